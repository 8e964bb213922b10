"""Putting things into the target that are no files: directories, links, devices; and removing what is in the way.

Invariants:

- A link is replaced or left, never followed. What stands where a directory belongs is removed only with
  `overwrite="always"`, a directory with something in it only if the caller wants deletions as well.
- A new thing gets its metadata before its name, through a descriptor that holds on to it, and only if it has no other
  name: what somebody slipped in under the temporary name is left alone.
- Of what is removed, no mounted file system is entered.

Imported by `restore`, on one thread.
"""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from basin.errors import CorruptionError, InvalidArgument
from basin.format.tree import Entry, RowKind
from basin.layers.snapshots.attributes import Attributes
from basin.layers.snapshots.metadata import Findings, Metadata
from basin.layers.snapshots.target import NO_DIRECTORY, PRIVATE_DIRECTORY, Folders, Target
from basin.layers.snapshots.writing import FirstLink, TemporaryNames

Overwrite = Literal["differing", "always", "never"]

_PLAIN_MODE: Final = 0o777
"""Of a directory without metadata, less what the user's umask takes."""
_LINK: Final = int(RowKind.LINK)
_DEVICES: Final = (int(RowKind.CHARACTER_DEVICE), int(RowKind.BLOCK_DEVICE))
_TYPES: Final = {
    int(RowKind.FILE): modes.S_IFREG,
    _LINK: modes.S_IFLNK,
    int(RowKind.FIFO): modes.S_IFIFO,
    int(RowKind.CHARACTER_DEVICE): modes.S_IFCHR,
    int(RowKind.BLOCK_DEVICE): modes.S_IFBLK,
    int(RowKind.SOCKET): modes.S_IFSOCK,
}
_LINKS_NOT: Final = (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems answer that have no hard links, not so many, or not between two places."""


@dataclass
class Counts:
    """What was done so far."""

    files: int = 0
    size: int = 0
    unchanged: int = 0
    kept: int = 0
    verified: int = 0
    directories: int = 0
    others: int = 0
    hard_links: int = 0
    deleted: int = 0
    skipped: int = 0


class Placer:
    """Places what is no file into open directories. `is_new` says that a directory was made by the restore."""

    def __init__(
        self,
        target: Target,
        folders: Folders,
        metadata: Metadata,
        findings: Findings,
        counts: Counts,
        wanted: Callable[[bytes, bool], bool],
        *,
        overwrite: Overwrite,
        delete: bool,
        dry_run: bool,
    ) -> None:
        """`wanted` tells of paths, and whether each is a directory, what the restore is about at all."""
        self._target = target
        self._folders = folders
        self._metadata = metadata
        self._findings = findings
        self._counts = counts
        self._wanted = wanted
        self._overwrite = overwrite
        self._delete = delete
        self._dry_run = dry_run
        self._names = TemporaryNames()

    # --- directories ------------------------------------------------------------------------------------------------

    def make_directory(self, folder: int, path: bytes, *, is_new: bool, has_metadata: bool) -> bool:
        """Make a directory, if it is not there; whether it is new. Raises `InvalidArgument` for what is in the way."""
        name = path.rpartition(b"/")[2]
        mode = PRIVATE_DIRECTORY if has_metadata else _PLAIN_MODE
        found = None if is_new else self._target.look(folder, name)
        if found is None and self._made(folder, name, mode):
            return True
        found = found or self._target.look(folder, name)
        if found is not None and modes.S_ISDIR(found.st_mode):
            if self._overwrite != "never" and not self._dry_run:
                self._unlock(folder, name, found)
            return False
        if self._overwrite != "always":
            raise InvalidArgument(NO_DIRECTORY)
        if not self._dry_run:
            self._target.remove_file(folder, name)
            self._target.make_directory(folder, name, mode=mode)
        self._counts.directories += 1
        return True

    def _made(self, folder: int, name: bytes, mode: int) -> bool:
        if not self._dry_run:
            try:
                self._target.make_directory(folder, name, mode=mode)
            except FileExistsError:
                return False
        self._counts.directories += 1
        return True

    def _unlock(self, folder: int, name: bytes, found: os.stat_result) -> None:
        """Let its owner into a directory that forbids it; the mode of the snapshot is set in the end."""
        if found.st_mode & PRIVATE_DIRECTORY != PRIVATE_DIRECTORY and found.st_uid == os.geteuid():
            with self._target.pin(folder, name) as (at, pinned):
                if modes.S_ISDIR(pinned.st_mode):
                    self._target.chmod(at, modes.S_IMODE(pinned.st_mode) | PRIVATE_DIRECTORY)

    # --- links, devices, fifos, sockets -----------------------------------------------------------------------------

    def put(
        self, folder: int, entry: Entry, attributes: Attributes | None, *, is_new: bool, first: FirstLink | None
    ) -> None:
        """Make what is no file and no directory, or leave it if it is there already."""
        found = None if is_new else self._target.look(folder, entry.name)
        if found is not None and self._leave(folder, entry, attributes, found, first):
            return
        if not self._dry_run:
            try:
                self._place(
                    folder,
                    entry.name,
                    is_new=is_new,
                    make=lambda name: self._make(folder, name, entry, attributes),
                    settle=lambda name: self._settle(folder, name, entry, attributes, first),
                )
            except PermissionError as error:
                if entry.kind not in _DEVICES or error.errno != errno.EPERM:
                    raise
                self._findings.warn(entry.path, "a device, which needs privilege: it was not made", kind="device")
                return
        self._counts.others += 1

    def _leave(
        self,
        folder: int,
        entry: Entry,
        attributes: Attributes | None,
        found: os.stat_result,
        first: FirstLink | None,
    ) -> bool:
        """Whether what is there stays. Makes room for what is to come, if it is a directory."""
        if self._overwrite == "never":
            self._counts.kept += 1
            return True
        if modes.S_ISDIR(found.st_mode):
            self.clear(folder, entry)
            return False
        if self._overwrite == "always" or not self._is_same(folder, entry, attributes, found):
            return False
        if self._dry_run or attributes is None:
            return True
        with self._target.pin(folder, entry.name) as (at, pinned):
            if modes.S_IFMT(pinned.st_mode) != modes.S_IFMT(found.st_mode):
                return False
            if self._metadata.differs(at, attributes, kind=entry.kind, found=pinned):
                if pinned.st_nlink > 1:
                    return False
                self._metadata.apply(at, attributes, kind=entry.kind, path=entry.path, found=pinned)
            if first is not None:
                first.identity = (pinned.st_dev, pinned.st_ino)
        return True

    def _is_same(self, folder: int, entry: Entry, attributes: Attributes | None, found: os.stat_result) -> bool:
        if modes.S_IFMT(found.st_mode) != _TYPES[entry.kind]:
            return False
        if entry.kind == _LINK:
            return attributes is not None and self._target.link_target(folder, entry.name) == attributes.target
        if entry.kind in _DEVICES:
            return attributes is not None and found.st_rdev == os.makedev(*_device_of(attributes))
        return True

    def _make(self, folder: int, name: bytes, entry: Entry, attributes: Attributes | None) -> None:
        if entry.kind == _LINK:
            if attributes is None or attributes.target is None:
                raise CorruptionError("the snapshot does not say where the link leads")
            self._target.make_link(folder, name, target=attributes.target)
            return
        device = _device_of(attributes) if entry.kind in _DEVICES else (0, 0)
        self._target.make_node(folder, name, mode=_TYPES[entry.kind] | 0o600, device=device)

    def _settle(
        self, folder: int, name: bytes, entry: Entry, attributes: Attributes | None, first: FirstLink | None
    ) -> None:
        """Metadata of what was just made."""
        with self._target.pin(folder, name) as (at, found):
            if modes.S_IFMT(found.st_mode) != _TYPES[entry.kind] or found.st_nlink > 1:
                raise InvalidArgument("something else was put in its place while it was made")
            if attributes is not None:
                self._metadata.apply(at, attributes, kind=entry.kind, path=entry.path)
            if first is not None:
                first.identity = (found.st_dev, found.st_ino)

    def _place(
        self,
        folder: int,
        name: bytes,
        *,
        is_new: bool,
        make: Callable[[bytes], None],
        settle: Callable[[bytes], None],
    ) -> None:
        """Make something under a temporary name, unless nothing can have its own, and give it its own in the end."""
        temporary = name if is_new else self._names.next()
        try:
            make(temporary)
        except FileExistsError:
            temporary = self._names.next()
            make(temporary)
        try:
            settle(temporary)
            if temporary != name:
                self._target.replace(folder, name, source=temporary)
        except BaseException:
            with suppress(OSError):
                self._target.remove_file(folder, temporary)
            raise

    # --- hard links -------------------------------------------------------------------------------------------------

    def link(self, folder: int, entry: Entry, *, is_new: bool, first: FirstLink, first_folder: int) -> bool:
        """Make an entry a hard link of the first one; False if it has to be something of its own."""
        found = None if is_new else self._target.look(folder, entry.name)
        if found is not None and self._overwrite == "never":
            self._counts.kept += 1
            return True
        source = self._target.look(first_folder, first.name)
        if source is None or (source.st_dev, source.st_ino) != first.identity:
            return False
        if found is not None and (found.st_dev, found.st_ino) == first.identity:
            self._counts.unchanged += 1
            return True
        if found is not None and modes.S_ISDIR(found.st_mode):
            self.clear(folder, entry)
        try:
            self._place(
                folder,
                entry.name,
                is_new=is_new,
                make=lambda name: self._target.make_hard_link(
                    folder, name, source_folder=first_folder, source=first.name
                ),
                settle=lambda _: None,
            )
        except OSError as error:
            if error.errno not in _LINKS_NOT:
                raise
            text = f"a hard link of {first.name!r}; written by itself: {error.strerror}"
            self._findings.warn(entry.path, text, kind=("hard link", error.errno))
            return False
        self._counts.hard_links += 1
        return True

    # --- removing ---------------------------------------------------------------------------------------------------

    def clear(self, folder: int, entry: Entry) -> None:
        """Remove a directory where something else belongs; raise `InvalidArgument` if that was not asked for."""
        if self._overwrite != "always":
            raise InvalidArgument("a directory stands in its place")
        if self._dry_run:
            return
        if self._delete:
            self.remove(entry.path)
            if self._target.look(folder, entry.name) is None:
                return
        try:
            self._target.remove_directory(folder, entry.name)
        except OSError as error:
            raise InvalidArgument("a directory stands in its place, and is not empty") from error

    def remove(self, path: bytes) -> None:
        """Remove what has a path, and all below, as far as it is wanted. What fails is noted, and the rest goes on."""
        parent, _, name = path.rpartition(b"/")
        with self._folders.using(parent) as folder:
            device = folder.device
        stack = [_Removal(parent, iter([name]))]
        while True:
            here = stack[-1]
            name = next(here.names, b"")
            if name:
                self._remove_one(stack, here, name, device)
                continue
            stack.pop()
            if not stack:
                return
            stack[-1].is_emptied &= here.is_emptied and self._remove_emptied(here.path)

    def _remove_one(self, stack: list[_Removal], here: _Removal, name: bytes, device: int) -> None:
        """Remove what is no directory; put one on the stack."""
        path = here.path + b"/" + name if here.path else name
        try:
            with self._folders.using(here.path) as folder:
                found = self._target.look(folder.descriptor, name)
                if found is not None and modes.S_ISDIR(found.st_mode):
                    if found.st_dev != device:
                        raise InvalidArgument("another file system is mounted here, which is not removed")
                elif self._wanted(path, False):
                    if not self._dry_run:
                        self._target.remove_file(folder.descriptor, name)
                    self._counts.deleted += 1
                    return
                else:
                    here.is_emptied = False
                    return
            with self._folders.using(path) as folder:
                stack.append(_Removal(path, iter(self._target.names(folder.descriptor))))
        except (OSError, InvalidArgument) as error:
            here.is_emptied = False
            self._findings.problem(path, error)

    def _remove_emptied(self, path: bytes) -> bool:
        """Remove a directory that all was removed from, if it is wanted; whether it is gone."""
        if not self._wanted(path, True):
            return False
        parent, _, name = path.rpartition(b"/")
        try:
            if not self._dry_run:
                self._folders.forget(path)
                with self._folders.using(parent) as folder:
                    self._target.remove_directory(folder.descriptor, name)
        except (OSError, InvalidArgument) as error:
            self._findings.problem(path, error)
            return False
        self._counts.deleted += 1
        return True


class _Removal:
    """A directory that names are removed from."""

    __slots__ = ("is_emptied", "names", "path")

    def __init__(self, path: bytes, names: Iterator[bytes]) -> None:
        self.path = path
        self.names = names
        self.is_emptied = True


def _device_of(attributes: Attributes | None) -> tuple[int, int]:
    if attributes is None or attributes.device is None:
        raise CorruptionError("the snapshot does not say which device it is")
    return attributes.device
