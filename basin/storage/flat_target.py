"""`FlatTarget`: one new file on the local disk that others are written into, one behind the other.

Invariants:

- The file has its name only when it is whole: it grows under a temporary name beside it, is synced, and then linked to
  a name that must be free. Whatever fails before leaves nothing under that name; a crash may leave the temporary file.
- One file inside at a time is written; the next begins where it ends.

It is a `Storage` of which `create` alone works, so that whoever writes strata can write into it. Which bytes stand
between and behind the files is the caller's business: this knows no format. Imports `basin.errors` and its neighbours.
"""

# The methods' contracts are the port's; descriptors and exact modes are the subject here, not paths (PTH).
# ruff: noqa: PTH100, PTH102, PTH108, PTH118, PTH119, PTH120

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias

from blake3 import blake3

from basin.errors import AlreadyExists, InvalidArgument
from basin.storage.flat import FlatStorage, Piece
from basin.storage.local_files import Descriptor, LocalAppendFile, LocalReadFile, sync_entries
from basin.storage.naming import checked_name
from basin.storage.protocol import AppendFile
from basin.storage.translation import translated

_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700
_NO_HARD_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})
_Pieces: TypeAlias = list[Piece]


def require_free(path: str | os.PathLike[str]) -> None:
    """Raise `AlreadyExists` if anything has this name, a dangling link too."""
    if os.path.lexists(path):
        name = os.fspath(path)
        raise AlreadyExists(f"{name} exists already: choose another, or delete it", object=name, operation="create")


def _temporary(path: str) -> str:
    """A free name beside `path`, in the same file system."""
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.urandom(8).hex()}.tmp")


@contextlib.contextmanager
def scratch_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty folder beside `path`, for its owner alone, which goes with all that is in it when the block ends."""
    folder = _temporary(os.path.abspath(os.fspath(path)))
    try:
        os.mkdir(folder, _FOLDER_MODE)
    except OSError as error:
        raise translated(error, "create", os.path.basename(folder), folder) from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Inside(AppendFile):
    """A file inside, while it is written."""

    def __init__(self, name: str, whole: LocalAppendFile) -> None:
        self.name = name
        self.offset = 0
        self.start = whole.offset
        self._whole = whole
        self._hasher = blake3()
        self.is_over = False

    def append(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_over:
            raise InvalidArgument(f"{self.name} was ended: another file was begun behind it", object=self.name)
        self._whole.append(data)
        self._hasher.update(data)
        self.offset += len(data)

    def sync(self) -> None:
        """As the port says; nothing is durable before the whole is, so there is nothing to wait for."""

    def close(self) -> None:
        """Nothing of its own is held open."""

    @property
    def piece(self) -> Piece:
        """What was written so far."""
        return Piece(self.name, self.start, self.offset, self._hasher.digest())


class FlatTarget(FlatStorage):
    """A new file at `path`. Use it as a context manager: unless `finish` was called, nothing is left behind."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `AlreadyExists` where there is a file, `StorageError` where none can be created."""
        self.path = os.path.abspath(os.fspath(path))
        require_free(self.path)
        self._temporary = _temporary(self.path)
        name = os.path.basename(self.path)
        try:
            descriptor = Descriptor(os.open(self._temporary, _CREATE, _FILE_MODE))
        except OSError as error:
            raise translated(error, "create", name, self.path) from error
        super().__init__(LocalReadFile(name, self.path, descriptor), (), self.path)
        self._file = LocalAppendFile(name, self.path, descriptor, 0)
        self._current: _Inside | None = None
        self.is_finished = False

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.offset

    @property
    def pieces(self) -> _Pieces:
        """The files inside that are complete, in the order in which they lie. Ends the one that is being written."""
        self._end_current()
        return list(self._pieces.values())

    def append(self, data: bytes) -> None:
        """Write bytes that belong to no file inside."""
        self._end_current()
        self._file.append(data)

    def create(self, name: str) -> AppendFile:
        """Begin a file inside; the one before ends."""
        self._require_open(checked_name(name))
        self._end_current()
        if name in self._pieces:
            raise AlreadyExists(f"{name} was written already", object=name, operation="create")
        self._current = _Inside(name, self._file)
        return self._current

    def _end_current(self) -> None:
        if self._current is not None:
            self._current.is_over = True
            self._pieces[self._current.name] = self._current.piece
            self._current = None

    def sync_folder(self, folder: str) -> None:
        """As the port says: it comes with `finish`."""

    def delete(self, name: str) -> None:
        """Nothing that was written goes singly: the whole does, when its writer fails."""

    def finish(self) -> None:
        """Make the whole durable and give it its name. Raises `AlreadyExists` if somebody took it meanwhile."""
        self._end_current()
        self._file.sync()
        try:
            try:
                os.link(self._temporary, self.path, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                require_free(self.path)  # Where a file has one name only, there is a moment between look and step.
                Path(self._temporary).rename(self.path)
            self.is_finished = True
            self._remove_temporary()
            self._sync_parent()
        except OSError as error:
            raise translated(error, "link", os.path.basename(self.path), self.path) from error

    def _sync_parent(self) -> None:
        descriptor = Descriptor(os.open(os.path.dirname(self.path), _FOLDER))
        try:
            sync_entries(descriptor)
        finally:
            descriptor.close()

    def _remove_temporary(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def close(self) -> None:
        """Release the file; without `finish`, delete it."""
        super().close()
        self._file.close()
        with contextlib.suppress(OSError):
            self._remove_temporary()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
