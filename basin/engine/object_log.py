"""The log in a bucket: one object per record, `log/<position>`, created only if the name is free.

Invariants:

- A name is taken once and never deleted; what is stored under it decides who appended, no reply does (see `claims`).
- The log has no holes: a record is appended behind one that was read. So its end can be searched for.
- Before its first append a handle sees for itself that the store lets one writer through (see `probe`).
- A body that a checkpoint holds may be overwritten by a stub, which keeps the record's hash.

It knows frames and positions; what a record means is `state`'s business.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

from basin.engine.log import LOG_FOLDER, SKIPPED, Cursor, Entry, Log
from basin.errors import BasinError, CommitUnknown, CorruptionError, InvalidArgument, ObjectMissing
from basin.format.hint import Stub, decode_stub, encode_stub
from basin.format.layout import FRAME_HEADER_SIZE, FRAME_SIZE_MAX, HASH_SIZE, RECORD_MAGIC, STUB_MAGIC
from basin.format.record import FrameCipher, FrameHeader, chain_hash, decode_frame_header, decode_record
from basin.storage.claims import Outcome, claim
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.requests import RequestPolicy
from basin.terms import Position

_WINDOW: Final = 64
"""Records fetched together."""
_STUB_SIZE_MIN: Final = 16 << 10
"""A smaller body is not worth a request that replaces it: it costs what storing 16 KiB for a year does."""
_POSITION_SIZE: Final = 8
_WAIT_FIRST_S: Final = 0.005
_WAIT_MAX_S: Final = 0.5


class Folded(ObjectMissing):
    """A record's body is gone; a checkpoint behind it holds it. Fields: `hash`, the record's, and `end`, behind it."""

    @property
    def hash(self) -> bytes:
        """The hash of the record that was folded."""
        return bytes(self.fields["hash"])

    @property
    def end(self) -> Cursor:
        """Where the log goes on behind it."""
        return Cursor(*self.fields["end"])


def record_name(position: Position) -> str:
    """Path of a record."""
    return f"{LOG_FOLDER}/{position:020d}"


def token_of(position: Position, frame_hash: bytes) -> bytes:
    """What identifies an append whose outcome is unknown."""
    return position.to_bytes(_POSITION_SIZE, "big") + frame_hash


def split_token(token: bytes) -> tuple[Position, bytes]:
    """Position and record hash in a token; raise `InvalidArgument`."""
    if type(token) is not bytes or len(token) != _POSITION_SIZE + HASH_SIZE:
        raise InvalidArgument("this token is of no commit whose outcome was unknown", token=token)
    return int.from_bytes(token[:_POSITION_SIZE], "big"), token[_POSITION_SIZE:]


def stub_entry(cipher: FrameCipher, name: str, frame: bytes, cursor: Cursor, names_from: Position = 0) -> Entry:
    """The stub at `cursor` in the file or object `name`; raises `Folded` unless it is up to `names_from`."""
    position = cursor.position + 1
    stub = decode_stub(cipher, frame, position)
    offset = cursor.offset + len(frame) + stub.gap if cursor.segment else 0
    end = Cursor(cursor.segment, offset, position)
    if position > names_from:
        raise Folded(
            f"record {position} in {name} was folded into the checkpoint of {stub.checkpoint}",
            object=name,
            operation="follow",
            hash=stub.hash,
            end=end,
        )
    return Entry(position, SKIPPED, stub.hash, end, len(frame))


def behind_stubs(cipher: FrameCipher, data: bytes, cursor: Cursor, position: Position) -> Cursor:
    """The end of the last stub up to `position`, or `cursor`, behind which `data` lies in a segment.

    Whoever looks for what comes after `position` has nothing to do with those. Cost: a search for four bytes, which
    nearly always finds nothing.
    """
    best = cursor
    if data.find(STUB_MAGIC) < 0:
        return best
    at = 0
    with contextlib.suppress(CorruptionError):
        while at < len(data) and cursor.position < position:
            header = decode_frame_header(data, at)
            end = Cursor(cursor.segment, cursor.offset + header.size, header.position)
            if header.magic == STUB_MAGIC:
                frame = data[at : at + header.size]
                best = end = stub_entry(cipher, "", frame, cursor, position).end
            at += end.offset - cursor.offset
            cursor = end
    return best


class ObjectLog(Log):
    """Reads and appends the records of one basin in a bucket."""

    looks_first = False

    def __init__(
        self, objects: ObjectStore, cipher: FrameCipher, policy: RequestPolicy, require_create_only: Callable[[], None]
    ) -> None:
        """`policy`: how long to try to find out what became of an append. `require_create_only`: called before the
        first; raises if the store would let several writers through.
        """
        self._objects = objects
        self._cipher = cipher
        self._policy = policy
        self._require_create_only = require_create_only
        self._losses = 0
        self._seen: dict[Position, bytes] = {}
        """Frames that somebody else stored where this handle wanted to, to be followed next."""
        self._sizes: dict[Position, int] = {}
        """Of large records seen: what may be worth a stub one day."""

    def prepare(self, *, writable: bool) -> None:
        """There is nothing that nobody else can see."""

    # --- reading ----------------------------------------------------------------------------------------------------

    def follow(self, cursor: Cursor, *, names_from: Position = 0, at_least: Position = 0) -> Iterator[Entry]:
        """As the base says; raises `Folded` at a stub. One request if there is nothing new."""
        position = max(cursor.position, names_from)
        frames = {at: frame for at, frame in self._seen.items() if at > position}
        self._seen.clear()
        end = self._end(position, max(position, at_least, *frames), frames)
        while position < end:
            window = range(position + 1, min(end, position + _WINDOW) + 1)
            self._fetch([at for at in window if at not in frames], frames)
            for position in window:
                yield self._entry(position, frames.pop(position))

    def _end(self, position: Position, known: Position, frames: dict[Position, bytes]) -> Position:
        """The last position of the log, which has at least `known`. Keeps what it reads on the way in `frames`.

        Steps of 1, 1, 2, 2, 4, 4, … until there is no record; then by the root of the last step; then one by one. So at
        most three requests find nothing, and each of the others a record that is wanted anyway. Halving would take
        fewer rounds, and ask in vain as often as it has rounds.
        """
        steps = (1 << number // 2 for number in itertools.count())
        missing = known + 1
        for step in steps:
            missing = known + step
            if not self._try(missing, frames):
                break
            known = missing
        for stride in (math.isqrt(missing - known), 1):
            while known + stride < missing:
                if not self._try(known + stride, frames):
                    missing = known + stride
                    break
                known += stride
        return known

    def _try(self, position: Position, frames: dict[Position, bytes]) -> bool:
        """Whether there is a record at `position`; if so, it is kept."""
        with contextlib.suppress(ObjectMissing):
            frames[position] = self._objects.get(ByteRange(record_name(position), 0, FRAME_SIZE_MAX))
            return True
        return False

    def _fetch(self, positions: Sequence[Position], frames: dict[Position, bytes]) -> None:
        """Read records that are known to be there, concurrently."""
        wanted = [ByteRange(record_name(position), 0, FRAME_SIZE_MAX) for position in positions]
        for position, body in zip(positions, self._objects.get_many(wanted) if wanted else (), strict=True):
            if isinstance(body, ObjectMissing):
                name = record_name(position)
                raise CorruptionError(
                    f"{name} is missing, and records behind it are there; restore it from a copy", object=name, offset=0
                ) from body
            if isinstance(body, BasinError):
                raise body
            frames[position] = body

    def _entry(self, position: Position, frame: bytes) -> Entry:
        """The record in a frame; if that is damaged, in what another reading gives: the first may be to blame."""
        try:
            return self._decode(position, frame)
        except CorruptionError:
            frames: dict[Position, bytes] = {}
            if not self._try(position, frames) or frames[position] == frame:
                raise
            return self._decode(position, frames[position])

    def _decode(self, position: Position, frame: bytes) -> Entry:
        name = record_name(position)
        try:
            header = decode_frame_header(frame)
            if header.magic == STUB_MAGIC:
                return stub_entry(self._cipher, name, frame, Cursor(0, 0, position - 1))
            if header.magic != RECORD_MAGIC or header.position != position:
                raise CorruptionError(f"record {header.position} stands where {position} belongs")
            record = decode_record(self._cipher.open(frame)[1])
        except CorruptionError as error:
            raise type(error)(f"{name}: {error.message}; run `basin check`", object=name, offset=0) from error
        if len(frame) >= _STUB_SIZE_MIN:
            self._sizes[position] = len(frame)
        return Entry(position, record, chain_hash(frame), Cursor(0, 0, position), len(frame))

    def cursor_before(self, position: Position) -> Cursor:
        return Cursor(0, 0, position)

    def keeps(self, cursor: Cursor) -> bool:
        """As the base says: unless a stub follows. One request."""
        frames: dict[Position, bytes] = {}
        if not self._try(cursor.position + 1, frames):
            return True
        frame = frames[cursor.position + 1]
        with contextlib.suppress(CorruptionError):
            return decode_frame_header(frame).magic != STUB_MAGIC
        return True

    def oldest(self) -> tuple[Cursor, bytes] | None:
        """From the beginning: nothing is ever deleted."""
        return Cursor(0, 0, 0), bytes(HASH_SIZE)

    def name_of(self, cursor: Cursor) -> str:
        return record_name(cursor.position)

    def hash_at(self, position: Position) -> bytes | None:
        """As the base says; also if only its stub is left."""
        frames: dict[Position, bytes] = {}
        if not self._try(position, frames):
            return None
        try:
            return self._entry(position, frames[position]).hash
        except Folded as folded:
            return folded.hash

    # --- appending --------------------------------------------------------------------------------------------------

    def exclusive(self) -> AbstractContextManager[None]:
        """Nobody can be kept out: `append` finds out."""
        return contextlib.nullcontext()

    def append(self, cursor: Cursor, frame: bytes, previous_hash: bytes, *, sync: bool = True) -> Cursor | None:
        """As the base says. One request, and more only where its outcome is in doubt; always durable."""
        self._require_create_only()
        position = cursor.position + 1
        name = record_name(position)
        made = claim(self._objects, name, frame, self._policy)
        if made.outcome is Outcome.UNKNOWN:
            raise CommitUnknown(
                f"it cannot be known whether the record at position {position} was stored; call db.resolve(token)",
                token=token_of(position, chain_hash(frame)),
                position=position,
            ) from made.error
        if made.outcome is Outcome.TAKEN and not self._is_stub_of(made.stored, position, frame):
            self._seen[position] = made.stored
            self._wait()
            return None
        self._losses = 0
        if len(frame) >= _STUB_SIZE_MIN:
            self._sizes[position] = len(frame)
        return Cursor(0, 0, position)

    def _is_stub_of(self, stored: bytes, position: Position, frame: bytes) -> bool:
        """Whether what stands at the place of a record is the stub of that very one: it was appended, and folded."""
        with contextlib.suppress(CorruptionError):
            return decode_stub(self._cipher, stored, position).hash == chain_hash(frame)
        return False

    def _wait(self) -> None:
        """After losing twice in a row, let others go first: who waits at random meets fewer of them."""
        self._losses += 1
        if self._losses > 1:
            time.sleep(random.random() * min(_WAIT_MAX_S, _WAIT_FIRST_S * 2**self._losses))

    def settle(self) -> None:
        """Every record is durable."""

    # --- upkeep -----------------------------------------------------------------------------------------------------

    def remove_through(self, position: Position, cursor: Cursor, *, checkpoint: Position, generation: int) -> int:
        """As the base says: of the large records that this handle has seen."""
        folded = [at for at in self._sizes if at <= min(position, cursor.position)]
        replaced = 0
        for at in folded:
            found = self.hash_at(at)
            del self._sizes[at]  # Behind the look, which notes the size again.
            if found is not None:
                self._put_stub(at, Stub(checkpoint, found), generation)
                replaced += 1
        return replaced

    def last_of(self, generations: Collection[int], floor: Position, end: Position) -> Position:
        """The last record from `floor` to `end` that is sealed under one of these key generations; 0: none.

        A later record never has an earlier generation, so it is searched by halving, a request a step. Stubs are passed
        over, for they are younger than what they stand for; only a repair leaves any from the history floor on. Those
        right behind the record count with it.
        """
        low, high, newest = self._record_from(max(floor, 1), end), end + 1, max(generations)
        if low > end or self._header_at(low).generation > newest:
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            record = self._record_from(middle, high - 1)
            if record == high or self._header_at(record).generation > newest:
                high = middle
            else:
                low = record
        return self._record_from(low + 1, end) - 1 if self._header_at(low).generation in generations else 0

    def _record_from(self, position: Position, end: Position) -> Position:
        """The first place from `position` to `end` where no stub stands; else the one behind `end`."""
        while position <= end and self._header_at(position).magic == STUB_MAGIC:
            position += 1
        return position

    def _header_at(self, position: Position) -> FrameHeader:
        name = record_name(position)
        return self._header_in(name, self._objects.get(ByteRange(name, 0, FRAME_HEADER_SIZE)))

    @staticmethod
    def _header_in(name: str, body: bytes | BasinError) -> FrameHeader:
        if isinstance(body, BasinError):
            raise body
        try:
            return decode_frame_header(body)
        except CorruptionError as error:
            raise type(error)(f"{name}: {error.message}; run `basin check`", object=name, offset=0) from error

    def positions_of(self, generations: Collection[int], end: Position) -> list[Position]:
        """The records and stubs up to `end` that are sealed under these key generations. A small request for each."""
        found = []
        for start in range(1, end + 1, _WINDOW):
            window = range(start, min(end + 1, start + _WINDOW))
            wanted = [ByteRange(record_name(position), 0, FRAME_HEADER_SIZE) for position in window]
            for position, body in zip(window, self._objects.get_many(wanted), strict=True):
                if self._header_in(record_name(position), body).generation in generations:
                    found.append(position)
        return found

    def replace(self, positions: Sequence[Position], *, checkpoint: Position, generation: int) -> None:
        """Put a stub under `generation` in the place of each of these records and stubs.

        The checkpoint at `checkpoint`, and a newer one, hold them. Each is read and verified first: only what is whole
        is replaced. Two requests for each.
        """
        for position in positions:
            found = self.hash_at(position)
            if found is not None:
                self._put_stub(position, Stub(checkpoint, found), generation)
            self._sizes.pop(position, None)

    def _put_stub(self, position: Position, stub: Stub, generation: int) -> None:
        frame = encode_stub(self._cipher, position, stub, generation=generation, randomness=os.urandom(32))
        self._objects.put(record_name(position), frame)

    def position_within(self, size_max: int) -> Position:
        """Not known: sizes would have to be asked for. History ends by time alone."""
        return 0

    def describe(self) -> dict[str, Any]:
        return {"folder": LOG_FOLDER}

    def close(self) -> None:
        """Nothing is held."""
