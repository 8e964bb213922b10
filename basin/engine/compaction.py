"""`compact`: keep a basin small and fast while others write and read; `plan`: what it would do.

`plan_compaction` decides from a state alone, and this carries it out, one record a step. So it may be killed at any
instruction: what a step had written and no record names is adopted or swept by whoever comes next.

Order of a run: names into runs, the history floor, expiry; then the prune, if asked for; then merges of runs, of small
strata and of indexes, and sealing anew under the newest key generation; files that nobody reads any more; a checkpoint.

Invariant: any number of these may run at a time, beside writers and readers, on any number of machines. A step that
comes too late is refused by the log, and costs only its own work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from basin.engine.checkpoints import checkpoint, due_floor, raise_floor
from basin.engine.collect import Pruner
from basin.engine.generations import finish_drops
from basin.engine.mark import Marks, mark
from basin.engine.memory import give_memory_back
from basin.engine.merging import flush, merge_indexes, merge_names, never
from basin.engine.plan import (
    MERGE_WIDTH,
    CompactionStep,
    Policy,
    plan_compaction,
    plan_file_deletions,
    plan_index_merge,
    plan_index_renewal,
    plan_names_merge,
    plan_names_rewrite,
    plan_reencryption,
    plan_strata_merge,
)
from basin.engine.recovery import sweep
from basin.engine.rewrite import merge_strata
from basin.engine.state import EXPIRY_LAG_MS
from basin.engine.tiers import is_cold, minimum_storage_s
from basin.errors import CorruptionError, ObjectMissing
from basin.format.record import Record
from basin.terms import StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

PASSES_MAX: Final = 5
"""Passes of a prune whose grace is 0: what was condemned is killed by the next one, and may free more."""
_PROGRESS_EVERY_S: Final = 0.2
_NAMES_WASTE: Final = 0.1
"""All runs of names are written anew when this share of their entries is seen by nobody."""


@dataclass(slots=True)
class Progress:
    """How far a compaction has come."""

    step: str = ""
    bytes_done: int = 0
    """Bytes read and written so far."""


@dataclass(slots=True)
class CompactionReport:
    """What a compaction did. Sizes in bytes."""

    steps: list[CompactionStep] = field(default_factory=list)
    bytes_processed: int = 0
    """Read and written."""
    bytes_freed: int = 0
    """Of files deleted, less those that were written."""
    bytes_condemned: int = 0
    """Of strata that will be deleted when the grace is over."""
    files_deleted: int = 0
    stopped: bool = False
    """Whether it was told to stop before it was done."""
    problems: list[str] = field(default_factory=list)
    """What could not be done because of damage: `basin check` names it."""
    seconds: float = 0.0


class _Stopped(Exception):  # not an error: somebody asked for it
    """The compaction was told to stop."""


class Compaction:
    """One run."""

    def __init__(
        self,
        core: Core,
        *,
        prune: bool,
        grace_s: float | None,
        rate: float,
        rewrite_cold: bool,
        stop: threading.Event | None,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        """`rate`: bytes a second read and written at most; 0: no limit."""
        self._core = core
        self._prune = prune
        self._grace_s = core.options.grace_s if grace_s is None else grace_s
        self._rate = rate
        self._rewrite_cold = rewrite_cold
        self._stop = stop if stop is not None else threading.Event()
        self._progress = Progress()
        self._tell = progress
        self._told = 0.0
        self._begun = time.monotonic()
        self._names_waste = 0.0
        self._names_unseen = 0
        self.report = CompactionReport()

    def _policy(self) -> Policy:
        return make_policy(self._core, self._grace_s, rewrite_cold=self._rewrite_cold)

    def run(self) -> CompactionReport:
        """Do all that is due."""
        core = self._core
        core.require_writable()
        core.commit_pending()
        core.ensure_session()
        before = _stored(core)
        try:
            self._step("names", self._settle_names)
            if self._prune:
                self._step("prune", self._prune_all)
            self._step("merge-names", self._merge_names)
            self._step("merge-strata", self._merge_strata)
            self._step("re-encrypt", self._reencrypt)
            self._step("merge-indexes", self._merge_indexes)
            self._step("delete-files", self._delete_files)
            if self._prune:
                self._step("sweep", self._sweep)
            self._step("checkpoint", self._checkpoint)
        except _Stopped:
            self.report.stopped = True
        state = core.state
        condemned = [identity for listed in state.condemns.values() for identity in listed]
        self.report.bytes_condemned = sum(state.strata[identity].added.length for identity in condemned)
        self.report.bytes_freed = before - _stored(core)
        self.report.bytes_processed = self._progress.bytes_done
        self.report.seconds = time.monotonic() - self._begun
        return self.report

    # --- pace -------------------------------------------------------------------------------------------------------

    def _step(self, name: str, work: Callable[[], None]) -> None:
        """Do a step; damage stops it, and the others go on.

        Each begins with as little memory as the one before: what one is done with lies in holes that do not fit the
        next, and the peak of a prune of ten million grains was 99 MiB instead of 88.
        """
        give_memory_back()
        self._progress.step = name
        self._pause(0)
        before = self._core.state
        try:
            work()
        except CorruptionError as error:
            self._problem(name, error)
        except ObjectMissing as error:
            self._core.refresh()
            if self._core.state.strata is before.strata:
                self._problem(name, error)  # Else somebody else is compacting: what is left is done next time.

    def _problem(self, step: str, error: Exception) -> None:
        self.report.problems.append(f"{step}: {error}")

    def _pause(self, size: int) -> None:
        """Count bytes; keep the rate; stop if told to."""
        progress = self._progress
        progress.bytes_done += size
        if self._rate:
            ahead_s = progress.bytes_done / self._rate - (time.monotonic() - self._begun)
            if ahead_s > 0:
                self._stop.wait(ahead_s)
        if self._stop.is_set():
            raise _Stopped
        if self._tell is not None and time.monotonic() - self._told >= _PROGRESS_EVERY_S:
            self._told = time.monotonic()
            self._tell(progress)

    def _done(self, kind: str, strata: Sequence[StratumId], freed: int) -> None:
        self.report.steps.append(CompactionStep(kind, tuple(strata), "", bytes_freed=freed))
        self._pause(0)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _settle_names(self) -> None:
        core = self._core
        with core.commit_mutex:
            core.catch_up()
            core.finish_strata()
            flush(core)
            raise_floor(core)
        due_ms = time.time_ns() // 1_000_000 - EXPIRY_LAG_MS
        if self._prune and due_ms > core.state.expire_through_ms:
            core.append(lambda now: Record(expire_through_ms=due_ms) if due_ms > now.expire_through_ms else None)

    def _prune_all(self) -> None:
        for _ in range(PASSES_MAX if self._grace_s == 0 else 1):
            pruner = Pruner(self._core, self._policy(), self._pause, self._problem, self._done)
            pruner.run()
            self._names_waste = max(self._names_waste, pruner.names_waste)
            self._names_unseen = pruner.names_unseen
            if not pruner.changed:
                return

    def _merge_names(self) -> None:
        core = self._core
        if self._names_waste > _NAMES_WASTE and core.state.name_runs:
            self._merge_window(core.state.name_runs, unseen=self._names_unseen)
        while window := plan_names_rewrite(core.state) or plan_names_merge(core.state.name_runs):
            if not self._merge_window(window):
                return

    def _merge_window(self, window: Sequence[object], *, unseen: int = 0) -> bool:
        runs = [run for run in self._core.state.name_runs if run in window]
        if not merge_names(self._core, runs, self._pause, unseen=unseen):
            return False
        self._done("merge-names", [run.id for run in runs], 0)
        return True

    def _merge_strata(self) -> None:
        size, cold = self._core.options.stratum_size, is_cold(self._core.options)
        while group := plan_strata_merge(self._core.state, MERGE_WIDTH, size_target=size, cold_data=cold):
            if not self._rewrite("merge-strata", group):
                return

    def _reencrypt(self) -> None:
        while group := plan_reencryption(self._core.state, self._policy()):
            if not self._rewrite("re-encrypt", group):
                return

    def _rewrite(self, kind: str, group: Sequence[StratumId]) -> bool:
        if not merge_strata(self._core, group, self._pause):
            return False
        self._done(kind, group, 0)
        return True

    def _merge_indexes(self) -> None:
        while sources := plan_index_merge(self._core.state) or plan_index_renewal(self._core.state):
            if not merge_indexes(self._core, sources, self._pause):
                return
            self._done("merge-indexes", [identity for _, identity, _ in sources], 0)

    def _delete_files(self) -> None:
        core = self._core
        due = plan_file_deletions(core.state, self._policy())
        if not due:
            return
        core.own_strata.delete_kept(due)
        core.append(lambda now: Record(files_deleted=[identity for identity in due if identity in now.retired]))
        self.report.files_deleted += len(due)
        self._done("delete-files", list(due), 0)

    def _sweep(self) -> None:
        self.report.files_deleted += sweep(self._core)
        finish_drops(self._core)

    def _checkpoint(self) -> None:
        core = self._core
        with core.commit_mutex:
            if core.state.position > core.checkpoint_position:
                checkpoint(core)


def _stored(core: Core) -> int:
    return sum(known.added.length for known in core.state.strata.values())


def make_policy(core: Core, grace_s: float, *, rewrite_cold: bool = False) -> Policy:
    """What a compaction of this basin may do now."""
    return Policy(
        now_ms=time.time_ns() // 1_000_000,
        grace_ms=int(grace_s * 1000),
        size_target=core.options.stratum_size,
        is_cold=is_cold(core.options),
        rewrite_cold=rewrite_cold,
        cold_minimum_ms=int(minimum_storage_s(core.options) * 1000),
    )


def plan(core: Core, *, prune: bool, grace_s: float | None = None, rewrite_cold: bool = False) -> list[CompactionStep]:
    """The first steps of a compaction, in order. Writes nothing; for a prune it reads names, indexes and links."""
    core.refresh()
    policy = make_policy(core, core.options.grace_s if grace_s is None else grace_s, rewrite_cold=rewrite_cold)
    if not prune:
        return plan_compaction(core.state, policy)
    marks = mark(core, never, floor=due_floor(core))
    try:
        hold_all(marks)
        return plan_compaction(marks.state, policy, marks.usage())
    finally:
        marks.close()


def hold_all(marks: Marks) -> None:
    """Keep all that parents link to, needed or not, but for those in strata of which nothing is needed."""
    usage = marks.usage()
    marks.hold(identity for identity, used in usage.items() if used.kept_grains)
