"""`basin export` and `basin import`: reading commands take the file, a selection has its own secret."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import basin
from tests.cli.conftest import Run

CONTENT = os.urandom(3000)


@pytest.fixture
def filled(opened: Run, tmp_path: Path) -> Run:
    """`run`, with an open basin that holds names, a keyspace, a number keyspace and a content."""
    with basin.open(tmp_path / "b", "w") as db:
        db.put_many([(b"fruit/apple", b"red"), (b"fruit/pear", CONTENT), (b"\xff", b"last")])
        db.keyspace("numbers", order="u64", values="json")[7] = {"seven": 7}
        db.blobs.put(b"content")
    return opened


@pytest.fixture
def encrypted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run`, with a basin under a key file that the environment names, and one name in it."""
    run("init", "--secret-file", str(tmp_path / "key"))
    monkeypatch.setenv("BASIN_SECRET_FILE", str(tmp_path / "key"))
    run("kv", "put", "name", "value")
    return run


@pytest.fixture
def flat(tmp_path: Path) -> str:
    return str(tmp_path / "FILE.basin")


def test_reading_commands_take_the_file(filled: Run, flat: str) -> None:
    assert filled("export", flat).stdout == f"exported {flat}: {os.path.getsize(flat)} bytes\n"  # noqa: PTH202  (one call)
    assert filled("-b", flat, "kv", "get", "fruit/pear").stdout_bytes == CONTENT
    assert filled("-b", flat, "kv", "scan").stdout == filled("kv", "scan").stdout
    assert filled("-b", flat, "kv", "scan", "--keyspace", "numbers").stdout == '7\t{"seven":7}\n'
    (key,) = filled("-b", flat, "blob", "ls").stdout.split()
    assert filled("-b", flat, "blob", "get", key).stdout_bytes == b"content"
    assert filled("-b", flat, "check").stdout == "no damage found\n"
    assert json.loads(filled("-b", flat, "stats", "--json").stdout)["profile"] == "open"
    assert filled("-b", flat, "log", "--limit", "1").stdout


def test_a_snapshot_is_exported_alone(encrypted: Run, flat: str, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    (top / "large").write_bytes(os.urandom(5 << 20))
    (top / "sub" / "small").write_bytes(b"small")
    encrypted("backup", str(top), "-q")
    (top / "sub" / "small").write_bytes(b"another content")
    encrypted("backup", str(top), "-q")
    first = json.loads(encrypted("snapshots", "--json").stdout.splitlines()[0])["id"]
    encrypted("export", flat, "--snapshot", first, "--open")
    with basin.open(flat, "r") as db:
        (snapshot,) = db.snapshots.list()
        assert snapshot.id == first
        assert snapshot.restore(tmp_path / "restored", top).problems == []
        assert list(db.scan()) == []
        assert [one for one in db.check() if one.severity != "info"] == []
    assert (tmp_path / "restored" / "large").read_bytes() == (top / "large").read_bytes()
    assert (tmp_path / "restored" / "sub" / "small").read_bytes() == b"small"
    encrypted("export", str(tmp_path / "other.basin"), "--snapshot", "ffffffff", "--open", code=1)
    encrypted("export", str(tmp_path / "other.basin"), "--snapshot", first, "--keyspace", "k", "--open", code=2)
    assert not (tmp_path / "other.basin").exists()


@pytest.mark.parametrize(
    "command",
    [("kv", "put", "name", "value"), ("kv", "del", "fruit/apple"), ("blob", "put", "-"), ("repair", "--yes")],
    ids=" ".join,
)
def test_writing_commands_refuse_the_file(filled: Run, flat: str, command: tuple[str, ...]) -> None:
    filled("export", flat)
    before = Path(flat).read_bytes()
    assert "mode='r'" in filled("-b", flat, *command, code=1, stdin=b"content").stderr
    assert Path(flat).read_bytes() == before


def test_export_in_json(filled: Run, flat: str) -> None:
    told = json.loads(filled("export", flat, "--json").stdout)
    size = Path(flat).stat().st_size
    assert told == {"file": flat, "bytes": size, "position": told["position"]}
    Path(flat).unlink()
    told = json.loads(filled("export", flat, "--prefix", "fruit/", "--open", "--json").stdout)
    size = Path(flat).stat().st_size
    assert told == {"file": flat, "bytes": size, "names": 2, "contents": 1, "position": told["position"]}


def test_a_file_that_is_there_stays(filled: Run, flat: str) -> None:
    Path(flat).write_bytes(b"mine")
    assert "exists already" in filled("export", flat, code=1).stderr
    assert Path(flat).read_bytes() == b"mine"


def test_the_secret_of_the_basin_opens_the_whole(encrypted: Run, flat: str) -> None:
    encrypted("export", flat)
    assert encrypted("-b", flat, "kv", "get", "name").stdout == "value"
    assert "passphrase" in encrypted("-b", flat, "kv", "get", "name", code=1, BASIN_SECRET_FILE="").stderr


def test_a_selection_has_a_secret_of_its_own(encrypted: Run, flat: str, tmp_path: Path) -> None:
    second = tmp_path / "second.key"
    encrypted("export", flat, "--prefix", "n", "--secret-file", str(second))
    assert second.stat().st_mode & 0o777 == 0o600
    encrypted("-b", flat, "kv", "get", "name", code=1)
    assert encrypted("-b", flat, "kv", "get", "name", BASIN_SECRET_FILE=str(second)).stdout == "value"


def test_a_selection_under_a_new_passphrase(encrypted: Run, flat: str) -> None:
    encrypted("export", flat, "--prefix", "n", BASIN_NEW_PASSPHRASE="another")
    assert encrypted("-b", flat, "kv", "get", "name", BASIN_PASSPHRASE="another").stdout == "value"


def test_a_selection_needs_a_secret_or_open(encrypted: Run, flat: str) -> None:
    assert "--secret-file or --open" in encrypted("export", flat, "--prefix", "n", code=1).stderr
    assert not Path(flat).exists()


@pytest.mark.parametrize(
    "options",
    [("--open",), ("--secret-file", "key"), ("--prefix", "n", "--open", "--secret-file", "key")],
    ids=" ".join,
)
def test_options_that_exclude_each_other(filled: Run, flat: str, options: tuple[str, ...]) -> None:
    filled("export", flat, *options, code=2)
    assert not Path(flat).exists()


def test_a_selection_in_the_spelling_of_its_keyspace(filled: Run, flat: str, tmp_path: Path) -> None:
    filled("export", flat, "--keyspace", "numbers", "--open")
    assert filled("-b", flat, "kv", "scan", "--keyspace", "numbers").stdout == '7\t{"seven":7}\n'
    assert filled("-b", flat, "kv", "scan").stdout == ""
    other = str(tmp_path / "hex.basin")
    filled("export", other, "--prefix", "ff", "--hex", "--open")
    assert filled("-b", other, "kv", "scan").stdout == "\\xff\tlast\n"


@pytest.mark.parametrize("options", [("--prefix", "vegetable/"), ("--keyspace", "none")], ids=" ".join)
def test_a_selection_without_names_leaves_nothing(
    filled: Run, flat: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    filled("export", flat, *options, "--open", code=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_import_into_another_basin_and_again(filled: Run, flat: str, tmp_path: Path) -> None:
    filled("export", flat)
    other = str(tmp_path / "other")
    filled("-b", other, "init", "--open")
    told = filled("-b", other, "import", flat).stdout
    assert told == "imported 5 names and 2 contents (3007 bytes); there already: 0 names and 0 contents\n"
    assert filled("-b", other, "kv", "scan").stdout == filled("kv", "scan").stdout
    told = json.loads(filled("-b", other, "import", flat, "--json").stdout)
    assert told == {"names": 0, "names_same": 5, "contents": 0, "contents_same": 2, "bytes": 0}
    assert filled("-b", other, "check").stdout == "no damage found\n"


def test_import_opens_the_file_by_the_secret_of_the_basin_or_its_own(encrypted: Run, flat: str, tmp_path: Path) -> None:
    encrypted("export", flat)
    encrypted("import", flat)  # By the secret of the basin, which is that of the file.
    encrypted("export", str(tmp_path / "part.basin"), "--prefix", "n", "--secret-file", str(tmp_path / "second"))
    encrypted("import", str(tmp_path / "part.basin"), code=1)
    encrypted("import", str(tmp_path / "part.basin"), "--secret-file", str(tmp_path / "second"))


def test_import_of_an_open_file_into_an_encrypted_basin(encrypted: Run, tmp_path: Path) -> None:
    part = str(tmp_path / "part.basin")
    encrypted("export", part, "--prefix", "n", "--open")
    encrypted("kv", "del", "name")
    encrypted("import", part)
    assert encrypted("kv", "get", "name").stdout == "value"


def test_import_of_what_is_no_basin(filled: Run, flat: str, tmp_path: Path) -> None:
    assert "not a basin" in filled("import", str(tmp_path / "none.basin"), code=1).stderr
    Path(flat).write_bytes(b"something else")
    assert "not a basin" in filled("import", flat, code=1).stderr


def test_a_damaged_file_ends_with_3(filled: Run, flat: str) -> None:
    filled("export", flat)
    os.truncate(flat, Path(flat).stat().st_size - 1)
    filled("-b", flat, "kv", "scan", code=3)
