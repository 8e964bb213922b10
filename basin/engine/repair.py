"""`repair`: mends what `check` names, from what can still be read; never unasked, and first as a dry run.

Invariants:

- Nothing that can still be read is dropped: an index is written anew from the grains themselves, a run of names from
  its readable blocks.
- A grain that cannot be read any more is recorded as damaged, so that putting its content again heals it.
- Every step is one record after its output is durable; stopping in between leaves a basin that can be repaired again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from basin.engine.cache import Cache
from basin.engine.checkpoints import checkpoint
from basin.engine.index import IndexReader
from basin.engine.merging import write_index_run
from basin.engine.names import BrokenRun, RunReader
from basin.engine.reader import StratumReader
from basin.engine.recovery import stored_strata, sweep
from basin.engine.runs import Columns, write_run
from basin.engine.state import ACTIVE, Stratum
from basin.engine.verify import index_rows, scan_places
from basin.engine.writer import stratum_name
from basin.errors import CorruptionError, StorageError
from basin.format.index import IndexEntry, entries_of
from basin.format.layout import GRAIN_HEADER_SIZE, STRATUM_HEADER_SIZE, Kind, StratumKind
from basin.format.names import Block, check_versions, decode_block
from basin.format.record import IndexRun, NameRun, Record
from basin.format.scan import GrainFound, scan_grains
from basin.terms import StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core


@dataclass(frozen=True, slots=True)
class RepairAction:
    """One thing that `repair` would do, or did (`done`). `object` is the file that it mends."""

    kind: str
    object: str
    detail: str
    done: bool = False


def repair(core: Core, *, dry_run: bool = True) -> list[RepairAction]:
    """Plan, and unless `dry_run` carry out, what can be mended. Cost: reads every stratum once."""
    if not dry_run:
        core.require_writable()
        core.commit_pending()
        core.ensure_session()
    else:
        core.refresh()
    core.open_everything()
    actions: list[RepairAction] = []
    with core.commit_mutex:
        for step in (_repair_index_runs, _repair_indexes, _repair_names, _repair_checkpoints, _repair_leftovers):
            actions += step(core, dry_run=dry_run)
    return actions


def _repair_index_runs(core: Core, *, dry_run: bool) -> Iterator[RepairAction]:
    """Forget merged indexes that cannot be read, or lack entries: every stratum has an index of its own."""
    bad: list[IndexRun] = []
    for run in core.state.index_runs:
        problem = _index_run_problem(core, run)
        if problem:
            bad.append(run)
            yield RepairAction("index", stratum_name(StratumKind.INDEX, run.id), f"drop: {problem}", not dry_run)
    if bad and not dry_run:
        removed = [run.id for run in bad]
        present = [identity for identity in removed if identity in core.state.strata]
        if core.append(lambda _: Record(index_runs_removed=removed, strata_removed=present)):
            for identity in removed:
                core.own_strata.delete(StratumKind.INDEX, identity)


def _index_run_problem(core: Core, run: IndexRun) -> str:
    """Why a merged index is of no use, or an empty text."""
    listed: dict[StratumId, set[tuple[bytes, int, int]]] = {}
    try:
        reader = StratumReader(core.storage, core.keyring, StratumKind.INDEX, run.id)
        index = IndexReader(reader, reader.directory(), Cache(0))
        for key, offset, length, stratum in index_rows(index):
            listed.setdefault(stratum, set()).add((key, offset, length))
    except (CorruptionError, StorageError) as error:
        return str(error)
    for identity in run.strata:
        known = core.state.strata.get(identity)
        if known is not None and not _places_of(core, known) <= listed.get(identity, set()):
            return f"grains of {identity} are missing from it"
    return ""


def _places_of(core: Core, known: Stratum) -> set[tuple[bytes, int, int]]:
    """Grains of a stratum as they lie there, or nothing if it cannot be read."""
    try:
        reader = StratumReader(core.storage, core.keyring, known.added.kind, known.added.id)
    except (CorruptionError, StorageError):
        return set()
    try:
        return set(scan_places(reader, known))
    finally:
        reader.close()


def _repair_indexes(core: Core, *, dry_run: bool) -> Iterator[RepairAction]:
    """Write a new index for strata whose own one is damaged or incomplete, from their grains."""
    covered = {identity for run in core.state.index_runs for identity in run.strata}
    names = {run.id for run in core.state.name_runs}
    rows: list[IndexEntry] = []
    strata: list[StratumId] = []
    lost: set[bytes] = set()
    for identity, known in core.state.strata.items():
        added = known.added
        skipped = added.kind == StratumKind.INDEX or identity in names or identity in covered
        if skipped or added.status == ACTIVE:
            continue
        places = _places_of(core, known)
        listed = _own_entries(core, known)
        lost |= {key for key, _, _ in (listed or set()) - places}
        if listed == places or not places:
            continue
        strata.append(identity)
        number = len(strata) - 1
        rows += [IndexEntry(key, offset, length, number, Kind.BLOB, 0) for key, offset, length in sorted(places)]
        detail = f"write a new index of {len(places)} grains"
        yield RepairAction("index", stratum_name(added.kind, identity), detail, not dry_run)
    lost = {key for key in lost if core.keyring.grain_keys.content_key(key) not in core.state.damaged}
    if lost:
        yield RepairAction("damaged", "log", f"record {len(lost)} grains as damaged", not dry_run)
    if dry_run or not (strata or lost):
        return
    damaged = [core.keyring.grain_keys.content_key(key) for key in sorted(lost)]
    if not strata:
        core.append(lambda _: Record(damaged=damaged))
        return
    run, added_index = write_index_run(core, strata, len(rows), [entries_of(rows)])
    core.append(lambda _: Record(index_runs_added=[run], strata_added=[added_index], damaged=damaged))


def _own_entries(core: Core, known: Stratum) -> set[tuple[bytes, int, int]] | None:
    """What a finished stratum's own index lists; None if it cannot be read."""
    try:
        reader = StratumReader(core.storage, core.keyring, known.added.kind, known.added.id)
        index = IndexReader(reader, reader.directory(), Cache(0))
        return {(key, offset, length) for key, offset, length, _ in index_rows(index)}
    except (CorruptionError, StorageError, IndexError):
        return None


# --- names ----------------------------------------------------------------------------------------------------------


def _repair_names(core: Core, *, dry_run: bool) -> Iterator[RepairAction]:
    """Write runs of names anew from their readable blocks."""
    for reader in list(core.current.tables.runs):
        name = stratum_name(StratumKind.META, reader.run.id)
        blocks, lost = _readable_blocks(core, reader)
        if not lost:
            continue
        if not blocks:
            yield RepairAction("names", name, "nothing of this run can be read: restore the file from a copy")
            continue
        kept = sum(len(block.names) for block in blocks)
        detail = f"keep {kept} of {reader.run.entries} entries; names in lost blocks may show older values again"
        if isinstance(reader, BrokenRun):
            detail += ", and so may names that a range deletion of this run covered"
        yield RepairAction("names", name, detail, not dry_run)
        if not dry_run:
            _rewrite_run(core, reader, blocks)


def _readable_blocks(core: Core, reader: RunReader) -> tuple[list[Block], bool]:
    """The blocks that can be read, in order, and whether anything is lost."""
    if isinstance(reader, BrokenRun):
        return _scanned_blocks(core, reader.run), True
    blocks, lost = [], False
    for number in range(len(reader.directory.firsts)):
        try:
            block = reader.block(number, keep=False)
            check_versions(block)
            blocks.append(block)
        except (CorruptionError, StorageError):
            lost = True
    return blocks, lost


def _scanned_blocks(core: Core, run: NameRun) -> list[Block]:
    """Blocks of a run whose directory is lost, found by walking its grains."""
    try:
        reader = StratumReader(core.storage, core.keyring, StratumKind.META, run.id)
        data = memoryview(reader.read_raw(0, reader.size()))
    except (CorruptionError, StorageError):
        return []
    blocks = []
    for found in scan_grains(data, STRATUM_HEADER_SIZE, len(data)):
        if isinstance(found, GrainFound) and found.header.kind == Kind.NAMES_BLOCK:
            grain = bytes(data[found.offset : found.offset + found.header.stored_size])
            try:
                _, payload = reader.decode_grain(grain, found.offset, grain[12:GRAIN_HEADER_SIZE])
                block = decode_block(payload.content)
                check_versions(block)
            except CorruptionError:
                continue
            if run.version:
                block = replace(block, version=run.version, versions=None)
            blocks.append(block)
    return sorted(blocks, key=lambda block: block.names[0])


def _columns(block: Block) -> Columns:
    count = len(block.names)
    return Columns(
        block.names,
        block.versions if block.versions is not None else [block.version] * count,
        block.kinds if block.kinds is not None else [1] * count,
        block.values,
        block.expiries if block.expiries is not None else [0] * count,
    )


def _rewrite_run(core: Core, reader: RunReader, blocks: list[Block]) -> None:
    old = reader.run
    run, added = write_run(
        core,
        map(_columns, blocks),
        reader.ranges,
        after=old.after,
        through=old.through,
        count_max=sum(len(block.names) for block in blocks),
    )
    done = core.append(
        lambda _: Record(
            name_runs_added=[run],
            name_runs_removed=[old.id],
            strata_added=[added],
            strata_removed=[old.id],
        )
    )
    core.own_strata.delete(StratumKind.META, old.id if done else run.id)


# --- the rest -------------------------------------------------------------------------------------------------------


def _repair_checkpoints(core: Core, *, dry_run: bool) -> Iterator[RepairAction]:
    bad = []
    for name in core.storage.list("checkpoint"):
        try:
            core.read_checkpoint(name)
        except (CorruptionError, StorageError, ValueError) as error:
            bad.append(name)
            yield RepairAction("checkpoint", f"checkpoint/{name}", f"write a new one: {error}", not dry_run)
    if bad and not dry_run:
        for name in bad:
            core.storage.delete(f"checkpoint/{name}")
        checkpoint(core)


def _repair_leftovers(core: Core, *, dry_run: bool) -> Iterator[RepairAction]:
    for kind, identity, header in stored_strata(core):
        state = core.state
        known = identity in state.strata or identity in state.retired or core.own_strata.owns(identity)
        if not known and header is not None and header.session not in core.state.sessions:
            yield RepairAction("leftover", stratum_name(kind, identity), "delete: no record names it", not dry_run)
    if not dry_run:
        sweep(core)
