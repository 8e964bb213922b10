"""The folder that a restore writes into: effects relative to open directories, and the directories that are open.

Invariants:

- Every name is one component, given with the descriptor of the directory that it lies in; no call follows a link in it.
  So whoever moves links about in the target cannot lead a call out of it.
- A directory is opened from its parent's descriptor, down from the target itself, which the caller has spelled.
- What is created is created exclusively: it is new, or the call fails.

`Target` is all that a restore does to a file system, so that tests can stand in for what needs privilege. Imported by
`metadata`, `writing` and `restore`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from basin.errors import InvalidArgument, OutOfSpace

At: TypeAlias = "int | bytes"
"""An inode to act on: a descriptor, or the path in `/proc` of one that was opened without access to its content."""

PRIVATE_DIRECTORY: Final = 0o700
PRIVATE_FILE: Final = 0o600
"""Modes until the owner is set: nobody else gets at what is half done."""

_LIST_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE_FLAGS: Final = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_PATH_FLAG: Final = getattr(os, "O_PATH", 0)
_LINK_FLAG: Final = getattr(os, "O_SYMLINK", os.O_NOFOLLOW)
"""Where there is no `O_PATH`: opens a link itself."""
_NO_DIRECTORY: Final = (errno.ENOTDIR, errno.ELOOP, errno.EMLINK)
"""What systems answer who opens a link as a directory, and forbids to follow it."""
NO_DIRECTORY: Final = "a link, or what else is no directory, stands where a directory belongs; it is not followed"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class Target:
    """The effects of a restore. `folder` is the descriptor of a directory, `name` a component in it.

    All raise `OSError`. Safe for many threads.
    """

    open_folders_max = 128
    """Directories kept open; less than the 256 descriptors that the meanest system allows."""
    syncs_at_once = hasattr(_LIBC, "syncfs")
    """Whether `sync` makes a whole file system durable. Otherwise every file is synced by itself, which is slow."""

    # --- looking ----------------------------------------------------------------------------------------------------

    def open_root(self, path: bytes) -> int:
        """The target itself; links in its path are the caller's, and are followed."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open_directory(self, folder: int, name: bytes) -> int:
        """A descriptor of a directory."""
        return os.open(name, _LIST_FLAGS, dir_fd=folder)

    def open_file(self, folder: int, name: bytes) -> int:
        """A descriptor to read a file by. Does not wait for what is none."""
        return os.open(name, _READ_FLAGS, dir_fd=folder)

    @contextmanager
    def pin(self, folder: int, name: bytes) -> Iterator[tuple[At, os.stat_result]]:
        """Hold on to whatever has this name, without opening it: what is done to it cannot hit what comes after it."""
        flags = _PATH_FLAG | os.O_NOFOLLOW if _PATH_FLAG else os.O_RDONLY | _LINK_FLAG | os.O_NONBLOCK
        descriptor = os.open(name, flags | os.O_CLOEXEC, dir_fd=folder)
        try:
            yield b"/proc/self/fd/%d" % descriptor if _PATH_FLAG else descriptor, os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def look(self, folder: int, name: bytes) -> os.stat_result | None:
        """What has this name; None if there is nothing."""
        try:
            return os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def stat(self, at: At) -> os.stat_result:
        """What is pinned or open."""
        return os.fstat(at) if isinstance(at, int) else os.stat(at)  # noqa: PTH116  # of bytes

    def link_target(self, folder: int, name: bytes) -> bytes:
        """Where a link leads."""
        return os.readlink(name, dir_fd=folder)

    def names(self, folder: int) -> list[bytes]:
        """All names in a directory."""
        with os.scandir(folder) as entries:
            return [os.fsencode(entry.name) for entry in entries]

    def ignores_case(self, folder: int) -> bool:
        """Whether the directory takes names for the same that differ only in case. Creates a file for a moment."""
        probe = b".basin-case-" + os.urandom(8).hex().encode()
        os.close(self.create_file(folder, probe, mode=PRIVATE_FILE))
        try:
            return self.look(folder, probe.upper()) is not None
        finally:
            self.remove_file(folder, probe)

    # --- making and removing ----------------------------------------------------------------------------------------

    def make_root(self, path: bytes) -> None:
        """Make the target, and what leads to it, if it is not there."""
        os.makedirs(path, exist_ok=True)  # noqa: PTH103  # of bytes

    def make_directory(self, folder: int, name: bytes, *, mode: int) -> None:
        """A new directory."""
        os.mkdir(name, mode, dir_fd=folder)

    def create_file(self, folder: int, name: bytes, *, mode: int, is_read: bool = False) -> int:
        """A descriptor of a new file, to be written, and read as well if `is_read`."""
        return os.open(name, _CREATE_FLAGS | (os.O_RDWR if is_read else os.O_WRONLY), mode, dir_fd=folder)

    def make_link(self, folder: int, name: bytes, *, target: bytes) -> None:
        """A new symbolic link."""
        os.symlink(target, name, dir_fd=folder)

    def make_node(self, folder: int, name: bytes, *, mode: int, device: tuple[int, int]) -> None:
        """A new device, fifo or socket: `mode` holds the type. Devices need privilege."""
        os.mknod(name, mode, os.makedev(*device), dir_fd=folder)

    def make_hard_link(self, folder: int, name: bytes, *, source_folder: int, source: bytes) -> None:
        """A new name of what is there already, which may be a symbolic link."""
        os.link(source, name, src_dir_fd=source_folder, dst_dir_fd=folder, follow_symlinks=False)

    def replace(self, folder: int, name: bytes, *, source: bytes) -> None:
        """Give `source`, of the same directory, the name of what may be there, in one step."""
        os.rename(source, name, src_dir_fd=folder, dst_dir_fd=folder)

    def remove_file(self, folder: int, name: bytes) -> None:
        """Remove what is no directory."""
        os.unlink(name, dir_fd=folder)

    def remove_directory(self, folder: int, name: bytes) -> None:
        """Remove an empty directory."""
        os.rmdir(name, dir_fd=folder)

    # --- metadata ---------------------------------------------------------------------------------------------------

    def chown(self, at: At, uid: int, gid: int) -> None:
        """Set owner and group. Needs privilege, mostly."""
        os.chown(at, uid, gid)

    def chmod(self, at: At, mode: int) -> None:
        """Set the permissions of what is no link."""
        os.chmod(at, mode)  # noqa: PTH101  # a descriptor, or a path of bytes

    def set_times(self, at: At, atime_ns: int, mtime_ns: int) -> None:
        """Set both times."""
        os.utime(at, ns=(atime_ns, mtime_ns))

    def xattrs(self, at: At) -> list[bytes]:
        """Names of extended attributes."""
        return [os.fsencode(name) for name in os.listxattr(at)]

    def xattr(self, at: At, name: bytes) -> bytes:
        """The value of an extended attribute."""
        return os.getxattr(at, name)

    def set_xattr(self, at: At, name: bytes, value: bytes) -> None:
        """Set an extended attribute. Some need privilege."""
        os.setxattr(at, name, value)

    def remove_xattr(self, at: At, name: bytes) -> None:
        """Remove an extended attribute."""
        os.removexattr(at, name)

    # --- durability -------------------------------------------------------------------------------------------------

    def sync(self, descriptor: int) -> None:
        """Make all of the file system durable that an open directory lies on, or only that directory."""
        if not self.syncs_at_once:
            os.fsync(descriptor)
        elif _LIBC.syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


class Folder:
    """An open directory of the target. `device` is that of its file system.

    `gives_acls`: whether what is made in it gets access control lists from it; None until somebody has asked.
    """

    __slots__ = ("descriptor", "device", "gives_acls", "users")

    def __init__(self, descriptor: int, device: int) -> None:
        self.descriptor = descriptor
        self.device = device
        self.users = 0
        self.gives_acls: bool | None = None


class Folders:
    """The directories of the target, by path, opened when they are needed. Safe for many threads.

    A path that is opened again may lead to another directory than before, if somebody moves directories in the target;
    it is one of the target all the same.
    """

    def __init__(self, target: Target, root: bytes) -> None:
        """Opens the target, which is there. Raises `OSError`."""
        self._target = target
        self._lock = threading.Lock()
        descriptor = target.open_root(root)
        device = os.fstat(descriptor).st_dev
        self._root = Folder(descriptor, device)
        self._open: OrderedDict[bytes, Folder] = OrderedDict()
        self._devices = {device: os.dup(descriptor)}

    @contextmanager
    def using(self, path: bytes) -> Iterator[Folder]:
        """A directory that stays open meanwhile. Raises `OSError`, `InvalidArgument` if a link stands in its place."""
        folder = self.take(path)
        try:
            yield folder
        finally:
            self.release(folder)

    def take(self, path: bytes) -> Folder:
        """As `using`; the caller gives it back with `release`."""
        with self._lock:
            folder = self._open.get(path) if path else self._root
            if folder is None:
                folder = self._walk(path)
            elif path:
                self._open.move_to_end(path)
            folder.users += 1
            return folder

    def release(self, folder: Folder) -> None:
        """Give back what `take` gave."""
        with self._lock:
            folder.users -= 1

    def forget(self, path: bytes) -> None:
        """Close a directory that is about to be removed."""
        with self._lock:
            folder = self._open.pop(path, None)
            if folder is not None:
                os.close(folder.descriptor)

    def _walk(self, path: bytes) -> Folder:
        """Open what is not open of the way to a directory."""
        parts = path.split(b"/")
        known = len(parts) - 1
        while known and b"/".join(parts[:known]) not in self._open:
            known -= 1
        folder = self._open[b"/".join(parts[:known])] if known else self._root
        for depth in range(known, len(parts)):
            folder.users += 1
            try:
                below = self._enter(folder, parts[depth])
            finally:
                folder.users -= 1
            self._open[b"/".join(parts[: depth + 1])] = folder = below
            self._close_idle(keep=folder)
        return folder

    def _enter(self, folder: Folder, name: bytes) -> Folder:
        try:
            descriptor = self._target.open_directory(folder.descriptor, name)
        except OSError as error:
            if error.errno in _NO_DIRECTORY:
                raise InvalidArgument(NO_DIRECTORY) from error
            raise
        device = os.fstat(descriptor).st_dev
        if device not in self._devices:
            self._devices[device] = os.dup(descriptor)
        return Folder(descriptor, device)

    def _close_idle(self, keep: Folder) -> None:
        """Close what nobody uses and was not used for longest, if too many are open."""
        while len(self._open) > self._target.open_folders_max:
            idle = (path for path, folder in self._open.items() if not folder.users and folder is not keep)
            path = next(idle, None)
            if path is None:
                return
            os.close(self._open.pop(path).descriptor)

    def sync(self) -> None:
        """Make durable all file systems that were written to."""
        for descriptor in self._devices.values():
            self._target.sync(descriptor)

    def close(self) -> None:
        """Close all. Nobody uses any of them."""
        for folder in (self._root, *self._open.values()):
            os.close(folder.descriptor)
        for descriptor in self._devices.values():
            os.close(descriptor)
        self._open.clear()
        self._devices.clear()


def require_room(error: OSError) -> None:
    """Raise `OutOfSpace` if a call failed because the target is full: no other file would fit either."""
    if error.errno in _FULL:
        raise OutOfSpace(f"the target is full: {error.strerror}", object="", operation="restore") from error
