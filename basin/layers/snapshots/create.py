"""Making a snapshot: scan, recognise what is unchanged, read the rest, put it, write the tree.

The way of a file: `scan` finds it in tree order; if the parent snapshot, or the journal of an interrupted backup, has
it with the same size, times and inode, its row is taken from there; else it is read, on threads that run ahead, and put
together with others. Rows go to the tree and to the journal in the order in which they were found.

Invariants:

- A file is read through a descriptor that follows no link, and is what it was when it was found, or is noted.
- Every few seconds, or so many bytes, all that is done is committed; the end of the backup is one batch with the
  document, which also lets go of the journals that the snapshot supersedes.
- Memory: some segments of files, the pages of the tree that are not complete, and the rows since the last commit.
"""

from __future__ import annotations

import grp
import itertools
import os
import pwd
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from basin.engine.basin import Basin, Batch
from basin.errors import BasinError
from basin.format.tree import Entry, RowKind, order_of
from basin.layers.blobs import Blobs
from basin.layers.snapshots.attributes import (
    Attributes,
    attributes_of,
    decode_attributes,
    encode_attributes,
    identity_of,
)
from basin.layers.snapshots.documents import (
    PROBLEMS_MAX,
    Document,
    Problem,
    Statistics,
    encode_document,
    snapshot_name,
    text_of,
)
from basin.layers.snapshots.earlier import Earlier, Known
from basin.layers.snapshots.journal import Beginning, Journal, delete_journal, names
from basin.layers.snapshots.large import LargeFile
from basin.layers.snapshots.patterns import Rules
from basin.layers.snapshots.reading import LARGE_SIZE, Content, has_changed, open_file, read_all
from basin.layers.snapshots.scan import Found, ScanProblem, scan
from basin.layers.tree import BlobStore, TreeWriter
from basin.terms import ContentKey, Ref

JOURNAL_INTERVAL_S: Final = 5.0
JOURNAL_SIZE: Final = 64 << 20
"""Of what was read: whichever comes first."""
_SEGMENT_SIZE: Final = 2 << 20
_SEGMENT_FILES: Final = 512
_SEGMENTS_AHEAD: Final = 2
_LARGE_AHEAD: Final = 16 << 20
"""What of a large file may be read and not stored: a window of two parts, and those on their way."""
_ROWS_TOGETHER: Final = 2048
"""So many rows of what is unchanged are looked up together: a `stat` result takes 700 bytes."""
_JOURNAL_SEGMENTS: Final = 16
"""A journal's interval is at least so many segments, so that what was read ahead is a small part of it."""
_READERS: Final = 2
_FILE: Final = int(RowKind.FILE)
_DIRECTORY: Final = int(RowKind.DIRECTORY)


@dataclass(frozen=True)
class BackupProgress:
    """How far a backup is. Expected numbers are those of the parent snapshot; 0 without one."""

    files: int
    size: int
    read_size: int
    files_expected: int
    size_expected: int
    seconds: float
    current: str


@dataclass(frozen=True)
class BackupOptions:
    """What `snapshots.create` was asked for, beside the paths."""

    rules: Rules
    one_file_system: bool = False
    exclude_caches: bool = False
    dry_run: bool = False
    journal_interval_s: float = JOURNAL_INTERVAL_S
    journal_size: int = JOURNAL_SIZE
    progress: Callable[[BackupProgress], None] | None = None


class _Put(NamedTuple):
    """A small file whose content is stored."""

    key: bytes
    size: int
    meta: bytes
    is_changed: bool


class _Segment:
    """Found files in their order; those whose row is None are to be read, and put. `is_large`: one, to be streamed."""

    __slots__ = ("found", "is_large", "put", "read", "rows", "size")

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.rows: list[Entry | None] = []
        self.size = 0
        self.is_large = False
        self.read: Future[list[Content | OSError]] | None = None
        self.put: Future[list[_Put | OSError]] | None = None

    def to_read(self) -> list[Found]:
        """The files without a row."""
        return [found for found, row in zip(self.found, self.rows, strict=True) if row is None]


class _Large:
    """A large file that is being put, and how far the journal has its parts."""

    def __init__(self, found: Found, source: LargeFile) -> None:
        self._found, self._source = found, source
        self._count = self._start = 0

    def go_on(self) -> Beginning | None:
        """The parts that are stored since this was asked last; None: there are none."""
        parts = self._source.stored[self._count :]
        if not parts:
            return None
        start = self._start
        self._count += len(parts)
        self._start += sum(size for _, size in parts)
        found = self._found
        return Beginning(found.path, identity_of(found.meta), found.stat.st_size, start, parts)


class _JournaledStore(BlobStore):
    """The tree's grains, put with the journal's batch, which also keeps them alive."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(lambda: journal.blobs)
        self._keep = journal.keep

    def put(self, content: bytes, links: Sequence[bytes]) -> bytes:
        key = super().put(content, links)
        self._keep(key)
        return key


class Backup:
    """One backup. `run` does it all."""

    def __init__(
        self, basin: Basin, document: Document, options: BackupOptions, known: Sequence[Known], expected: Statistics
    ) -> None:
        """`known`: earlier backups of the same paths, the most telling first. `expected`: what the last one met."""
        self._basin = basin
        self._document = document
        self._options = options
        self._earlier = [Earlier(one) for one in known]
        self._expected = expected
        self._begin = time.monotonic()
        self._problems: list[Problem] = []
        self._counts: dict[str, int] = dict.fromkeys(
            [name for name, kind in Statistics.__annotations__.items() if kind == "int"], 0
        )
        self._users: set[int] = set()
        self._groups: set[int] = set()
        self._current = b""
        self._journal: Journal | None = None
        self._committed = 0.0, 0
        """When the journal was committed last, and how much had been read then."""
        self._large: _Large | None = None
        self._segment_size = min(_SEGMENT_SIZE, options.journal_size // _JOURNAL_SEGMENTS)

    # --- the whole --------------------------------------------------------------------------------------------------

    def run(self, paths: Sequence[bytes], superseded: Sequence[str]) -> Document:
        """Do it; returns the document of the complete snapshot. `superseded`: interrupted ones that it replaces."""
        if self._options.dry_run:
            for segment in self._segments(paths, lambda: Blobs(self._basin)):
                self._count_dry(segment)
            return self._finished("")
        self._put_document(self._basin, self._document, [])
        self._basin.commit()
        journal = Journal(self._basin, self._document.id)
        writer = TreeWriter(_JournaledStore(journal))
        before = self._written()
        try:
            self._write(self._segments(paths, lambda: journal.blobs), journal, writer)
            tree = writer.finish()
            written = self._written()
            self._counts["new_size"] = written[0] - before[0]
            self._counts["stored_size"] = written[1] - before[1]
            document = self._finished(tree.hex())

            def finish(batch: Batch) -> None:
                self._put_document(batch, document, [tree])
                delete_journal(batch, document.id)
                for identity in superseded:
                    names(batch).delete(snapshot_name(identity))
                    delete_journal(batch, identity)

            journal.finish(finish)
        except BaseException as error:
            journal.abandon(error)
            raise
        return document

    def put_stream(self, name: bytes, source: Any) -> Document:
        """A snapshot of one file whose content `source` gives."""
        journal = Journal(self._basin, self._document.id)
        reader = _Counting(source, self._advance)
        try:
            key = journal.blobs.put(reader, root=False)
            size = reader.size
            now = time.time_ns()
            meta = encode_attributes(Attributes(now, now, 0, 0o600, os.getuid(), os.getgid()))
            writer = TreeWriter(_JournaledStore(journal))
            writer.add(Entry(b"", name, _FILE, size, 0, key.digest if size else None, meta))
            tree = writer.finish()
            self._counts |= {"files": 1, "size": size, "new_files": 1, "read_files": 1, "read_size": size}
            document = self._finished(tree.hex())
            journal.finish(lambda batch: self._put_document(batch, document, [tree]))
        except BaseException as error:
            journal.abandon(error)
            raise
        return document

    def _put_document(self, where: Basin | Batch, document: Document, links: Sequence[bytes]) -> None:
        key = Blobs(where).put(encode_document(document), [ContentKey(link) for link in links], root=False, hot=True)
        names(where).put(snapshot_name(document.id), Ref(key))

    def _finished(self, tree: str) -> Document:
        return replace(
            self._document,
            tree=tree,
            end_ns=time.time_ns(),
            owners={str(number): name for number in sorted(self._users) if (name := _user_name(number))},
            groups={str(number): name for number in sorted(self._groups) if (name := _group_name(number))},
            problems=tuple(self._problems),
            statistics=Statistics(**self._counts, seconds=round(time.monotonic() - self._begin, 3)),
        )

    def _written(self) -> tuple[int, int]:
        """Bytes of new contents that the handle has written, and what they take."""
        written = self._basin.stats()["written"]
        return written["bytes_new"], written["bytes_stored"]

    # --- finding ----------------------------------------------------------------------------------------------------

    def _segments(self, paths: Sequence[bytes], blobs: Callable[[], Blobs]) -> Iterator[_Segment]:
        """All that is found, in tree order, in portions; what is unchanged, and stored no more, is to be read."""
        together: list[_Segment] = []
        count = 0
        for segment in self._portions(self._looked_at(paths)):
            together.append(segment)
            count += len(segment.found)
            if segment.size or count >= _ROWS_TOGETHER:
                yield from self._with_missing(together, blobs())
                together, count = [], 0
        yield from self._with_missing(together, blobs())

    def _with_missing(self, segments: Sequence[_Segment], blobs: Blobs) -> Iterator[_Segment]:
        """The segments, with what is stored no more among what is to be read."""
        rows = itertools.chain.from_iterable(segment.rows for segment in segments)
        keys = ContentKey.of_many([row.key for row in rows if row is not None and row.key is not None])
        missing = {key.digest for key in blobs.missing(keys)}
        if not missing:
            yield from segments
            return
        for segment in segments:
            for at, row in enumerate(segment.rows):
                if row is not None and row.key in missing:
                    segment.rows[at] = None
                    self._counts["unchanged_files"] -= 1
                    self._counts["changed_files"] += 1
            yield from self._portions(zip(segment.found, segment.rows, strict=True))

    def _looked_at(self, paths: Sequence[bytes]) -> Iterator[tuple[Found, Entry | None]]:
        """What is found, and its row if it need not be read."""
        options = self._options
        found = scan(
            paths,
            options.rules,
            one_file_system=options.one_file_system,
            exclude_caches=options.exclude_caches,
            on_problem=self._scan_problem,
        )
        for directory in found:
            order = order_of(directory[0].parent)
            for one in directory:
                yield one, self._row_of(one, order)

    def _portions(self, pairs: Iterable[tuple[Found, Entry | None]]) -> Iterator[_Segment]:
        segment = _Segment()
        for found, row in pairs:
            if row is None and found.stat.st_size > LARGE_SIZE:
                if segment.found:
                    yield segment
                segment = _Segment()
                segment.is_large = True
            segment.found.append(found)
            segment.rows.append(row)
            if row is None:
                segment.size += found.stat.st_size
            if segment.size >= self._segment_size or len(segment.found) >= _SEGMENT_FILES or segment.is_large:
                yield segment
                segment = _Segment()
        if segment.found:
            yield segment

    def _row_of(self, found: Found, order: bytes) -> Entry | None:
        """The row of what need not be read; None: a file that is new or has changed."""
        self._users.add(found.stat.st_uid)
        self._groups.add(found.stat.st_gid)
        counts = self._counts
        if found.kind != _FILE:
            counts["directories" if found.kind == _DIRECTORY else "others"] += 1
            return Entry(found.parent, found.name, found.kind, 0, 0, None, found.meta)
        if not found.stat.st_size:
            counts["unchanged_files"] += 1
            return Entry(found.parent, found.name, _FILE, 0, 0, None, found.meta)
        for earlier in self._earlier:
            row = earlier.row_of(found, order)
            if row is not None:
                counts["unchanged_files"] += 1
                return row
        was_there = any(earlier.find(order, found.name) is not None for earlier in self._earlier)
        counts["changed_files" if was_there else "new_files"] += 1
        return None

    # --- reading and writing ----------------------------------------------------------------------------------------

    def _write(self, segments: Iterator[_Segment], journal: Journal, writer: TreeWriter) -> None:
        """Put what was found, with files being read ahead of it."""
        self._journal = journal
        self._committed = time.monotonic(), 0
        with (
            ThreadPoolExecutor(_READERS, thread_name_prefix="basin-backup") as readers,
            ThreadPoolExecutor(1, thread_name_prefix="basin-put") as putter,
        ):
            waiting: deque[_Segment] = deque()
            try:
                for segment in self._ahead(segments, waiting, readers):
                    self._begin_put(segment, journal, putter)
                    put = segment.put.result() if segment.put is not None else []
                    # What will have been read before the next commit counts, too.
                    is_due = self._is_due(segment.size + sum(one.size for one in waiting) + 2 * self._segment_size)
                    if waiting and not is_due and not segment.is_large:
                        self._begin_put(waiting[0], journal, putter)
                    for row in self._finish_large(segment) if segment.is_large else self._finish(segment, put):
                        writer.add(row)
                        journal.add(row)
                    self._report()
                    if is_due:
                        self._commit_journal()
            finally:
                for segment in waiting:
                    for future in (segment.read, segment.put):
                        if future is not None:
                            future.cancel()

    def _begin_put(self, segment: _Segment, journal: Journal, putter: ThreadPoolExecutor) -> None:
        """Have the contents of small files put by the journal's batch: nothing is committed before their rows are."""
        read, blobs = segment.read, journal.blobs
        if read is not None and segment.put is None:
            segment.read = None
            segment.put = putter.submit(_put_all, read, blobs)

    def _is_due(self, ahead: int) -> bool:
        """Whether the last commit is so many seconds or bytes ago, with those that are read ahead."""
        then, read_size = self._committed
        since = self._counts["read_size"] - read_size + ahead
        return time.monotonic() - then >= self._options.journal_interval_s or since >= self._options.journal_size

    def _commit_journal(self) -> None:
        """Commit what is done, if this backup has a journal."""
        if self._journal is None:
            return
        if self._large is not None:
            beginning = self._large.go_on()
            if beginning is not None:
                self._journal.add_parts(beginning)
        self._journal.commit()
        self._committed = time.monotonic(), self._counts["read_size"]

    def _beginning_of(self, found: Found) -> list[tuple[ContentKey, int]]:
        """The parts of a large file that an interrupted backup stored: the most that any has."""
        return max((one.beginning_of(found) for one in self._earlier), key=len, default=[])

    def _ahead(
        self, segments: Iterator[_Segment], waiting: deque[_Segment], readers: ThreadPoolExecutor
    ) -> Iterator[_Segment]:
        """The segments, with some behind each being read already."""
        for segment in segments:
            if not segment.is_large and None in segment.rows:
                segment.read = readers.submit(read_all, segment.to_read())
            waiting.append(segment)
            if len(waiting) > _SEGMENTS_AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _finish(self, segment: _Segment, put: Iterable[_Put | OSError]) -> Iterator[Entry]:
        """The rows of a segment in order, after what was read of it is put."""
        results = iter(put)
        for found, row in zip(segment.found, segment.rows, strict=True):
            if row is not None:
                self._count(found, row)
                yield row
                continue
            result = next(results)
            if isinstance(result, OSError):
                self._problem(found.path, _reason(result))
                continue
            key, size, meta, is_changed = result
            row = Entry(found.parent, found.name, _FILE, size, 0, key if size else None, meta)
            self._count_read(found, row, size, changed=is_changed)
            yield row

    def _finish_large(self, segment: _Segment) -> Iterator[Entry]:
        """Stream a large file."""
        found = segment.found[0]
        self._current = found.path
        try:
            descriptor = open_file(found.path)
        except OSError as error:
            self._problem(found.path, _reason(error))
            return
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            before = os.fstat(descriptor)
            source = LargeFile(file, Blobs(self._basin), self._beginning_of(found), self._advance)
            self._large = _Large(found, source)
            try:
                # By the handle: what the journal commits meanwhile is another batch.
                key = Blobs(self._basin).put(source, root=False)
            except OSError as error:
                self._problem(found.path, _reason(error))
                return
            finally:
                self._large = None
            after = os.fstat(descriptor)
        size = source.size
        changed = has_changed(found.stat, before, after, size)
        meta = (
            attributes_of(before, xattrs=decode_attributes(found.meta).xattrs, changed=changed)
            if changed
            else found.meta
        )
        row = Entry(found.parent, found.name, _FILE, size, 0, key.digest if size else None, meta)
        self._count_read(found, row, 0, changed=changed)  # It was counted while it was read.
        yield row

    # --- counting and telling ---------------------------------------------------------------------------------------

    def _count(self, found: Found, row: Entry) -> None:
        self._current = found.path
        if row.kind == _FILE:
            self._counts["files"] += 1
            self._counts["size"] += row.size

    def _count_read(self, found: Found, row: Entry, size: int, *, changed: bool) -> None:
        self._count(found, row)
        self._counts["read_files"] += 1
        self._counts["read_size"] += size
        if changed:
            self._problem(found.path, "changed while it was read")

    def _count_dry(self, segment: _Segment) -> None:
        for found, row in zip(segment.found, segment.rows, strict=True):
            if row is not None:
                self._count(found, row)
            else:
                size = found.stat.st_size
                self._count_read(found, Entry(found.parent, found.name, _FILE, size), size, changed=False)
        self._report()

    def _advance(self, size: int) -> None:
        """So much more of a large file has been read."""
        self._counts["read_size"] += size
        self._report()
        if self._is_due(_LARGE_AHEAD):
            self._commit_journal()

    def _scan_problem(self, problem: ScanProblem) -> None:
        self._problem(problem.path, _reason(problem.error))

    def _problem(self, path: bytes, error: str) -> None:
        self._counts["problems"] += 1
        if len(self._problems) < PROBLEMS_MAX:
            self._problems.append(Problem(text_of(path), error))

    def _report(self) -> None:
        if self._options.progress is None:
            return
        counts = self._counts
        self._options.progress(
            BackupProgress(
                counts["files"],
                counts["size"],
                counts["read_size"],
                self._expected.files,
                self._expected.size,
                time.monotonic() - self._begin,
                text_of(self._current),
            )
        )


def _put_all(read: Future[list[Content | OSError]], blobs: Blobs) -> list[_Put | OSError]:
    """Store what was read; the contents themselves are let go of."""
    contents = read.result()
    keys = iter(blobs.put_many([one.data for one in contents if isinstance(one, Content)], root=False))
    return [
        one if isinstance(one, OSError) else _Put(next(keys).digest, len(one.data), one.meta, one.is_changed)
        for one in contents
    ]


class _Counting:
    """A source that tells how much was read from it."""

    def __init__(self, source: Any, advance: Callable[[int], None]) -> None:
        self._source, self._advance = source, advance
        self.size = 0

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes."""
        data: bytes = self._source.read(size)
        self.size += len(data)
        self._advance(len(data))
        return data


def _reason(error: BaseException) -> str:
    if isinstance(error, BasinError):
        return error.message
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _user_name(number: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return ""


def _group_name(number: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(number).gr_name
    return ""
