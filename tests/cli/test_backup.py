"""`basin backup`, `snapshots`, `ls`, `find`, `cat`, `diff`, `restore`, `forget`: what they print, and how they end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, Shell


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    (top / "one").write_bytes(b"one")
    (top / "sub" / "two").write_bytes(b"two two")
    (top / "sub" / "junk.o").write_bytes(b"junk")
    (top / "link").symlink_to("one")
    return top


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def saved(run: Run, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The snapshot that a backup made."""
    return rows(run("backup", "--json", *arguments, code=code).stdout)[-1]


def test_a_backup_says_what_it_did(opened: Run, tree: Path) -> None:
    shown = opened("backup", str(tree)).stdout.splitlines()
    assert shown[0].startswith("snapshot ")
    assert shown[1].startswith("3 files (3 new, 0 changed)")
    assert shown[2].startswith("3 files, 14 bytes read")
    assert opened("backup", "-q", str(tree)).stdout == ""
    found = saved(opened, str(tree), "--tag", "a", "--tag", "b", "--host", "elsewhere")
    assert (found["type"], found["tags"], found["host"], found["complete"]) == (
        "snapshot",
        ["a", "b"],
        "elsewhere",
        True,
    )
    assert found["paths"] == [str(tree)]


def test_a_dry_run_writes_nothing(opened: Run, tree: Path) -> None:
    assert "3 files, 14 bytes to be read" in opened("backup", "-n", str(tree)).stdout
    assert opened("snapshots").stdout == ""


def test_rules_are_options(opened: Run, tree: Path, tmp_path: Path) -> None:
    def names(*options: str) -> list[str]:
        identity = saved(opened, str(tree), *options)["id"]
        return [Path(line).name for line in opened("ls", "-R", f"{identity}:{tree}").stdout.splitlines()]

    assert names("--exclude", "*.o") == ["link", "one", "sub", "two"]
    assert names("-e", "*.o", "-e", "two", "-i", "two") == ["link", "one", "sub", "two"]
    (tmp_path / "patterns").write_text("sub/\n# a comment\n", encoding="utf-8")
    assert names("--exclude-file", str(tmp_path / "patterns")) == ["link", "one"]
    assert names("--exclude-larger-than", "3") == ["link", "one", "sub"]
    (tree / "sub" / ".gitignore").write_text("junk*\n", encoding="utf-8")
    assert names("--ignore-file", ".gitignore") == ["link", "one", "sub", ".gitignore", "two"]
    assert names("--exclude-if-present", ".gitignore") == ["link", "one", "sub", ".gitignore"]
    (tree / "sub" / "CACHEDIR.TAG").write_bytes(b"Signature: 8a477f597d28d172789f06886806bc55")
    assert names("--exclude-caches") == ["link", "one", "sub", "CACHEDIR.TAG"]
    assert "two" in names("--one-file-system")


def test_what_makes_no_sense_is_a_usage_error(opened: Run, tree: Path) -> None:
    for options in (
        [],
        [str(tree), "--stdin"],
        [str(tree), "--force", "--parent", "latest"],
        ["--stdin", "--dry-run"],
        [str(tree), "--exclude-larger-than", "much"],
        [str(tree), "--exclude", "a[b"],
    ):
        opened("backup", *options, code=2)
    opened("backup", str(tree), "--parent", "ffffffff", code=1)
    opened("forget", code=2)
    opened("forget", "ffff", "--keep-last", "1", code=2)
    opened("ls", "latest", code=1)


def test_a_source_that_is_not_there_is_told_and_the_rest_is_saved(opened: Run, tree: Path) -> None:
    result = opened("backup", "--json", str(tree), str(tree.parent / "absent"), code=4)
    assert "absent" in result.stderr
    found = rows(result.stdout)[-1]
    assert found["statistics"]["files"] == 3
    assert [Path(one["path"]).name for one in found["problems"]] == ["absent"]


def test_standard_input_is_saved(opened: Run) -> None:
    opened("backup", "--stdin", "--stdin-name", "dump.sql", stdin=b"select")
    assert opened("cat", "latest:dump.sql").stdout_bytes == b"select"


def test_progress_is_a_line_a_second_with_json(opened: Run, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basin.cli.progress.DELAY_S", 0.0)
    found = rows(opened("backup", "--json", str(tree)).stdout)
    assert [one["type"] for one in found[-2:]] == ["progress", "snapshot"]
    assert {"files", "size", "read_size", "seconds", "seconds_left", "current"} <= found[0].keys()
    assert [one["type"] for one in rows(opened("backup", "--json", "-q", str(tree)).stdout)] == []


def test_a_snapshot_is_looked_at(opened: Run, tree: Path) -> None:
    identity = saved(opened, str(tree))["id"]
    found = {Path(row["path"]).name: row for row in rows(opened("ls", "--json", f"{identity}:{tree}").stdout)}
    assert (found["link"]["kind"], found["link"]["target"]) == ("link", "one")
    assert (found["sub"]["kind"], found["sub"]["files"], found["sub"]["size"]) == ("directory", 2, 11)
    assert found["one"]["mode"] == f"{(tree / 'one').stat().st_mode & 0o7777:04o}"
    assert opened("ls", f"latest:{tree}/one").stdout == f"{str(tree)[1:]}/one\n"
    long = opened("ls", "-l", f"{identity[:6]}:{tree}").stdout.splitlines()
    assert long[0].startswith("lrwx")
    assert long[0].endswith("/link -> one")
    assert opened("find", "tw*").stdout == f"{identity}:{str(tree)[1:]}/sub/two\n"
    assert opened("find", "*/sub/t*", "-s", "latest").stdout == f"{identity}:{str(tree)[1:]}/sub/two\n"
    assert rows(opened("find", "--json", "two").stdout)[0]["snapshot"] == identity
    assert opened("cat", f"latest:{tree}/sub/two").stdout_bytes == b"two two"
    opened("cat", f"latest:{tree}/absent", code=1)
    opened("cat", f"latest:{tree}/sub", code=2)
    opened("ls", f"latest:{tree}/../..", code=2)


def test_names_that_do_not_print_are_shown_as_what_they_are(opened: Run, tmp_path: Path) -> None:
    top = tmp_path / "odd"
    top.mkdir()
    (top / os.fsdecode(b"a\xff\nb")).write_bytes(b"x")
    opened("backup", str(top))
    assert opened("ls", f"latest:{top}").stdout == f"{str(top)[1:]}/a\\xff\\nb\n"
    assert "path_base64" in rows(opened("ls", "--json", f"latest:{top}").stdout)[0]
    assert opened("cat", f"latest:{top}/" + os.fsdecode(b"a\xff\nb")).stdout_bytes == b"x"


def test_what_differs_is_shown(opened: Run, tree: Path) -> None:
    first = saved(opened, str(tree))["id"]
    (tree / "one").write_bytes(b"another")
    (tree / "sub" / "junk.o").unlink()
    (tree / "new").write_bytes(b"")
    (tree / "link").unlink()
    (tree / "link").mkdir()
    (tree / "sub" / "two").chmod(0o600)
    second = saved(opened, str(tree))["id"]
    shown = opened("diff", first, second).stdout.splitlines()
    inside = str(tree)[1:]
    assert shown[:-1] == [f"T {inside}/link/", f"+ {inside}/new", f"M {inside}/one", f"- {inside}/sub/junk.o"]
    assert shown[-1] == "1 new, 1 gone, 1 changed, 1 of another kind"
    assert f"U {inside}/sub/two" in opened("diff", "-m", first, second).stdout.splitlines()
    assert {row["change"] for row in rows(opened("diff", "--json", first, second).stdout)} == set("T+M-")


def test_a_snapshot_is_restored(opened: Run, tree: Path, tmp_path: Path) -> None:
    opened("backup", str(tree))
    target = tmp_path / "target"
    assert "would write 3 files of 14 bytes" in opened("restore", "-n", f"latest:{tree}", str(target)).stdout
    assert not target.exists()
    assert opened("restore", f"latest:{tree}", str(target)).stdout.startswith("wrote 3 files of 14 bytes")
    assert (target / "sub" / "two").read_bytes() == b"two two"
    assert (target / "link").readlink() == Path("one")
    found = rows(opened("restore", "--json", "--verify", f"latest:{tree}", str(target)).stdout)[-1]
    assert (found["type"], found["files"], found["unchanged"]) == ("restored", 0, 3)
    opened("restore", "-q", f"latest:{tree}", str(tmp_path / "some"), "-e", "*.o", "-i", "sub/")
    assert sorted(path.name for path in (tmp_path / "some").rglob("*")) == ["sub", "two"]
    (target / "extra").write_bytes(b"x")
    opened("restore", "--delete", f"latest:{tree}", str(target))
    assert not (target / "extra").exists()
    opened("restore", f"latest:{tree}/one", str(tmp_path / "single"))
    assert (tmp_path / "single" / "one").read_bytes() == b"one"


def test_what_cannot_be_restored_is_told(opened: Run, tree: Path, tmp_path: Path) -> None:
    opened("backup", str(tree))
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "outside").mkdir()
    (target / "sub").symlink_to(tmp_path / "outside")
    result = opened("restore", f"latest:{tree}", str(target), code=4)
    assert "sub" in result.stderr
    assert (target / "one").read_bytes() == b"one"
    assert list((tmp_path / "outside").iterdir()) == []


def test_snapshots_are_forgotten_by_rules_and_by_name(opened: Run, tree: Path) -> None:
    made = [saved(opened, str(tree), "--tag", f"t{number}")["id"] for number in range(4)]
    shown = opened("forget", "--keep-last", "2", "--dry-run").stdout.splitlines()
    assert [line.split("\t")[0] for line in shown] == ["would forget", "would forget", "keep", "keep"]
    decided = rows(opened("forget", "--keep-last", "1", "--keep-tag", "t0", "--json").stdout)
    assert [row["kept"] for row in decided] == [True, False, False, True]
    assert [row["id"] for row in rows(opened("snapshots", "--json").stdout)] == [made[0], made[3]]
    opened("forget", made[0])
    assert [row["id"] for row in rows(opened("snapshots", "--json").stdout)] == [made[3]]
    opened("forget", made[0], code=1)


def test_it_runs_as_a_program(opened: Run, tree: Path, shell: Shell) -> None:
    assert "snapshot " in shell("backup", str(tree)).stdout
    assert "3\t14\t" in shell("snapshots").stdout
