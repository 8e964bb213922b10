"""A folder on the local disk that remembers pieces of a bucket's immutable objects: metadata and indexes.

Invariants:

- A piece is returned only if its checksum, key and start are right; whatever else lies under its name is removed and
  counts as a miss. The checksum finds accidents, not malice: who reads a bucket verifies what it hands out, and a piece
  comes from here as it would come from there, with its cipher and its tags.
- The cache never fails its caller: no `OSError` leaves. What it cannot read is a miss; what it cannot write is dropped,
  and writing pauses for a minute.
- Every file and folder may vanish at any moment, also while in use; folders are made again.
- A piece appears whole, by a rename in its own folder. Nothing is synced: what a power cut tears is found by its
  checksum.
- No path depends on what is stored but through a hash, no link inside the folder is followed, and only files whose
  names this module makes are evicted. Folders have mode 0700, files 0600.
- Nothing is kept open between two calls and no lock is held, not even among threads. So processes share a folder, and
  the handle works on in a forked child.

```
<2 hex digits>/<30 hex digits>      a piece, named by the hash of its key and start; mtime is its last use, to a minute
<2 hex digits>/<16 hex digits>.tmp  a piece or tally that is being written, or was when its process died
tally                               its length is the count of blocks held: a put appends as many bytes as it takes
                                    blocks, so that all processes share one total without a lock. Too high rather than
                                    too low; counted anew when it passes the limit, is missing or is empty
```

A piece, little-endian:

| offset | size | field | meaning |
|---|---|---|---|
| 0 | 4 | magic | `BsnP` |
| 4 | 2 | version | 1 |
| 6 | 2 | key size | bytes of the key |
| 8 | 8 | start | where the piece begins in its object |
| 16 | 8 | size | bytes of the piece |
| 24 | … | key | UTF-8 |
| … | … | data | the piece |
| end - 16 | 16 | checksum | XXH3-128, seed 0, of everything before |

Another layout needs another version only: an old piece is then foreign, and goes.

Imports `basin.errors` and its neighbours in `basin.storage`. It asks no bucket and knows no grain.
"""

# Descriptors and exact modes are the subject here, not paths (PTH).
# ruff: noqa: PTH100, PTH101, PTH102, PTH103, PTH108, PTH120

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from basin.errors import InvalidArgument
from basin.storage.local_files import Descriptor

BLOCK_SIZE: Final = 4096
"""A piece is counted as the blocks that it takes on the disk, because that is what fills up."""

PIECE_SIZE_MAX: Final = 64 << 20
"""Longer pieces are not kept. It bounds the memory that a planted file can cost."""

_HEADER: Final = struct.Struct("<4sHHQQ")
_MAGIC: Final = b"BsnP"
_VERSION: Final = 1
_CHECKSUM_SIZE: Final = 16
_KEY_SIZE_MAX: Final = 2**16 - 1
_OFFSET_MAX: Final = 2**63 - 1

_TOUCH_INTERVAL_S: Final = 60
_TEMPORARY_AGE_MAX_S: Final = 300  # Writing a piece takes milliseconds. To sweep one of a stopped process does no harm.
_PAUSE_S: Final = 60.0
_TALLY_ATTEMPTS: Final = 10
_LIST_ATTEMPTS: Final = 5
_FULL_SHARE_AFTER_EVICTION: Final = 0.9  # Each count of the folder thus pays for a tenth of the cache in new pieces.

_FILE_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700

# O_NOFOLLOW and O_NONBLOCK: a planted link leads nowhere, a planted FIFO does not hang.
_SAFE: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_READ: Final = os.O_RDONLY | _SAFE
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE
_TALLY: Final = os.O_RDWR | os.O_CREAT | os.O_APPEND | _SAFE
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | _SAFE

_SHARD_NAME: Final = re.compile(r"[0-9a-f]{2}")
_OWN_FILE_NAME: Final = re.compile(r"[0-9a-f]{30}|[0-9a-f]{16}\.tmp")
_TEMPORARY_SUFFIX: Final = ".tmp"
_TALLY_SHARD: Final = "00"  # where a new tally is written: a folder that is swept


class _Place(NamedTuple):
    """Where a piece lies: a file in one of the 256 shards."""

    shard: str
    file: str


class _Held(NamedTuple):
    """One file of the cache as a count of the folder finds it. Sorts by last use."""

    used_ns: int
    blocks: int
    place: _Place


class DiskCache:
    """Pieces of immutable objects below `folder`, which take at most `size_max` bytes of the disk.

    `folder` is made with the first `put`; it belongs to the cache, and may be deleted at any time. Processes and
    threads may share it; the smallest `size_max` among them rules. Beyond the bound lies only what is being written at
    this moment: one piece for each thread of each process. Safe for several threads; the counters may then miss a few.
    """

    def __init__(self, folder: Path, size_max: int) -> None:
        if size_max < 0:
            raise InvalidArgument(f"a cache cannot hold {size_max} bytes", size_max=size_max)
        self._root = os.path.abspath(folder)
        self.size_max = size_max
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self._closed = False
        self._paused_until = 0.0  # on the clock `time.monotonic`
        self._evicting_process = 0  # the id of the process in which a thread makes room; a forked child has another

    def __repr__(self) -> str:
        return f"DiskCache({self._root!r}, {self.size_max})"

    def get(self, key: str, start: int, stop: int) -> bytes | None:
        """Bytes `start` to `stop` of the object `key`, or None.

        Served from a piece that was put with exactly this `start` and is at least as long: where the object ends before
        `stop`, ask for its end. Reads and checks the whole piece.
        """
        key_bytes = _checked_key(key, start)
        if not start <= stop <= _OFFSET_MAX:
            raise InvalidArgument(f"not a range: {start} to {stop}", start=start, stop=stop)
        data = None if self._closed else self._look_up(key_bytes, start)
        if data is None or len(data) < stop - start:
            self.misses += 1
            return None
        self.hits += 1
        return bytes(data[: stop - start])

    def _look_up(self, key: bytes, start: int) -> memoryview | None:
        """The piece, or None. What is in its place and is no such piece is removed."""
        shard, file = _place_of(key, start)
        try:
            folder = Descriptor(os.open(f"{self._root}/{shard}", _FOLDER))
            descriptor = Descriptor(os.open(file, _READ, dir_fd=folder))
            status = os.fstat(descriptor)
            data = decode_piece(_read_piece(descriptor, status), key, start)
        except OSError:
            return None
        if data is None:
            _remove(file, folder)
        elif _is_older(status.st_mtime_ns, _TOUCH_INTERVAL_S):
            with contextlib.suppress(OSError):
                os.utime(descriptor)
        return data

    def put(self, key: str, start: int, data: bytes) -> None:
        """Keep `data`, which begins at `start` of the object `key`, if that can be done.

        A piece that is there already and begins with `data` stays; any other is replaced. Cost: a look at that piece,
        and one small file; after a tenth of `size_max`, also a count of the whole folder (5 to 15 microseconds and 300
        bytes of memory a piece), during which other threads' pieces are dropped.
        """
        key_bytes = _checked_key(key, start)
        if self._closed or time.monotonic() < self._paused_until or self._evicting_process == os.getpid():
            return
        piece = encode_piece(key_bytes, start, data)
        if len(data) > PIECE_SIZE_MAX or _blocks(len(piece)) * BLOCK_SIZE > self.size_max:
            return
        held = self._look_up(key_bytes, start)
        if held is not None and held[: len(data)] == data:
            return
        try:
            self._store(_place_of(key_bytes, start), piece)
        except (FileNotFoundError, IsADirectoryError):
            return  # Somebody deletes the folder just now, or put a folder of his own in the piece's place.
        except OSError:
            self._paused_until = time.monotonic() + _PAUSE_S

    @property
    def size(self) -> int:
        """Bytes of the disk that are taken, as far as they are counted: rather too many. A multiple of `BLOCK_SIZE`."""
        try:
            with contextlib.suppress(FileNotFoundError):
                if blocks := os.lstat(self._tally_path).st_size:
                    return BLOCK_SIZE * blocks
            return BLOCK_SIZE * sum(held.blocks for held in self._survey())
        except OSError:
            return 0

    def close(self) -> None:
        """From now on every `get` is a miss and every `put` is dropped. There is nothing to release."""
        self._closed = True

    @property
    def _tally_path(self) -> str:
        return f"{self._root}/tally"

    def _store(self, place: _Place, piece: bytes) -> None:
        folder = self._open_shard(place.shard)
        temporary = os.urandom(8).hex() + _TEMPORARY_SUFFIX
        blocks = _blocks(len(piece))
        try:
            _write_file(temporary, folder, piece)
            tally = self._reserve(blocks)
            os.rename(temporary, place.file, src_dir_fd=folder, dst_dir_fd=folder)
            if not os.fstat(tally).st_nlink:
                self._add_to_tally(blocks)  # It was replaced, perhaps by one who looked before these were added.
        except BaseException:
            _remove(temporary, folder)
            raise

    def _open_shard(self, shard: str) -> Descriptor:
        """Open a shard, which is made if need be; a file or link in its place is removed."""
        path = f"{self._root}/{shard}"
        try:
            return Descriptor(os.open(path, _FOLDER))
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self._root), exist_ok=True)
            _make_folder(self._root)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            os.unlink(path)
        _make_folder(path)
        return Descriptor(os.open(path, _FOLDER))

    def _reserve(self, blocks: int) -> Descriptor:
        """Add the blocks of a temporary file to the tally, make room for them, and return the tally that has them.

        After the file was written, so that whoever counts the folder finds all that was reserved; before it is a piece,
        so that the pieces of all who write at once fit. Raises `OSError` (ENOSPC) if there is no room to be made.
        """
        tally, counted = self._add_to_tally(blocks)
        if counted > blocks and counted * BLOCK_SIZE <= self.size_max:
            return tally
        self._evicting_process = os.getpid()
        try:
            return self._make_room(tally, blocks)
        finally:
            self._evicting_process = 0

    def _add_to_tally(self, blocks: int) -> tuple[Descriptor, int]:
        """Append to the tally; return it with its length. What was appended to one just replaced is appended again."""
        for _ in range(_TALLY_ATTEMPTS):
            tally = self._open_tally()
            _write_all(tally, bytes(blocks))
            status = os.fstat(tally)
            if status.st_nlink:
                return tally, status.st_size
        raise FileNotFoundError(errno.ENOENT, "the tally vanishes all the time")

    def _open_tally(self) -> Descriptor:
        try:
            return Descriptor(os.open(self._tally_path, _TALLY, _FILE_MODE))
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ELOOP):
                raise
        _remove(self._tally_path)
        return Descriptor(os.open(self._tally_path, _TALLY, _FILE_MODE))

    def _make_room(self, tally: int, wanted: int) -> Descriptor:
        """Count the folder, evict until it is nine tenths full, and set the tally right.

        The `wanted` blocks are in both already. Several processes may do so at once: they choose nearly the same
        victims, and one that is gone is no failure.
        """
        before = os.fstat(tally).st_size
        held = sorted(self._survey())
        limit = self.size_max // BLOCK_SIZE
        kept = sum(one.blocks for one in held)
        victims, freed = _chosen(held, kept - int(limit * _FULL_SHARE_AFTER_EVICTION))
        self._evict(victims)
        kept -= freed
        new = self._replace_tally(tally, kept - before)
        if new is None:
            new, _ = self._add_to_tally(wanted)  # Another process counted meanwhile, perhaps without these.
        if kept > limit:
            raise OSError(errno.ENOSPC, "the cache is full of pieces that are being written")
        return new

    def _replace_tally(self, old: int, change: int) -> Descriptor | None:
        """Put a tally in the place of `old` that is longer by `change`, or shorter; None if somebody else does so.

        Not by truncating it: one who counted for long would not see that others did so twice meanwhile, and would undo
        what they added. The new one is written under a name that only one can create, made of the number of the old
        one's inode, so that nobody replaces what is not `old` any more. Left behind by a process that died just there,
        it is swept like every temporary file; until then the folder is counted at each put.
        """
        status = os.fstat(old)
        folder = self._open_shard(_TALLY_SHARD)
        temporary = f"{status.st_ino:016x}{_TEMPORARY_SUFFIX}"
        try:
            new = Descriptor(os.open(temporary, _TALLY | os.O_EXCL, _FILE_MODE, dir_fd=folder))
        except FileExistsError:
            return None
        try:
            status = os.fstat(old)
            os.ftruncate(new, max(0, status.st_size + change))
            if not status.st_nlink:
                _remove(temporary, folder)
                return None
            os.rename(temporary, self._tally_path, src_dir_fd=folder)
        except BaseException:
            _remove(temporary, folder)
            raise
        _write_all(new, bytes(max(0, os.fstat(old).st_size - status.st_size)))  # what was added in the last moment
        return new

    def _survey(self) -> Iterator[_Held]:
        """Every file of the cache, in no order. What vanishes meanwhile is left out."""
        try:
            with os.scandir(self._root) as entries:
                shards = [entry.name for entry in entries if _SHARD_NAME.fullmatch(entry.name)]
        except FileNotFoundError:
            return
        future_ns = time.time_ns() + _TOUCH_INTERVAL_S * 10**9
        for shard in shards:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                folder = Descriptor(os.open(f"{self._root}/{shard}", _FOLDER))
                for file, status in _files_of(folder):
                    # A clock that once was ahead must not keep its pieces for ever: they count as the oldest.
                    used_ns = status.st_mtime_ns if status.st_mtime_ns <= future_ns else 0
                    yield _Held(used_ns, _blocks(status.st_size), _Place(shard, file))

    def _evict(self, victims: list[_Place]) -> None:
        by_shard: defaultdict[str, list[str]] = defaultdict(list)
        for shard, file in victims:
            by_shard[shard].append(file)
        for shard, files in by_shard.items():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                folder = Descriptor(os.open(f"{self._root}/{shard}", _FOLDER))
                for file in files:
                    self._evict_file(file, folder)

    def _evict_file(self, file: str, folder: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file, dir_fd=folder)
            self.evictions += not file.endswith(_TEMPORARY_SUFFIX)


def encode_piece(key: bytes, start: int, data: bytes) -> bytes:
    """The file of a piece. Pure."""
    header = _HEADER.pack(_MAGIC, _VERSION, len(key), start, len(data))
    checksum = xxhash.xxh3_128(header + key)
    checksum.update(data)
    return b"".join((header, key, data, checksum.digest()))


def decode_piece(piece: bytes, key: bytes, start: int) -> memoryview | None:
    """The data of the piece that was encoded with this `key` and `start`; None for anything else. Pure."""
    if len(piece) < _HEADER.size + len(key) + _CHECKSUM_SIZE:
        return None
    body = memoryview(piece)[:-_CHECKSUM_SIZE]
    data = body[_HEADER.size + len(key) :]
    if piece[: _HEADER.size] != _HEADER.pack(_MAGIC, _VERSION, len(key), start, len(data)):
        return None
    if body[_HEADER.size : _HEADER.size + len(key)] != key:
        return None
    return data if xxhash.xxh3_128_digest(body) == piece[-_CHECKSUM_SIZE:] else None


def _checked_key(key: str, start: int) -> bytes:
    """The bytes of `key`; raises `InvalidArgument` if they or `start` do not fit into a piece."""
    encoded = key.encode("utf-8", "surrogatepass")
    if len(encoded) > _KEY_SIZE_MAX or not 0 <= start <= _OFFSET_MAX:
        raise InvalidArgument(f"not a piece: {key[:100]!r} at {start}", start=start)
    return encoded


def _place_of(key: bytes, start: int) -> _Place:
    digest = hashlib.blake2b(start.to_bytes(8, "little") + key, digest_size=16).hexdigest()
    return _Place(digest[:2], digest[2:])


def _blocks(size: int) -> int:
    return -(-size // BLOCK_SIZE)


def _is_older(time_ns: int, age_s: int) -> bool:
    """Whether a time of a file lies further away than `age_s`; also in the future, where a wrong clock left it."""
    return abs(time.time_ns() - time_ns) > age_s * 10**9


def _chosen(held: list[_Held], excess: int) -> tuple[list[_Place], int]:
    """What to evict of `held`, which is sorted, and the blocks that this frees: every temporary file that was left
    behind, and the pieces that were not used for longest until `excess` blocks are free.
    """
    victims: list[_Place] = []
    freed = 0
    for used_ns, blocks, place in held:
        if place.file.endswith(_TEMPORARY_SUFFIX):
            goes = _is_older(used_ns, _TEMPORARY_AGE_MAX_S)
        else:
            goes = freed < excess
        if goes:
            victims.append(place)
            freed += blocks
    return victims, freed


def _files_of(folder: int) -> list[tuple[str, os.stat_result]]:
    """The cache's own files in an open shard, with what the file system says of them.

    A temporary file that vanishes meanwhile has perhaps become a piece that is not in the list: so look again.
    """
    found: list[tuple[str, os.stat_result]] = []
    for _ in range(_LIST_ATTEMPTS):
        found.clear()
        complete = True
        with os.scandir(folder) as entries:
            for entry in entries:
                if not _OWN_FILE_NAME.fullmatch(entry.name) or entry.is_dir(follow_symlinks=False):
                    continue
                try:
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    complete &= not entry.name.endswith(_TEMPORARY_SUFFIX)
        if complete:
            break
    return found


def _read_piece(descriptor: int, status: os.stat_result) -> bytes:
    """The bytes of a file; none if it is no file or cannot be a piece, however long it is."""
    size_max = _HEADER.size + _KEY_SIZE_MAX + PIECE_SIZE_MAX + _CHECKSUM_SIZE
    if not stat.S_ISREG(status.st_mode) or status.st_size > size_max:
        return b""
    return os.read(descriptor, status.st_size)


def _write_file(file: str, folder: int, data: bytes) -> None:
    descriptor = Descriptor(os.open(file, _CREATE, _FILE_MODE, dir_fd=folder))
    os.fchmod(descriptor, _FILE_MODE)  # The umask may have taken bits away.
    _write_all(descriptor, data)


def _write_all(descriptor: int, data: bytes) -> None:
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, data[written:])


def _make_folder(path: str) -> None:
    """Make a folder that may be there."""
    try:
        os.mkdir(path, _FOLDER_MODE)
    except FileExistsError:
        return
    os.chmod(path, _FOLDER_MODE)  # The umask may have taken bits away.


def _remove(path: str, folder: int | None = None) -> None:
    """Remove a file or an empty folder, if that can be done."""
    with contextlib.suppress(OSError):
        try:
            os.unlink(path, dir_fd=folder)
        except (IsADirectoryError, PermissionError):  # The latter is how some systems refuse to unlink a folder.
            os.rmdir(path, dir_fd=folder)
