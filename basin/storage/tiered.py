"""`TieredStorage`: one storage over two roots: `data/` lies below the second one, everything else below the first.

Invariants:

- A name is of one root, by its first folder alone; so nothing but a file of `data/` ever asks the second root.
- Both are of the same kind: files that grow, or objects. What is asked of the whole (boot id, conditional creation,
  the object store for the log) is asked of the first.

Owns both: closing it closes them. Imports its neighbours.
"""

# The methods' contracts are the port's (D102).

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from basin.errors import BasinError, InvalidArgument
from basin.storage.objects import ByteRange, Readiness
from basin.storage.protocol import AppendFile, Extent, LockFile, ReadFile, Storage

DATA_FOLDER: Final = "data"

_Names: TypeAlias = list[str]  # In the class below, `list` is a method.
_Bodies: TypeAlias = list[bytes | BasinError]


class TieredStorage(Storage):
    """`hot` for all names but those below `data/`, which are `cold`'s. Safe for several threads."""

    def __init__(self, hot: Storage, cold: Storage) -> None:
        """Raises `InvalidArgument` where one has growing files and the other objects."""
        if (hot.objects is None) != (cold.objects is None):
            text = f"{hot.url} and {cold.url} cannot hold one basin: both are folders of a disk, or both are buckets"
            raise InvalidArgument(text, option="data_url")
        self.url = hot.url
        self.objects = hot.objects
        self.hot = hot
        self.cold = cold

    def __repr__(self) -> str:
        return f"TieredStorage({self.hot!r}, {self.cold!r})"

    def _of(self, name: str) -> Storage:
        """The root of a file or folder."""
        return self.cold if name.partition("/")[0] == DATA_FOLDER else self.hot

    # --- writing ----------------------------------------------------------------------------------------------------

    def create(self, name: str) -> AppendFile:
        return self._of(name).create(name)

    def append_to(self, name: str, offset: int) -> AppendFile:
        return self._of(name).append_to(name, offset)

    def link(self, source: str, target: str) -> None:
        root = self._of(source)
        if root is not self._of(target):
            raise InvalidArgument(f"link {source!r}: {target!r} lies below another root", object=source)
        root.link(source, target)

    def put_if_absent(self, name: str, data: bytes) -> None:
        self._of(name).put_if_absent(name, data)

    def delete(self, name: str) -> None:
        self._of(name).delete(name)

    def delete_many(self, names: Sequence[str]) -> None:
        for root in (self.hot, self.cold):
            of_root = [name for name in names if self._of(name) is root]
            if of_root:
                root.delete_many(of_root)

    def sync_folder(self, folder: str) -> None:
        self._of(folder).sync_folder(folder)

    def reserve(self, name: str, size: int) -> None:
        self._of(name).reserve(name, size)

    def lock(self, name: str) -> LockFile:
        return self._of(name).lock(name)

    def require_create_only(self) -> None:
        """As the port says; no file of `data/` is created under a condition."""
        self.hot.require_create_only()

    # --- reading ----------------------------------------------------------------------------------------------------

    def open(self, name: str) -> ReadFile:
        return self._of(name).open(name)

    def open_known(self, extent: Extent) -> ReadFile:
        return self._of(extent.name).open_known(extent)

    def read_file(self, name: str, size_max: int) -> bytes:
        return self._of(name).read_file(name, size_max)

    def exists(self, name: str) -> bool:
        return self._of(name).exists(name)

    def read_ranges(self, wanted: Sequence[ByteRange]) -> _Bodies:
        found: dict[int, bytes | BasinError] = {}
        for root in (self.hot, self.cold):
            rows = [row for row, one in enumerate(wanted) if self._of(one.name) is root]
            if rows:
                found |= zip(rows, root.read_ranges([wanted[row] for row in rows]), strict=True)
        return [found[row] for row in range(len(wanted))]

    def prefetch(self, extents: Sequence[Extent]) -> None:
        for root in (self.hot, self.cold):
            of_root = [extent for extent in extents if self._of(extent.name) is root]
            if of_root:
                root.prefetch(of_root)

    def readiness(self, name: str) -> Readiness:
        return self._of(name).readiness(name)

    def restore(self, name: str, *, days: int, tier: str) -> None:
        self._of(name).restore(name, days=days, tier=tier)

    # --- folders ----------------------------------------------------------------------------------------------------

    def list(self, folder: str) -> _Names:
        return self._of(folder).list(folder)

    def list_folders(self, folder: str) -> _Names:
        found = self._of(folder).list_folders(folder)
        if folder:
            return found
        return sorted({*found, *(one for one in self.cold.list_folders("") if one == DATA_FOLDER)})

    # --- the whole --------------------------------------------------------------------------------------------------

    def boot_id(self) -> bytes:
        return self.hot.boot_id()

    def writable(self) -> bool:
        return self.hot.writable() and self.cold.writable()

    def requests(self) -> dict[str, int]:
        cold = self.cold.requests()
        return {kind: count + cold[kind] for kind, count in self.hot.requests().items()}

    def close(self) -> None:
        try:
            self.hot.close()
        finally:
            self.cold.close()
