"""What tests of restoring are made of: rows by hand, contents in memory, a target that records what needs privilege."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from basin.errors import ContentNotFound
from basin.format.tree import Entry, RowKind, order_of
from basin.layers.snapshots.attributes import Attributes, encode_attributes
from basin.layers.snapshots.restore import RestoreOptions, RestoreReport, restore
from basin.layers.snapshots.target import At, Target
from basin.terms import ContentKey

WHEN_NS = 1_600_000_000_123_456_789
PART_SIZE = 4 << 20


class MemoryContents:
    """Contents by key, as `db.blobs` gives them; counts what it was asked for. `broken`: keys that cannot be read."""

    are_remote = False

    def __init__(self) -> None:
        self.stored: dict[bytes, bytes] = {}
        self.broken: dict[bytes, Exception] = {}
        self.batches: list[int] = []
        self.read_size = 0
        self._lock = threading.Lock()

    def put(self, content: bytes) -> bytes:
        key = blake3(content).digest()
        self.stored[key] = content
        return key

    def get_many(self, addresses: Iterable[ContentKey], /) -> list[bytes]:
        found = [self._get(one.digest) for one in addresses]
        with self._lock:
            self.batches.append(len(found))
        return found

    def _get(self, key: bytes) -> bytes:
        if key in self.broken:
            raise self.broken[key]
        if key not in self.stored:
            raise ContentNotFound("not stored", content_key=key)
        return self.stored[key]

    def open(self, address: ContentKey, /) -> io.BytesIO:
        contents = self

        class Counted(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                piece = super().read(size)
                contents.read_size += len(piece)
                return piece

        return Counted(self._get(address.digest))

    def parts(self, address: ContentKey, /) -> list[tuple[ContentKey, int]]:
        content = self._get(address.digest)
        pieces = [content[at : at + PART_SIZE] for at in range(0, len(content), PART_SIZE)]
        return [(ContentKey(blake3(piece).digest()), len(piece)) for piece in pieces]


class Rows:
    """Rows of a tree, made by hand, and given in the order of trees. Names are not checked."""

    def __init__(self) -> None:
        self.contents = MemoryContents()
        self.entries: list[Entry] = []
        self.inode = 1000

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self.entries, key=lambda one: (order_of(one.parent), one.name)))

    def add(
        self,
        path: str | bytes,
        kind: RowKind,
        *,
        size: int = 0,
        key: bytes | None = None,
        plain: bool = False,
        parent: bytes | None = None,
        **attributes: Any,
    ) -> Entry:
        """A row; `plain`: without metadata. `parent`: where the path cannot be taken apart."""
        self.inode += 1
        path = os.fsencode(path)
        above, _, name = path.rpartition(b"/") if parent is None else (parent, b"", path)
        mine: dict[str, Any] = {"mtime_ns": WHEN_NS, "ctime_ns": 0, "inode": self.inode, "mode": 0o644}
        mine |= {"uid": os.getuid(), "gid": os.getgid()} | attributes
        meta = b"" if plain else encode_attributes(Attributes(**mine))
        self.entries.append(Entry(above, name, kind, size, 0, key, meta))
        return self.entries[-1]

    def directory(self, *paths: str | bytes, **attributes: Any) -> None:
        for path in paths:
            self.add(path, RowKind.DIRECTORY, **{"mode": 0o755} | attributes)

    def file(self, path: str | bytes, content: bytes = b"content", **attributes: Any) -> Entry:
        key = self.contents.put(content) if content else None
        return self.add(path, RowKind.FILE, size=len(content), key=key, **attributes)

    def link(self, path: str | bytes, target: bytes, **attributes: Any) -> None:
        self.add(path, RowKind.LINK, target=target, mode=0o777, **attributes)

    def restore(self, path: Path, *, target: Target | None = None, tables: Any = None, **options: Any) -> RestoreReport:
        return restore(
            self, self.contents, os.fsencode(path), RestoreOptions(**options), tables, target=target or Target()
        )


class RecordingTarget(Target):
    """A target that records what needs privilege, and does not do it: owners, devices, extended attributes.

    `refused` are the names of methods that fail, as they do for who has no privilege. A device stands as a fifo, and is
    seen as the device.
    """

    def __init__(self, *refused: str) -> None:
        self.refused = set(refused)
        self.calls: list[tuple[Any, ...]] = []
        self.owners: dict[int, tuple[int, int]] = {}
        self.devices: dict[int, tuple[int, int]] = {}
        self.attributes: dict[int, dict[bytes, bytes]] = {}

    def names_of(self, method: str) -> list[str]:
        """What a method was called for."""
        return [call[1] for call in self.calls if call[0] == method]

    def _record(self, method: str, at: At, *values: Any) -> int:
        """The inode."""
        where = at if isinstance(at, bytes) else b"/proc/self/fd/%d" % at
        self.calls.append((method, Path(os.fsdecode(os.readlink(where))).name, *values))  # noqa: PTH115  # of bytes
        if method in self.refused:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return os.stat(where).st_ino  # noqa: PTH116  # of bytes

    def chown(self, at: At, uid: int, gid: int) -> None:
        self.owners[self._record("chown", at, uid, gid)] = (uid, gid)

    def chmod(self, at: At, mode: int) -> None:
        self._record("chmod", at, mode)
        super().chmod(at, mode)

    def set_xattr(self, at: At, name: bytes, value: bytes) -> None:
        self.attributes.setdefault(self._record("set_xattr", at, name, value), {})[name] = value

    def remove_xattr(self, at: At, name: bytes) -> None:
        del self.attributes[self._record("remove_xattr", at, name)][name]

    def xattrs(self, at: At) -> list[bytes]:
        return list(self.attributes.get(self.stat(at).st_ino, {}))

    def xattr(self, at: At, name: bytes) -> bytes:
        return self.attributes[self.stat(at).st_ino][name]

    def make_node(self, folder: int, name: bytes, *, mode: int, device: tuple[int, int]) -> None:
        if not stat.S_ISCHR(mode) and not stat.S_ISBLK(mode):
            super().make_node(folder, name, mode=mode, device=device)
            return
        self.calls.append(("make_node", name, mode, device))
        if "make_node" in self.refused:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        os.mkfifo(name, 0o600, dir_fd=folder)
        inode = os.stat(name, dir_fd=folder).st_ino  # relative to a descriptor
        self.devices[inode] = (stat.S_IFMT(mode), os.makedev(*device))

    def _seen(self, found: os.stat_result) -> os.stat_result:
        """As it would be, had everything been done that was recorded."""
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        values = list(found[:10])
        values[4:6] = self.owners.get(found.st_ino, (found.st_uid, found.st_gid))
        if found.st_ino in self.devices:
            kind, fields["st_rdev"] = self.devices[found.st_ino]
            values[0] = kind | stat.S_IMODE(found.st_mode)
        return os.stat_result(values, fields)

    def look(self, folder: int, name: bytes) -> os.stat_result | None:
        found = super().look(folder, name)
        return None if found is None else self._seen(found)

    def stat(self, at: At) -> os.stat_result:
        return self._seen(super().stat(at))

    @contextmanager
    def pin(self, folder: int, name: bytes) -> Iterator[tuple[At, os.stat_result]]:
        with super().pin(folder, name) as (at, found):
            yield at, self._seen(found)


def told(report: RestoreReport) -> dict[str, str]:
    """Problems by path."""
    return {one.path: one.error for one in report.problems}


def descriptors() -> int:
    """How many this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def below(folder: Path) -> list[str]:
    """All paths in a folder, no link followed."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
