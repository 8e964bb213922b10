"""Stubs in the place of damaged records: in new copies of segments on a disk, over objects in a bucket.

Invariants:

- A copy of what is replaced lies in `rot/` before it goes. Nobody reads there but `repair_survey`, after a repair that
  was interrupted between taking a segment away and putting its new copy there.
- Every record that can be read stays at its byte: a stub fills the place of what it stands for (see `format.hint`), so
  that whoever holds a place in the log, a watermark, or the header of the next segment, is still right.
- A stub has the hash of its record if the next one, or a checkpoint, tells it; else 32 zero bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from basin.engine.file_log import LOCK_NAME, segment_name
from basin.engine.log import Cursor
from basin.engine.repair_survey import ASIDE_FOLDER, Gap, Survey, stored_segment
from basin.errors import AlreadyExists, Conflict, CorruptionError, ObjectMissing
from basin.format.hint import Stub, encode_stub
from basin.format.layout import FRAME_SIZE_MAX, HASH_SIZE, SEGMENT_HEADER_SIZE
from basin.format.segment import (
    SegmentHeader,
    Watermark,
    decode_segment_header,
    decode_watermark,
    encode_segment_header,
    encode_watermark,
)
from basin.storage.protocol import LockFile, Storage
from basin.terms import Position

if TYPE_CHECKING:
    from basin.engine.core import Core


def put_stubs(core: Core, survey: Survey, checkpoint: Position, gaps: Sequence[Gap]) -> None:
    """Put stubs that name a checkpoint where records are missing in `gaps`; mend the headers of segments among them.

    On a disk, none of the segments may be one that is still appended to.
    """
    if core.is_remote:
        for gap in gaps:
            _put_object(core, survey, checkpoint, gap)
        return
    with _locked(core):
        _rewrite_segments(core, survey, checkpoint, gaps)


def end_log(core: Core, survey: Survey, position: Position, digest: bytes) -> None:
    """Put stubs into all gaps, and one at `position` behind all that is stored: whoever follows the log meets it.

    They name the checkpoint at `position`; `digest` is the hash that the next record follows. Raises `Conflict` if
    somebody appended since the survey.
    """
    last = Stub(position, digest)
    frame = encode_stub(
        core.cipher, position, last, generation=core.keyring.generation, randomness=os.urandom(HASH_SIZE)
    )
    if core.is_remote:
        put_stubs(core, survey, position, survey.gaps)
        if core.log.append(Cursor(0, 0, survey.end), frame, b"") is None:
            raise _moved()
        return
    with _locked(core) as lock:
        if decode_watermark(lock.read()) != survey.mark:
            raise _moved()
        _rewrite_segments(core, survey, position, survey.gaps)
        _append_segment(core, survey, position, frame, lock)


def _moved() -> Conflict:
    return Conflict("somebody appended to the log while it was repaired: repair it again")


@contextlib.contextmanager
def _locked(core: Core) -> Iterator[LockFile]:
    """Keep others from appending, by the log's lock but not by what knows the log, which cannot read it."""
    lock = core.storage.lock(LOCK_NAME)
    try:
        lock.acquire(core.options.lock_timeout_s)
        yield lock
    finally:
        lock.close()


def _stub(core: Core, survey: Survey, checkpoint: Position, position: Position, size: int = 0) -> bytes:
    return encode_stub(
        core.cipher,
        position,
        Stub(checkpoint, survey.hash_of(position) or bytes(HASH_SIZE)),
        generation=core.keyring.generation,
        randomness=os.urandom(32),
        size=size,
    )


# --- in a bucket ------------------------------------------------------------------------------------------------------


def _put_object(core: Core, survey: Survey, checkpoint: Position, gap: Gap) -> None:
    objects = core.storage.objects
    assert objects is not None
    with contextlib.suppress(ObjectMissing):
        _keep_bytes(core.storage, gap.name, core.storage.read_file(gap.name, FRAME_SIZE_MAX))
    objects.put(gap.name, _stub(core, survey, checkpoint, gap.first))


def _keep_bytes(storage: Storage, name: str, data: bytes) -> None:
    """Store a copy below `rot/`, under the first name that is free."""
    for aside in _aside_names(name):
        with contextlib.suppress(AlreadyExists):
            storage.put_if_absent(aside, data)
            return


def _aside_names(name: str) -> itertools.chain[str]:
    stem = f"{ASIDE_FOLDER}/{name.rpartition('/')[2]}"
    return itertools.chain([stem], (f"{stem}.{number:04d}" for number in itertools.count(1)))


# --- on a disk --------------------------------------------------------------------------------------------------------


def _rewrite_segments(core: Core, survey: Survey, checkpoint: Position, gaps: Sequence[Gap]) -> None:
    for number in sorted({gap.segment for gap in gaps}):
        own = [gap for gap in gaps if gap.segment == number]
        survey.ends[number] = _rewrite_segment(core, survey, checkpoint, number, own)


def _rewrite_segment(core: Core, survey: Survey, checkpoint: Position, number: int, gaps: Sequence[Gap]) -> int:
    """Replace one segment by a copy with stubs; returns the byte at which it ends."""
    storage, name = core.storage, segment_name(number)
    data = bytearray(stored_segment(storage, number) or b"")
    data += bytes(max(0, SEGMENT_HEADER_SIZE - len(data)))
    end = max(survey.ends[number], SEGMENT_HEADER_SIZE)
    for gap in gaps:
        if not gap.start:
            data[:SEGMENT_HEADER_SIZE] = encode_segment_header(_header(core, survey, number))
        elif gap.missing:
            stubs = _stubs(core, survey, checkpoint, gap)
            data += bytes(max(0, gap.start + len(stubs) - len(data)))
            data[gap.start : gap.start + len(stubs)] = stubs
            end = max(end, gap.start + len(stubs))
    with contextlib.suppress(ObjectMissing):
        _keep_file(storage, name)
    storage.delete(name)
    storage.put_if_absent(name, bytes(data))
    return end


def _append_segment(core: Core, survey: Survey, position: Position, frame: bytes, lock: LockFile) -> None:
    """A new segment with one frame behind all others, and a watermark that says that it counts.

    Never at the end of an old one: another process may have that open, and would append to what is now a copy in
    `rot/`. The watermark sends it here.
    """
    last = max(survey.ends, default=0)
    if last:
        _sync(core.storage, segment_name(last))
    previous = survey.hash_of(survey.end) or bytes(HASH_SIZE)
    header = SegmentHeader(core.keyring.basin_id, last + 1, position, previous, survey.ends.get(last, 0))
    body = encode_segment_header(header) + frame
    core.storage.put_if_absent(segment_name(last + 1), body)
    lock.write(encode_watermark(Watermark(core.storage.boot_id(), last + 1, len(body), position)))


def _stubs(core: Core, survey: Survey, checkpoint: Position, gap: Gap) -> bytes:
    """Stubs for all positions of a gap, which fill it; as they come, where nothing says how large it is."""
    *others, last = range(gap.first, gap.last + 1)
    stubs = b"".join([_stub(core, survey, checkpoint, position) for position in others])
    room = gap.stop - gap.start - len(stubs)
    if gap.stop <= gap.start:
        return stubs + _stub(core, survey, checkpoint, last)
    frame = _stub(core, survey, checkpoint, last, size=room)
    return stubs + frame + bytes(room - len(frame))


def _header(core: Core, survey: Survey, number: int) -> SegmentHeader:
    """The header of a segment, from what stands before and behind it."""
    first = _first_position(core, survey, number)
    piece = survey.pieces.get(first)
    before = survey.hash_of(first - 1) or bytes(HASH_SIZE)
    return SegmentHeader(
        core.keyring.basin_id,
        number,
        first,
        piece.previous if piece is not None and piece.previous else before,
        survey.ends.get(number - 1, 0),
    )


def _first_position(core: Core, survey: Survey, number: int) -> Position:
    """The position of a segment's first record."""
    own = [piece.position for piece in survey.pieces.values() if piece.segment == number]
    own += [gap.first for gap in survey.gaps if gap.segment == number and gap.missing]
    if own:
        return min(own)
    following = stored_segment(core.storage, number + 1)
    if following is not None:
        with contextlib.suppress(CorruptionError):
            return decode_segment_header(following).first_position
    return survey.end + 1


def _keep_file(storage: Storage, name: str) -> None:
    """Give a file a second name below `rot/`, the first that is free."""
    for aside in _aside_names(name):
        with contextlib.suppress(AlreadyExists):
            storage.link(name, aside)
            storage.sync_folder(ASIDE_FOLDER)
            return


def _sync(storage: Storage, name: str) -> None:
    """Make a file durable, whoever wrote it."""
    reader = storage.open(name)
    try:
        size = reader.size()
    finally:
        reader.close()
    file = storage.append_to(name, size)
    try:
        file.sync()
    finally:
        file.close()
