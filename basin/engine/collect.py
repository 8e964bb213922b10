"""Pruning: condemn what no name needs, write anew what is needed little, kill what was condemned long ago.

The steps of one pass, each a record: revive what should never have been condemned; kill condemns whose time is over;
condemn strata with dead parents, together with the strata that are wholly dead; write partly dead strata anew.

What is written anew is *condemned*, not removed: whoever found a dead grain in it before revives it by their commit,
until it is killed after the grace. So no writer loses anything without being told so by `Conflict`.

Invariants:

- A condemn lists only what nobody relied on after the mark (the rules refuse it), and nothing that a grain which stays
  links to: dead parents are condemned together with what they link to, and count as staying until they are killed.
- Whatever is condemned and needed is durable elsewhere before, and relied on by the same record.
- A file is deleted after the kill is in the log, and stands in the log's list until it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Self

from basin.engine.mark import Marks, mark
from basin.engine.plan import (
    Policy,
    Usage,
    plan_dead,
    plan_kills,
    plan_parents,
    plan_partly_dead,
)
from basin.engine.rewrite import Places, Rewriter, grains_end, walk_grains
from basin.engine.state import State
from basin.errors import CorruptionError
from basin.format.grain import decode_header
from basin.format.layout import FLAG_LINKS, STRATUM_HEADER_SIZE, StratumKind
from basin.format.record import Condemn, IndexRun, Kill, Record, StratumAdded
from basin.terms import Position, StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

CONDEMNED_TOGETHER: Final = 16
"""Dead strata of one condemn: reviving one revives all of them."""
_PLACES_TOGETHER: Final = 256
"""Strata whose grains are looked up in one pass over the indexes: as many temporary files are appended to in turn."""
_GROUP_SIZE: Final = 64 << 20
"""Bytes that are written anew for one record."""
_HELD_SHARE: Final = 0.05
"""Dead parents may keep this share of what is needed; above, all strata that hold any are written anew."""


class _Places:
    """Where the kept grains of some strata lie: found by going through the indexes once for all of them."""

    def __init__(self, marks: Marks, strata: Sequence[StratumId]) -> None:
        self._numbers = {identity: number for number, identity in enumerate(strata)}
        self._spool = marks.kept_places(strata)

    def of(self, identity: StratumId) -> Places:
        """Those of one stratum, in any order."""
        return self._spool.read(self._numbers[identity])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()


class Pruner:
    """One pass over a basin. `changed` counts its records."""

    def __init__(
        self,
        core: Core,
        policy: Policy,
        pause: Callable[[int], None],
        problem: Callable[[str, Exception], None],
        done: Callable[[str, Sequence[StratumId], int], None],
    ) -> None:
        """`pause(bytes)` may wait or raise; `done(step, strata, bytes)` is told of each record."""
        self._core = core
        self._policy = policy
        self._pause = pause
        self._problem = problem
        self._done = done
        self._copied: dict[StratumId, list[StratumId]] = {}
        """Strata that were condemned in this pass, and where what is needed of them lies now."""
        self._claimed: set[StratumId] = set()
        """Strata that grains written since the mark link into."""
        self._looked_through: dict[StratumId, int] = {}
        self.changed = 0
        self.names_waste = 0.0
        """The share of entries of names that nobody sees."""
        self.names_unseen = 0
        """How many of those stand in runs, at least."""

    def run(self) -> None:
        """Mark, and do what is due."""
        marks = mark(self._core, self._pause)
        try:
            usage = marks.usage()
            self.names_waste, self.names_unseen = marks.names_waste, marks.names_unseen
            self._revive(marks, usage)
            self._kill()
            self._condemn(marks, usage)
        finally:
            marks.close()

    # --- condemned before -------------------------------------------------------------------------------------------

    def _revive(self, marks: Marks, usage: dict[StratumId, Usage]) -> None:
        """Whatever is needed is in no condemned stratum alone; should it be, that is taken back, never killed."""
        strata = marks.state.strata
        needed = [one for one, used in usage.items() if used.kept_grains and strata[one].condemned]

        def build(now: State) -> Record | None:
            still = [one for one in needed if one in now.strata and now.strata[one].condemned]
            return Record(relied=still, revived=still) if still else None

        if needed and self._core.append(build):
            self._report("revive", needed, 0)

    def _kill(self) -> None:
        for condemn in plan_kills(self._core.state, self._policy):
            listed = self._core.state.condemns.get(condemn)
            if listed is not None:  # Else another was faster, as this handle saw when it appended the last kill.
                self._kill_one(condemn, listed)

    def _kill_one(self, condemn: Position, listed: Sequence[StratumId]) -> None:
        core = self._core
        going = set(listed)
        freed = sum(core.state.strata[identity].added.length for identity in listed)

        def build(now: State) -> Record | None:
            if condemn not in now.condemns:
                return None  # Revived, or killed by another.
            emptied = [
                run.id for run in now.index_runs if all(one in going or one not in now.strata for one in run.strata)
            ]
            return Record(
                killed=[Kill(condemn, list(listed))],
                index_runs_removed=emptied,
                strata_removed=[identity for identity in emptied if identity in now.strata],
                files_kept=True,
            )

        if core.append(build):
            self._report("kill", listed, freed)

    # --- condemned now ----------------------------------------------------------------------------------------------

    def _condemn(self, marks: Marks, usage: dict[StratumId, Usage]) -> None:
        state = marks.state
        parents = plan_parents(state, usage)
        saved = marks.save()
        held = self._hold(marks, parents)
        if _kept_size(held) - _kept_size(usage) > _HELD_SHARE * _kept_size(usage):
            thorough = plan_parents(state, usage, thorough=True)
            if set(thorough) != set(parents):
                parents = thorough
                marks.restore(saved)
                held = self._hold(marks, parents)
        dead = plan_dead(state, held)
        if parents:
            if not self._condemn_parents(marks, parents, dead):
                return  # Somebody relied on them meanwhile: what they link to stays as well, until next time.
            # Until they are killed they may come back, and what they link to must be there then.
            marks.hold(parents)
            held = marks.usage()
            dead = [identity for identity in plan_dead(state, held) if identity not in self._copied]
        partly_dead = sorted(plan_partly_dead(state, self._policy, held), reverse=True)
        # The newest first: where one was spared a copy because another has it, that one is the newer.
        for start in range(0, len(partly_dead), _PLACES_TOGETHER):
            some = partly_dead[start : start + _PLACES_TOGETHER]
            with _Places(marks, some) as places:
                for group in _groups(some, held):
                    self._write_anew(marks, group, places)
        for start in range(0, len(dead), CONDEMNED_TOGETHER):
            self._condemn_dead(marks, dead[start : start + CONDEMNED_TOGETHER])

    def _hold(self, marks: Marks, going: Iterable[StratumId]) -> dict[StratumId, Usage]:
        """Keep what stays because some parent that stays links to it, needed or not."""
        gone = set(going)
        metas = [one for one in marks.strata if marks.state.strata[one].added.kind == StratumKind.META]
        marks.hold(one for one in metas if one not in gone)
        return marks.usage()

    def _condemn_parents(self, marks: Marks, parents: Sequence[StratumId], dead: Sequence[StratumId]) -> bool:
        """All strata of dead parents in one record, and the dead strata that those may link into."""
        rewriter = Rewriter(self._core, StratumKind.META, self._pause)
        with _Places(marks, parents) as places:
            outputs = self._copy_kept(marks, parents, rewriter, places)
        if not self._append_condemn(marks, parents, dead, outputs):
            rewriter.discard()
            return False
        return True

    def _condemn_dead(self, marks: Marks, dead: Sequence[StratumId]) -> None:
        self._append_condemn(marks, [], dead, [])

    def _write_anew(self, marks: Marks, group: Sequence[StratumId], places: _Places) -> None:
        """Copy what is needed of some strata, and condemn them."""
        if any(not self._is_free(self._core.state, marks, identity) for identity in group):
            group = [identity for identity in group if self._is_free(self._core.state, marks, identity)]
        if not group:
            return
        rewriter = Rewriter(self._core, StratumKind.DATA, self._pause)
        try:
            outputs = self._copy_kept(marks, group, rewriter, places)
        except CorruptionError as error:
            self._problem("rewrite", error)  # `check` names it, `repair` mends it; until then it stays as it is.
            return
        if not self._append_condemn(marks, group, [], outputs, rewriter.runs):
            rewriter.discard()

    def _copy_kept(
        self, marks: Marks, strata: Sequence[StratumId], rewriter: Rewriter, places: _Places
    ) -> list[StratumAdded]:
        """Copy what is needed of some strata, durably. What was copied is deleted if that fails, and only then: as soon
        as a record may name it, only the log says whether it does.
        """
        try:
            for identity in strata:
                rewriter.copy(marks.state.strata[identity].added, places.of(identity))
            return rewriter.finish()
        except BaseException:
            rewriter.discard()
            raise

    def _append_condemn(
        self,
        marks: Marks,
        whole: Sequence[StratumId],
        dead: Sequence[StratumId],
        outputs: Sequence[StratumAdded],
        runs: Sequence[IndexRun] = (),
    ) -> bool:
        """One record that adds `outputs` and condemns all of `whole`, and those of `dead` that nobody needs by now."""
        condemned: list[StratumId] = []

        def build(now: State) -> Record | None:
            self._claim(marks, now)
            if not all(self._is_free(now, marks, identity) for identity in whole):
                return None
            going = [*whole, *(identity for identity in dead if self._is_free(now, marks, identity))]
            relied = self._relied_on(marks, going)
            if not going or not all(one in now.strata and not now.strata[one].condemned for one in relied):
                return None
            condemned[:] = going
            return Record(
                strata_added=list(outputs),
                index_runs_added=list(runs),
                condemned=[Condemn(marks.position, going)],
                relied=sorted(relied),
            )

        sizes = {identity: known.added.length for identity, known in self._core.state.strata.items()}
        if not self._core.append(build):
            return False
        self._copied |= {identity: [one.id for one in outputs] for identity in condemned}
        self._looked_through |= {one.id: one.length for one in outputs}
        freed = sum(sizes.get(identity, 0) for identity in condemned) - sum(one.length for one in outputs)
        self._report("rewrite" if outputs else "condemn", condemned, freed)
        return True

    def _is_free(self, now: State, marks: Marks, identity: StratumId) -> bool:
        """Whether nobody has come to need a stratum since the mark, as far as the log and this handle know."""
        known = now.strata.get(identity)
        return (
            known is not None
            and not known.condemned
            and known.relied <= marks.position
            and identity not in self._claimed
            and identity not in self._core.relied_by_batches()
        )

    def _relied_on(self, marks: Marks, going: Sequence[StratumId]) -> set[StratumId]:
        """The strata that hold what these were spared a copy of."""
        relied: set[StratumId] = set()
        for identity in going:
            for other in marks.relied_on(identity):
                if other not in going:
                    relied.update(self._copied.get(other, [other]))
        return relied

    def _claim(self, marks: Marks, now: State) -> None:
        """Look through the parents that came since the mark: what they link to is not to be condemned.

        Their writer's commit relies on it; but somebody else may find such a parent before that, and refer to it.
        """
        core = self._core
        names = {run.id for run in now.name_runs}
        for identity, known in now.strata.items():
            added = known.added
            if added.kind != StratumKind.META or identity in names:
                continue
            before = marks.state.strata.get(identity)
            start = self._looked_through.get(
                identity, before.added.length if before is not None else STRATUM_HEADER_SIZE
            )
            if start >= grains_end(added):
                continue
            for offset, grain in walk_grains(core.readers.get(added.kind, identity), grains_end(added), start):
                header = decode_header(grain)
                if header.flags & FLAG_LINKS:
                    self._claim_links(identity, offset, len(grain), header.key)
            self._looked_through[identity] = grains_end(added)

    def _claim_links(self, identity: StratumId, offset: int, length: int, key: bytes) -> None:
        core = self._core
        links = core.readers.get(StratumKind.META, identity).read_grain(offset, length, key)[1].links
        for link in links:
            for place in core.locator.find_all(core.keyring.grain_keys.grain_key(link)):
                self._claimed.add(place.stratum)

    def _report(self, step: str, strata: Sequence[StratumId], freed: int) -> None:
        self.changed += 1
        self._done(step, strata, freed)


def _kept_size(usage: dict[StratumId, Usage]) -> int:
    return sum(used.kept_size for used in usage.values())


def _groups(strata: Sequence[StratumId], usage: dict[StratumId, Usage]) -> Iterable[list[StratumId]]:
    """Neighbours of which as much is needed as fills a stratum."""
    group: list[StratumId] = []
    size = 0
    for identity in strata:
        if group and size + usage[identity].kept_size > _GROUP_SIZE:
            yield group
            group, size = [], 0
        group.append(identity)
        size += usage[identity].kept_size
    if group:
        yield group
