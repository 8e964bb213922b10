"""`SimulatedDisk`: a disk in memory that remembers what a power cut could do to it.

The rules of POSIX, read as badly as they allow:

- A file's contents and length are durable once the file was synced, and not before. Until then each 512-byte sector
  that was written may hold its durable bytes, the newest, or any version between; a file may have any length it went
  through; where the length survives and the bytes do not, there are zeros.
- A directory entry (of a file or folder: made, linked, removed) is durable once its folder was synced; each entry by
  itself, in any order, and independently of the file's contents.
- `sync_folder` makes durable the folder's entries, and of its parents only the entries that lead to it.
- A failed sync (`lose_unsynced`) leaves sectors that a later sync does not write any more.

Every change is an `Effect`. Effects can be recorded and applied again to another disk; `basin.testing.crash` enumerates
what is left of a disk after a power cut. `DiskImage` is such a state: names, file contents, folders.

Imports the names' rules only; `basin.testing.simulated` makes a storage of it.
"""

# The methods' contracts are the port's.

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

import xxhash

from basin.storage.naming import folders_above, parent_of

SECTOR_SIZE: Final = 512


def sector_digest(index: int, data: bytes) -> int:
    """What sector `index` of a file adds to the file's digest."""
    return xxhash.xxh3_128_intdigest(data, seed=index)


def size_digest(size: int) -> int:
    """What the length of a file adds to its digest: a sector of zeros is not the same as none."""
    return xxhash.xxh3_128_intdigest(size.to_bytes(8, "little"), seed=1 << 63)


class FileImage:
    """One file's contents, never changed. The digest is a sum over the sectors; the bytes are joined on demand.

    `base` holds the bytes of which `size` count (followed by zeros, if it is shorter); `patches`, as (offset, bytes),
    are laid over it.
    """

    __slots__ = ("_base", "_content", "_entry_digests", "_patches", "digest", "size")

    def __init__(self, size: int, digest: int, base: bytes, patches: tuple[tuple[int, bytes], ...] = ()) -> None:
        self.size = size
        self.digest = digest
        self._base = base
        self._patches = patches
        self._content: bytes | None = None
        self._entry_digests: dict[str, int] = {}

    @classmethod
    def of(cls, content: bytes) -> FileImage:
        """The image of a file that holds `content`."""
        sectors = range(0, len(content), SECTOR_SIZE)
        total = sum(sector_digest(at // SECTOR_SIZE, content[at : at + SECTOR_SIZE]) for at in sectors)
        return cls(len(content), total + size_digest(len(content)), content)

    @property
    def content(self) -> bytes:
        """The file's bytes."""
        if self._content is None:
            if not self._patches and len(self._base) == self.size:
                self._content = self._base
            else:
                built = bytearray(self._base[: self.size].ljust(self.size, b"\0"))
                for offset, data in self._patches:
                    built[offset : offset + len(data)] = data
                self._content = bytes(built)
        return self._content

    def entry_digest(self, name: str) -> int:
        """What this file under `name` adds to the digest of a disk."""
        found = self._entry_digests.get(name)
        if found is None:
            found = xxhash.xxh3_128_intdigest(self.digest.to_bytes(32, "little") + name.encode())
            self._entry_digests[name] = found
        return found


def folder_digest(name: str) -> int:
    """What the folder `name` adds to the digest of a disk."""
    return xxhash.xxh3_128_intdigest(b"folder " + name.encode())


class DiskImage:
    """A state of a disk: files by name (one object under two names is one file with two names), folders, a digest."""

    __slots__ = ("digest", "files", "folders")

    def __init__(self, files: dict[str, FileImage], folders: frozenset[str], digest: int | None = None) -> None:
        self.files = files
        self.folders = folders
        if digest is None:
            digest = sum(file.entry_digest(name) for name, file in files.items()) + sum(map(folder_digest, folders))
        self.digest = digest

    @classmethod
    def of(cls, contents: Mapping[str, bytes]) -> DiskImage:
        """The image of a disk with these files and the folders they need."""
        folders = {folder for name in contents for folder in folders_above(name)}
        return cls({name: FileImage.of(content) for name, content in contents.items()}, frozenset(folders))

    def contents(self) -> dict[str, bytes]:
        """The bytes of every file, by name."""
        return {name: self.files[name].content for name in sorted(self.files)}

    def with_content(self, name: str, content: bytes | None) -> DiskImage:
        """This image with other bytes in one file, or (`None`) without it."""
        files = dict(self.files)
        if content is None:
            files.pop(name, None)
        else:
            files[name] = FileImage.of(content)
        return DiskImage(files, self.folders)


class Effect(NamedTuple):
    """One change of a disk. Files are meant by `number` (in order of creation): a name may be gone or shared."""

    kind: str
    name: str = ""
    target: str = ""
    number: int = -1
    offset: int = 0
    data: bytes = b""

    def __str__(self) -> str:
        parts = [self.kind, self.name, self.target]
        if self.number >= 0:
            parts.append(f"file {self.number}")
        if self.kind in ("write", "extend"):
            parts.append(f"at {self.offset}, {len(self.data)} bytes")
        return " ".join(filter(None, parts))


class Inode:
    """A file on the disk, and what of it is not durable.

    `pending` has for each sector written since the last sync its versions, the durable one first (shorter than a
    sector, or empty, where the durable file ended before). `sizes` are the lengths since then, the durable one first.
    """

    __slots__ = (
        "_content",
        "_image",
        "holder",
        "holder_thread",
        "lost",
        "name",
        "number",
        "pending",
        "sizes",
        "variants",
    )

    def __init__(self, number: int, name: str, image: FileImage) -> None:
        self.number = number
        self.name = name
        self.pending: dict[int, list[bytes]] = {}
        self.lost: set[int] = set()
        self.sizes = [image.size]
        self.holder: object | None = None  # the lock file object that holds the lock
        self.holder_thread = 0
        self.variants: list[FileImage] | None = None  # Kept by basin.testing.crash until the next change.
        self._image: FileImage | None = image
        self._content: bytes | bytearray | None = None

    @property
    def size(self) -> int:
        return self.sizes[-1]

    @property
    def dirty(self) -> bool:
        """Whether a power cut may leave anything but the newest contents."""
        return bool(self.pending) or len(self.sizes) > 1

    def image(self) -> FileImage:
        """The newest contents."""
        if self._image is None:
            self._image = FileImage.of(bytes(self._readable()))
        return self._image

    def _readable(self) -> bytes | bytearray:
        if self._content is None:
            self._content = self.image().content
        return self._content

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._readable()[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        content = self._readable()
        if not isinstance(content, bytearray):
            self._content = content = bytearray(content)
        sectors = range(offset // SECTOR_SIZE, -(-(offset + len(data)) // SECTOR_SIZE))
        for sector in sectors:
            if sector not in self.pending:
                self.pending[sector] = [bytes(content[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE])]
        content[offset : offset + len(data)] = data
        for sector in sectors:
            self.pending[sector].append(bytes(content[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE]))
        self.lost.difference_update(sectors)
        if len(content) > self.sizes[-1]:
            self.sizes.append(len(content))
        self._changed()

    def extend(self, size: int) -> None:
        """Grow to `size` with zeros that are part of the allocation, and so are never anything else."""
        self._content = bytearray(self._readable()).ljust(size, b"\0")
        self.sizes.append(size)
        self._changed()

    def sync(self) -> None:
        self.pending = {sector: versions for sector, versions in self.pending.items() if sector in self.lost}
        self.sizes = self.sizes[:1] + self.sizes[-1:] if self.pending else self.sizes[-1:]
        self.variants = None

    def lose(self) -> None:
        self.lost.update(self.pending)

    def _changed(self) -> None:
        self._image = None
        self.variants = None


class _Folder:
    """The value of a folder's directory entry."""


FOLDER: Final = _Folder()

Entry: TypeAlias = Inode | _Folder | None
"""What a name stands for; `None` is "absent"."""


class SimulatedDisk:
    """A disk, shared by any number of `SimulatedStorage`s as by processes. Safe for several threads.

    `capacity` bounds the bytes in all files together (`OutOfSpace` beyond). While `record()` is on, `effects` grows.
    """

    def __init__(self, *, boot: int = 1, capacity: int | None = None) -> None:
        self.boot = boot
        self.capacity = capacity
        self.effects: list[Effect] = []
        self.acknowledged = 0
        self.names: dict[str, Inode] = {}
        self.folders: set[str] = set()
        self.pending_entries: dict[str, list[Entry]] = {}
        self.changed = threading.Condition(threading.RLock())
        self._inodes: list[Inode] = []
        self._recording = False

    @classmethod
    def from_image(cls, image: DiskImage, *, boot: int = 2, capacity: int | None = None) -> SimulatedDisk:
        """A disk that holds `image`, all of it durable, on a machine started the `boot`-th time."""
        disk = cls(boot=boot, capacity=capacity)
        disk.folders = set(image.folders)
        inodes: dict[int, Inode] = {}
        for name, file in image.files.items():
            inode = inodes.get(id(file))
            if inode is None:
                inode = inodes[id(file)] = Inode(len(disk._inodes), name, file)
                disk._inodes.append(inode)
            disk.names[name] = inode
        return disk

    @property
    def boot_id(self) -> bytes:
        """16 bytes that differ between a disk and its image after a power cut."""
        return self.boot.to_bytes(16, "big")

    def record(self) -> None:
        """Begin to remember effects."""
        self._recording = True

    def acknowledge(self) -> None:
        """Note that the script told its caller that something is durable."""
        self.apply(Effect("acknowledge"))

    def apply(self, effect: Effect) -> None:
        """Let `effect` happen here, and record it."""
        with self.changed:
            _APPLY[effect.kind](self, effect)
            if self._recording:
                self.effects.append(effect)

    def kill_image(self) -> DiskImage:
        """What the next process finds if this one is killed: everything written so far (same boot, no locks)."""
        with self.changed:
            return DiskImage({name: inode.image() for name, inode in self.names.items()}, frozenset(self.folders))

    def inode(self, number: int) -> Inode:
        """The file with this number."""
        return self._inodes[number]

    def used(self) -> int:
        """Bytes in all files that have a name."""
        return sum(inode.size for inode in set(self.names.values()))

    def create(self, name: str) -> Inode:
        """A new file and the folders it needs; the name must be free."""
        with self.changed:
            self.make_folders(name)
            self.apply(Effect("create", name))
            return self.names[name]

    def make_folders(self, name: str) -> None:
        """Make the folders that lead to `name`."""
        for folder in folders_above(name):
            if folder not in self.folders:
                self.apply(Effect("make_folder", folder))

    def _set_entry(self, name: str, new: Entry, old: Entry) -> None:
        history = self.pending_entries.pop(name, [old])  # Entered again: the order is that of the latest change.
        history.append(new)
        self.pending_entries[name] = history

    def _make_folder(self, effect: Effect) -> None:
        self.folders.add(effect.name)
        self._set_entry(effect.name, FOLDER, None)

    def _create(self, effect: Effect) -> None:
        inode = Inode(len(self._inodes), effect.name, FileImage.of(b""))
        self._inodes.append(inode)
        self.names[effect.name] = inode
        self._set_entry(effect.name, inode, None)

    def _link(self, effect: Effect) -> None:
        inode = self.names[effect.name]
        self.names[effect.target] = inode
        self._set_entry(effect.target, inode, None)

    def _delete(self, effect: Effect) -> None:
        self._set_entry(effect.name, None, self.names.pop(effect.name))

    def _write(self, effect: Effect) -> None:
        self.inode(effect.number).write(effect.offset, effect.data)

    def _extend(self, effect: Effect) -> None:
        self.inode(effect.number).extend(effect.offset)

    def _sync(self, effect: Effect) -> None:
        self.inode(effect.number).sync()

    def _lose(self, effect: Effect) -> None:
        self.inode(effect.number).lose()

    def _sync_folder(self, effect: Effect) -> None:
        for name in [name for name in self.pending_entries if parent_of(name) == effect.name]:
            del self.pending_entries[name]
        for folder in (*folders_above(effect.name), effect.name):
            self.pending_entries.pop(folder, None)

    def _acknowledge(self, _effect: Effect) -> None:
        self.acknowledged += 1


_APPLY: Final = {
    "make_folder": SimulatedDisk._make_folder,
    "create": SimulatedDisk._create,
    "link": SimulatedDisk._link,
    "delete": SimulatedDisk._delete,
    "write": SimulatedDisk._write,
    "extend": SimulatedDisk._extend,
    "sync": SimulatedDisk._sync,
    "lose": SimulatedDisk._lose,
    "sync_folder": SimulatedDisk._sync_folder,
    "acknowledge": SimulatedDisk._acknowledge,
}
