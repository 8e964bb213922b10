"""`export_all`: a whole basin as one flat file, its strata as they are stored.

Invariants:

- The file shows one log position, that of one state, whatever is committed meanwhile; it keeps the basin's id, and is
  opened by the secrets that open the basin.
- Strata are copied as they are and compared with the hash that the log names: what is damaged is not exported as if it
  were whole.
- Of the log it holds the records that the state's runs of names do not cover, and at least the last: one segment, whose
  first record is the history floor. The indexes of all contents are one index run, written for the file.
- Memory is bounded by a window of what is copied, a few pages of each index, and a checkpoint.
- The source is only read. When files of the state were merged away meanwhile, all is begun again with a newer state;
  whatever fails leaves nothing behind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from basin.engine.export_index import write_merged_index
from basin.engine.file_log import segment_name
from basin.engine.flat import begin_flat, end_flat
from basin.engine.log import CHECKPOINT_FOLDER
from basin.engine.state import ACTIVE, CUT, State, Stratum, state_to_map
from basin.engine.writer import stratum_name
from basin.errors import BasinError, ChecksumMismatch, CorruptionError, ObjectMissing
from basin.format.checkpoint import encode_checkpoint
from basin.format.document import DOCUMENT_SIZE_MAX
from basin.format.layout import MIB, StratumKind
from basin.format.record import chain_hash
from basin.format.segment import SegmentHeader, encode_segment_header
from basin.format.slots import DESCRIPTOR_NAME, GENERATION_SIZE, KEYS_FOLDER, parse_generation_name, slot_name
from basin.storage.flat_target import FlatTarget
from basin.storage.objects import ByteRange
from basin.terms import Position, StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

ExportProgress: TypeAlias = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all, or None where that is not known)."""
_WINDOW: Final = 4 * MIB
_ATTEMPTS: Final = 5
"""A compactor that is always faster would have to merge the same strata again and again, which none does."""
_SEGMENT: Final = 1


class ExportReport(NamedTuple):
    """What became of an export. `names` and `contents` are counted where they were selected, else None."""

    path: str
    size: int
    position: Position
    strata: int
    names: int | None = None
    contents: int | None = None


def export_all(core: Core, path: str | os.PathLike[str], progress: ExportProgress | None = None) -> ExportReport:
    """Write the basin as it is now, after committing what is pending, to a new file at `path`; durable on return.

    Raises `AlreadyExists` if there is a file, `GrainNotReady` where contents are in cold storage, the kinds of
    `CorruptionError` where the basin is damaged, `StorageError`. Cost: every stratum and every index is read once.
    """
    for attempt in range(_ATTEMPTS):
        if core.writable and core.poisoned is None:
            core.commit_pending()
        else:
            core.refresh()
        state = core.state
        try:
            with FlatTarget(path) as target:
                return _Export(core, state, target, progress).run()
        except ObjectMissing:
            core.refresh()
            if core.state.position == state.position or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


class _Export:
    """One attempt, of one state."""

    def __init__(self, core: Core, state: State, target: FlatTarget, progress: ExportProgress | None) -> None:
        self._core = core
        self._state = state
        self._target = target
        self._progress = progress
        self._strata = [known for known in state.strata.values() if known.added.kind != StratumKind.INDEX]
        self._total = sum(known.added.length for known in self._strata)
        self._done = 0

    def run(self) -> ExportReport:
        """Write all, in the order of the format."""
        target, state = self._target, self._state
        begin_flat(target)
        self._write(DESCRIPTOR_NAME, self._core.storage.read_file(DESCRIPTOR_NAME, DOCUMENT_SIZE_MAX + 1))
        self._copy_keys()
        strata = {known.added.id: self._copy_stratum(known) for known in self._strata}
        if state.position:  # Else there is neither a record nor anything that one could name.
            first = self._copy_log()
            self._write_checkpoint(strata, first)
        end_flat(target)
        return ExportReport(target.path, target.size, state.position, len(strata))

    def _write(self, name: str, data: bytes) -> None:
        self._target.create(name).append(data)

    def _copy_keys(self) -> None:
        """The valid slots, with the keys of all generations that were not dropped."""
        core, state = self._core, self._state
        own = core.keyring.slot
        if own is None:
            return
        for slot_id in sorted(state.slots or [own.slot_id]):
            self._write(slot_name(slot_id), core.storage.read_file(slot_name(slot_id), DOCUMENT_SIZE_MAX + 1))
            for found in core.storage.list(f"{KEYS_FOLDER}/{slot_id}"):
                generation = parse_generation_name(found)
                if generation is not None and generation not in state.generations_dropped:
                    name = f"{KEYS_FOLDER}/{slot_id}/{found}"
                    self._write(name, core.storage.read_file(name, GENERATION_SIZE + 1))

    def _copy_stratum(self, known: Stratum) -> Stratum:
        """Copy a stratum up to where the log vouches for it; returns how the file's state describes it."""
        added = known.added
        reader = self._core.readers.get(added.kind, added.id)
        inside = self._target.create(stratum_name(added.kind, added.id))
        for offset in range(0, added.length, _WINDOW):
            data = reader.read_raw(offset, min(_WINDOW, added.length - offset))
            inside.append(data)
            self._advance(len(data))
        digest = self._target.pieces[-1].hash
        if digest != added.hash:
            text = f"{reader.name} does not have the hash that the log names; run `basin check`"
            raise ChecksumMismatch(text, object=reader.name, offset=0)
        # Nobody writes on here: what was active is as complete as it will be.
        return known._replace(added=added._replace(status=CUT)) if added.status == ACTIVE else known

    def _advance(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)

    # --- the log ----------------------------------------------------------------------------------------------------

    def _copy_log(self) -> Position:
        """Copy the records behind those whose names are in runs, as one segment; returns the first one's position."""
        core, state = self._core, self._state
        # Records that changed no name need not be replayed; the last one shows that log and checkpoint belong together.
        start = state.flushed if state.named > state.flushed else state.position - 1
        inside = self._target.create(segment_name(_SEGMENT))
        reached = start
        with core.commit_mutex:  # A log is followed by one thread at a time.
            for previous, frame in self._frames(start):
                if reached == start:
                    header = SegmentHeader(core.keyring.basin_id, _SEGMENT, start + 1, previous, 0)
                    inside.append(encode_segment_header(header))
                inside.append(frame)
                reached += 1
        if reached != state.position:
            text = f"the log ends at position {reached}, but the state is of {state.position}; run `basin check`"
            raise CorruptionError(text, object="log", offset=0)
        return start + 1

    def _frames(self, start: Position) -> Iterator[tuple[bytes, bytes]]:
        """(hash of the record before, frame as stored) of the records behind `start`, up to the state's position."""
        log, position = self._core.log, self._state.position
        for entry in log.follow(log.cursor_before(start), names_from=start, at_least=position):
            if entry.position > position:
                return
            name, begin = log.name_of(entry.end), max(0, entry.end.offset - entry.size)
            (frame,) = self._core.storage.read_ranges([ByteRange(name, begin, begin + entry.size)])
            if isinstance(frame, BasinError):
                raise frame
            if chain_hash(frame) != entry.hash:
                text = f"{name} at byte {begin}: the record was read differently a moment ago; run `basin check`"
                raise CorruptionError(text, object=name, offset=begin)
            yield entry.record.previous, frame

    # --- the state --------------------------------------------------------------------------------------------------

    def _write_checkpoint(self, strata: dict[StratumId, Stratum], first: Position) -> None:
        """The merged index, and the state in which it stands for all others."""
        core, state = self._core, self._state
        identity = StratumId((time.time_ns() // 1_000_000).to_bytes(6, "big") + os.urandom(10))
        merged = write_merged_index(core, state, self._target, identity)
        exported = state._replace(
            strata=strata,
            index_runs=(),
            flushed=first - 1,
            floor=max(state.floor, first),
            pins={label: pinned for label, pinned in state.pins.items() if pinned >= max(state.floor, first)},
            sessions={},
            seen_ms={},
            jobs={},
            gone={},
            retired={},
        )
        if merged is not None:
            run, added = merged
            exported = exported._replace(
                strata={**strata, added.id: Stratum(added, state.position, 0)}, index_runs=(run,)
            )
        frame = encode_checkpoint(
            core.cipher,
            state.position,
            state_to_map(exported),
            generation=core.keyring.generation,
            randomness=os.urandom(32),
        )
        self._write(f"{CHECKPOINT_FOLDER}/{state.position:020d}", frame)
