"""`basin mount`: snapshots as folders of the file system, to be read. The only module that knows FUSE.

    FOLDER/<id of a snapshot>/<paths>      FOLDER/latest -> <id of the newest complete one>
    FOLDER/<paths>                         with --snapshot

Invariants:

- Nothing is written, neither through the folder (EROFS) nor to the basin.
- Everything that goes wrong in the basin is an error number to who reads, and a line on standard error: one damaged
  file does not end the mount.
- The answers are given one at a time: `Snapshot` is not safe for several threads, so the kernel's requests are not
  served by several. What is known of one path is kept, for the kernel asks for each again and again.

`MountedFiles` needs no FUSE, and is tested without; `mfusepy` is imported when something is mounted.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import click

from basin.cli.common import Command, Target, pass_target
from basin.cli.failures import Failure, describe, warn
from basin.cli.output import printable
from basin.cli.snapshots import located
from basin.errors import BasinError, InvalidArgument, MissingDependency, NameNotFound

if TYPE_CHECKING:
    from basin.api import Database
    from basin.format.tree import Entry
    from basin.layers.snapshots import Snapshot

_Stat = dict[str, int]

LATEST: Final = b"latest"
REFRESH_S: Final = 5.0
"""How old the list of snapshots in the folder may be."""
_DEVICE: Final = "/dev/fuse"
_FILE, _DIRECTORY, _LINK = 0, 1, 2
_TYPES: Final = (
    *(stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO),
    *(stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK),
)
"""By the kinds of rows."""
_FOLDER_MODE: Final = stat.S_IFDIR | 0o555
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_TRUNC | os.O_CREAT
_ENTRIES_KEPT: Final = 16_384
"""Of each snapshot: about 500 bytes an entry."""
_BLOCK_SIZE: Final = 512
_NAME_MAX: Final = 255


class Located(NamedTuple):
    """An entry, and the snapshot that it is of; no entry: the snapshot's own folder."""

    shown: ShownSnapshot
    entry: Entry | None


class ShownSnapshot:
    """A snapshot below a folder, from the directory `base` of it on; remembers what was looked at."""

    def __init__(self, snapshot: Snapshot, base: bytes = b"") -> None:
        self.snapshot = snapshot
        self._base = base
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def whole(self, path: bytes) -> bytes:
        """The path in the snapshot."""
        return b"/".join(part for part in (self._base, path) if part)

    def entry(self, path: bytes) -> Entry | None:
        """The entry at a path below the folder, with its metadata; None for the top. Raises `NameNotFound`."""
        whole = self.whole(path)
        if not whole:
            return None
        found = self._entries.get(whole)
        if found is None:
            found = self.snapshot.entry(whole)
            self._keep(found)
        return found

    def children(self, path: bytes) -> Iterator[Entry]:
        """What lies in a directory."""
        for found in self.snapshot.ls(self.whole(path)):
            self._keep(found)
            yield found

    def _keep(self, entry: Entry) -> None:
        self._entries[entry.path] = entry
        if len(self._entries) > _ENTRIES_KEPT:
            self._entries.popitem(last=False)


class Shelf:
    """All snapshots, by the names of their folders; looked for again when the list is old."""

    def __init__(self, list_snapshots: Callable[[], list[Snapshot]]) -> None:
        self._list = list_snapshots
        self._shown: dict[bytes, ShownSnapshot] = {}
        self._listed_at: float | None = None

    def shown(self) -> dict[bytes, ShownSnapshot]:
        """The snapshots, the oldest first."""
        if self._listed_at is None or time.monotonic() - self._listed_at >= REFRESH_S:
            known, self._shown = self._shown, {}
            for one in self._list():
                name = one.id.encode()
                kept = known.get(name)
                # Of a backup that goes on there may be more by now.
                is_same = kept is not None and kept.snapshot.is_complete
                self._shown[name] = kept if kept is not None and is_same else ShownSnapshot(one)
            self._listed_at = time.monotonic()
        return self._shown

    def latest(self) -> bytes | None:
        """The folder of the newest complete one."""
        complete = [name for name, one in self.shown().items() if one.snapshot.is_complete]
        return complete[-1] if complete else None


class MountedFiles:
    """What FUSE asks, answered. Paths begin with a slash; errors are `OSError`s. For one thread."""

    use_ns = True
    """Times are whole nanoseconds (a setting of mfusepy)."""

    def __init__(self, shelf: Shelf | ShownSnapshot, on_mounted: Callable[[], None] = lambda: None) -> None:
        self._shelf = shelf
        self._on_mounted = on_mounted
        self._files: dict[int, io.BufferedReader] = {}
        self._handles = 0

    def init(self, _path: str) -> None:
        """The folder is mounted now."""
        self._on_mounted()

    def destroy(self, _path: str) -> None:
        """It is not any more."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    # --- finding ----------------------------------------------------------------------------------------------------

    def _locate(self, path: str) -> Located | None:
        """What stands at a path; None for the folder of all snapshots. Raises an `OSError`."""
        inside = _encoded(path).strip(b"/")
        if isinstance(self._shelf, ShownSnapshot):
            return Located(self._shelf, self._shelf.entry(inside))
        if not inside:
            return None
        name, _, inside = inside.partition(b"/")
        shown = self._shelf.shown().get(name)
        if shown is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return Located(shown, shown.entry(inside))

    def _entry(self, path: str) -> Located | None:
        """`_locate`, but None for whatever is a folder of ours and no entry of a snapshot."""
        if self._is_latest(path):
            return None
        found = self._locate(path)
        return None if found is None or found.entry is None else found

    def _is_latest(self, path: str) -> bool:
        return isinstance(self._shelf, Shelf) and _encoded(path).strip(b"/") == LATEST

    # --- looking ----------------------------------------------------------------------------------------------------

    def getattr(self, path: str, _handle: int | None = None) -> _Stat:
        """What `stat` says."""
        with _told(path):
            if isinstance(self._shelf, Shelf) and self._is_latest(path):
                return _stat_of_latest(self._target_of_latest(self._shelf))
            found = self._locate(path)
            if found is None or found.entry is None:
                return _stat_of_folder(path, 0 if found is None else found.shown.snapshot.start_ns)
            return _stat_of(found.shown.snapshot, found.entry)

    def readdir(self, path: str, _handle: int = 0) -> Iterator[tuple[str, _Stat, int]]:
        """Names, with type and inode."""
        with _told(path):
            found = self._locate(path)
            for name in (".", ".."):  # Their inodes matter to nobody, but one that is 0 is no entry.
                yield name, {"st_mode": _FOLDER_MODE, "st_ino": 1}, 0
            if found is None and isinstance(self._shelf, Shelf):
                yield from self._folders(self._shelf)
                return
            assert found is not None
            if found.entry is not None and found.entry.kind != _DIRECTORY:
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            for entry in found.shown.children(self._inside(path)):
                yield _decoded(entry.name), _stat_of(found.shown.snapshot, entry), 0

    @staticmethod
    def _folders(shelf: Shelf) -> Iterator[tuple[str, _Stat, int]]:
        for name, shown in shelf.shown().items():
            yield name.decode(), _stat_of_folder(f"/{name.decode()}", shown.snapshot.start_ns), 0
        latest = shelf.latest()
        if latest is not None:
            yield LATEST.decode(), _stat_of_latest(latest), 0

    def _inside(self, path: str) -> bytes:
        """A path without the folder of its snapshot."""
        inside = _encoded(path).strip(b"/")
        return inside if isinstance(self._shelf, ShownSnapshot) else inside.partition(b"/")[2]

    @staticmethod
    def _target_of_latest(shelf: Shelf) -> bytes:
        latest = shelf.latest()
        if latest is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return latest

    def readlink(self, path: str) -> str:
        """The target of a link."""
        with _told(path):
            if isinstance(self._shelf, Shelf) and self._is_latest(path):
                return _decoded(self._target_of_latest(self._shelf))
            found = self._entry(path)
            if found is None or found.entry is None or found.entry.kind != _LINK:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return _decoded(found.shown.snapshot.attributes(found.entry).target or b"")

    def listxattr(self, path: str) -> list[str]:
        """The names of the extended attributes."""
        with _told(path):
            return [_decoded(name) for name in self._xattrs(path)]

    def getxattr(self, path: str, name: str, _position: int = 0) -> bytes:
        """One extended attribute."""
        with _told(path):
            value = self._xattrs(path).get(_encoded(name))
            if value is None:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            return value

    def _xattrs(self, path: str) -> dict[bytes, bytes]:
        found = self._entry(path)
        if found is None or found.entry is None or not found.entry.meta:
            return {}
        return dict(found.shown.snapshot.attributes(found.entry).xattrs)

    def statfs(self, _path: str) -> _Stat:
        """A full disk."""
        return {"f_bsize": _BLOCK_SIZE, "f_frsize": _BLOCK_SIZE, "f_namemax": _NAME_MAX}

    # --- reading ----------------------------------------------------------------------------------------------------

    def open(self, path: str, flags: int) -> int:
        """A handle for `read`."""
        with _told(path):
            if flags & _WRITING:
                self._refuse()
            found = self._entry(path)
            if found is None or found.entry is None or found.entry.kind == _DIRECTORY:
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            if found.entry.kind != _FILE:
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            self._handles += 1
            self._files[self._handles] = found.shown.snapshot.open_entry(found.entry)
            return self._handles

    def read(self, path: str, size: int, offset: int, handle: int) -> bytes:
        """At most `size` bytes from `offset`; fewer at the end alone."""
        with _told(path):
            file = self._files[handle]
            file.seek(offset)
            return file.read(size)

    def release(self, _path: str, handle: int) -> int:
        """Nobody reads from a handle any more."""
        file = self._files.pop(handle, None)
        if file is not None:
            file.close()
        return 0

    # --- not writing ------------------------------------------------------------------------------------------------

    def _refuse(self, *_arguments: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    chmod = chown = create = fallocate = link = mkdir = mknod = _refuse
    removexattr = rename = rmdir = setxattr = symlink = truncate = unlink = utimens = write = _refuse


# --- stat -------------------------------------------------------------------------------------------------------------


def _stat_of(snapshot: Snapshot, entry: Entry) -> _Stat:
    """What `stat` says of an entry; of one without metadata, what anybody may read."""
    if not entry.meta:
        mode = _TYPES[entry.kind] | (0o555 if entry.kind == _DIRECTORY else 0o444)
        return _stat(mode, entry.size, snapshot.start_ns, _inode(snapshot, entry.path))
    found = snapshot.attributes(entry)
    # The names of a file with several of them have one inode, as they had; all others have one of their own.
    own = entry.path if found.linked is None else b"\0%d %d" % (found.linked[0], found.inode)
    size = {_FILE: entry.size, _LINK: len(found.target or b"")}.get(entry.kind, 0)
    stated = _stat(_TYPES[entry.kind] | found.mode, size, found.mtime_ns, _inode(snapshot, own))
    stated |= {"st_ctime": found.ctime_ns, "st_uid": found.uid, "st_gid": found.gid}
    if found.linked is not None:
        stated["st_nlink"] = found.linked[1]
    if found.device is not None:
        stated["st_rdev"] = os.makedev(*found.device)
    return stated


def _stat_of_folder(path: str, time_ns: int) -> _Stat:
    return _stat(_FOLDER_MODE, 0, time_ns, _number(_encoded(path)))


def _stat_of_latest(target: bytes) -> _Stat:
    return _stat(stat.S_IFLNK | 0o777, len(target), 0, _number(LATEST))


def _stat(mode: int, size: int, time_ns: int, inode: int) -> _Stat:
    """One link, also of a directory: whoever counts sub-directories by their links then knows that he cannot."""
    times = {"st_atime": time_ns, "st_mtime": time_ns, "st_ctime": time_ns}
    blocks = -(-size // _BLOCK_SIZE)
    return {"st_mode": mode, "st_size": size, "st_blocks": blocks, "st_nlink": 1, "st_ino": inode, **times}


def _inode(snapshot: Snapshot, own: bytes) -> int:
    return _number(b"%s/%s" % (snapshot.id.encode(), own))


def _number(text: bytes) -> int:
    """63 bits of a hash: an inode that is the same whenever it is asked for."""
    from blake3 import blake3  # Late: the list of commands loads no hash.

    return int.from_bytes(blake3(text).digest(8), "little") >> 1 | 1


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Make error numbers of Basin's errors, and a line on standard error of what the number does not say."""
    try:
        yield
    except (NameNotFound, InvalidArgument) as error:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
    except BasinError as error:
        warn(f"{printable(_encoded(path))}: {describe(error)}")
        raise OSError(errno.EIO, os.strerror(errno.EIO)) from error


# --- the command ------------------------------------------------------------------------------------------------------


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option(
    "--snapshot", "-s", "place", metavar="SNAP[:PATH]", help="This one alone, or what lies below a path of it."
)
@click.option("--allow-other", is_flag=True, help="Also for other users, by the modes and owners of the files.")
@pass_target
def mount(target: Target, *, folder: Path, place: str | None, allow_other: bool) -> None:
    """Show snapshots in FOLDER, read-only, until this is interrupted or FOLDER unmounted.

    Each has a folder named by its id; `latest` leads to the newest. Needs FUSE, and the package `basin-store[mount]`.
    """
    fuse = _fuse()
    if not folder.is_dir() or any(folder.iterdir()):
        raise Failure(f"{folder} is not an empty folder to mount at: make one")
    with target.open("r") as db:
        shelf = _shelf(db, place)
        is_mounted = False

        def mounted() -> None:
            nonlocal is_mounted
            is_mounted = True
            click.echo(f"mounted {printable(target.url)} at {printable(str(folder))}", err=True)

        options: dict[str, Any] = {"allow_other": True, "default_permissions": True} if allow_other else {}
        try:
            fuse.FUSE(
                MountedFiles(shelf, mounted),
                str(folder),
                foreground=True,
                nothreads=True,
                ro=True,
                use_ino=True,
                kernel_cache=True,
                fsname="basin",
                subtype="basin",
                **options,
            )
        except RuntimeError as error:  # A number alone: the library has said why on standard error.
            if not is_mounted:
                raise Failure(f"{folder} could not be mounted") from error


def _shelf(db: Database, place: str | None) -> Shelf | ShownSnapshot:
    if place is None:

        def listed() -> list[Snapshot]:
            db.refresh()
            return db.snapshots.list()

        return Shelf(listed)
    snapshot, path = located(db, place)
    entry = snapshot.entry(path)
    if entry.kind != _DIRECTORY:
        raise Failure(f"{place} is no directory")
    return ShownSnapshot(snapshot, entry.path)


def _fuse() -> Any:
    """The module `mfusepy`; raise `MissingDependency` without it or its library, and `Failure` without the device."""
    try:
        import mfusepy  # type: ignore[import-untyped]  # it has no types
    except ImportError as error:
        text = "mounting needs the package mfusepy: pip install 'basin-store[mount]'"
        raise MissingDependency(text, package="mfusepy") from error
    except OSError as error:
        text = "mounting needs the library libfuse: install the system's package fuse3, or libfuse2"
        raise MissingDependency(text, package="libfuse") from error
    if sys.platform == "linux" and not os.access(_DEVICE, os.R_OK | os.W_OK):
        text = "cannot be opened" if Path(_DEVICE).exists() else "is not there"
        raise Failure(f"{_DEVICE} {text}: this system, or this container, offers no FUSE; `basin restore` needs none")
    return mfusepy
