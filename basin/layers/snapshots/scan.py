"""Walking the user's file system in tree order: what there is to back up, and what the file system says of it.

Invariants:

- Rows come in the order of a tree: the children of a directory by name, then those of each of its sub-directories. The
  directories above a given path are rows too, without their other children.
- No link is followed, but above a given path, which the caller has spelled. A directory is listed through a descriptor
  that is what its row says, so nobody can slip another one under the walk.
- A given path is kept whatever the rules say. All else is kept only if the rules keep it.
- What cannot be read is told to `on_problem`, and the walk goes on; a directory's row stays, without children.
- Memory: the names of one directory, and the names of the sub-directories, not yet visited, of those above it.

A path longer than the system allows (4095 bytes on Linux) is a problem like any other.

Reads the user's files, never the basin's. Imported by `create`.
"""

from __future__ import annotations

import errno
import os
import stat as modes
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from basin.errors import InvalidArgument
from basin.format.tree import RowKind
from basin.layers.snapshots.attributes import XATTRS_SIZE_MAX, attributes_of, attributes_of_way
from basin.layers.snapshots.patterns import (
    CACHE_TAG_NAME,
    CACHE_TAG_SIGNATURE,
    PATTERN_FILE_SIZE_MAX,
    Patterns,
    Rules,
    Scope,
    pattern_lines,
)

LIST_MAX: Final = 4096
"""A directory with more entries is yielded in several lists: a `stat` result takes 700 bytes."""

_DIRECTORY: Final = int(RowKind.DIRECTORY)
_LINK: Final = int(RowKind.LINK)
_FILE: Final = int(RowKind.FILE)
_KINDS: Final = {
    modes.S_IFREG: _FILE,
    modes.S_IFDIR: _DIRECTORY,
    modes.S_IFLNK: _LINK,
    modes.S_IFIFO: int(RowKind.FIFO),
    modes.S_IFCHR: int(RowKind.CHARACTER_DEVICE),
    modes.S_IFBLK: int(RowKind.BLOCK_DEVICE),
    modes.S_IFSOCK: int(RowKind.SOCKET),
}
_FORMAT_MASK: Final = 0o170000
_LIST_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NO_XATTRS: Final = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_ENCODING: Final = sys.getfilesystemencoding()


class Found(NamedTuple):
    """An entry that is to be a row. `path` is where it really is; `stat` and `meta` are of one moment."""

    parent: bytes
    name: bytes
    kind: int
    stat: os.stat_result
    path: bytes
    meta: bytes


class ScanProblem(NamedTuple):
    """What could not be looked at, and why."""

    path: bytes
    error: OSError


class _Given:
    """A directory on the way to given paths, or such a path itself."""

    __slots__ = ("children", "is_given")

    def __init__(self) -> None:
        self.children: dict[bytes, _Given] = {}
        self.is_given = False


class _Place(NamedTuple):
    """A directory that is to be listed. `scope` is `None` on the way to a given path: only `given` is kept there."""

    path: bytes
    given: _Given | None
    scope: Scope | None
    top_device: int
    """The device of the given path that it lies in; of no meaning above one."""


class _Frame:
    """The sub-directories of a directory that are yet to be visited: names, with device and inode of each.

    `ways`: those that the rules leave out, or would not enter, but for the given paths in them.
    """

    __slots__ = ("at", "identities", "names", "place", "ways")

    def __init__(self, place: _Place) -> None:
        self.place = place
        self.names: list[bytes] = []
        self.identities = array("Q")
        self.ways: set[bytes] = set()
        self.at = 0

    def add(self, name: bytes, stat: os.stat_result) -> None:
        """Note a sub-directory."""
        self.names.append(name)
        self.identities.append(stat.st_dev)
        self.identities.append(stat.st_ino)


def scan(
    paths: Sequence[bytes],
    rules: Rules,
    *,
    one_file_system: bool = False,
    exclude_caches: bool = False,
    on_problem: Callable[[ScanProblem], None],
) -> Iterator[list[Found]]:
    """What lies at and below absolute paths, as lists of entries of one directory, none empty, in tree order.

    A directory comes as one list, a large one as several. With `one_file_system`, a directory on another device than
    the given path above it is kept without its children. With `exclude_caches`, of a directory that is tagged as a
    cache only the tag is kept. Raises `InvalidArgument` for a path that is not absolute or holds `..`.
    """
    walk = _Scan(rules, on_problem, one_file_system=one_file_system, exclude_caches=exclude_caches)
    return walk.walk(_given(paths))


def _given(paths: Sequence[bytes]) -> _Given:
    top = _Given()
    for path in paths:
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        if not path.startswith(b"/") or b".." in parts or b"\0" in path:
            raise InvalidArgument(f"not an absolute path without `..`: {path!r}")
        here = top
        for part in parts:
            here = here.children.setdefault(part, _Given())
        here.is_given = True
    return top


class _Scan:
    """One walk."""

    def __init__(
        self, rules: Rules, on_problem: Callable[[ScanProblem], None], *, one_file_system: bool, exclude_caches: bool
    ) -> None:
        self._rules = rules
        self._one_file_system = one_file_system
        self._exclude_caches = exclude_caches
        self._on_problem = on_problem
        self._ignore_files = [os.fsencode(name) for name in rules.ignore_files]
        self._markers = {os.fsencode(name) for name in rules.exclude_if_present}
        self._size_max = sys.maxsize if rules.exclude_larger_than is None else rules.exclude_larger_than
        self._without_xattrs: set[int] = set()
        """Devices whose file system has no extended attributes."""

    def walk(self, top: _Given) -> Iterator[list[Found]]:
        """All of it, from the top directory."""
        try:
            stat = os.stat(b"/")  # noqa: PTH116  # of bytes
        except OSError as error:
            self._problem(b"/", error)
            return
        place = _Place(b"", top, self._scope_at(Scope() if top.is_given else None, top), stat.st_dev)
        frame = _Frame(place)
        yield from self._list(frame, (stat.st_dev, stat.st_ino))
        frames = [frame]
        while frames:
            frame = frames[-1]
            if frame.at == len(frame.names):
                frames.pop()
                continue
            at, frame.at = frame.at, frame.at + 1
            identity = frame.identities[2 * at], frame.identities[2 * at + 1]
            below = _Frame(self._step(frame, frame.names[at], identity[0]))
            yield from self._list(below, identity)
            frames.append(below)

    def _step(self, frame: _Frame, name: bytes, device: int) -> _Place:
        """The place of a sub-directory."""
        place = frame.place
        given = place.given.children.get(name) if place.given is not None else None
        scope = None if place.scope is None or name in frame.ways else place.scope.within(name)
        top_device = place.top_device
        if given is not None and given.is_given:
            scope = self._scope_at(scope or Scope(), given)
            top_device = device
        return _Place(place.path + b"/" + name, given, scope, top_device)

    def _scope_at(self, scope: Scope | None, given: _Given) -> Scope | None:
        """The caller's patterns are relative to each given path."""
        return scope.with_given(self._rules.patterns) if scope is not None and given.is_given else scope

    def _list(self, frame: _Frame, identity: tuple[int, int]) -> Iterator[list[Found]]:
        """The entries of a directory that are kept; notes its sub-directories in the frame."""
        place = frame.place
        if place.scope is None:
            yield from self._list_way(frame)
            return
        try:
            descriptor = _open_directory(place.path or b"/", identity)
        except OSError as error:
            self._problem(place.path or b"/", error)
            return
        try:
            names = self._names(place, descriptor)
            names = self._apply_markers(frame, names, descriptor)
            for start in range(0, len(names), LIST_MAX):
                found = self._look_at(frame, names[start : start + LIST_MAX], descriptor)
                if found:
                    yield found
        finally:
            os.close(descriptor)

    def _names(self, place: _Place, descriptor: int) -> list[bytes]:
        """The names in a directory, sorted; a given one that is not there is a problem."""
        try:
            names = [name.encode(_ENCODING, "surrogateescape") for name in os.listdir(descriptor)]
        except OSError as error:
            self._problem(place.path or b"/", error)
            return []
        names.sort()
        if place.given is not None:
            for name in sorted(place.given.children.keys() - set(names)):
                self._problem(place.path + b"/" + name, _error(errno.ENOENT))
        return names

    def _apply_markers(self, frame: _Frame, names: list[bytes], descriptor: int) -> list[bytes]:
        """Heed the files in a directory that say something of the directory: ignore files, tags of caches, markers."""
        if not (self._ignore_files or self._markers or self._exclude_caches):
            return names
        place = frame.place
        there = set(names)
        keep = self._markers & there
        if self._exclude_caches and CACHE_TAG_NAME in there and self._is_cache(place, descriptor):
            keep.add(CACHE_TAG_NAME)
        if keep:
            given = place.given.children if place.given is not None else {}
            frame.ways.update(name for name, one in given.items() if not one.is_given)
            return [name for name in names if name in keep or name in given]
        scope = place.scope
        for name in self._ignore_files:
            if name in there and scope is not None:
                lines = pattern_lines(self._content(place, name, descriptor, PATTERN_FILE_SIZE_MAX))
                scope = scope.with_lying(Patterns(lines, lenient=True))
        frame.place = _Place(place.path, place.given, scope, place.top_device)
        return names

    def _is_cache(self, place: _Place, descriptor: int) -> bool:
        return self._content(place, CACHE_TAG_NAME, descriptor, len(CACHE_TAG_SIGNATURE)) == CACHE_TAG_SIGNATURE

    def _content(self, place: _Place, name: bytes, descriptor: int, size: int) -> bytes:
        """The first bytes of a file in a directory; nothing of what is no file. What cannot be read is a problem."""
        try:
            if not modes.S_ISREG(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                return b""
            with os.fdopen(os.open(name, _READ_FLAGS, dir_fd=descriptor), "rb") as file:
                return file.read(size)
        except OSError as error:
            self._problem(place.path + b"/" + name, error)
            return b""

    def _look_at(self, frame: _Frame, names: list[bytes], descriptor: int) -> list[Found]:
        """Some entries of a directory. Flat: 6 us of processor time each, of which `stat` and `listxattr` take half."""
        place = frame.place
        scope, top_device = place.scope or Scope(), place.top_device
        has_patterns = bool(scope)
        given = place.given.children if place.given is not None else {}
        path_prefix = place.path + b"/"
        parent = place.path[1:]
        size_max, one_file_system, without_xattrs = self._size_max, self._one_file_system, self._without_xattrs
        stat_of, kind_of = os.stat, _KINDS.get
        found: list[Found] = []
        for name in names:
            path = path_prefix + name
            try:
                stat = stat_of(name, dir_fd=descriptor, follow_symlinks=False)
                kind = kind_of(stat.st_mode & _FORMAT_MASK)
                target = os.readlink(name, dir_fd=descriptor) if kind == _LINK else None
            except OSError as error:
                self._problem(path, error)
                continue
            if kind is None:
                self._problem(path, OSError(errno.EINVAL, f"of an unknown type: mode {stat.st_mode:o}"))
                continue
            is_directory = kind == _DIRECTORY
            leaves = is_directory and one_file_system and stat.st_dev != top_device
            excluded = (kind == _FILE and stat.st_size > size_max) or (
                has_patterns and scope.excludes(name, is_directory=is_directory)
            )
            forced = given.get(name)
            is_way = False
            if forced is not None:
                self._require_directory(path, forced, kind)
                is_way = is_directory and not forced.is_given and (leaves or excluded or name in frame.ways)
                if is_way:
                    frame.ways.add(name)
            if excluded and not is_way and not (forced is not None and forced.is_given):
                continue
            if is_way:
                meta = attributes_of_way(stat)
            else:
                xattrs = None if stat.st_dev in without_xattrs else self._xattrs(path, stat)
                meta = attributes_of(stat, target=target, xattrs=xattrs)
            found.append(Found(parent, name, kind, stat, path, meta))
            if is_directory and (not leaves or forced is not None):
                frame.add(name, stat)
        return found

    def _list_way(self, frame: _Frame) -> Iterator[list[Found]]:
        """The children of a directory that lead to given paths; it is not listed."""
        place = frame.place
        found: list[Found] = []
        for name, given in sorted((place.given or _Given()).children.items()):
            path = place.path + b"/" + name
            try:
                stat = os.stat(path, follow_symlinks=not given.is_given)  # noqa: PTH116  # of bytes
                target = os.readlink(path) if modes.S_ISLNK(stat.st_mode) else None  # noqa: PTH115  # of bytes
            except OSError as error:
                self._problem(path, error)
                continue
            kind = _KINDS[stat.st_mode & _FORMAT_MASK]
            self._require_directory(path, given, kind)
            if kind != _DIRECTORY and not given.is_given:
                continue
            if given.is_given:
                meta = attributes_of(stat, target=target, xattrs=self._xattrs(path, stat))
            else:
                meta = attributes_of_way(stat)
            found.append(Found(place.path[1:], name, kind, stat, path, meta))
            if kind == _DIRECTORY:
                frame.add(name, stat)
        if found:
            yield found

    def _require_directory(self, path: bytes, given: _Given, kind: int) -> None:
        """Tell which given paths cannot be there, because what should lead to them is no directory."""
        if kind != _DIRECTORY:
            for name in sorted(given.children):
                self._problem(path + b"/" + name, _error(errno.ENOTDIR))

    def _xattrs(self, path: bytes, stat: os.stat_result) -> dict[bytes, bytes] | None:
        """Extended attributes. They are asked for by path, because Linux takes no descriptor of the directory here."""
        try:
            names = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno in _NO_XATTRS:
                self._without_xattrs.add(stat.st_dev)
            else:
                self._problem(path, error)
            return None
        if not names:
            return None
        found: dict[bytes, bytes] = {}
        size = 0
        for name in names:
            try:
                value = os.getxattr(path, name, follow_symlinks=False)
            except OSError as error:
                if error.errno != errno.ENODATA:  # It was removed meanwhile.
                    self._problem(path, error)
                continue
            encoded = os.fsencode(name)
            size += len(encoded) + len(value)
            if size > XATTRS_SIZE_MAX:
                self._problem(path, OSError(errno.E2BIG, "too many extended attributes: the rest is not kept"))
                break
            found[encoded] = value
        return found

    def _problem(self, path: bytes, error: OSError) -> None:
        self._on_problem(ScanProblem(path, error))


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _open_directory(path: bytes, identity: tuple[int, int]) -> int:
    """A descriptor of the directory with this device and inode. Raises `OSError` if it is not at this path any more."""
    descriptor = os.open(path, _LIST_FLAGS)
    stat = os.fstat(descriptor)
    if (stat.st_dev, stat.st_ino) != identity:
        os.close(descriptor)
        raise OSError(errno.ESTALE, "another directory took its place during the scan")
    return descriptor
