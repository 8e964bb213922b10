"""`repair`: mends what `check` names, from what can still be read; never unasked, and first as a dry run.

Invariants:

- The plan is made from what `check` finds, before anything is written; carrying it out does what was planned, or less
  where somebody else came first.
- Nothing that can still be read is dropped. What cannot be is said to be lost, by name and content key, and recorded as
  damaged, so that putting it again heals it.
- Every step is one record after its output is durable; stopping in between leaves a basin that can be repaired again.

Each kind of file has a module: `repair_log`, `repair_strata`, `repair_names`, `repair_keys`; `repair_reading` reads
what is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from basin.engine.checkpoints import checkpoint
from basin.engine.hints import HINT_NAME
from basin.engine.log import CHECKPOINT_FOLDER
from basin.engine.recovery import is_dead, recover, sweep
from basin.engine.repair_keys import hint_is_behind, key_problems, write_hint_again
from basin.engine.repair_log import is_salvaged, look_again, plan_log
from basin.engine.repair_missing import plan_missing
from basin.engine.repair_names import plan_run
from basin.engine.repair_strata import plan_index_run, plan_stratum
from basin.engine.repair_tasks import RepairAction, Task, impossible
from basin.engine.verify import Finding, FindingKind, check
from basin.engine.writer import stratum_name
from basin.errors import BasinError, CorruptionError, ReadOnly, StorageError
from basin.format.layout import StratumKind

if TYPE_CHECKING:
    from basin.engine.core import Core

__all__ = ["RepairAction", "repair"]


def repair(core: Core, *, dry_run: bool = True) -> list[RepairAction]:
    """Plan, and unless `dry_run` carry out, what can be mended. Cost: reads every stratum once, damaged ones again."""
    if not is_salvaged(core):
        core.refresh()
        look_again(core)
    if dry_run:
        with core.commit_mutex:
            return [task.action for task in _plan(core)]
    if is_salvaged(core):
        core.require_open()
        if not core.writable:
            raise ReadOnly("this handle was opened for reading")
    else:
        core.require_writable()
        core.commit_pending()
    with core.commit_mutex:
        actions = []
        for action, run in _plan(core):
            if run is not None and not is_salvaged(core):
                core.ensure_session()
            actions.append(replace(action, done=run is not None and run()))
        if any(action.done for action in actions):
            core.ensure_session()
            recover(core)  # A session that died is revoked once its strata can be read.
    return actions


def _plan(core: Core) -> list[Task]:
    """What there is to do, in the order in which it is done. Writes nothing."""
    findings = list(check(core))
    tasks = list(plan_log(core))
    tasks += _plan_strata(core, {found.object for found in findings if found.severity == "damage"})
    tasks += plan_missing(core, [found for found in findings if found.kind == FindingKind.MISSING])
    tasks += _plan_keys(core)
    tasks += _plan_checkpoints(core)
    tasks += _plan_leftovers(core, [found for found in findings if found.kind == FindingKind.LEFTOVER])
    return tasks


def _plan_strata(core: Core, damaged: set[str]) -> Iterator[Task]:
    """One task for each stratum that is not as it was written, by what is in it."""
    name_runs = {run.id: run for run in core.state.name_runs}
    index_runs = {run.id: run for run in core.state.index_runs}
    for identity, known in core.state.strata.items():
        if stratum_name(known.added.kind, identity) not in damaged:
            continue
        if identity in name_runs:
            yield plan_run(core, name_runs[identity])
        elif identity in index_runs:
            yield plan_index_run(core, index_runs[identity])
        elif known.added.kind != StratumKind.INDEX:
            yield plan_stratum(core, known)


def _plan_keys(core: Core) -> Iterator[Task]:
    for kind, _, name, detail, _, remedy, mend in key_problems(core):
        if kind == FindingKind.HINT:
            continue
        if mend is None:
            yield impossible(kind, name, f"{detail}: {remedy}")
        else:
            yield Task(RepairAction(kind, name, f"{remedy}: {detail}"), mend)


def _plan_checkpoints(core: Core) -> Iterator[Task]:
    """Bad checkpoints go, and a new one comes; a hint that leads nowhere as well."""
    for name in core.storage.list(CHECKPOINT_FOLDER):
        path = f"{CHECKPOINT_FOLDER}/{name}"
        try:
            core.read_checkpoint(name)
        except (CorruptionError, ValueError) as error:
            yield Task(RepairAction("checkpoint", path, f"write a new one: {error}"), partial(_renew, core, path))
        except (BasinError, StorageError) as error:
            yield impossible("checkpoint", path, f"cannot be read now: {error}")
    if hint_is_behind(core):
        yield Task(RepairAction("hint", HINT_NAME, "write it anew"), partial(write_hint_again, core))


def _renew(core: Core, path: str) -> bool:
    """Delete a checkpoint that nobody can use, and make sure of one that everybody can."""
    core.storage.delete(path)
    if core.checkpoint_position < core.state.position or path.endswith(f"/{core.state.position:020d}"):
        checkpoint(core)
    return True


def _plan_leftovers(core: Core, findings: list[Finding]) -> Iterator[Task]:
    is_alone = all(session == core.session or is_dead(core, session) for session in core.state.sessions)
    for found in findings:
        if is_alone or "header" not in found.detail:
            action = RepairAction("leftover", found.object, "delete: no record names it")
            yield Task(action, partial(_sweep, core, found.object))
        else:
            yield impossible("leftover", found.object, "it may be another writer's: repair when no other is open")


def _sweep(core: Core, name: str) -> bool:
    sweep(core)
    return not core.storage.exists(name)
