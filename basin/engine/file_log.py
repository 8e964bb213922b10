"""The log on a local disk: append-only segments, one short lock, and a watermark of what is durable.

Invariants:

- Nothing is overwritten or truncated but the watermark in `log/lock`, which is never replaced.
- While the watermark's boot id is the machine's, nothing behind it counts: readers ignore it. A handle that appends for
  the first time makes whole records behind it durable and moves it; whatever else is there is cut by the header of a
  new segment, and so is everything behind a write or sync that failed.
- After a boot (or without a watermark) the files are scanned, and the next appender opens a new segment. A tail is torn
  only if nothing behind the first bad byte is a record, and the watermark does not lie behind it; else it is rot.
- `append` returns only after the record is durable and the watermark says so.
- In the place of a record that was damaged, and that a checkpoint holds, a repair leaves a stub, in a new copy of the
  segment.

It knows frames and positions; what a record means is `state`'s business.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, Final

from basin.engine.log import LOG_FOLDER, SKIPPED, START, Cursor, Entry, Log
from basin.engine.object_log import Folded, behind_stubs, stub_entry
from basin.errors import (
    BasinError,
    CorruptionError,
    ObjectMissing,
    ReadOnly,
    StorageUnavailable,
    TruncatedStratum,
)
from basin.format.layout import (
    FRAME_FLAG_UNSYNCED,
    FRAME_SIZE_MAX,
    MIB,
    RECORD_MAGIC,
    SEGMENT_HEADER_SIZE,
    STUB_MAGIC,
    WATERMARK_SIZE,
)
from basin.format.record import FrameCipher, chain_hash, decode_frame_header, decode_record
from basin.format.scan import find_frames
from basin.format.segment import (
    SegmentHeader,
    Watermark,
    decode_segment_header,
    decode_watermark,
    encode_segment_header,
    encode_watermark,
)
from basin.storage.protocol import AppendFile, LockFile, ReadFile, Storage
from basin.terms import Position

LOCK_NAME: Final = "log/lock"
SEGMENT_SIZE: Final = 16 * MIB
"""A segment ends after this many bytes: the unit in which old log is removed."""
_READ_MAX: Final = SEGMENT_SIZE + FRAME_SIZE_MAX
"""A segment is no larger, whatever its last record is."""


def segment_name(segment: int) -> str:
    """Path of a segment."""
    return f"{LOG_FOLDER}/{segment:020d}.log"


class FileLog(Log):
    """Reads and appends the records of one basin. One thread at a time; `exclusive` keeps other processes out."""

    looks_first = True

    def __init__(self, storage: Storage, cipher: FrameCipher, basin_id: bytes, lock_timeout_s: float) -> None:
        self._storage = storage
        self._cipher = cipher
        self._basin_id = basin_id
        self._timeout_s = lock_timeout_s
        self._lock: LockFile | None = None
        self._lock_held = False
        self._held_mark: Watermark | None = None
        self._left_behind: Watermark | None = None
        self._tail_adopted = False
        self._appender: AppendFile | None = None
        self._appender_segment = 0
        self._reader: ReadFile | None = None
        self._reader_segment = 0
        self._boot_id = storage.boot_id()

    # --- where the log ends -----------------------------------------------------------------------------------------

    def segments(self) -> list[int]:
        """Numbers of the segments that are there, ascending."""
        numbers = []
        for name in self._storage.list(LOG_FOLDER):
            stem, dot, suffix = name.partition(".")
            if suffix == "log" and dot and len(stem) == 20 and stem.isdigit():
                numbers.append(int(stem))
        return numbers

    def header(self, segment: int) -> SegmentHeader:
        """The verified header of a segment; its errors name the file."""
        return self.header_in(segment, self._storage.read_file(segment_name(segment), SEGMENT_HEADER_SIZE))

    def header_in(self, segment: int, data: bytes) -> SegmentHeader:
        """`header` for bytes that are in hand."""
        name = segment_name(segment)
        try:
            header = decode_segment_header(data)
        except CorruptionError as error:
            raise type(error)(f"{name}: {error.message}", object=name, offset=0) from error
        if header.segment != segment or header.basin_id != self._basin_id:
            raise CorruptionError(f"{name} belongs elsewhere", object=name, offset=0)
        return header

    def watermark(self) -> Watermark | None:
        """What `log/lock` says now, if it can be trusted."""
        try:
            if self._lock is not None:
                return decode_watermark(self._lock.read())
            return decode_watermark(self._storage.read_file(LOCK_NAME, WATERMARK_SIZE))
        except (ObjectMissing, TruncatedStratum):
            return None

    def current_watermark(self) -> Watermark | None:
        """The watermark, if it is of this boot: where the log ends. Nobody moves it while we hold the lock."""
        mark = self._held_mark if self._lock_held else self.watermark()
        return mark if mark is not None and mark.boot_id == self._boot_id and mark != self._left_behind else None

    def is_more_behind(self, mark: Watermark) -> bool:
        """Whether bytes lie behind a watermark that may count: not those of a write that is known to have failed."""
        if any(segment > mark.segment for segment in self.segments()):
            return True
        return not mark.cut and self._is_there(mark.segment) and self._size(mark.segment) > mark.offset

    def prepare(self, *, writable: bool) -> None:
        """As the base says. For a handle that only reads: do not believe a watermark with more behind it while nobody
        appends.

        What a writer adopts when it opens, a reader counts without moving the watermark. Takes the lock for a moment,
        and only where there is more: in passing somebody is about to move the watermark, else nobody is.
        """
        if writable:
            with self.exclusive():
                return  # Adopts what lies behind a watermark that was left behind.
        mark = self.current_watermark()
        if mark is None or not self.is_more_behind(mark):
            return
        lock = self._storage.lock(LOCK_NAME)
        try:
            lock.acquire(self._timeout_s)
            if self.watermark() == mark and self.is_more_behind(mark):
                self._left_behind = mark
        finally:
            lock.close()

    # --- reading ----------------------------------------------------------------------------------------------------

    def follow(self, cursor: Cursor, *, names_from: Position = 0, at_least: Position = 0) -> Iterator[Entry]:
        """The records behind `cursor`, oldest first; one watermark read if there are none.

        Raises `CorruptionError` for rot, naming segment and offset. Records up to `names_from` are of no interest to
        the caller and are skipped without decrypting them. A watermark below `at_least`, which is known to be durable,
        is from before an unclean remount, and is not believed.
        """
        mark = self.current_watermark()
        if mark is not None and mark.position == cursor.position >= at_least:
            return
        yield from self._follow(cursor, mark if mark is None or mark.position >= at_least else None, names_from)

    def _follow(self, cursor: Cursor, mark: Watermark | None, names_from: Position) -> Iterator[Entry]:
        """The records from `cursor` to the watermark, or, without one, to the last that can be read."""
        numbers = [number for number in self.segments() if number >= cursor.segment]
        if not numbers and mark is None and cursor == START:
            return
        last = mark.segment if mark is not None else (numbers[-1] if numbers else 0)
        segment = cursor.segment or (numbers[0] if numbers else 1)
        while segment <= last:
            if segment not in numbers:
                raise CorruptionError(
                    f"{segment_name(segment)} is missing; restore it from a copy",
                    object=segment_name(segment),
                    offset=0,
                )
            header = self.header(segment)
            if segment != cursor.segment:
                if header.first_position > cursor.position + 1:
                    raise CorruptionError(
                        f"{segment_name(segment)} starts at position {header.first_position}, "
                        f"but the log before it ends at {cursor.position}",
                        object=segment_name(segment),
                        offset=0,
                    )
                cursor = Cursor(segment, SEGMENT_HEADER_SIZE, header.first_position - 1)
            end = self._end_of(segment, last, numbers, mark)
            for entry in self._frames(cursor, end, names_from):
                cursor = entry.end
                if entry.position > names_from:
                    yield entry
            segment += 1
        if mark is None:
            self._require_acknowledged(cursor)

    def _require_acknowledged(self, cursor: Cursor) -> None:
        """Raise if the log, whose end was found by scanning, ends before the watermark of an earlier boot.

        Cut between two records, or with its last segment gone, it looks whole. One of this boot came while we scanned.
        """
        mark = self.watermark()
        if mark is None or mark.unsynced or mark.boot_id == self._boot_id:
            return
        if (mark.segment, mark.offset) > (cursor.segment, cursor.offset):
            name = segment_name(mark.segment)
            raise TruncatedStratum(
                f"the log ends at position {cursor.position}, but {mark.position} was acknowledged: {name} is missing "
                "or cut short; restore it from a copy",
                object=name,
                offset=cursor.offset if mark.segment == cursor.segment else 0,
            )

    def _end_of(self, segment: int, last: int, numbers: list[int], mark: Watermark | None) -> int | None:
        """Byte at which `segment` ends; None means: to be found by scanning."""
        if mark is not None and segment == mark.segment:
            return mark.offset
        if segment < last:
            return self.header(segment + 1).previous_end if segment + 1 in numbers else None
        return None

    def _frames(self, cursor: Cursor, end: int | None, names_from: Position) -> Iterator[Entry]:
        """The records of one segment from `cursor` to `end`."""
        name = segment_name(cursor.segment)
        file = self._storage.open(name)
        try:
            size = file.size()
            if end is not None and size < end:
                raise TruncatedStratum(
                    f"{name} has {size} bytes, but {end} were acknowledged; restore it from a copy",
                    object=name,
                    offset=size,
                )
            stop = size if end is None else end
            data = file.read(cursor.offset, stop - cursor.offset) if stop > cursor.offset else b""
        finally:
            file.close()
        at, position = 0, cursor.position
        while at < len(data):
            try:
                header = decode_frame_header(data, at)
                frame = data[at : at + header.size]
                if header.magic == STUB_MAGIC:
                    before = Cursor(cursor.segment, cursor.offset + at, position)
                    entry = stub_entry(self._cipher, name, frame, before, names_from)
                    at, position = entry.end.offset - cursor.offset, entry.position
                    yield entry
                    continue
                if header.magic != RECORD_MAGIC or header.position != position + 1:
                    raise CorruptionError(f"record {header.position} stands where {position + 1} belongs")
                if header.position <= names_from and len(frame) == header.size:
                    record = SKIPPED
                else:
                    record = decode_record(self._cipher.open(frame)[1])
            except CorruptionError as error:
                if end is None and self._is_torn(cursor.segment, cursor.offset + at, data, at, position):
                    return
                raise type(error)(
                    f"{name} at byte {cursor.offset + at}: {error.message}; run `basin check`",
                    object=name,
                    offset=cursor.offset + at,
                ) from error
            at += header.size
            position += 1
            yield Entry(
                position, record, chain_hash(frame), Cursor(cursor.segment, cursor.offset + at, position), header.size
            )

    def _is_torn(self, segment: int, offset: int, data: bytes, at: int, position: Position) -> bool:
        """Whether the bad bytes at `offset` are a write that power loss cut short: nothing behind them ever counted."""
        mark = self.watermark()
        if mark is not None and not mark.unsynced and (mark.segment, mark.offset) > (segment, offset):
            return False
        for found, size in find_frames(data, at):
            try:
                header, payload = self._cipher.open(data[found : found + size])
                decode_record(payload)
            except CorruptionError:
                continue
            if header.position > position and not header.flags & FRAME_FLAG_UNSYNCED:
                return False
        return True

    def keeps(self, cursor: Cursor) -> bool:
        """As the base says: unless a stub follows, which a repair put there."""
        try:
            with contextlib.suppress(CorruptionError):
                next(self.follow(cursor), None)
        except Folded:
            return False
        return cursor.segment in self.segments()

    def oldest(self) -> tuple[Cursor, bytes] | None:
        numbers = self.segments()
        if not numbers:
            return None
        header = self.header(numbers[0])
        return Cursor(numbers[0], SEGMENT_HEADER_SIZE, header.first_position - 1), header.previous_hash

    def hash_at(self, position: Position) -> bytes | None:
        """As the base says. Reads the segment from its start."""
        oldest = self.oldest()
        if oldest is None or position <= oldest[0].position:
            return None
        for entry in self.follow(self.cursor_before(position - 1), names_from=position - 1):
            if entry.position == position:
                return entry.hash
        return None

    def name_of(self, cursor: Cursor) -> str:
        return segment_name(cursor.segment)

    def cursor_before(self, position: Position) -> Cursor:
        """As the base says: the start of a segment, or behind the last stub in it up to `position`."""
        best: Cursor | None = None
        for segment in reversed(self.segments()):
            header = self.header(segment)
            best = Cursor(segment, SEGMENT_HEADER_SIZE, header.first_position - 1)
            if header.first_position <= position + 1:
                data = self._storage.read_file(segment_name(segment), _READ_MAX)[SEGMENT_HEADER_SIZE:]
                return behind_stubs(self._cipher, data, best, position)
        if best is None:
            return START
        raise CorruptionError(f"the log behind position {position} is missing", object=LOG_FOLDER, offset=0)

    # --- appending --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """As the base says: by the log's lock."""
        if self._lock_held:
            yield
            return
        if self._lock is None:
            self._lock = self._storage.lock(LOCK_NAME)
        self._lock.acquire(self._timeout_s)
        try:
            self._held_mark = self.watermark()
            self._lock_held = True
            self._adopt_tail()
            yield
        finally:
            self._lock_held = False
            self._lock.release()

    def _adopt_tail(self) -> None:
        """Once a handle: count the whole records behind the watermark, after making them durable.

        Nobody is appending while we hold the lock, so they are of a writer that died before it moved the watermark, or
        the watermark itself was lost: it is not synced, and a file system that was cut off and mounted again without a
        reboot shows an old one, with acknowledged records behind it. Where a write or sync failed, its writer said so.
        """
        mark = self.current_watermark()
        if self._tail_adopted or mark is None:
            return
        self._tail_adopted = True
        if not self.is_more_behind(mark):
            return
        if not self._is_there(mark.segment):
            self._left_behind = mark  # So old that its segment was removed since: the log is scanned.
            return
        reached = start = Cursor(mark.segment, mark.offset, mark.position)
        for entry in self._follow(start, None, mark.position):
            if entry.end.segment != reached.segment:
                self._sync_old(entry.end.segment)
            reached = entry.end
        while reached.segment + 1 in self.segments():  # Empty ones cut what they follow: nobody may append there again.
            reached = self._start_of_next(reached)
        if reached != start:
            self._sync_old(start.segment)
            self._write_watermark(Watermark(self._boot_id, reached.segment, reached.offset, reached.position))

    def settle(self) -> None:
        """Make records durable that were appended without a sync. Only inside `exclusive`."""
        mark = self.current_watermark()
        if mark is not None and mark.unsynced:
            self._sync_old(mark.segment)
            self._write_watermark(mark._replace(unsynced=False))

    def append(self, cursor: Cursor, frame: bytes, previous_hash: bytes, *, sync: bool = True) -> Cursor | None:
        """Append one frame behind `cursor`, durably; None if the log does not end there (follow it, then try again).

        Only inside `exclusive`. After any error nothing is acknowledged, and the segment is not appended to again.
        """
        if not self._lock_held or self._lock is None:
            raise ReadOnly("the log is appended to only while its lock is held")
        mark = self.current_watermark()
        if mark is not None:
            if mark.position != cursor.position:
                return None
            cursor = Cursor(mark.segment, mark.offset, mark.position)  # Perhaps in a segment that is still empty.
        try:
            file, start = self._open_segment(cursor, previous_hash, mark)
            file.append(frame)
            if sync:
                file.sync()
        except BaseException:
            self._drop_appender()
            mark = self.current_watermark()  # Perhaps that of a segment which this call began.
            if mark is not None:
                self._write_watermark(mark._replace(cut=True))
            raise
        end = Cursor(self._appender_segment, start + len(frame), cursor.position + 1)
        reached = Watermark(self._boot_id, end.segment, end.offset, end.position, not sync)
        self._write_watermark(reached)
        return end

    def _open_segment(self, cursor: Cursor, previous_hash: bytes, mark: Watermark | None) -> tuple[AppendFile, int]:
        """The file whose end is `cursor`, or a new segment that cuts the old one there; and where its end is.

        The handle's own `offset` does not know of what other processes appended.

        Whether a new one is needed depends on the watermark and on file sizes alone, which only grow: an appender that
        dies right after creating a segment has decided what the next one decides too.
        """
        while True:
            fits = mark is not None and SEGMENT_HEADER_SIZE <= cursor.offset < SEGMENT_SIZE
            if fits and self._size(cursor.segment) == cursor.offset:
                if self._appender is None or self._appender_segment != cursor.segment:
                    self._drop_appender()
                    self._appender = self._storage.append_to(segment_name(cursor.segment), cursor.offset)
                    self._appender_segment = cursor.segment
                return self._appender, cursor.offset
            self._drop_appender()
            following = cursor.segment + 1
            if following not in self.segments():
                return self._new_segment(cursor, previous_hash, mark), SEGMENT_HEADER_SIZE
            cursor = self._start_of_next(cursor)

    def _start_of_next(self, end: Cursor) -> Cursor:
        """Where the segment begins that cut the one of `end` there."""
        following = end.segment + 1
        header = self.header(following)
        if header.previous_end != end.offset or header.first_position != end.position + 1:
            name = segment_name(following)
            raise CorruptionError(f"{name} does not continue the log where it ends", object=name, offset=0)
        return Cursor(following, SEGMENT_HEADER_SIZE, end.position)

    def _size(self, segment: int) -> int:
        """Length of a segment file now: somebody may have died while appending."""
        if self._reader is None or self._reader_segment != segment:
            self._close_reader()
            self._reader = self._storage.open(segment_name(segment))
            self._reader_segment = segment
        return self._reader.size()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _new_segment(self, cursor: Cursor, previous_hash: bytes, mark: Watermark | None) -> AppendFile:
        """Create the next segment, durably, and open it for appending."""
        if cursor.segment and (mark is None or mark.unsynced):
            self._sync_old(cursor.segment)
        segment = cursor.segment + 1
        name = segment_name(segment)
        header = SegmentHeader(self._basin_id, segment, cursor.position + 1, previous_hash, cursor.offset)
        self._storage.put_if_absent(name, encode_segment_header(header))
        if mark is None and self._lock is not None:
            # From here on nothing counts in this boot but what was synced: a record whose sync fails would look whole
            # to whoever scans, until the power is cut.
            start = Watermark(self._boot_id, segment, SEGMENT_HEADER_SIZE, cursor.position)
            self._write_watermark(start)
        self._appender = self._storage.append_to(name, SEGMENT_HEADER_SIZE)
        self._appender_segment = segment
        return self._appender

    def _write_watermark(self, mark: Watermark) -> None:
        """Move the watermark. While the lock is held."""
        if self._lock is not None:
            self._lock.write(encode_watermark(mark))
        self._held_mark = mark

    def _sync_old(self, segment: int) -> None:
        """Make the old segment durable: its last writer did not sync, or nothing says that it did."""
        name = segment_name(segment)
        reader = self._storage.open(name)
        try:
            size = reader.size()
        finally:
            reader.close()
        file = self._storage.append_to(name, size)
        try:
            file.sync()
        finally:
            file.close()

    def _drop_appender(self) -> None:
        if self._appender is not None:
            self._appender.close()
        self._appender = None
        self._close_reader()

    # --- upkeep -----------------------------------------------------------------------------------------------------

    def end_segment(self, cursor: Cursor, previous_hash: bytes) -> Cursor:
        """Let the next record begin a new segment, so that all those before can be removed; returns where.

        Only inside `exclusive`; `cursor` is the end of the log, `previous_hash` that of its last record. One byte is
        appended first: whoever finds the new segment after a crash then decides, as this one did, that the old one is
        not appended to, with the watermark or without.
        """
        self.settle()
        mark = self.current_watermark()
        if mark is not None:
            if mark.position != cursor.position:
                raise StorageUnavailable("the log moved while it was locked", object=LOG_FOLDER, operation="append")
            cursor = Cursor(mark.segment, mark.offset, mark.position)
        if cursor.offset <= SEGMENT_HEADER_SIZE:
            return cursor
        self._drop_appender()
        if mark is not None and self._size(cursor.segment) == cursor.offset:
            self._end_file(cursor)
        self._open_segment(cursor, previous_hash, mark)
        ended = Watermark(self._boot_id, self._appender_segment, SEGMENT_HEADER_SIZE, cursor.position)
        self._write_watermark(ended)
        return Cursor(ended.segment, ended.offset, ended.position)

    def _end_file(self, cursor: Cursor) -> None:
        """Append, durably, what is no record."""
        file = self._storage.append_to(segment_name(cursor.segment), cursor.offset)
        try:
            file.append(bytes(1))
            file.sync()
        finally:
            file.close()

    def last_held(self, segment: int, end: Position) -> Position:
        """The last position in a segment; `end` if that is the last one, which goes on."""
        return self.header(segment + 1).first_position - 1 if self._is_there(segment + 1) else end

    def remove_through(self, position: Position, cursor: Cursor, *, checkpoint: Position, generation: int) -> int:
        """As the base says: delete the segments with no record above `position`; never that of `cursor`."""
        removed = 0
        numbers = self.segments()
        with contextlib.suppress(ObjectMissing):  # Another handle is removing them, too.
            for segment, following in itertools.pairwise(numbers):
                if segment >= cursor.segment or self.header(following).first_position - 1 > position:
                    break
                self._storage.delete(segment_name(segment))
                self._storage.sync_folder(LOG_FOLDER)  # Else a power cut could leave a gap that looks like a loss.
                removed += 1
        return removed

    def position_within(self, size_max: int) -> Position:
        """The lowest position whose record and all later ones fit into `size_max` bytes, by whole segments."""
        total = 0
        with contextlib.suppress(ObjectMissing):  # Another handle has just removed it.
            for segment in reversed(self.segments()):
                file = self._storage.open(segment_name(segment))
                total += file.size()
                file.close()
                if total > size_max:
                    return self.header(segment + 1).first_position if self._is_there(segment + 1) else 0
        return 0

    def _is_there(self, segment: int) -> bool:
        return self._storage.exists(segment_name(segment))

    def describe(self) -> dict[str, Any]:
        """As the base says. One open per segment."""
        return {"bytes": self._stored_size(), "segments": len(self.segments()), "folder": LOG_FOLDER}

    def _stored_size(self) -> int:
        total = 0
        for segment in self.segments():
            with contextlib.suppress(ObjectMissing):
                file = self._storage.open(segment_name(segment))
                total += file.size()
                file.close()
        return total

    def close(self) -> None:
        """Release files and lock."""
        with contextlib.suppress(BasinError):
            self._drop_appender()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
