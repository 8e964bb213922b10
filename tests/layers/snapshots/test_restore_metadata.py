"""Owners, devices, ACLs and other extended attributes: what needs privilege, on a target that records it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from basin.format.tree import RowKind
from basin.layers.snapshots.target import At, Target
from tests.layers.snapshots.restore_material import RecordingTarget, Rows, below, told

ACL = b"system.posix_acl_access"
DEFAULT_ACL = b"system.posix_acl_default"


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "target"


def warned(report: Any) -> dict[str, str]:
    return {one.path: one.error for one in report.warnings}


# --- owners -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> None:
    """The users and groups of this machine: `ada` 501, `staff` 601."""

    def numbered(table: dict[str, int], field: str) -> Callable[[str], Any]:
        def find(name: str) -> Any:
            return SimpleNamespace(**{field: table[name]})

        return find

    monkeypatch.setattr("pwd.getpwnam", numbered({"ada": 501}, "pw_uid"))
    monkeypatch.setattr("grp.getgrnam", numbered({"staff": 601}, "gr_gid"))


TABLES = SimpleNamespace(owners={"1000": "ada", "1001": "gone"}, groups={"2000": "staff"})


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ("names", {"known": (501, 601), "gone": (1001, 2001), "nameless": (1002, 601)}),
        ("numbers", {"known": (1000, 2000), "gone": (1001, 2001), "nameless": (1002, 2000)}),
        ("none", {}),
    ],
)
def test_owners_go_by_names_or_numbers_or_not_at_all(
    rows: Rows, path: Path, users: None, owners: str, expected: dict[str, tuple[int, int]]
) -> None:
    rows.file("known", uid=1000, gid=2000)
    rows.directory("gone", uid=1001, gid=2001)
    rows.link("nameless", b"x", uid=1002, gid=2000)
    target = RecordingTarget()
    report = rows.restore(path, target=target, owners=owners, tables=TABLES)
    assert not report.problems
    assert not report.warnings
    calls = [(call[1], call[2:]) for call in target.calls if call[0] == "chown"]
    assert len(calls) == len(expected)
    found = {name: target.owners.get((path / name).lstat().st_ino) for name in ("known", "gone", "nameless")}
    assert {name: one for name, one in found.items() if one} == expected


def test_without_tables_numbers_count(rows: Rows, path: Path, users: None) -> None:
    rows.file("file", uid=1000, gid=2000)
    target = RecordingTarget()
    rows.restore(path, target=target)
    assert list(target.owners.values()) == [(1000, 2000)]


def test_owners_that_are_refused_are_one_warning_for_each(rows: Rows, path: Path) -> None:
    for number in range(20):
        rows.file(f"{number:02}", uid=1000 + number % 2, gid=7)
    target = RecordingTarget("chown")
    report = rows.restore(path, target=target, threads=1)
    assert not report.problems
    assert (report.files, len(report.warnings), report.warning_count) == (20, 2, 20)
    assert "1000:7" in warned(report)["00"]
    assert len(target.names_of("chown")) == 2


def test_an_owner_that_agrees_is_not_set_again(rows: Rows, path: Path) -> None:
    rows.file("file", uid=1000, gid=7)
    rows.directory("folder", uid=1000, gid=7)
    target = RecordingTarget()
    rows.restore(path, target=target)
    target.calls.clear()
    assert rows.restore(path, target=target).unchanged == 1
    assert target.names_of("chown") == []
    target.owners.clear()
    assert rows.restore(path, target=target).unchanged == 1
    assert sorted(target.owners.values()) == [(1000, 7), (1000, 7)]


# --- order, and rights that are lent ----------------------------------------------------------------------------------


def test_owner_then_mode_then_acls(rows: Rows, path: Path) -> None:
    xattrs = {ACL: b"acl", b"security.capability": b"cap", b"user.note": b"note"}
    rows.file("file", mode=0o4755, uid=1000, gid=7, xattrs=dict(sorted(xattrs.items())))
    rows.directory("folder", mode=0o2755, uid=1000, gid=7, xattrs={DEFAULT_ACL: b"default"})
    target = RecordingTarget()
    assert not rows.restore(path, target=target).problems
    assert [(call[0], *call[2:]) for call in target.calls if call[1] == "file"] == [
        ("chown", 1000, 7),
        ("set_xattr", b"user.note", b"note"),
        ("chmod", 0o4755),
        ("set_xattr", b"security.capability", b"cap"),
        ("set_xattr", ACL, b"acl"),
    ]
    assert [call[0] for call in target.calls if call[1] == "folder"] == ["chown", "chmod", "set_xattr"]
    assert stat.S_IMODE((path / "file").stat().st_mode) == 0o4755


@pytest.mark.parametrize("owners", ["numbers", "none"])
def test_nobody_else_than_the_owner_lends_his_rights(rows: Rows, path: Path, owners: str) -> None:
    """A setuid program of one user must not become one of whoever restores it."""
    rows.file("theirs", mode=0o6755, uid=os.getuid() + 1)
    rows.file("ours", mode=0o6755)
    rows.directory("folder", mode=0o2755, uid=os.getuid() + 1)
    report = rows.restore(path, target=RecordingTarget("chown"), owners=owners)
    assert stat.S_IMODE((path / "theirs").stat().st_mode) == 0o755
    assert stat.S_IMODE((path / "ours").stat().st_mode) == 0o6755
    assert stat.S_IMODE((path / "folder").stat().st_mode) == 0o2755
    assert "setuid" in " ".join(one.error for one in report.warnings)


def test_a_file_belongs_to_nobody_else_until_it_is_whole(rows: Rows, path: Path) -> None:
    class Watching(RecordingTarget):
        def chmod(self, at: At, mode: int) -> None:
            modes.append(stat.S_IMODE(Target.stat(self, at).st_mode))
            super().chmod(at, mode)

    modes: list[int] = []
    rows.directory("folder", mode=0o777)
    rows.file("folder/file", mode=0o666)
    rows.file("file", mode=0o666)
    rows.restore(path, target=Watching())
    assert sorted(modes) == [0o600, 0o600, 0o700]


# --- extended attributes ----------------------------------------------------------------------------------------------


def test_extended_attributes_become_those_of_the_snapshot(rows: Rows, path: Path) -> None:
    rows.file("file", xattrs={b"user.a": b"1", b"user.b": b"2"})
    rows.directory("folder", xattrs={b"user.c": b"3"})
    target = RecordingTarget()
    rows.restore(path, target=target)
    inode = (path / "file").stat().st_ino
    assert target.attributes == {
        inode: {b"user.a": b"1", b"user.b": b"2"},
        (path / "folder").stat().st_ino: {b"user.c": b"3"},
    }
    target.attributes[inode] = {b"user.a": b"1", b"user.b": b"other", b"user.more": b"x", b"security.label": b"x"}
    target.calls.clear()
    report = rows.restore(path, target=target)
    assert (report.unchanged, report.files) == (1, 0)
    assert target.attributes[inode] == {b"user.a": b"1", b"user.b": b"2", b"security.label": b"x"}
    assert target.names_of("set_xattr") == ["file"]


def test_an_acl_that_a_new_file_inherits_is_taken_away(rows: Rows, path: Path) -> None:
    class Inheriting(RecordingTarget):
        def create_file(self, folder: int, name: bytes, *, mode: int, is_read: bool = False) -> int:
            descriptor = super().create_file(folder, name, mode=mode, is_read=is_read)
            if DEFAULT_ACL in self.attributes.get(os.fstat(folder).st_ino, {}):
                self.attributes[os.fstat(descriptor).st_ino] = {ACL: b"inherited"}
            return descriptor

    for name in ("one", "other"):
        rows.file(name)
    path.mkdir()
    target = Inheriting()
    target.attributes[path.stat().st_ino] = {DEFAULT_ACL: b"to be inherited"}
    assert not rows.restore(path, target=target).problems
    assert [target.attributes[(path / name).stat().st_ino] for name in ("one", "other")] == [{}, {}]


def test_new_files_are_asked_for_attributes_only_where_they_inherit_some(rows: Rows, path: Path) -> None:
    """A call for every file: a fiftieth of a restore."""

    class Asked(RecordingTarget):
        def xattrs(self, at: At) -> list[bytes]:
            asked.append(stat.S_ISDIR(Target.stat(self, at).st_mode))
            return super().xattrs(at)

    asked: list[bool] = []
    rows.directory("folder")
    for number in range(5):
        rows.file(f"folder/{number}")
    target = Asked()
    assert rows.restore(path, target=target, threads=1).files == 5
    assert asked == [True, True]  # For its files, and for its own.
    assert target.names_of("chown") == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSPC])
def test_attributes_that_are_refused_are_one_warning_for_each_name(rows: Rows, path: Path, number: int) -> None:
    class Refusing(RecordingTarget):
        def set_xattr(self, at: At, name: bytes, value: bytes) -> None:
            raise OSError(number, os.strerror(number))

    for name in ("a", "b", "c"):
        rows.file(name, xattrs={b"security.x": b"1", b"user.y": b"2"})
    report = rows.restore(path, target=Refusing(), threads=1)
    assert not report.problems
    assert (report.files, report.warning_count, len(report.warnings)) == (3, 6, 2)
    assert all(os.strerror(number) in one.error for one in report.warnings)


def test_where_there_are_no_attributes_nothing_is_said_unless_some_are_needed(rows: Rows, path: Path) -> None:
    class Without(RecordingTarget):
        def xattrs(self, at: At) -> list[bytes]:
            raise OSError(errno.ENOTSUP, "Operation not supported")

        def set_xattr(self, at: At, name: bytes, value: bytes) -> None:
            self.xattrs(at)

    rows.file("plain")
    report = rows.restore(path, target=Without())
    assert not report.problems
    assert not report.warnings
    rows.file("rich", xattrs={b"user.y": b"2"})
    report = rows.restore(path, target=Without())
    assert not report.problems
    assert list(warned(report)) == ["rich"]


def test_a_file_that_forbids_writing_has_its_attributes_set_before(rows: Rows, path: Path) -> None:
    """As who has no privilege has to do it: who may not write a file may not set an attribute of users either."""

    class Strict(RecordingTarget):
        def set_xattr(self, at: At, name: bytes, value: bytes) -> None:
            if name.startswith(b"user.") and not Target.stat(self, at).st_mode & stat.S_IWUSR:
                raise PermissionError(errno.EACCES, "Permission denied")
            super().set_xattr(at, name, value)

    rows.file("file", mode=0o444, xattrs={b"user.a": b"1"})
    report = rows.restore(path, target=Strict())
    assert not report.warnings
    assert not report.problems


# --- devices ----------------------------------------------------------------------------------------------------------


def devices(rows: Rows) -> None:
    rows.add("null", RowKind.CHARACTER_DEVICE, device=(1, 3), mode=0o666, uid=0, gid=0)
    rows.add("disk", RowKind.BLOCK_DEVICE, device=(8, 1), mode=0o640, uid=0, gid=6)


def test_devices_are_made_with_owner_and_mode(rows: Rows, path: Path) -> None:
    devices(rows)
    target = RecordingTarget()
    report = rows.restore(path, target=target)
    assert not report.problems
    assert report.others == 2
    made = {call[3]: call[2] for call in target.calls if call[0] == "make_node"}
    assert made == {(1, 3): stat.S_IFCHR | 0o600, (8, 1): stat.S_IFBLK | 0o600}
    assert target.owners[(path / "disk").stat().st_ino] == (0, 6)
    assert stat.S_IMODE((path / "null").stat().st_mode) == 0o666
    target.calls.clear()
    assert rows.restore(path, target=target).others == 0
    assert target.calls == []
    target.devices[(path / "null").stat().st_ino] = (stat.S_IFCHR, os.makedev(1, 5))
    assert rows.restore(path, target=target).others == 1


def test_devices_without_privilege_are_a_warning_and_leave_nothing(rows: Rows, path: Path) -> None:
    devices(rows)
    rows.file("file")
    report = rows.restore(path, target=RecordingTarget("make_node"))
    assert not report.problems
    assert (report.others, report.files, report.warning_count) == (0, 1, 2)
    assert "privilege" in warned(report)["disk"]
    assert below(path) == ["file"]


def test_a_device_whose_number_is_not_known_is_a_problem(rows: Rows, path: Path) -> None:
    rows.add("null", RowKind.CHARACTER_DEVICE)
    rows.add("link", RowKind.LINK)
    report = rows.restore(path, target=RecordingTarget())
    assert set(told(report)) == {"null", "link"}
    assert report.damage_count == 2
    assert below(path) == []


@pytest.mark.root
def test_the_superuser_restores_owners_devices_and_attributes_for_real(rows: Rows, path: Path) -> None:
    devices(rows)
    rows.file("file", mode=0o4711, uid=12, gid=34, xattrs={b"security.basin": b"x"})
    rows.link("link", b"x", uid=12, gid=34)
    rows.directory("folder", uid=12, gid=34, mode=0o1777)
    report = rows.restore(path)
    assert not report.problems
    found = {name: (path / name).lstat() for name in below(path)}
    assert all((found[name].st_uid, found[name].st_gid) == (12, 34) for name in ("file", "link", "folder"))
    assert stat.S_IMODE(found["file"].st_mode) == 0o4711
    assert stat.S_IMODE(found["folder"].st_mode) == 0o1777
    assert os.getxattr(path / "file", "security.basin") == b"x"
    assert found["null"].st_rdev == os.makedev(1, 3)
    assert stat.S_ISBLK(found["disk"].st_mode)
    assert rows.restore(path).others == 0
