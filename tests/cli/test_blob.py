"""`basin blob`: content comes back, sources that cannot be read do not stop the others, output files are whole."""

from __future__ import annotations

import json
import os
import threading
import uuid
from pathlib import Path

import blake3
import pytest

import basin
from basin.errors import ChecksumMismatch
from tests.cli.conftest import Run

ABSENT = "0" * 64


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"content")
    return path


def test_put_prints_the_content_key_and_get_the_content(opened: Run, source: Path) -> None:
    key = opened("blob", "put", str(source)).stdout
    assert key == blake3.blake3(b"content").hexdigest() + "\n"
    assert opened("blob", "get", key.strip()).stdout_bytes == b"content"


def test_put_reads_standard_input(opened: Run) -> None:
    key = opened("blob", "put", "-", stdin=b"piped").stdout.strip()
    assert opened("blob", "get", key).stdout_bytes == b"piped"


def test_put_of_several_names_each_source(opened: Run, source: Path) -> None:
    key = blake3.blake3(b"content").hexdigest()
    other = blake3.blake3(b"piped").hexdigest()
    assert opened("blob", "put", str(source), "-", stdin=b"piped").stdout == f"{key}  {source}\n{other}  -\n"


def test_put_in_json(opened: Run, source: Path) -> None:
    key = blake3.blake3(b"content").hexdigest()
    expected = {"source": str(source), "content_key": key, "size": 7}
    assert json.loads(opened("blob", "put", str(source), "--json").stdout) == expected


def test_put_goes_on_after_sources_that_cannot_be_read(opened: Run, source: Path, tmp_path: Path) -> None:
    result = opened("blob", "put", str(tmp_path / "gone"), str(source), str(tmp_path), code=4)
    assert result.stdout == f"{blake3.blake3(b'content').hexdigest()}  {source}\n"
    assert result.stderr.splitlines() == [
        f"basin: cannot read {tmp_path / 'gone'}: No such file or directory",
        f"basin: cannot read {tmp_path}: Is a directory",
        "basin: 2 of 3 sources could not be read",
    ]
    assert opened("blob", "ls").stdout.split() == [blake3.blake3(b"content").hexdigest()]


def test_put_keeps_nothing_of_a_source_that_fails_in_the_middle(opened: Run, source: Path) -> None:
    result = opened("blob", "put", "/proc/self/mem", str(source), code=4)
    assert "cannot read /proc/self/mem: " in result.stderr
    assert len(opened("blob", "ls").stdout.split()) == 1


def test_large_content_streams_and_its_parts_have_addresses(opened: Run, tmp_path: Path) -> None:
    data = os.urandom((5 << 20) + 17)
    (tmp_path / "large").write_bytes(data)
    key = opened("blob", "put", str(tmp_path / "large")).stdout.strip()
    assert opened("blob", "get", key).stdout_bytes == data
    with basin.open(tmp_path / "b", "r") as db:
        count = len(db.blobs.parts(key))
    assert count > 1
    assert b"".join(opened("blob", "get", f"{key}-{number}").stdout_bytes for number in range(count)) == data
    opened("blob", "get", f"{key}-{count}", code=1)


def test_get_of_absent_content_is_one_line(opened: Run) -> None:
    assert ABSENT in opened("blob", "get", ABSENT, code=1).stderr


@pytest.mark.parametrize("key", ["", "12", "g" * 64, "0" * 64 + "-", "0" * 64 + "-01"])
def test_get_of_what_is_no_key_is_a_usage_error(opened: Run, key: str) -> None:
    opened("blob", "get", key, code=2)


def test_get_writes_a_file(opened: Run, source: Path, tmp_path: Path) -> None:
    key = opened("blob", "put", str(source)).stdout.strip()
    target = tmp_path / "target"
    target.write_bytes(b"before")
    assert opened("blob", "get", key, "-o", str(target)).stdout == ""
    assert target.read_bytes() == b"content"
    result = opened("blob", "get", key, "-o", str(target), "--json")
    assert json.loads(result.stdout) == {"content_key": key, "path": str(target), "size": 7}


def test_the_file_that_get_writes_has_the_usual_permissions(opened: Run, source: Path, tmp_path: Path) -> None:
    key = opened("blob", "put", str(source)).stdout.strip()
    opened("blob", "get", key, "-o", str(tmp_path / "target"))
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_get_that_fails_leaves_the_file_alone(
    opened: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = opened("blob", "put", str(source)).stdout.strip()
    target = tmp_path / "target"
    target.write_bytes(b"before")
    before = sorted(tmp_path.iterdir())

    def copy(*_arguments: object) -> int:
        raise ChecksumMismatch("data/00 is damaged")

    monkeypatch.setattr("basin.cli.blob._copy", copy)
    assert "data/00 is damaged" in opened("blob", "get", key, "-o", str(target), code=3).stderr
    assert target.read_bytes() == b"before"
    assert sorted(tmp_path.iterdir()) == before


def test_get_writes_into_a_pipe_and_does_not_replace_it(opened: Run, source: Path, tmp_path: Path) -> None:
    key = opened("blob", "put", str(source)).stdout.strip()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    opened("blob", "get", key, "-o", str(pipe))
    reader.join(10)
    assert received == [b"content"]
    assert pipe.is_fifo()


def test_get_follows_a_link_and_keeps_the_permissions_of_what_it_replaces(
    opened: Run, source: Path, tmp_path: Path
) -> None:
    key = opened("blob", "put", str(source)).stdout.strip()
    target = tmp_path / "target"
    target.write_bytes(b"before")
    target.chmod(0o600)
    (tmp_path / "link").symlink_to(target)
    opened("blob", "get", key, "-o", str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"content", 0o600)


def test_get_into_a_folder_that_is_not_there_is_one_line(opened: Run, source: Path, tmp_path: Path) -> None:
    key = opened("blob", "put", str(source)).stdout.strip()
    assert "No such file" in opened("blob", "get", key, "-o", str(tmp_path / "no" / "x"), code=1).stderr


def test_get_in_json_without_a_file_is_a_usage_error(opened: Run) -> None:
    opened("blob", "get", ABSENT, "--json", code=2)


def test_ls_lists_what_was_put_and_not_removed(opened: Run) -> None:
    keys = sorted(opened("blob", "put", "-", stdin=data).stdout.strip() for data in (b"a", b"bb", b"ccc"))
    assert opened("blob", "ls").stdout.split() == keys
    opened("blob", "rm", keys[0], keys[2])
    assert opened("blob", "ls").stdout.split() == [keys[1]]


def test_ls_with_sizes(opened: Run) -> None:
    key = opened("blob", "put", "-", stdin=b"bb").stdout.strip()
    assert opened("blob", "ls", "-l").stdout == f"{key}\t2\n"
    assert json.loads(opened("blob", "ls", "-l", "--json").stdout) == {"content_key": key, "size": 2}
    assert json.loads(opened("blob", "ls", "--json").stdout) == {"content_key": key}


def test_rm_in_json(opened: Run) -> None:
    key = opened("blob", "put", "-", stdin=b"bb").stdout.strip()
    assert json.loads(opened("blob", "rm", key, "--json").stdout)["removed"] == [key]


def test_ls_shows_no_size_of_what_is_archived(run: Run) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    with basin.open(url, "x", profile="open", data_storage_class="GLACIER", part_max=8192, part_size=2048) as db:
        sizes = {
            str(db.blobs.put(b"small" * 100)): None,
            str(db.blobs.put(b"large" * 3000)): 15_000,
            str(db.blobs.put(b"hot" * 100, hot=True)): 300,
        }
    listed = sorted(sizes.items())
    lines = [f"{key}\t{'-' if size is None else size}\n" for key, size in listed]
    assert run("blob", "ls", "-l", BASIN_URL=url).stdout == "".join(lines)
    found = [json.loads(line) for line in run("blob", "ls", "-l", "--json", BASIN_URL=url).stdout.splitlines()]
    assert found == [{"content_key": key, "size": size} for key, size in listed]
