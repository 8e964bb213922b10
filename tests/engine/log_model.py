"""An explicit-state model of the log in a bucket: every interleaving of actors upon the real rules of `State`.

`explore` walks all worlds that a `Scenario` can reach, breadth first, and raises `Violation` with the shortest way to
a world in which an invariant is broken. A world is the log so far, the objects of strata that exist, the requests that
may still arrive, and the actors. What the model takes from the product, and does not imitate: `Record` and its bytes,
`apply` and `fold`, `state_to_map` and `state_from_map`.

Invariants, by their names in `Violation`:

- ACKNOWLEDGED: a commit that was acknowledged is in the log exactly once; REPEATED: no commit counts twice.
- REFUSED: a commit of which its writer was told that it did not happen is not in the log.
- LOST: every content that a visible name needs, links followed, lies in a stratum that counts.
- DELETED: the object of every stratum that counts exists. Both hold also for what a late request would make of the log.
- UNREAD: a transaction counts only if nothing changed what it had read.
- DIFFERENT: a log folds to one state, also from a checkpoint in its middle, and as its writers judged it beforehand.
- STUCK: no stored record, and no refusal, leaves anybody without a next step.
- READER: a reader that reloads finds the content of every name that is live at the head.

What is atomic: following the log to its head; reading a slot that is taken, which never changes; one upload; one
deletion. Everything else is a step of its own, and every actor may stop for ever, or go on much later, before any step.
Requests: answered, or carried out with the reply lost, or late (whenever its slot is still free), or dropped. A late
copy of a request whose slot is taken has no effect and is forgotten.

Not modelled: runs of names and of indexes, the history floor, expiry, key slots, and what lies in the bytes of a frame.

What is deleted, and what is copied before, is `log_model_collector`'s.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Final

from basin.engine.state import ACTIVE, FINISHED
from basin.errors import Conflict
from basin.format.record import Batch, Condemn, Kill, Record, StratumAdded
from tests.engine.log_model_history import CLAIM, STUCK, History, Violation, number_of, stratum
from tests.engine.log_model_scenario import (
    ABSENT,
    CHILD,
    COMMITTED,
    CREATED,
    LOOK,
    NO_REPLY,
    OCCUPY,
    OWN,
    PARENT,
    READY,
    SENT,
    STEPS_MAX,
    TAKEN,
    UNKNOWN,
    UNRESOLVED,
    UNSURE,
    Collector,
    Reader,
    Report,
    Scenario,
    World,
    Writer,
    label,
    uploader,
)

ACKNOWLEDGED: Final = "an acknowledged commit is not in the log"
REPEATED: Final = "a commit counts twice"
REFUSED: Final = "a commit that was refused is in the log"
LOST: Final = "the content of a visible name is lost"
DELETED: Final = "a stratum that counts was deleted"
READER: Final = "a reader finds the content of a live name missing"

_NOW_MS: Final = 1_800_000_000_000


class Model:
    """The worlds of one scenario: `first`, `steps` from one to the next, and `check`."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.history = History()
        self.events: Counter[str] = Counter()
        self.cut = 0
        self._omitted = scenario.omitted
        self._contents = dict(enumerate(scenario.strata, 1))
        self._sessions: dict[tuple[int, int], int] = {}
        self._intact: dict[tuple[int, int], str] = {}
        self._plans: dict[tuple[int, int, Writer], tuple[str, int, int]] = {}
        for index, script in enumerate(scenario.writers):
            for step, (kind, *details) in enumerate(script):
                for spare in (0, 1):
                    self._contents[self._own(index, step, spare)] = self._uploaded(kind, details)
        self.first = self._begin()

    def _uploaded(self, kind: str, details: list[Any]) -> int:
        if kind == "rewrite":
            return self._contents[details[0]]
        return self._needed(details[-1]) if kind in ("put", "adopt", "open") else 0

    def _needed(self, content: int) -> int:
        return content | CHILD if self.scenario.links and content & PARENT else content

    def _own(self, index: int, step: int, spare: int) -> int:
        return OWN + (index * STEPS_MAX + step) * 2 + spare

    def _added(self, number: int, *, is_active: bool = False) -> StratumAdded:
        session = self._sessions[uploader(number), (number - OWN) % 2] if number >= OWN else 1
        status, length = (ACTIVE, 100) if is_active else (FINISHED, 200)
        return StratumAdded(stratum(number), 1, status, length, 1, bytes(32), 0, session)

    def _begin(self) -> World:
        """The log of somebody who is gone, and the sessions of all actors."""
        scenario, node = self.scenario, 0
        batch = Batch(
            reference_names=[name for name, _ in scenario.names],
            reference_keys=[content.to_bytes(32, "big") for _, content in scenario.names],
        )
        existing = range(1, len(scenario.strata) + 1)
        first = Record(session_begun=True, sequence=1, batches=[batch], strata_added=[self._added(n) for n in existing])
        actors = len(scenario.writers) + scenario.collectors
        owners = [(index, 0) for index in range(actors)] + [(index, 1) for index in scenario.spare]
        for record in (first, *(Record(session_begun=True, sequence=1) for _ in owners)):
            node = self._store(node, record)
        self._sessions.update({owner: position for position, owner in enumerate(owners, 2)})
        self._limit = len(owners) + 1 + scenario.depth
        everybody = [*(Writer() for _ in scenario.writers), *(Collector() for _ in range(scenario.collectors))]
        readers = [Reader()] if scenario.reader else []
        return World(node, sum(1 << number for number in existing), (), (*everybody, *readers))

    def _store(self, node: int, record: Record) -> int:
        record.previous, record.time_ms = self.history.states[node].hash, _NOW_MS
        return self.history.extend(node, self.history.judge(node, record))

    # --- invariants ---------------------------------------------------------------------------------------------------

    def check(self, world: World) -> None:
        """Raise `Violation` unless every invariant holds that can be seen in one world."""
        if self.history.flaws[world.node]:
            raise Violation(self.history.flaws[world.node])
        commits = self.history.commits[world.node]
        for index, script in enumerate(self.scenario.writers):
            told = world.actors[index].told
            for step in range(len(script)):
                count = commits[label(index, step)]
                answer = told[step] if step < len(told) else UNRESOLVED
                if count > 1:
                    raise Violation(REPEATED)
                if answer == COMMITTED and count != 1:
                    raise Violation(ACKNOWLEDGED)
                if answer == ABSENT and count:
                    raise Violation(REFUSED)
        for node in (world.node, *(self.history.extend(world.node, record) for record in world.late)):
            broken = self._broken(node, world.objects)
            if broken:
                raise Violation(broken, "" if node == world.node else "if a late request arrives")

    def _broken(self, node: int, objects: int) -> str:
        found = self._intact.get((node, objects))
        if found is None:
            strata = [number_of(identity) for identity in self.history.states[node].strata]
            held = 0
            for number in strata:
                held |= self._contents[number]
            found = LOST if self._named(node) & ~held else ""
            if not all(objects >> number & 1 for number in strata):
                found = DELETED
            self._intact[node, objects] = found
        return found

    def _named(self, node: int) -> int:
        """All contents that the visible names need."""
        needed = 0
        for content in self.history.names[node].values():
            needed |= self._needed(content)
        return needed

    # --- what happens to a request ------------------------------------------------------------------------------------

    def steps(self, world: World) -> Iterator[World]:
        """Every world that may come next."""
        for record in world.late:
            self.events["late request arrived"] += 1
            yield World(self.history.extend(world.node, record), world.objects, (), world.actors)
        for index, actor in enumerate(world.actors):
            if isinstance(actor, Writer):
                yield from self._writer(world, index, actor)
            elif isinstance(actor, Collector):
                yield from self._collector(world, index, actor)
            else:
                yield from self._reader(world, index, actor)

    def _position(self, world: World) -> int:
        return self.history.states[world.node].position

    def _is_full(self, world: World) -> bool:
        """Whether the universe is cut here: nobody logs more."""
        full = self._position(world) >= self._limit
        self.cut += full
        return full

    def _outcomes(self, world: World, index: int, slot: int, record: int) -> Iterator[tuple[World, int]]:
        """Put-if-absent of a record at a slot, as the store and the network may treat it."""
        if slot <= self._position(world):
            yield world, TAKEN
            if "condition of the put" in self._omitted and slot == self._position(world):
                node = self.history.extend(self.history.parents[world.node], record)
                yield world._replace(node=node, late=()), CREATED
            return
        landed = world._replace(node=self.history.extend(world.node, record), late=())
        yield landed, CREATED
        if index in self.scenario.lossy:
            yield landed, NO_REPLY
            yield world, NO_REPLY
            yield world._replace(late=tuple(sorted({*world.late, record}))), NO_REPLY

    # --- writers ------------------------------------------------------------------------------------------------------

    def _writer(self, world: World, index: int, writer: Writer) -> Iterator[World]:
        if writer.doomed:
            yield _deleting(world, index, writer)
        elif writer.step == len(self.scenario.writers[index]):
            return
        elif writer.phase == LOOK:
            yield self._look(world, index, writer)
        elif writer.phase == READY:
            yield from self._prepare(world, index, writer)
        elif writer.phase == SENT:
            for after, outcome in self._outcomes(world, index, writer.slot, writer.record):
                if outcome == CREATED:
                    counts = self.history.counts[after.node]
                    yield self._told(after, index, writer, COMMITTED) if counts else _again(after, index, writer)
                elif outcome == TAKEN:
                    yield self._taken(after, index, writer)
                    yield from self._carelessly(after, index, writer)
                else:
                    yield _with(after, index, writer._replace(phase=UNSURE))
        elif writer.phase == UNSURE:
            yield from self._unsure(world, index, writer)
        else:
            yield from self._resolve(world, index, writer)

    def _look(self, world: World, index: int, writer: Writer) -> World:
        """Look the content up, as of now; upload it if it is nowhere."""
        kind, *details = self.scenario.writers[index][writer.step]
        if kind == "adopt" and world.objects >> self._own(details[0], 0, 0) & 1:
            return _with(world, index, writer._replace(phase=READY, choice=-self._own(details[0], 0, 0)))
        if kind in ("put", "adopt"):
            found = self._find(world.node, details[-1])
            return self._upload(world, index, writer) if found is None else _choose(world, index, writer, found)
        if kind in ("rewrite", "open"):
            return self._upload(world, index, writer)
        if kind == "finish":
            return _choose(world, index, writer, -self._own(index, details[0], writer.spare))
        if kind == "sweep" and "revoke before sweeping" in self._omitted:
            writer = writer._replace(doomed=self._unlogged(world, details[0]))
        return _choose(world, index, writer, 0)

    def _find(self, node: int, content: int) -> int | None:
        numbers = map(number_of, self.history.states[node].strata)
        return min((number for number in numbers if self._contents[number] & content), default=None)

    def _upload(self, world: World, index: int, writer: Writer) -> World:
        number = self._own(index, writer.step, writer.spare)
        return _choose(world._replace(objects=world.objects | 1 << number), index, writer, -number)

    def _unlogged(self, world: World, victim: int) -> tuple[int, ...]:
        """Objects of another writer's first session that no record names."""
        strata = self.history.states[world.node].strata
        uploads = (self._own(victim, step, 0) for step in range(len(self.scenario.writers[victim])))
        return tuple(number for number in uploads if world.objects >> number & 1 and stratum(number) not in strata)

    def _prepare(self, world: World, index: int, writer: Writer) -> Iterator[World]:
        """Follow the log to its head; build the record for the slot behind it, mending what `apply` refuses."""
        plan = (world.node, index, writer)
        if plan not in self._plans:
            self._plans[plan] = self._plan(*plan)
        verdict, choice, record = self._plans[plan]
        if verdict == "send":
            if not self._is_full(world):
                slot = self._position(world) + 1
                yield _with(world, index, writer._replace(phase=SENT, choice=choice, slot=slot, record=record))
            return
        self.events[verdict] += 1
        if verdict == "found itself":
            yield self._told(world, index, writer, COMMITTED)
        elif verdict == "refused":
            yield self._told(world, index, writer, ABSENT)
        elif verdict == "revoked" and index in self.scenario.spare and not writer.spare:
            yield _with(world, index, writer._replace(spare=1, sequence=1))
        elif verdict == "revoked":
            yield self._told(world, index, writer, ABSENT)
        elif verdict == "upload":
            yield self._upload(world, index, writer)
        else:
            raise Violation(STUCK, "a writer cannot mend its record")

    def _plan(self, node: int, index: int, writer: Writer) -> tuple[str, int, int]:
        """What a writer does at a node: send a record (with the choice made for it), or why not."""
        state = self.history.states[node]
        kind, *details = self.scenario.writers[index][writer.step]
        session = self._sessions[index, writer.spare]
        if "look-up before repeating" not in self._omitted and state.sessions.get(session, 0) > writer.sequence:
            return "found itself", 0, 0
        if kind == "claim" and CLAIM in self.history.names[node]:
            return "refused", 0, 0
        choice, revives, revokes = writer.choice, False, True
        if kind == "adopt" and self._is_gone(node, -choice):
            self.events["left a stratum that is gone"] += 1
            found = self._find(node, details[-1])
            if found is None:
                return "upload", 0, 0
            choice = found
        for _ in range(5):
            record = self._record(node, index, writer, choice=choice, revives=revives, revokes=revokes)
            try:
                number = self.history.judge(node, record)
                self.events["revived"] += revives
                return "send", choice, number
            except Conflict as conflict:
                self.events[f"rule {conflict.rule} refused a {kind}"] += 1
                if kind == "rewrite" or conflict.fields.get("session") == session:
                    return "revoked" if conflict.rule == 1 else "refused", 0, 0
                if "session" in conflict.fields:
                    revokes = False
                    if uploader(-choice) == index:
                        continue
                elif stratum(abs(choice)) in state.strata:
                    revives = choice > 0
                    choice = abs(choice)
                    continue
            found = self._find(node, details[-1]) if kind in ("put", "adopt") else 0
            if found is None:
                return "upload", 0, 0
            choice, revives = found, False
        return "stuck", 0, 0

    def _is_gone(self, node: int, number: int) -> bool:
        """Whether a stratum was in the log, and is no longer: its object may be deleted at any moment.

        The state does not tell it from one that no record ever named; only the records do.
        """
        if "adopt only what was never logged" in self._omitted or number < OWN:
            return False
        return stratum(number) in self.history.logged[node] - self.history.states[node].strata.keys()

    def _record(
        self, node: int, index: int, writer: Writer, *, choice: int, revives: bool = False, revokes: bool = True
    ) -> Record:
        kind, *details = self.scenario.writers[index][writer.step]
        named, batch = label(index, writer.step), Batch()
        record = Record(
            self._sessions[index, writer.spare],
            writer.sequence + 1,
            self.history.states[node].hash,
            _NOW_MS,
            batches=[batch],
        )
        if kind in ("put", "adopt", "open", "finish"):
            batch.reference_names, batch.reference_keys = [named], [details[-1].to_bytes(32, "big")]
        else:
            batch.names, batch.values = [named], [b""]
        if kind == "claim":
            batch.names, batch.values = [named, CLAIM], [b"", b""]
        elif kind == "drop":
            batch.deletes = [details[0]]
        elif kind in ("sweep", "adopt"):
            record.sessions_revoked = [self._sessions[details[0], 0]] if revokes else []
        elif kind == "rewrite":
            record.strata_removed = [stratum(details[0])]
        if choice < 0:
            record.strata_added = [self._added(-choice, is_active=kind == "open")]
        elif choice and not ("rely on own strata" in self._omitted and uploader(choice) == index):
            record.relied = [stratum(choice)]
            record.revived = record.relied if revives else []
        return record

    def _taken(self, world: World, index: int, writer: Writer) -> World:
        """The slot is taken: by us, or by somebody."""
        reads = not self.scenario.stubs and "look-up before repeating" not in self._omitted
        if reads and self.history.is_ours(world.node, writer.slot, writer.record):
            self.events["found its record in the slot"] += 1
            return self._told(world, index, writer, COMMITTED)
        return _again(world, index, writer)

    def _unsure(self, world: World, index: int, writer: Writer) -> Iterator[World]:
        """No reply: read the slot. If it is empty, put the same once more, or give up."""
        yield from self._carelessly(world, index, writer)
        if writer.slot <= self._position(world):
            yield self._taken(world, index, writer)
            return
        yield _with(world, index, writer._replace(phase=SENT))
        gone = 0
        if "keep uploads of unknown commits" in self._omitted and writer.choice < 0:
            gone = 1 << -writer.choice
        yield _with(world, index, writer._replace(phase=UNKNOWN))._replace(objects=world.objects & ~gone)

    def _carelessly(self, world: World, index: int, writer: Writer) -> Iterator[World]:
        """Store the record once more at the end of the log, where nobody has judged it."""
        if not {*self.scenario.verbatim, *self.scenario.rechained} & {index} or self._is_full(world):
            return
        copies = [writer.record] if index in self.scenario.verbatim else []
        if index in self.scenario.rechained:
            copies.append(self.history.number(self._record(world.node, index, writer, choice=writer.choice)))
        for record in copies:
            self.events["stored carelessly"] += 1
            again = writer._replace(phase=SENT, slot=self._position(world) + 1, record=record)
            yield _with(world, index, again)

    def _resolve(self, world: World, index: int, writer: Writer) -> Iterator[World]:
        """The outcome is unknown: read the slot; if it is empty, occupy it, so that nothing can arrive there."""
        if writer.slot <= self._position(world):
            sequence = self.history.states[world.node].sessions.get(self._sessions[index, writer.spare], 0)
            ours = not self.scenario.stubs and self.history.is_ours(world.node, writer.slot, writer.record)
            committed = ours or sequence > writer.sequence
            self.events["resolved: committed" if committed else "resolved: absent"] += 1
            yield self._told(world, index, writer, COMMITTED if committed else ABSENT)
            return
        if writer.phase == UNKNOWN:
            if index in self.scenario.spare and not writer.spare:
                yield self._told(world, index, writer._replace(spare=1, sequence=1), UNRESOLVED)
            if "occupy the slot" in self._omitted:
                yield self._told(world, index, writer, ABSENT)
            yield _with(world, index, writer._replace(phase=OCCUPY))
            return
        occupant = Record(
            session_begun=True, sequence=1, previous=self.history.states[world.node].hash, time_ms=_NOW_MS
        )
        for after, outcome in self._outcomes(world, index, writer.slot, self.history.judge(world.node, occupant)):
            if outcome == CREATED:
                self.events["occupied the slot"] += 1
            yield _with(after, index, writer._replace(phase=UNKNOWN))

    def _told(self, world: World, index: int, writer: Writer, answer: int) -> World:
        """A step ends, and its caller learns how."""
        kind, *details = self.scenario.writers[index][writer.step]
        doomed: tuple[int, ...] = ()
        if answer == COMMITTED and kind == "sweep":
            doomed = self._unlogged(world, details[0])
        elif answer == COMMITTED and kind == "rewrite":
            doomed = (details[0],)
        sequence = writer.sequence + (answer == COMMITTED)
        return _with(
            world,
            index,
            Writer(writer.step + 1, LOOK, 0, 0, -1, sequence, writer.spare, (*writer.told, answer), doomed),
        )

    # --- collectors and readers ---------------------------------------------------------------------------------------

    def _collector(self, world: World, index: int, collector: Collector) -> Iterator[World]:
        if collector.doomed:
            yield _deleting(world, index, collector)
        elif collector.phase == LOOK:
            garbage = self._garbage(world.node)
            if garbage:
                mark = self._position(world)
                yield _with(world, index, Collector(phase=READY, mark=mark, listed=garbage))
            for condemn, listed in self.history.states[world.node].condemns.items():
                listed_numbers = tuple(map(number_of, listed))
                yield _with(world, index, Collector(phase=READY, condemn=condemn, listed=listed_numbers))
        elif collector.phase == READY:
            yield from self._send(world, index, collector)
        elif collector.phase == SENT:
            for after, outcome in self._outcomes(world, index, collector.slot, collector.record):
                if outcome == NO_REPLY:
                    yield _with(after, index, collector._replace(phase=UNSURE))
                else:
                    yield self._collected(after, index, collector)
        elif collector.slot <= self._position(world):
            yield self._collected(world, index, collector)
        else:
            yield _with(world, index, collector._replace(phase=SENT))
            yield _with(world, index, Collector())

    def _garbage(self, node: int) -> tuple[int, ...]:
        """Strata without named content, into which nothing that stays has a link."""
        named, strata = self._named(node), self.history.states[node].strata
        numbers = [number_of(identity) for identity, known in strata.items() if not known.condemned]
        listed = {number for number in numbers if not self._contents[number] & named}
        if "condemn parents with children" in self._omitted:
            return tuple(number for number in sorted(listed) if not self._contents[number] & PARENT)
        if self.scenario.links:
            staying = [number for number in map(number_of, strata) if number not in listed]
            if "condemned parents stay" in self._omitted:
                staying = [number for number in staying if number in numbers]
            if any(self._contents[number] & PARENT for number in staying):
                listed = {number for number in listed if not self._contents[number] & CHILD}
        return tuple(sorted(listed))

    def _send(self, world: World, index: int, collector: Collector) -> Iterator[World]:
        state = self.history.states[world.node]
        session = self._sessions[index, 0]
        record = Record(session, state.sessions[session] + 1, state.hash, _NOW_MS)
        listed = [stratum(number) for number in collector.listed]
        if collector.condemn:
            record.killed = [Kill(collector.condemn, listed)]
        else:
            record.condemned = [Condemn(collector.mark, listed)]
        try:
            number = self.history.judge(world.node, record)
        except Conflict as conflict:
            self.events[f"rule {conflict.rule} refused a {'kill' if collector.condemn else 'condemn'}"] += 1
            yield _with(world, index, Collector())
            return
        if not self._is_full(world):
            early = collector.condemn and "settle before deleting" in self._omitted
            doomed = collector.listed if early else ()
            sent = collector._replace(phase=SENT, slot=state.position + 1, record=number, doomed=doomed)
            yield _with(world, index, sent)

    def _collected(self, world: World, index: int, collector: Collector) -> World:
        """The slot of a condemn or kill is taken, by it or by somebody."""
        if not self.history.is_ours(world.node, collector.slot, collector.record):
            return _with(world, index, collector._replace(phase=READY, slot=0, record=-1))
        if collector.condemn:
            self.events["killed"] += 1
            return _with(world, index, Collector(doomed=collector.listed))
        doomed = collector.listed if "kill before deleting" in self._omitted else ()
        after = Collector(phase=READY, condemn=collector.slot, listed=collector.listed, doomed=doomed)
        return _with(world, index, after)

    def _reader(self, world: World, index: int, reader: Reader) -> Iterator[World]:
        """Read every live name at its own position; at a missing object reload, and look again."""
        if reader.node < 0:
            yield _with(world, index, Reader(world.node))
            return
        strata = sorted(map(number_of, self.history.states[reader.node].strata))
        needed = self._named(reader.node)
        for number in strata:
            if self._contents[number] & needed:
                needed &= ~self._contents[number]
                if world.objects >> number & 1:
                    continue
                if reader.node == world.node or "reload" in self._omitted:
                    raise Violation(READER)
                self.events["reader reloaded"] += 1
                yield _with(world, index, Reader(world.node))
                return
        if needed:
            raise Violation(READER)


def _with(world: World, index: int, actor: Any) -> World:
    actors = world.actors
    return World(world.node, world.objects, world.late, (*actors[:index], actor, *actors[index + 1 :]))


def _choose(world: World, index: int, writer: Writer, choice: int) -> World:
    return _with(world, index, writer._replace(phase=READY, choice=choice, slot=0, record=-1))


def _again(world: World, index: int, writer: Writer) -> World:
    """It lost the slot: it follows the log, and looks itself up before it tries again."""
    return _choose(world, index, writer, writer.choice)


def _deleting(world: World, index: int, actor: Any) -> World:
    after = _with(world, index, actor._replace(doomed=actor.doomed[1:]))
    return after._replace(objects=world.objects & ~(1 << actor.doomed[0]))


# --- the search -------------------------------------------------------------------------------------------------------


def explore(scenario: Scenario) -> Report:
    """Visit every world that can be reached, and check it. Raises `Violation` at the first that breaks an invariant."""
    model = Model(scenario)
    came_from: dict[World, World | None] = {model.first: None}
    waiting = deque([model.first])
    transitions = 0
    while waiting:
        world = waiting.popleft()
        try:
            model.check(world)
            for after in model.steps(world):
                transitions += 1
                if after not in came_from:
                    came_from[after] = world
                    waiting.append(after)
        except Violation as violation:
            way = [world]
            while (before := came_from[way[-1]]) is not None:
                way.append(before)
            for before, after in itertools.pairwise(reversed(way)):
                violation.add_note(_difference(before, after))
            raise
    history = model.history
    return Report(len(came_from), transitions, len(history.states), history.voids, model.cut, +model.events)


def _difference(before: World, after: World) -> str:
    """One line of the way to a violation."""
    changed = [
        f"actor {index}: {new}"
        for index, (old, new) in enumerate(zip(before.actors, after.actors, strict=True))
        if old != new
    ]
    return f"log {after.node}, objects {after.objects:b}, late {after.late}; {'; '.join(changed)}"
