"""Writing files of a snapshot into the target: contents fetched together, holes, and each file in one step.

Invariants:

- A file gets its name when it is whole, with its metadata. In a directory that the restore itself has made, where
  nothing can have that name, it has it from the start: if the restore is killed, its size or time tells.
- A file that fails leaves nothing behind, and what was there stays.
- With `verify`, a file is read back and hashed before it takes the place of another. What is read may come from the
  system's memory, not the disk.
- Parts that are all zeros are not read; their keys tell.

Batches run on several threads at once: while one waits for contents, others write. Imported by `restore`.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat as modes
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from blake3 import blake3

from basin.errors import ContentNotFound, CorruptionError, GrainNotReady, InvalidArgument, ObjectMissing
from basin.format.tree import Entry
from basin.layers.snapshots.attributes import HAS_HOLES, Attributes
from basin.layers.snapshots.metadata import Findings, Metadata
from basin.layers.snapshots.target import PRIVATE_FILE, Folder, Folders, Target, require_room
from basin.terms import ContentKey

SMALL_SIZE: Final = 4 << 20
"""Files up to this size are one grain each, and are fetched together; larger ones are streamed."""
HOLE_SIZE: Final = 4096
"""Zeros are left out in blocks of this size: what file systems allocate."""

_PLAIN_MODE: Final = 0o666
"""Of a file without metadata, less what the user's umask takes."""
_PIECE_SIZE: Final = 1 << 20
_ZEROS: Final = bytes(HOLE_SIZE)
_PIECE_OF_ZEROS: Final = memoryview(bytes(_PIECE_SIZE))
UNREADABLE: Final = (CorruptionError, ContentNotFound, GrainNotReady, ObjectMissing)
"""What ails one content, and leaves the others."""


class ContentReader(Protocol):
    """A content, opened."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, none at the end only."""
        ...

    def seek(self, offset: int, /) -> int:
        """Go to an offset from the beginning."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Contents(Protocol):
    """Where contents come from: `db.blobs`, or what stands in for it. Used by several threads at once."""

    @property
    def are_remote(self) -> bool:
        """Whether they come over a network."""
        ...

    def get_many(self, addresses: Iterable[ContentKey], /) -> list[bytes]:
        """Contents in the order asked for."""
        ...

    def open(self, address: ContentKey, /) -> ContentReader:
        """A large content."""
        ...

    def parts(self, address: ContentKey, /) -> list[tuple[ContentKey, int]]:
        """Its parts in order, with their lengths."""
        ...


class FirstLink:
    """The first of several hard links. `identity` is the device and inode of the file, once it is there."""

    __slots__ = ("identity", "left", "name", "parent")

    def __init__(self, parent: bytes, name: bytes, left: int) -> None:
        """`left`: how many other links there may be."""
        self.parent = parent
        self.name = name
        self.left = left
        self.identity: tuple[int, int] | None = None


class Job(NamedTuple):
    """A file to be written. `is_new`: its directory was made by us, so that nothing can have its name.

    `agrees`: what is there agrees in size and time, and is written only if its content turns out to be another.
    """

    entry: Entry
    attributes: Attributes | None
    is_new: bool = False
    agrees: bool = False
    first: FirstLink | None = None


class Written(NamedTuple):
    """What became of a batch: files written, their bytes, how many agreed, and how many were read back or compared."""

    files: int
    size: int
    unchanged: int
    verified: int


class TemporaryNames:
    """Names that nothing else has, to be replaced by final ones. Left over only if the process is killed."""

    def __init__(self) -> None:
        self._prefix = b".basin-restore-" + os.urandom(8).hex().encode() + b"-"
        self._numbers = itertools.count()

    def next(self) -> bytes:
        """Another one."""
        return self._prefix + b"%d" % next(self._numbers)


class FileWriter:
    """Writes batches of files. Safe for many threads."""

    def __init__(
        self,
        contents: Contents,
        target: Target,
        folders: Folders,
        metadata: Metadata,
        findings: Findings,
        *,
        verify: bool,
        sparse: bool,
        durable: bool,
    ) -> None:
        """`durable`: sync each file; the caller does not ask for that if it syncs everything at the end."""
        self._contents = contents
        self._target = target
        self._folders = folders
        self._metadata = metadata
        self._findings = findings
        self._verify = verify
        self._sparse = sparse
        self._durable = durable
        self._names = TemporaryNames()
        self._lock = threading.Lock()
        self._streaming = threading.Lock()
        """Held while a large file is written: each is fetched on all cores, and some MiB at a time."""
        self.done_size = 0
        """Bytes written or compared so far, also of files that are not finished."""

    def write(self, jobs: Sequence[Job]) -> Written:
        """Write files whose contents fit into memory together, or one large file.

        What fails is noted, and the rest goes on; raises what concerns all: `OutOfSpace`, `StorageError`.
        """
        jobs, agreed = self._without_agreed(jobs)
        fetched = self._fetch([job.entry for job in jobs if job.entry.size <= SMALL_SIZE])
        count = size = 0
        for folder, job in self._in_folders(jobs):
            try:
                self._write_one(folder, job, fetched)
                count += 1
                size += job.entry.size
            except OSError as error:
                require_room(error)
                self._findings.problem(job.entry.path, error)
            except UNREADABLE as error:
                self._findings.problem(job.entry.path, error)
        return Written(count, size, agreed, count + agreed if self._verify else 0)

    def _in_folders(self, jobs: Iterable[Job]) -> Iterator[tuple[Folder, Job]]:
        """Each job with its directory, which stays open until the next one."""
        for parent, together in itertools.groupby(jobs, key=_parent_of):
            try:
                folder = self._folders.take(parent)
            except (OSError, InvalidArgument) as error:
                for job in together:
                    self._findings.problem(job.entry.path, error)
                continue
            try:
                for job in together:
                    yield folder, job
            finally:
                self._folders.release(folder)

    # --- what is there ----------------------------------------------------------------------------------------------

    def _without_agreed(self, jobs: Sequence[Job]) -> tuple[list[Job], int]:
        """The jobs that are to be written, and how many are not, because what is there holds the same."""
        if not any(job.agrees for job in jobs):
            return list(jobs), 0
        left = [job for job in jobs if not job.agrees]
        for folder, job in self._in_folders([job for job in jobs if job.agrees]):
            try:
                if not (self._holds(folder.descriptor, job.entry) and self.settle(folder.descriptor, job)):
                    left.append(job)
            except OSError:
                left.append(job)  # What cannot be read is written anew.
        left.sort(key=_parent_of)
        return left, len(jobs) - len(left)

    def _holds(self, folder: int, entry: Entry) -> bool:
        descriptor = self._target.open_file(folder, entry.name)
        try:
            holds = self._hash(descriptor, entry.size) == entry.key or entry.size == 0
        finally:
            os.close(descriptor)
        if holds:
            self.advance(entry.size)
        return holds

    def settle(self, folder: int, job: Job) -> bool:
        """Mend the metadata of a file that is there and agrees; False if it has to be written anew instead.

        That is so if somebody changed it meanwhile, or owns it; and if its metadata differs, but it has other names:
        they may lie outside of the target.
        """
        try:
            return self._settle(folder, job)
        except PermissionError:
            return False

    def _settle(self, folder: int, job: Job) -> bool:
        entry, attributes = job.entry, job.attributes
        with self._target.pin(folder, entry.name) as (at, found):
            if not modes.S_ISREG(found.st_mode) or found.st_size != entry.size:
                return False
            if attributes is not None and self._metadata.differs(at, attributes, kind=entry.kind, found=found):
                if found.st_nlink > 1:
                    return False
                self._metadata.apply(at, attributes, kind=entry.kind, path=entry.path, found=found)
            if job.first is not None:
                job.first.identity = (found.st_dev, found.st_ino)
        return True

    # --- writing ----------------------------------------------------------------------------------------------------

    def _fetch(self, entries: Iterable[Entry]) -> dict[bytes, bytes | Exception]:
        """Contents by key, each once; in place of one that cannot be read, why."""
        keys = list({entry.key: None for entry in entries if entry.key is not None})
        if not keys:
            return {}
        addresses = ContentKey.of_many(keys)
        try:
            return dict(zip(keys, self._contents.get_many(addresses), strict=True))
        except UNREADABLE:
            return {key: self._fetch_one(address) for key, address in zip(keys, addresses, strict=True)}

    def _fetch_one(self, address: ContentKey) -> bytes | Exception:
        try:
            return self._contents.get_many([address])[0]
        except UNREADABLE as error:
            return error

    def _write_one(self, folder: Folder, job: Job, fetched: Mapping[bytes, bytes | Exception]) -> None:
        """Write a file, and put it in its place. Flat, because it is what a restore spends its time with."""
        target, entry, attributes, inside = self._target, job.entry, job.attributes, folder.descriptor
        content = _content_of(entry, fetched) if entry.size <= SMALL_SIZE else None
        mode = _PLAIN_MODE if attributes is None else PRIVATE_FILE
        name = entry.name
        try:
            if not job.is_new:
                name = self._names.next()
            descriptor = target.create_file(inside, name, mode=mode, is_read=self._verify)
        except FileExistsError:
            name = self._names.next()
            descriptor = target.create_file(inside, name, mode=mode, is_read=self._verify)
        try:
            try:
                found = target.stat(descriptor)
                self._fill(descriptor, entry, attributes, content)
                if attributes is not None:
                    inherits = self._gives_acls(folder)
                    self._metadata.apply(
                        descriptor, attributes, kind=entry.kind, path=entry.path, found=found, inherits=inherits
                    )
                if self._verify and entry.size and self._hash(descriptor, entry.size) != entry.key:
                    raise OSError(errno.EIO, "what was read back is not what was written")
                if self._durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if name is not entry.name:
                target.replace(inside, entry.name, source=name)
        except BaseException:
            with suppress(OSError):
                target.remove_file(inside, name)
            raise
        if job.first is not None:
            job.first.identity = (found.st_dev, found.st_ino)

    def _gives_acls(self, folder: Folder) -> bool:
        """Whether new files in a directory may have access control lists from the start; asked once for each."""
        if folder.gives_acls is None:
            folder.gives_acls = self._metadata.gives_acls(folder.descriptor)
        return folder.gives_acls

    def _fill(self, descriptor: int, entry: Entry, attributes: Attributes | None, content: bytes | None) -> None:
        has_holes = self._sparse and attributes is not None and bool(attributes.flags & HAS_HOLES)
        if content is None:
            with self._streaming:
                self._fill_large(descriptor, entry, has_holes=has_holes)
        elif has_holes:
            _write_data(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
            self.advance(len(content))
        else:
            _write_all(descriptor, content, 0)
            self.advance(len(content))

    def _fill_large(self, descriptor: int, entry: Entry, *, has_holes: bool) -> None:
        if entry.key is None:
            raise CorruptionError("the snapshot says no content of the file")
        address = ContentKey(entry.key)
        parts = self._contents.parts(address)
        if sum(length for _, length in parts) != entry.size:
            raise CorruptionError("the content has another size than the snapshot says")
        zeros = _zero_parts(parts) if self._sparse else ()
        write = _write_data if has_holes else _write_all
        reader = self._contents.open(address)
        try:
            at = read_at = 0
            for number, (_, length) in enumerate(parts):
                stop = at + length
                if number in zeros:
                    at = stop
                    self.advance(length)
                    continue
                if read_at != at:
                    reader.seek(at)
                while at < stop:
                    piece = reader.read(min(stop - at, _PIECE_SIZE))
                    if not piece:
                        raise CorruptionError("the content ends early")
                    write(descriptor, piece, at)
                    at += len(piece)
                    self.advance(len(piece))
                read_at = at
        finally:
            reader.close()
        os.ftruncate(descriptor, entry.size)

    def _hash(self, descriptor: int, size: int) -> bytes:
        """The content key of what a file holds; of some other content, if it has not this size."""
        hasher = blake3()
        at = 0
        while piece := os.pread(descriptor, _PIECE_SIZE, at):
            hasher.update(piece)
            at += len(piece)
        return hasher.digest() if at == size else b""

    def advance(self, size: int) -> None:
        """Count bytes that are done."""
        with self._lock:
            self.done_size += size


def _parent_of(job: Job) -> bytes:
    return job.entry.parent


def _content_of(entry: Entry, fetched: Mapping[bytes, bytes | Exception]) -> bytes:
    if entry.key is None:
        content: bytes | Exception = b""
    else:
        content = fetched[entry.key]
    if isinstance(content, Exception):
        raise content
    if len(content) != entry.size:
        raise CorruptionError("the content has another size than the snapshot says")
    return content


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    done = os.pwrite(descriptor, content, offset)
    while done < len(content):
        done += os.pwrite(descriptor, memoryview(content)[done:], offset + done)


def _write_data(descriptor: int, content: bytes, offset: int) -> None:
    """Write into a new file what is not zero, in its blocks; the caller sets the size of the file."""
    begin = 0
    at = -(offset % HOLE_SIZE)
    while at < len(content):
        block = content[max(at, 0) : at + HOLE_SIZE]
        if block == _ZEROS[: len(block)]:
            if begin < at:
                _write_all(descriptor, content[begin:at], offset + begin)
            begin = at + HOLE_SIZE
        at += HOLE_SIZE
    if begin < len(content):
        _write_all(descriptor, content[begin:], offset + begin)


def _zero_parts(parts: Sequence[tuple[ContentKey, int]]) -> set[int]:
    """The numbers of parts that hold nothing but zeros.

    Only those are asked whose answer is worth hashing that many zeros: zeros are cut at the largest size of parts, a
    power of two, so they repeat, or are as large, or stand at the end.
    """
    counts = Counter(key for key, _ in parts)
    last = len(parts) - 1
    return {
        number
        for number, (key, length) in enumerate(parts)
        if (counts[key] > 1 or number == last or not length & (length - 1)) and key.digest == _key_of_zeros(length)
    }


@lru_cache(maxsize=64)
def _key_of_zeros(length: int) -> bytes:
    hasher = blake3()
    for start in range(0, length, _PIECE_SIZE):
        hasher.update(_PIECE_OF_ZEROS[: length - start])
    return hasher.digest()
