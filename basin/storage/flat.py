"""`FlatStorage`: the storage port over one file that holds all the others, read in place.

Invariants:

- Nothing is ever written: every method of the port that would raises `ReadOnly`.
- A file inside is read by its own ranges of the whole, never beyond its end. A small file that is read whole is
  compared with its hash; strata are verified by whoever reads them.

Where the bytes come from is any `ReadFile`: a file of the local disk here, one of a server in `flat_remote`. Which
files lie where in it is for the caller to know: this knows no format. Imports `basin.errors` and its neighbours.
"""

# Descriptors and exact flags are the subject here, not paths (PTH).
# ruff: noqa: PTH100

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple, NoReturn, TypeAlias

from blake3 import blake3

from basin.errors import BasinClosed, ChecksumMismatch, ObjectMissing, ReadOnly, TruncatedStratum
from basin.storage.local_files import Descriptor, LocalReadFile
from basin.storage.naming import checked_folder, checked_name
from basin.storage.protocol import AppendFile, LockFile, ReadFile, Storage
from basin.storage.translation import translated

_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_BOOT_ID_SIZE: Final = 16

_Names: TypeAlias = list[str]  # In the classes below, `list` is a method.


class Piece(NamedTuple):
    """A file inside: its name, where its `size` bytes begin, and their BLAKE3."""

    name: str
    offset: int
    size: int
    hash: bytes


def open_local_file(path: str | os.PathLike[str]) -> ReadFile:
    """A file of the local disk, for reading. Raises `ObjectMissing`, `StorageError`; also for what is no regular file.

    A symbolic link is followed: the user named it.
    """
    where = os.path.abspath(os.fspath(path))
    try:
        descriptor = Descriptor(os.open(where, _READ))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EISDIR, "this is no regular file")  # translated below, like the others
    except OSError as error:
        raise translated(error, "open", Path(where).name, where) from error
    return LocalReadFile(Path(where).name, where, descriptor)


class PieceFile(ReadFile):
    """One of the files inside."""

    def __init__(self, whole: ReadFile, piece: Piece) -> None:
        self.name = piece.name
        self._whole = whole
        self._start = piece.offset
        self._size = piece.size

    def read(self, offset: int, size: int) -> bytes:
        if not (offset >= 0 and 0 <= size <= self._size - offset):
            raise TruncatedStratum(
                f"{self.name} ends at byte {self._size}, {size} bytes were expected at {offset}",
                object=self.name,
                offset=min(offset, self._size),
            )
        return self._whole.read(self._start + offset, size)

    def read_again(self, offset: int, size: int) -> bytes | None:
        return self._whole.read_again(self._start + offset, size) if 0 <= offset <= self._size - size else None

    def size(self) -> int:
        return self._size

    def close(self) -> None:
        """Nothing of its own is held open."""


class FlatStorage(Storage):
    """The files in `whole` that `pieces` describes. Owns `whole`. Safe for several threads."""

    def __init__(
        self, whole: ReadFile, pieces: Iterable[Piece], url: str, requests: Callable[[], dict[str, int]] | None = None
    ) -> None:
        """`requests` counts what a server was asked for."""
        self.url = url
        self._whole = whole
        self._requests = requests
        self._pieces = {piece.name: piece for piece in pieces}
        self._closed = False
        _storages.add(self)

    def __repr__(self) -> str:
        return f"FlatStorage({self.url!r})"

    def _require_open(self, name: str) -> None:
        if self._closed:
            raise BasinClosed(f"the storage at {self.url!r} is closed, or was opened before a fork", object=name)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _piece(self, name: str, operation: str) -> Piece:
        self._require_open(checked_name(name))
        piece = self._pieces.get(name)
        if piece is None:
            raise ObjectMissing(f"{self.url} holds no {name}", object=name, operation=operation)
        return piece

    def open(self, name: str) -> ReadFile:
        return PieceFile(self._whole, self._piece(name, "open"))

    def read_file(self, name: str, size_max: int) -> bytes:
        """As the port says; a file that is read whole has its hash, or another reading of it has."""
        piece = self._piece(name, "read")
        file = PieceFile(self._whole, piece)
        data = file.read(0, min(piece.size, size_max))
        if piece.size > size_max or blake3(data).digest() == piece.hash:
            return data
        again = file.read_again(0, piece.size)
        if again is None or blake3(again).digest() != piece.hash:
            text = f"{name} is not what was exported: restore {self.url} from a copy"
            raise ChecksumMismatch(text, object=name, offset=0)
        return again

    def exists(self, name: str) -> bool:
        self._require_open(checked_name(name))
        return name in self._pieces

    def list(self, folder: str) -> _Names:
        return sorted(rest for rest in self._below(folder) if "/" not in rest)

    def list_folders(self, folder: str) -> _Names:
        return sorted({rest.partition("/")[0] for rest in self._below(folder) if "/" in rest})

    def _below(self, folder: str) -> _Names:
        self._require_open(checked_folder(folder))
        start = f"{folder}/" if folder else ""
        return [name[len(start) :] for name in self._pieces if name.startswith(start)]

    def boot_id(self) -> bytes:
        """As the port says: nothing here can be lost that was not synced."""
        return bytes(_BOOT_ID_SIZE)

    def writable(self) -> bool:
        return False

    def requests(self) -> dict[str, int]:
        return self._requests() if self._requests is not None else {}

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._whole.close()

    # --- what nobody can do here ------------------------------------------------------------------------------------

    def _refuse(self, operation: str, name: str) -> NoReturn:
        raise ReadOnly(f"{operation} {name!r}: {self.url} is one flat file, which is only read", object=name)

    def create(self, name: str) -> AppendFile:
        self._refuse("create", name)

    def append_to(self, name: str, offset: int) -> AppendFile:
        self._refuse("append_to", name)

    def put_if_absent(self, name: str, data: bytes) -> None:
        self._refuse("put_if_absent", name)

    def link(self, source: str, target: str) -> None:
        self._refuse("link", source)

    def delete(self, name: str) -> None:
        self._refuse("delete", name)

    def sync_folder(self, folder: str) -> None:
        self._refuse("sync_folder", folder)

    def reserve(self, name: str, size: int) -> None:
        self._refuse("reserve", name)

    def lock(self, name: str) -> LockFile:
        self._refuse("lock", name)

    def _abandon(self) -> None:
        """In a forked child: close what was inherited. A remote file has seen to itself."""
        self._closed = True
        if isinstance(self._whole, LocalReadFile):
            self._whole.abandon()


_storages: weakref.WeakSet[FlatStorage] = weakref.WeakSet()


def _abandon_all() -> None:
    for storage in list(_storages):
        storage._abandon()


os.register_at_fork(after_in_child=_abandon_all)
