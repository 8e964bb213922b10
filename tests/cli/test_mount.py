"""`basin mount`: what a mounted snapshot says to who looks and reads; through FUSE where it can be opened."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.api import Database
from basin.cli import mount as mounting
from basin.cli.failures import Failure
from basin.cli.mount import REFRESH_S, MountedFiles, Shelf, ShownSnapshot
from basin.errors import MissingDependency
from basin.layers.snapshots import Snapshot
from tests.cli.conftest import Run, environment

FILES = {b"empty": b"", b"text": b"hello\n", b"sub/deep/large": os.urandom(5_000_000), b"not \xff utf-8": b"name"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One of each kind that needs no privilege."""
    root = tmp_path / "tree"
    for name, body in FILES.items():
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    (root / "sub" / "link").symlink_to("../text")
    os.link(root / "text", root / "sub" / "text again")
    os.mkfifo(root / "fifo", 0o620)
    os.setxattr(root / "text", b"user.note", b"kept\0")
    (root / "text").chmod(0o4640)
    os.utime(root / "text", ns=(5, 1_600_000_000_123_456_789))
    (root / "sub").chmod(0o750)
    return root


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with basin.open(tmp_path / "b", "x", profile="open") as opened:
        yield opened


@pytest.fixture
def snapshot(db: Database, tree: Path) -> Snapshot:
    return db.snapshots.create(tree)


@pytest.fixture
def alone(snapshot: Snapshot, tree: Path) -> MountedFiles:
    """The tree at the top."""
    return MountedFiles(ShownSnapshot(snapshot, os.fsencode(tree).strip(b"/")))


def names(files: MountedFiles, path: str) -> list[str]:
    found = [name for name, _, _ in files.readdir(path)]
    assert found[:2] == [".", ".."]
    return found[2:]


def read_all(files: MountedFiles, path: str, size: int = 131_072) -> bytes:
    handle = files.open(path, os.O_RDONLY)
    body = b""
    while piece := files.read(path, size, len(body), handle):
        body += piece
    files.release(path, handle)
    return body


def refused(number: int, call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(OSError) as error:
        call(*arguments)
    assert error.value.errno == number


class TestLooking:
    def test_a_directory_lists_its_children(self, alone: MountedFiles) -> None:
        assert names(alone, "/") == sorted(["empty", "fifo", "not \udcff utf-8", "sub", "text"])
        assert names(alone, "/sub") == ["deep", "link", "text again"]
        assert names(alone, "/sub/deep") == ["large"]

    def test_it_lists_types_and_inodes_as_stat_says(self, alone: MountedFiles) -> None:
        for name, listed, offset in list(alone.readdir("/"))[2:]:
            stated = alone.getattr(f"/{name}")
            assert offset == 0
            assert (listed["st_mode"], listed["st_ino"]) == (stated["st_mode"], stated["st_ino"])
            assert listed["st_ino"] > 0

    def test_stat_says_what_the_file_system_said(self, alone: MountedFiles, tree: Path) -> None:
        for path in ("text", "sub", "sub/link", "fifo", "sub/deep/large", "empty"):
            real, stated = os.lstat(tree / path), alone.getattr(f"/{path}")
            for field in ("st_mode", "st_uid", "st_gid", "st_mtime_ns", "st_ctime_ns"):
                assert stated[field.removesuffix("_ns")] == getattr(real, field), (path, field)
            if not stat.S_ISDIR(real.st_mode):
                assert (stated["st_size"], stated["st_nlink"]) == (real.st_size, real.st_nlink), path
        assert alone.getattr("/")["st_mode"] == tree.stat().st_mode

    def test_names_of_one_file_have_one_inode_and_no_others_do(self, alone: MountedFiles) -> None:
        paths = ("/", "/text", "/empty", "/fifo", "/sub", "/sub/link", "/sub/deep", "/sub/deep/large")
        inodes = [alone.getattr(path)["st_ino"] for path in paths]
        assert len(set(inodes)) == len(paths)
        assert alone.getattr("/sub/text again")["st_ino"] == inodes[1]

    def test_links_and_extended_attributes(self, alone: MountedFiles) -> None:
        assert alone.readlink("/sub/link") == "../text"
        assert alone.listxattr("/text") == ["user.note"]
        assert alone.getxattr("/text", "user.note") == b"kept\0"
        assert alone.listxattr("/empty") == alone.listxattr("/") == []
        refused(errno.ENODATA, alone.getxattr, "/text", "user.other")
        refused(errno.EINVAL, alone.readlink, "/text")

    def test_what_is_not_there(self, alone: MountedFiles) -> None:
        for call in (alone.getattr, alone.readlink, alone.listxattr, lambda path: list(alone.readdir(path))):
            refused(errno.ENOENT, call, "/nothing")
            refused(errno.ENOENT, call, "/sub/../text")
        refused(errno.ENOENT, alone.open, "/nothing", os.O_RDONLY)
        refused(errno.ENOTDIR, lambda: list(alone.readdir("/text")))

    def test_a_way_that_leads_to_what_was_backed_up(self, snapshot: Snapshot, tree: Path) -> None:
        files = MountedFiles(ShownSnapshot(snapshot))
        for path in (tree, *tree.parents):
            assert stat.S_ISDIR(files.getattr(str(path))["st_mode"])
        assert names(files, str(tree.parent)) == [tree.name]

    def test_an_interrupted_backup_shows_as_far_as_it_went(self, db: Database, tree: Path) -> None:
        class Killed(Exception):
            pass

        def killed(progress: Any) -> None:
            if progress.files >= 3:
                raise Killed

        with pytest.raises(Killed):
            db.snapshots.create(tree, progress=killed, journal_interval_s=0, journal_size=0)
        (incomplete,) = db.snapshots.list()
        assert not incomplete.is_complete
        shelf = Shelf(db.snapshots.list)
        assert shelf.latest() is None
        files = MountedFiles(shelf)
        assert names(files, "/") == [incomplete.id]
        refused(errno.ENOENT, files.getattr, "/latest")


class TestReading:
    def test_files_read_as_they_were(self, alone: MountedFiles) -> None:
        for name, body in FILES.items():
            assert read_all(alone, f"/{name.decode('utf-8', 'surrogateescape')}") == body

    def test_anywhere_in_any_order_through_several_handles(self, alone: MountedFiles) -> None:
        path, body = "/sub/deep/large", FILES[b"sub/deep/large"]
        one, other = alone.open(path, os.O_RDONLY), alone.open(path, os.O_RDONLY)
        assert one != other
        for handle, offset in ((one, 4_000_000), (other, 0), (one, 17), (other, 4_999_990), (one, 6_000_000)):
            assert alone.read(path, 4096, offset, handle) == body[offset : offset + 4096]
        alone.release(path, one)
        assert alone.read(path, 10, 0, other) == body[:10]
        alone.destroy("/")

    def test_what_is_no_file(self, alone: MountedFiles) -> None:
        refused(errno.EISDIR, alone.open, "/sub", os.O_RDONLY)
        refused(errno.EISDIR, alone.open, "/", os.O_RDONLY)
        refused(errno.ENXIO, alone.open, "/fifo", os.O_RDONLY)

    def test_damage_is_an_error_of_its_file_alone(
        self, db: Database, alone: MountedFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        db.core.finish_strata()
        stratum = max((tmp_path / "b" / "data").iterdir(), key=lambda path: path.stat().st_size)
        body = bytearray(stratum.read_bytes())
        body[len(body) // 2] ^= 1
        stratum.chmod(0o600)
        stratum.write_bytes(body)
        refused(errno.EIO, read_all, alone, "/sub/deep/large")
        assert read_all(alone, "/text") == FILES[b"text"]
        assert capsys.readouterr().err.startswith("basin: /sub/deep/large: ")


class TestRefusing:
    @pytest.mark.parametrize(
        "flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_APPEND], ids=hex
    )
    def test_nobody_writes_into_a_file(self, alone: MountedFiles, flags: int) -> None:
        refused(errno.EROFS, alone.open, "/text", flags)

    @pytest.mark.parametrize(
        ("call", "arguments"),
        [
            ("chmod", ("/text", 0o600)),
            ("chown", ("/text", 0, 0)),
            ("create", ("/new", 0o600, os.O_WRONLY)),
            ("fallocate", ("/text", 0, 0, 10, 1)),
            ("link", ("/new", "/text")),
            ("mkdir", ("/new", 0o700)),
            ("mknod", ("/new", 0o600, 0)),
            ("removexattr", ("/text", "user.note")),
            ("rename", ("/text", "/new")),
            ("rmdir", ("/sub",)),
            ("setxattr", ("/text", "user.note", b"", 0)),
            ("symlink", ("/new", "text")),
            ("truncate", ("/text", 0)),
            ("unlink", ("/text",)),
            ("utimens", ("/text", (0, 0))),
            ("write", ("/text", b"", 0, 1)),
        ],
    )
    def test_nothing_is_changed(self, alone: MountedFiles, call: str, arguments: tuple[Any, ...]) -> None:
        refused(errno.EROFS, getattr(alone, call), *arguments)


class TestAllSnapshots:
    def test_each_has_its_folder_and_latest_leads_to_the_newest(self, db: Database, tree: Path) -> None:
        first = db.snapshots.create(tree)
        (tree / "later").write_bytes(b"new")
        second = db.snapshots.create(tree)
        files = MountedFiles(Shelf(db.snapshots.list))
        assert names(files, "/") == [first.id, second.id, "latest"]
        assert files.readlink("/latest") == second.id
        assert stat.S_ISLNK(files.getattr("/latest")["st_mode"])
        assert files.getattr(f"/{first.id}")["st_mtime"] == first.start_ns
        assert read_all(files, f"/{second.id}{tree}/later") == b"new"
        refused(errno.ENOENT, files.getattr, f"/{first.id}{tree}/later")
        for snapshot in (first, second):
            assert read_all(files, f"/{snapshot.id}{tree}/text") == FILES[b"text"]
        refused(errno.ENOENT, files.getattr, "/0000000000000000")
        refused(errno.EISDIR, files.open, f"/{first.id}", os.O_RDONLY)

    def test_one_that_comes_is_seen_soon_and_one_that_is_forgotten_goes(
        self, db: Database, tree: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        shelf = Shelf(db.snapshots.list)
        files = MountedFiles(shelf)
        assert names(files, "/") == []
        first = db.snapshots.create(tree)
        assert names(files, "/") == []  # The list is kept for a while.
        now += REFRESH_S
        assert names(files, "/") == [first.id, "latest"]
        kept = shelf.shown()[first.id.encode()]
        second = db.snapshots.create(tree)
        now += REFRESH_S
        assert shelf.shown()[first.id.encode()] is kept
        db.snapshots.forget([first.id])
        now += REFRESH_S
        assert names(files, "/") == [second.id, "latest"]
        refused(errno.ENOENT, files.getattr, f"/{first.id}")


class TestTheCommand:
    @pytest.fixture
    def stored(self, opened: Run, tree: Path) -> Run:
        opened("backup", str(tree), "--quiet")
        return opened

    @pytest.fixture
    def fuse(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """A FUSE that is mounted and unmounted at once; what it was asked for."""
        asked: list[Any] = []

        class Fuse:
            @staticmethod
            def FUSE(files: MountedFiles, folder: str, **options: Any) -> None:  # noqa: N802  (the library's name)
                files.init("/")
                asked.append((names(files, "/"), folder, options))

        monkeypatch.setattr(mounting, "_fuse", lambda: Fuse)
        return asked

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        made = tmp_path / "mounted"
        made.mkdir()
        return made

    def test_it_mounts_all_read_only(self, stored: Run, fuse: list[Any], folder: Path) -> None:
        result = stored("mount", str(folder))
        ((found, at, options),) = fuse
        assert at == str(folder)
        assert len(found) == 2
        assert found[1] == "latest"
        assert options["ro"]
        assert options["foreground"]
        assert options["nothreads"]
        assert "allow_other" not in options
        assert result.stderr.startswith("mounted ")
        assert result.stdout == ""

    def test_it_mounts_one_and_what_lies_below_a_path_of_it(
        self, stored: Run, fuse: list[Any], folder: Path, tree: Path
    ) -> None:
        stored("mount", str(folder), "--snapshot", "latest")
        stored("mount", str(folder), "--snapshot", f"latest:{tree}/sub", "--allow-other")
        assert fuse[0][0] == [tree.parts[1]]
        assert fuse[1][0] == ["deep", "link", "text again"]
        assert fuse[1][2]["default_permissions"]

    def test_what_cannot_be_mounted(self, stored: Run, fuse: list[Any], folder: Path, tree: Path) -> None:
        assert "not an empty folder" in stored("mount", str(folder / "none"), code=1).stderr
        assert "not an empty folder" in stored("mount", str(tree), code=1).stderr
        assert "no snapshot" in stored("mount", str(folder), "--snapshot", "ffffffff", code=1).stderr
        assert "is no directory" in stored("mount", str(folder), "--snapshot", f"latest:{tree}/text", code=1).stderr
        assert fuse == []

    def test_without_the_package_it_says_how_to_get_it(
        self, stored: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "mfusepy", None)
        assert "pip install 'basin-store[mount]'" in stored("mount", str(folder), code=1).stderr

    def test_without_the_library_it_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class NoLibrary:
            def find_spec(self, name: str, *_rest: Any) -> None:
                if name == "mfusepy":
                    raise OSError("Unable to find libfuse")

        monkeypatch.delitem(sys.modules, "mfusepy", raising=False)
        monkeypatch.setattr(sys, "meta_path", [NoLibrary(), *sys.meta_path])
        with pytest.raises(MissingDependency) as error:
            mounting._fuse()
        assert error.value.fields["package"] == "libfuse"

    def test_without_the_device_it_says_so(
        self, stored: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "mfusepy", object())
        monkeypatch.setattr(mounting, "_DEVICE", str(tmp_path / "fuse"))
        assert "is not there" in stored("mount", str(folder), code=1).stderr


def why_not() -> str:
    """Why nothing can be mounted here; empty if it can."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
        mounting._fuse()
    except (OSError, Failure, MissingDependency) as error:
        return f"no FUSE here: {error}"
    return ""


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is FUSE")
@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_through_the_kernel(opened: Run, tree: Path, tmp_path: Path, ended_by: signal.Signals) -> None:
    opened("backup", str(tree), "--quiet")
    folder = tmp_path / "mounted"
    folder.mkdir()
    command = [sys.executable, "-m", "basin.cli", "mount", str(folder)]
    process = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("mounted ")
        assert os.path.ismount(folder)
        compare(tree, Path(f"{folder}/latest{tree}"))
        for write in (
            lambda: (folder / "new").write_bytes(b""),
            lambda: Path(f"{folder}/latest{tree}/text").write_bytes(b""),
            lambda: Path(f"{folder}/latest{tree}/text").unlink(),
        ):
            refused(errno.EROFS, write)
    finally:
        process.send_signal(ended_by)
        code = process.wait(timeout=30)
        rest = process.stderr.read() if process.stderr is not None else ""
        if process.stderr is not None:
            process.stderr.close()
    assert (code, rest) == (0, "")
    until = time.monotonic() + 10
    while os.path.ismount(folder) and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.ismount(folder)
    assert list(folder.iterdir()) == []


def compare(real: Path, shown: Path) -> None:
    """Names, kinds, modes, owners, times, sizes, contents, links, attributes, and which names are one file."""
    paths = sorted(os.path.relpath(path, os.fsencode(real)) for path in walk(os.fsencode(real)))
    assert sorted(os.path.relpath(path, os.fsencode(shown)) for path in walk(os.fsencode(shown))) == paths
    for path in paths:
        one, other = (os.path.join(os.fsencode(root), path) for root in (real, shown))  # noqa: PTH118  (of bytes)
        before, after = os.lstat(one), os.lstat(other)
        for field in ("st_mode", "st_uid", "st_gid", "st_mtime_ns"):
            assert getattr(before, field) == getattr(after, field), (path, field)
        if stat.S_ISREG(before.st_mode):
            assert Path(os.fsdecode(one)).read_bytes() == Path(os.fsdecode(other)).read_bytes()
            assert before.st_nlink == after.st_nlink
            assert os.listxattr(one) == os.listxattr(other)
        if stat.S_ISLNK(before.st_mode):
            assert os.readlink(one) == os.readlink(other)  # noqa: PTH115  (of bytes)
    assert os.path.samefile(shown / "text", shown / "sub" / "text again")  # noqa: PTH121  (what it is about)
    assert os.getxattr(shown / "text", "user.note") == b"kept\0"


def walk(root: bytes) -> Iterator[bytes]:
    for folder, directories, files in os.walk(root):
        yield from (os.path.join(folder, name) for name in (*directories, *files))  # noqa: PTH118  (of bytes)
