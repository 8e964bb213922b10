"""What of the log is still stored and whole: every record that proves itself, and every stretch that does not.

Unlike following the log this stops at nothing. Invariants:

- A piece is a record or stub that opens under the basin's keys at a position above those before it.
- A gap is what stands between two pieces that do not follow one another, or before the end that the watermark or the
  next segment states. The end of the last segment without a watermark is told from rot as `file_log` does it.
- What may be passing (a bucket that does not answer) raises: it is no gap.

Memory: about 300 bytes a record; bodies are read again by whoever needs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from basin.engine.file_log import SEGMENT_SIZE, FileLog, segment_name
from basin.engine.log import LOG_FOLDER
from basin.engine.object_log import record_name
from basin.errors import BasinError, CorruptionError, ObjectMissing
from basin.format.hint import decode_stub
from basin.format.layout import (
    FRAME_FLAG_UNSYNCED,
    FRAME_SIZE_MAX,
    SEGMENT_HEADER_SIZE,
    STUB_MAGIC,
)
from basin.format.record import FrameCipher, Record, chain_hash, decode_frame_header, decode_record
from basin.format.scan import find_frames
from basin.format.segment import SegmentHeader, Watermark
from basin.storage.objects import ByteRange
from basin.storage.protocol import Storage
from basin.terms import Position

if TYPE_CHECKING:
    from basin.engine.core import Core

ASIDE_FOLDER: Final = "rot"
"""Where a repair keeps what it replaced. Nobody reads there but a repair that was interrupted."""
SEGMENT_READ_MAX: Final = SEGMENT_SIZE + FRAME_SIZE_MAX
_WINDOW: Final = 64
"""Objects fetched together."""


class Piece(NamedTuple):
    """A record or stub that is whole: where it lies, its chain hash, and that of the record before it (stub: empty)."""

    position: Position
    segment: int
    offset: int
    size: int
    hash: bytes
    previous: bytes
    is_stub: bool = False
    is_unsynced: bool = False


class Gap(NamedTuple):
    """Bytes of a segment, or an object, that hold no record; and the positions that are missing there, if any.

    `stop` is -1 where nothing says how many bytes there were.
    """

    name: str
    segment: int
    start: int
    stop: int
    first: Position
    last: Position
    reason: str

    @property
    def missing(self) -> int:
        """How many records."""
        return max(0, self.last - self.first + 1)


@dataclass(slots=True)
class Segment:
    """One segment file: its number, its verified header or None, its bytes, and the byte at which it ends."""

    number: int
    header: SegmentHeader | None
    data: bytes
    end: int
    problem: str = ""
    is_missing: bool = False


@dataclass(slots=True)
class Survey:
    """The log as it lies there. `first` and `end` are the positions between which records should be stored."""

    first: Position = 1
    end: Position = 0
    pieces: dict[Position, Piece] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)
    """The byte at which each segment ends."""
    mark: Watermark | None = None
    """The watermark that was believed, or not."""

    @property
    def is_whole(self) -> bool:
        """Whether every record is there, or a stub in its place."""
        return not self.gaps

    def is_record(self, position: Position) -> bool:
        """Whether the record at a position can be read."""
        piece = self.pieces.get(position)
        return piece is not None and not piece.is_stub

    def hash_of(self, position: Position) -> bytes | None:
        """The chain hash of a record, by itself or by the one that follows it."""
        piece, following = self.pieces.get(position), self.pieces.get(position + 1)
        if piece is not None:
            return piece.hash
        return following.previous if following is not None and following.previous else None

    def unchained(self) -> Iterator[Piece]:
        """Records that do not follow the one before."""
        for position, piece in self.pieces.items():
            before = self.pieces.get(position - 1)
            if before is not None and piece.previous and piece.previous != before.hash:
                yield piece


def survey_log(core: Core, known: Position) -> Survey:
    """Look at all that is stored of the log, which has had at least `known` records.

    Reads every byte of it; in a bucket one list, and every object.
    """
    if isinstance(core.log, FileLog):
        return _SegmentSurveyor(core.storage, core.cipher, core.log).survey(known)
    return _survey_objects(core, known)


def piece_name(core: Core, piece: Piece) -> str:
    """The file or object that holds a piece."""
    return record_name(piece.position) if core.is_remote else segment_name(piece.segment)


def read_piece(core: Core, piece: Piece) -> Record:
    """The record of a piece that is no stub."""
    name = piece_name(core, piece)
    if core.is_remote:
        frame = core.storage.read_file(name, FRAME_SIZE_MAX)
    elif core.storage.exists(name):
        file = core.storage.open(name)
        try:
            frame = file.read(piece.offset, piece.size)
        finally:
            file.close()
    else:
        frame = (stored_segment(core.storage, piece.segment) or b"")[piece.offset : piece.offset + piece.size]
    return decode_record(core.cipher.open(frame)[1])


def _piece_in(cipher: FrameCipher, frame: bytes, segment: int, offset: int) -> tuple[Piece, int]:
    """A verified frame, and the bytes that it takes with its gap; raises `CorruptionError`."""
    header = decode_frame_header(frame)
    if header.magic == STUB_MAGIC:
        stub = decode_stub(cipher, frame, header.position)
        piece = Piece(header.position, segment, offset, len(frame), stub.hash, b"", is_stub=True)
        return piece, len(frame) + (stub.gap if segment else 0)
    opened, payload = cipher.open(frame)
    record = decode_record(payload)
    is_unsynced = bool(opened.flags & FRAME_FLAG_UNSYNCED)
    piece = Piece(
        header.position, segment, offset, len(frame), chain_hash(frame), record.previous, is_unsynced=is_unsynced
    )
    return piece, len(frame)


# --- in a bucket ------------------------------------------------------------------------------------------------------


def _survey_objects(core: Core, known: Position) -> Survey:
    """Every position up to the last that is listed, or found behind it, or known to have been there."""
    survey = Survey()
    listed = [int(name) for name in core.storage.list(LOG_FOLDER) if name.isdigit()]
    end = max(listed, default=0)
    while core.storage.exists(record_name(end + 1)):
        end += 1
    survey.end = max(end, known)
    assert core.storage.objects is not None
    for start in range(1, survey.end + 1, _WINDOW):
        window = range(start, min(survey.end + 1, start + _WINDOW))
        wanted = [ByteRange(record_name(position), 0, FRAME_SIZE_MAX) for position in window]
        for position, body in zip(window, core.storage.objects.get_many(wanted), strict=True):
            problem = _object_problem(core, survey, position, body)
            if problem:
                name = record_name(position)
                size = len(body) if isinstance(body, bytes) else 0
                survey.gaps.append(Gap(name, 0, 0, size, position, position, problem))
    return survey


def _object_problem(core: Core, survey: Survey, position: Position, body: bytes | BasinError) -> str:
    """Take the piece of one object into the survey, or say what is wrong with it."""
    name = record_name(position)
    if isinstance(body, ObjectMissing):
        return f"{name} is missing"
    if isinstance(body, BasinError):
        raise body
    try:
        piece, _ = _piece_in(core.cipher, body, 0, 0)
        if piece.position != position:
            return f"{name}: record {piece.position} stands where {position} belongs"
    except CorruptionError as error:
        return f"{name}: {error.message}"
    survey.pieces[position] = piece
    return ""


# --- on a disk --------------------------------------------------------------------------------------------------------


def stored_segment(storage: Storage, number: int) -> bytes | None:
    """The bytes of a segment; of the copy that an interrupted repair kept aside, if only that is there."""
    name = segment_name(number)
    with contextlib.suppress(ObjectMissing):
        return storage.read_file(name, SEGMENT_READ_MAX)
    stem = name.rpartition("/")[2]
    for copy in reversed(storage.list(ASIDE_FOLDER)):
        if copy.startswith(stem):
            return storage.read_file(f"{ASIDE_FOLDER}/{copy}", SEGMENT_READ_MAX)
    return None


class _Hole(NamedTuple):
    """Bytes between two pieces."""

    start: int
    stop: int
    reason: str


class _SegmentSurveyor:
    """Reads the segments one after another, and keeps count of the positions."""

    def __init__(self, storage: Storage, cipher: FrameCipher, log: FileLog) -> None:
        self._storage = storage
        self._cipher = cipher
        self._log = log
        self._survey = Survey()
        self._expected: Position | None = None
        """The position that comes next; None: nothing was found yet."""
        self._loose: set[int] = set()
        """Segments of which nothing says where they end."""
        self._pending: list[Gap] = []
        """Holes whose positions the next piece tells: one, or the ends of several segments."""

    def survey(self, known: Position) -> Survey:
        mark = self._survey.mark = self._log.watermark()
        is_current = mark is not None and mark == self._log.current_watermark() and not self._log.is_more_behind(mark)
        bound = mark if mark is not None and (is_current or not mark.unsynced) else None
        numbers = self._log.segments()
        if is_current and mark is not None:
            numbers = [number for number in numbers if number <= mark.segment]
        last = max([*numbers, bound.segment if bound is not None else min(known, 1)])
        segments = [self._segment(number) for number in range(min(numbers, default=last), last + 1)] if last else []
        while len(segments) > 1 and segments[0].is_missing:
            segments.pop(0)  # Removed since they were listed.
        for segment, following in zip(segments, [*segments[1:], None], strict=False):
            acknowledged = bound.offset if bound is not None and bound.segment == segment.number else 0
            if following is not None and following.header is not None:
                acknowledged = segment.end = following.header.previous_end
            elif following is not None:
                self._loose.add(segment.number)
            elif is_current:
                segment.end = acknowledged
            else:
                segment.end = max(segment.end, acknowledged)
            self._walk(segment, acknowledged if following is None else segment.end)
        self._finish(max(known, bound.position if bound is not None else 0))
        return self._survey

    def _segment(self, number: int) -> Segment:
        data = stored_segment(self._storage, number)
        is_missing = data is None or not self._storage.exists(segment_name(number))
        segment = Segment(number, None, data or b"", len(data or b""), is_missing=is_missing)
        if is_missing:
            segment.problem = f"{segment_name(number)} is missing"
        try:
            if data is not None:
                segment.header = self._log.header_in(number, data)
        except CorruptionError as error:
            segment.problem = segment.problem or error.message
        return segment

    def _walk(self, segment: Segment, acknowledged: int) -> None:
        """Take the pieces of one segment; behind byte `acknowledged` a tail may be torn."""
        survey = self._survey
        name = segment_name(segment.number)
        if segment.header is not None:
            self._begin(segment.header.first_position)
        if segment.problem:
            survey.gaps.append(Gap(name, segment.number, 0, SEGMENT_HEADER_SIZE, 1, 0, segment.problem))
        items = list(self._items(segment))
        torn = _torn_from(items, acknowledged)
        survey.ends[segment.number] = max(SEGMENT_HEADER_SIZE, segment.end if torn is None else torn)
        for item in items:
            if torn is not None and (item.offset if isinstance(item, Piece) else item.start) >= torn:
                break
            if isinstance(item, Piece):
                self._take(item)
            else:
                self._lack(Gap(name, segment.number, item.start, item.stop, 1, 0, item.reason))

    def _lack(self, gap: Gap) -> None:
        """A hole that lacks positions which are not known yet, perhaps the rest of the one before."""
        before = self._pending[-1] if self._pending else None
        if before is not None and (before.segment, before.stop) == (gap.segment, gap.start):
            self._pending[-1] = before._replace(stop=gap.stop)
        else:
            self._pending.append(gap)

    def _items(self, segment: Segment) -> Iterator[Piece | _Hole]:
        """Pieces and holes in the order of their bytes."""
        data, at, last = segment.data[: segment.end], SEGMENT_HEADER_SIZE, 0
        while at < len(data):
            try:
                piece, size = self._piece(data, segment.number, at)
                if piece.position <= last:
                    raise CorruptionError(f"record {piece.position} stands behind {last}")
            except CorruptionError as error:
                resumed = self._resumed(data, segment.number, at + 1, last)
                yield _Hole(at, resumed, f"{segment_name(segment.number)} at byte {at}: {error.message}")
                at = resumed
                continue
            yield piece
            last, at = piece.position, at + size
        if at < segment.end:
            text = f"{segment_name(segment.number)} ends at byte {len(data)}, and {segment.end} were acknowledged"
            yield _Hole(max(SEGMENT_HEADER_SIZE, at), segment.end, text)

    def _piece(self, data: bytes, segment: int, at: int) -> tuple[Piece, int]:
        size = decode_frame_header(data, at).size
        return _piece_in(self._cipher, data[at : at + size], segment, at)

    def _resumed(self, data: bytes, segment: int, start: int, last: Position) -> int:
        """Where the next piece begins behind a hole; the end if there is none."""
        with contextlib.suppress(CorruptionError):
            for offset, _ in find_frames(data, start):
                with contextlib.suppress(CorruptionError):
                    if self._piece(data, segment, offset)[0].position > last:
                        return offset
        return len(data)

    # --- positions ----------------------------------------------------------------------------------------------------

    def _begin(self, first: Position) -> None:
        """The header of a segment says which position comes next."""
        if self._expected is None:
            self._survey.first = self._expected = first
        elif first >= self._expected:
            self._settle(first, -1)
            self._expected = first

    def _take(self, piece: Piece) -> None:
        if self._expected is None:
            is_first = not self._pending or piece.position == 1
            self._survey.first = self._expected = piece.position if is_first else piece.position - 1
        if piece.position < self._expected:
            return  # A stray copy of what stands elsewhere.
        self._settle(piece.position, piece.segment, piece.offset)
        self._survey.pieces[piece.position] = piece
        self._expected = piece.position + 1

    def _settle(self, reached: Position, segment: int, offset: int = 0) -> None:
        """What is pending lacks the positions before `reached`, which begins at `offset` of `segment` (-1: the next).

        Holes at the ends of several segments share them: one each, the last has the rest. What follows nothing and
        lacks nothing is what a cut left at the end of a segment.
        """
        pending, self._pending = self._pending, []
        expected = reached if self._expected is None else self._expected
        if not pending and reached > expected:
            number = segment if segment >= 0 else max(self._survey.ends)
            at = offset if segment >= 0 else self._survey.ends[number]
            text = f"{segment_name(number)} at byte {at}: records are missing"
            pending = [Gap(segment_name(number), number, at, at, 1, 0, text)]
        for number, gap in enumerate(pending):
            is_last = number == len(pending) - 1
            last = reached - 1 if is_last else min(expected, reached - len(pending) + number)
            if last >= expected:
                self._survey.gaps.append(gap._replace(first=expected, last=last))
                expected = last + 1
            elif gap.segment != segment and gap.segment in self._loose:
                self._survey.ends[gap.segment] = gap.start
            else:
                self._survey.gaps.append(gap)

    def _finish(self, known: Position) -> None:
        """The log ends with the last piece, or where the watermark says."""
        survey = self._survey
        if self._expected is None:
            self._expected = max(1, known)
            survey.first = self._expected
        survey.end = max(self._expected - 1, known)
        if self._pending or survey.end >= self._expected:
            self._settle(survey.end + 1, -1)


def _torn_from(items: list[Piece | _Hole], acknowledged: int) -> int | None:
    """Where a tail begins that a power cut left: behind it and behind `acknowledged` nothing ever counted."""
    torn = None
    for item in reversed(items):
        if isinstance(item, Piece):
            if not item.is_unsynced:
                return torn
        elif item.start >= acknowledged:
            torn = item.start
        else:
            return torn
    return torn
