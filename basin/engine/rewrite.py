"""Writing strata anew: grains of several go into new ones, sealed under the newest generation.

Invariants: a grain that does not authenticate is never copied; memory is bounded by a window of the input and the
output's own index; an output is durable before the one record that swaps it in, and deleted if that is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import xxhash

from basin.engine.merging import never, remove_files, write_index_run
from basin.engine.reader import StratumReader
from basin.engine.state import ACTIVE, CUT, FINISHED
from basin.engine.tiers import is_cold
from basin.engine.writer import StratumWriter
from basin.errors import CorruptionError
from basin.format.grain import CHECKSUM, decode_header, verify_grain
from basin.format.index import Entries, IndexEntry, entries_of
from basin.format.layout import (
    CODEC_STORED,
    CODEC_ZSTD,
    GRAIN_HEADER_SIZE,
    PROFILE_OPEN,
    STRATUM_FOOTER_SIZE,
    STRATUM_GRAINS_MAX,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.record import IndexRun, Record, StratumAdded
from basin.terms import StratumId

if TYPE_CHECKING:
    import numpy.typing as npt

    from basin.engine.core import Core

Place: TypeAlias = tuple[int, int]
"""Offset and length of a grain."""
PLACE: Final = np.dtype([("offset", "<u4"), ("length", "<u4")])
Places: TypeAlias = "npt.NDArray[np.void]"
"""A one-dimensional array of `PLACE`."""
_WINDOW: Final = 4 << 20
"""Bytes that are read together, where a read may be a request."""
_WINDOW_ON_DISK: Final = 1 << 20
_GAP: Final = 64 << 10
"""Bytes between two grains that are read along, because another read costs more."""
_PLACED_TOGETHER: Final = 1 << 13
"""Grains whose places are widened at a time, to 32 bytes each."""
_SMALL: Final = 16 << 10
_TOGETHER: Final = 256
"""Small grains that are appended together."""
_INDEX_SHARE: Final = 64
"""Bytes of index for each grain, amply."""
_CHECKSUM_AND_LENGTH: Final = struct.Struct("<II")
_KIND_AT, _CODEC_AT, _KEY_AT = 8, 9, 12
"""In a grain's header."""
_PLAIN: Final = frozenset(bytes([Kind.BLOB, codec, 0, 0]) for codec in (CODEC_STORED, CODEC_ZSTD))
"""Kind, codec and flags of a content without links."""
_INDEX_KINDS: Final = frozenset({Kind.INDEX_PAGES, Kind.INDEX_DIRECTORY})


def places_of(rows: Sequence[Place]) -> Places:
    """Offsets and lengths as an array."""
    return np.array(rows, dtype=PLACE)


def grains_at(reader: StratumReader, places: Places, window: int = _WINDOW) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the grains at `places`, which are sorted, unverified; neighbours with one read.

    `window`: bytes that are read together at most, but for a single grain.
    """
    starts = places["offset"].astype(np.int64)
    ends = np.maximum.accumulate(starts + places["length"])
    apart = (np.flatnonzero(starts[1:] - ends[:-1] > _GAP) + 1).tolist()
    start = 0
    for stretch_stop in (*apart, len(places)):
        while start < stretch_stop:
            begin = int(starts[start])
            stop = int(np.searchsorted(ends, begin + window, side="right"))
            stop = min(max(stop, start + 1), stretch_stop)
            data = reader.read_raw(begin, int(ends[stop - 1]) - begin)
            these = places[start:stop]
            for offset, length in zip(these["offset"].tolist(), these["length"].tolist(), strict=True):
                yield offset, data[offset - begin : offset - begin + length]
            start = stop


def walk_grains(reader: StratumReader, stop: int, start: int = STRATUM_HEADER_SIZE) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of every grain before `stop`, verified; raise `CorruptionError` at the first bad one."""
    offset, begin, data = start, start, b""
    while offset < stop:
        at = offset - begin
        try:
            if len(data) - at < GRAIN_HEADER_SIZE or len(data) - at < decode_header(data, at).stored_size:
                begin, at = offset, 0
                data = reader.read_raw(offset, min(_WINDOW, stop - offset))
                size = decode_header(data).stored_size
                if size > len(data):
                    data = reader.read_raw(offset, min(size, stop - offset))
            grain = data[at : at + decode_header(data, at).stored_size]
            verify_grain(grain)
        except CorruptionError as error:
            raise reader.damage(offset, error.message) from error
        yield offset, grain
        offset += len(grain)


def grains_end(added: StratumAdded) -> int:
    """Where the grains of a stratum end, as far as the log vouches for them."""
    return added.length if added.status in (ACTIVE, CUT) else added.length - STRATUM_FOOTER_SIZE


def scanned_entries(core: Core, added: StratumAdded) -> Entries:
    """The index entries of a stratum, from its grains, as far as the log vouches for them."""
    rows = []
    for offset, grain in walk_grains(core.readers.get(added.kind, added.id), grains_end(added)):
        header = decode_header(grain)
        if header.kind not in _INDEX_KINDS:
            rows.append(IndexEntry(header.key, offset, len(grain), 0, header.kind, header.flags))
    return entries_of(rows)


def _intact(reader: StratumReader, offset: int, grain: bytes) -> bytes:
    """The grain, or another reading of it, that is what was written; raise `CorruptionError` if there is none."""
    try:
        verify_grain(grain)
    except CorruptionError as error:
        again = reader.read_again(offset, len(grain))
        if again is None or not _is_intact(again):
            raise reader.damage(offset, error.message) from error
        return again
    return grain


def _is_intact(grain: bytes) -> bool:
    """`verify_grain` of a grain whose kind and flags are known, at half the cost."""
    checksum, length = _CHECKSUM_AND_LENGTH.unpack_from(grain)
    actual: int = xxhash.xxh32_intdigest(grain[CHECKSUM.size :])
    return bool(length + CHECKSUM.size == len(grain) and actual == checksum)


class Rewriter:
    """Copies grains into new strata of one kind, of this handle's session."""

    def __init__(self, core: Core, kind: StratumKind, pause: Callable[[int], None]) -> None:
        """`pause(bytes)` is called for what was read and written: it may wait, or raise to stop."""
        self._core = core
        self._kind = kind
        self._pause = pause
        self._writer: StratumWriter | None = None
        self._finished: list[StratumAdded] = []
        self._is_cold = kind == StratumKind.DATA and is_cold(core.options)
        self.runs: list[IndexRun] = []
        """Where contents are cold, their index is not: the runs that the record must add as well."""

    def copy_all(self, added: StratumAdded) -> None:
        """Every grain of a stratum."""
        reader = self._core.readers.get(added.kind, added.id)
        grains = walk_grains(reader, grains_end(added))
        self._copy_each(reader, ((offset, grain) for offset, grain in grains if grain[_KIND_AT] not in _INDEX_KINDS))

    def copy(self, added: StratumAdded, places: Places | Sequence[Place]) -> None:
        """Some grains of a stratum, given in any order. An array of them takes 8 bytes a grain, a list 144."""
        reader = self._core.readers.get(added.kind, added.id)
        rows = places if isinstance(places, np.ndarray) else places_of(places)
        del places
        rows = rows[np.argsort(rows["offset"], kind="stable")]
        window = _WINDOW if self._core.is_remote else _WINDOW_ON_DISK
        for start in range(0, len(rows), _PLACED_TOGETHER):
            self._copy_each(reader, grains_at(reader, rows[start : start + _PLACED_TOGETHER], window))

    def _copy_each(self, reader: StratumReader, grains: Iterable[tuple[int, bytes]]) -> None:
        """Copy grains in their order, small ones without links together."""
        plain: list[tuple[int, bytes]] = []
        for offset, grain in grains:
            if len(grain) <= _SMALL and grain[_KIND_AT:_KEY_AT] in _PLAIN:
                plain.append((offset, grain))
                if len(plain) == _TOGETHER:
                    self._copy_plain(reader, plain)
                    plain = []
                continue
            self._copy_plain(reader, plain)
            plain = []
            self._copy(reader, offset, _intact(reader, offset, grain))
        self._copy_plain(reader, plain)

    def _copy_plain(self, reader: StratumReader, plain: Sequence[tuple[int, bytes]]) -> None:
        """Small contents without links, at a third of the cost of `_copy`.

        In an open basin, where no seal binds a grain to its place, they are carried over as they are: at a tenth.
        """
        writer = self._writer
        size = sum(len(grain) for _, grain in plain)
        if (
            writer is None
            or writer.room < size + _INDEX_SHARE * len(plain)
            or writer.grain_count + len(plain) > STRATUM_GRAINS_MAX
            or not all(_is_intact(grain) for _, grain in plain)
        ):
            for offset, grain in plain:
                self._copy(reader, offset, _intact(reader, offset, grain))
            return
        if reader.header.profile == PROFILE_OPEN:
            writer.append_stored([grain for _, grain in plain])
        else:
            keys = [grain[_KEY_AT:GRAIN_HEADER_SIZE] for _, grain in plain]
            codecs = [grain[_CODEC_AT] for _, grain in plain]
            writer.append_blobs(keys, codecs, [reader.unseal(grain, offset) for offset, grain in plain])
        self._pause(2 * size)

    def _copy(self, reader: StratumReader, offset: int, grain: bytes) -> None:
        header = decode_header(grain)
        data = reader.unseal(grain, offset)
        writer = self._writer
        if writer is None or writer.is_full:
            self._finish()
            writer = self._writer = self._core.own_strata.create(self._kind)
            writer.forgo_search()
        writer.append(header.kind, header.key, header.codec, header.flags, data)
        self._pause(2 * len(grain))

    def _finish(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        entries = [writer.entries()] if self._is_cold else []
        try:
            writer.finish()
        except BaseException:
            self._core.own_strata.discard(writer)
            raise
        self._finished.append(writer.describe(FINISHED))
        if entries:
            run, added = write_index_run(self._core, [writer.id], len(entries[0]), entries)
            self.runs.append(run)
            self._finished.append(added)

    def finish(self) -> list[StratumAdded]:
        """Make all durable; returns how a record describes the new strata."""
        self._finish()
        return self._finished

    def discard(self) -> None:
        """Delete what was written; no record names it."""
        if self._writer is not None:
            self._core.own_strata.discard(self._writer)
            self._writer = None
        for added in self._finished:
            self._core.own_strata.delete(added.kind, added.id)
        self._finished, self.runs = [], []


def merge_strata(core: Core, sources: Sequence[StratumId], pause: Callable[[int], None] = never) -> bool:
    """Copy all grains of some strata of one kind into new ones, and remove the old ones."""
    core.ensure_session()
    strata = core.state.strata
    rewriter = Rewriter(core, StratumKind(strata[sources[0]].added.kind), pause)
    try:
        for identity in sources:
            rewriter.copy_all(strata[identity].added)
        added = rewriter.finish()
    except BaseException:
        rewriter.discard()
        raise
    gone = set(sources)
    emptied = [run.id for run in core.state.index_runs if set(run.strata) <= gone]
    done = core.append(
        lambda now: (
            Record(
                strata_added=added,
                strata_removed=[*sources, *emptied],
                index_runs_added=rewriter.runs,
                index_runs_removed=emptied,
                files_kept=core.is_remote,
            )
            if all(one in now.strata and not now.strata[one].condemned for one in sources)
            else None
        )
    )
    if done:
        remove_files(core, StratumKind(strata[sources[0]].added.kind), sources)
        remove_files(core, StratumKind.INDEX, emptied)
    else:
        rewriter.discard()
    return done
