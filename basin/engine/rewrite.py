"""Writing strata anew: the grains of several go into new ones, sealed under the newest generation.

Invariants: a grain that does not authenticate is never copied; memory is bounded; an output is durable before the one
record that swaps it in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from basin.engine.merging import remove_files
from basin.engine.state import FINISHED
from basin.engine.writer import StratumWriter
from basin.format.layout import STRATUM_HEADER_SIZE, Kind, StratumKind
from basin.format.record import Record
from basin.format.scan import Damage, scan_grains
from basin.terms import StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core


def merge_strata(core: Core, small: Sequence[StratumId]) -> bool:
    """Copy all grains of small strata into one new stratum, and remove the small ones."""
    core.ensure_session()
    kind = StratumKind(core.state.strata[small[0]].added.kind)
    writer = core.own_strata.create(kind)
    try:
        for identity in small:
            _copy_grains(core, identity, writer)
        writer.finish()
    except BaseException:
        core.own_strata.discard(writer)
        raise
    added = writer.describe(FINISHED)
    gone = set(small)
    emptied = [run.id for run in core.state.index_runs if set(run.strata) <= gone]
    done = core.append(
        lambda now: (
            Record(
                strata_added=[added],
                strata_removed=[*small, *emptied],
                index_runs_removed=emptied,
                files_kept=core.is_remote,
            )
            if all(one in now.strata and not now.strata[one].condemned for one in small)
            else None
        )
    )
    if done:
        remove_files(core, kind, small)
        remove_files(core, StratumKind.INDEX, emptied)
    else:
        core.own_strata.delete(kind, writer.id)
    return done


def _copy_grains(core: Core, identity: StratumId, writer: StratumWriter) -> None:
    """Decrypt and seal again every grain of one stratum; raise `CorruptionError` at the first bad one."""
    known = core.state.strata[identity].added
    reader = core.readers.get(known.kind, identity)
    data = memoryview(reader.read_raw(0, known.length))
    stop = reader.grains_end(known.length, finished=known.status == FINISHED)
    for found in scan_grains(data, STRATUM_HEADER_SIZE, stop):
        if isinstance(found, Damage):
            raise reader.damage(found.offset, found.reason)
        header = found.header
        if header.kind in (Kind.INDEX_PAGES, Kind.INDEX_DIRECTORY):
            continue
        plain = reader.unseal(bytes(data[found.offset : found.offset + header.stored_size]), found.offset)
        writer.append(header.kind, header.key, header.codec, header.flags, plain)
