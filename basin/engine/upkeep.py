"""Upkeep in the process: flush and merge names, merge indexes and small strata, checkpoint, drop old log.

It runs after a commit, in the thread that committed, so that memory, open files and the cost of a read stay bounded
without any other process. What is due is decided from the state by pure functions (`plan`); a step writes its output
durably, and then one record swaps it in. A step whose inputs changed meanwhile is refused by `State.apply` and its
output deleted.

Invariants:

- Nothing is dropped that a position at or above the history floor can see.
- Merging moves grains to another stratum and keeps every one of them; deciding what is dead is not upkeep's.
- A file is deleted only after the record that removed it is durable. Readers that still want it look its content up
  again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from basin.engine.checkpoints import checkpoint, raise_floor
from basin.engine.hints import read_hint
from basin.engine.merging import flush, merge_indexes, merge_names
from basin.engine.plan import plan_index_merge, plan_names_merge, plan_strata_merge
from basin.engine.rewrite import merge_strata
from basin.engine.tiers import is_cold
from basin.errors import BasinError, CommitUnknown, OutOfSpace, StorageUnavailable
from basin.format.record import Record

if TYPE_CHECKING:
    from basin.engine.core import Core

KEPT_DELETED_MIN: Final = 16
"""Deleting kept files costs a record."""


def upkeep(core: Core) -> None:
    """Do what is due. Called under the commit mutex, after a commit.

    A step that fails is not tried again by this handle: `check` names what is wrong, and the other steps go on.
    """
    if not core.session:
        return  # Nothing of this handle was committed: planning now could be overtaken by its session's begin.
    state = core.state
    structure = (state.strata, state.name_runs, state.index_runs)
    # Most commits only add a few names: nothing to merge that there was not after the last one.
    is_settled = bool(core.settled) and all(old is new for old, new in zip(core.settled, structure, strict=True))
    if is_settled and not is_flush_due(core) and not is_checkpoint_due(core):
        return
    for step in (
        _flush_names,
        _merge_runs,
        _merge_small_strata,
        _merge_index_runs,
        _checkpoint_log,
        _delete_kept_files,
    ):
        if step.__name__ in core.upkeep_problems:
            continue
        try:
            step(core)
        except (OutOfSpace, StorageUnavailable, CommitUnknown):
            core.settled = ()  # It passes: the next commit tries again.
            return
        except BasinError as error:
            core.upkeep_problems[step.__name__] = error
    state = core.state
    core.settled = (state.strata, state.name_runs, state.index_runs)


def is_flush_due(core: Core) -> bool:
    """Whether the names in memory exceed their budget, or are those of more records than an opener should replay."""
    table = core.current.tables.memtables[0]
    unflushed = core.state.position - core.state.flushed
    return table.size > core.options.memtable_size or (unflushed >= core.options.checkpoint_every and len(table) > 0)


def is_checkpoint_due(core: Core) -> bool:
    """Whether an opener would have to replay too much."""
    state = core.state
    return (
        state.flushed > core.checkpoint_position
        or state.position - core.checkpoint_position >= core.options.checkpoint_every
    )


def _flush_names(core: Core) -> None:
    if is_flush_due(core):
        flush(core)


def _merge_runs(core: Core) -> None:
    while (window := plan_names_merge(core.state.name_runs)) and merge_names(core, window):
        pass


def _merge_small_strata(core: Core) -> None:
    small = plan_strata_merge(core.state, size_target=core.options.stratum_size, cold_data=is_cold(core.options))
    if small:
        merge_strata(core, small)


def _merge_index_runs(core: Core) -> None:
    while (sources := plan_index_merge(core.state)) and merge_indexes(core, sources):
        pass


def _checkpoint_log(core: Core) -> None:
    if is_checkpoint_due(core) and not _somebody_did(core):
        raise_floor(core)
        checkpoint(core)


def _somebody_did(core: Core) -> bool:
    """Whether another writer of a bucket has just stored a checkpoint: every one of them finds that it is due."""
    hint = read_hint(core.storage) if core.is_remote else None
    if hint is not None and hint.checkpoint > core.checkpoint_position:
        core.checkpoint_position = hint.checkpoint
        return not is_checkpoint_due(core)
    return False


def _delete_kept_files(core: Core) -> None:
    """Delete files that were kept for readers at earlier positions, after `grace_s`; many at a time."""
    oldest_ms = time.time_ns() // 1_000_000 - int(core.options.grace_s * 1000)
    due = [identity for identity, (_, time_ms) in core.state.retired.items() if time_ms <= oldest_ms]
    if len(due) < KEPT_DELETED_MIN:
        return
    core.own_strata.delete_kept({identity: core.state.retired[identity].kind for identity in due})
    core.append(lambda now: Record(files_deleted=[identity for identity in due if identity in now.retired]))
