"""An explicit-state model of deletion: writers, collectors that rewrite, merges and a reader upon the real rules.

`log_model_search` walks all worlds that it gives. `log_model` is about requests that get lost; this is about what is
deleted, and what is copied before.

Invariants, by their names in `Broken`:

- LOST: every content that a visible name needs, links followed, lies in a stratum that counts.
- DELETED: the file of every stratum that counts exists.
- LEAKED: every file is of a stratum that counts, or stands in the list of those to be deleted.
- REPEATED: no commit counts twice. REFUSED: none counts of which its writer was told otherwise.
- STUCK: `apply` refuses no record that its writer has mended.
- READER: a reader that follows the log to its head finds the content of every name.

What is one step: to follow the log, build a record and append it, for an append succeeds only if nobody was faster, and
whoever was slower has changed nothing; to mark, for what is read does not change; to delete a file. Every actor may
stop for ever before any step (no step has to be taken), or be interrupted and begin anew.

Worlds that differ only in what no step can see are one. Seen are: which strata exist, count, and are condemned
together; the names; what each actor has in hand; and of positions only whether something happened after a mark that a
collector has in hand, for `apply` compares nothing else. Collectors share a session, and their order does not count:
they are alike. A reader is what it needs and where it looks for it.

Not modelled: what `log_model` has (lost and late requests of collectors, strata that still grow, sweeps), and the
history floor: a collector marks from the names of one position. No wait is modelled: each may take no time, or any.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Final

from basin.errors import Conflict
from tests.engine.log_model_ledger import FIRST_SESSION, STUCK, Broken, Change, Ledger, View, contents_of, unused
from tests.engine.log_model_world import (
    ABSENT,
    COMMITTED,
    KILL,
    LISTED_MAX,
    LOOK,
    READY,
    UNSURE,
    Collector,
    Heir,
    Merger,
    Places,
    Reader,
    Universe,
    World,
    Writer,
    bits,
    holding,
    mask,
    mentioned,
    told,
    with_actor,
)

LOST: Final = "the content of a visible name is lost"
DELETED: Final = "the file of a stratum that counts is deleted"
LEAKED: Final = "a file is forgotten"
REPEATED: Final = "a commit counts twice"
REFUSED: Final = "a commit that was refused is in the log"
READER: Final = "a reader finds the content of a live name missing"


class Deletion:
    """The worlds of one universe: `first`, `steps` from one to the next, `check`, and the `key` of what can be seen."""

    def __init__(self, universe: Universe) -> None:
        self.universe = universe
        self.events: Counter[str] = Counter()
        self._omitted = universe.omitted
        used: list[int] = []
        for contents in universe.strata:
            used.append(unused(contents, used))
        self.ledger = Ledger(used, universe.names, len(universe.writers) + 1)
        self._sessions = [FIRST_SESSION + 1 + index for index in range(len(universe.writers))]
        self._session = FIRST_SESSION + 1 + len(universe.writers)
        """Of collectors, mergers and heirs."""
        self._children: dict[int, int] = {}
        for parent, child in universe.links:
            self._children[parent] = self._children.get(parent, 0) | child
        self._verdicts: dict[tuple[int, int], str] = {}
        self._keys: dict[Any, int] = {}
        self._node_keys: dict[int, int] = {}
        self._shared: dict[Any, Any] = {}
        self._collector_keys: dict[tuple[int, Collector], int] = {}
        actors: list[Any] = [Writer() for _ in universe.writers]
        actors += [Collector() for _ in range(universe.collectors)]
        actors += [Merger(universe.merges)] if universe.merges else []
        actors += [Heir(writer) for writer in universe.heirs]
        actors += [Reader()] if universe.reader else []
        self.first = World(0, mask(used), tuple(actors))

    # --- contents -----------------------------------------------------------------------------------------------------

    def _closure(self, contents: int) -> int:
        """Contents, and all that they link to."""
        while True:
            more = contents
            for parent, children in self._children.items():
                if contents & parent:
                    more |= children
            if more == contents:
                return contents
            contents = more

    def _linked(self, contents: int) -> int:
        """What contents link to directly."""
        linked = 0
        for parent, children in self._children.items():
            if contents & parent:
                linked |= children
        return linked

    def _named(self, view: View) -> int:
        named = 0
        for _, content in view.names:
            named |= content
        return self._closure(named)

    def _is_meta(self, number: int) -> bool:
        return bool(contents_of(number) & self.universe.meta)

    def _split(self, contents: int) -> list[int]:
        """META and DATA contents never share a stratum."""
        return [part for part in (contents & self.universe.meta, contents & ~self.universe.meta) if part]

    def _new(self, world: World, parts: Iterable[int]) -> tuple[int, ...]:
        """Numbers for new strata."""
        view = self.ledger.views[world.node]
        used = {*view.strata, *view.retired, *view.gone}
        for actor in world.actors:
            used.update(mentioned(actor))
        new: list[int] = []
        for contents in parts:
            new.append(unused(contents, used | set(new)))
        return tuple(new)

    # --- invariants ---------------------------------------------------------------------------------------------------

    def check(self, world: World) -> None:
        """Raise `Broken` unless every invariant holds that can be seen in one world."""
        verdict = self._verdicts.get((world.node, world.files))
        if verdict is None:
            verdict = self._verdicts[world.node, world.files] = self._verdict(world)
        if verdict:
            raise Broken(verdict)
        commits = self.ledger.views[world.node].commits
        for index in range(len(self.universe.writers)):
            for step, answer in enumerate(world.actors[index].told):
                if answer == ABSENT and (index, step) in commits:
                    raise Broken(REFUSED)

    def _verdict(self, world: World) -> str:
        view = self.ledger.views[world.node]
        held = 0
        for number in view.strata:
            held |= contents_of(number)
        if self._named(view) & ~held:
            return LOST
        if mask(view.strata) & ~world.files:
            return DELETED
        if world.files & ~mask((*view.strata, *view.retired)):
            return LEAKED
        if len(set(view.commits)) < len(view.commits):
            return REPEATED
        return ""

    # --- what is seen of a world --------------------------------------------------------------------------------------

    def key(self, world: World) -> tuple[int, ...]:
        """Equal for worlds whose steps lead to equal worlds."""
        node = world.node
        node_key = self._node_keys.get(node)
        if node_key is None:
            node_key = self._node_keys[node] = self._number(self._node_key(node))
        split = len(self.universe.writers)
        collectors = world.actors[split : split + self.universe.collectors]
        numbers = [self._collector_keys.get((node, one)) or self._collector_number(node, one) for one in collectors]
        known = self._keys
        rest = [known.setdefault(one, len(known)) for one in world.actors[:split]]
        rest += [known.setdefault(one, len(known)) for one in world.actors[split + len(collectors) :]]
        return node_key, known.setdefault(world.files, len(known)), *rest, *sorted(numbers)

    def shared(self, world: World) -> World:
        """The same world; what equals a part of an earlier one is that very part, to save memory."""
        one = self._shared
        actors = tuple(one.setdefault((type(actor), actor), actor) for actor in world.actors)
        return World(world.node, one.setdefault(world.files, world.files), actors)

    def _number(self, thing: Any) -> int:
        return self._keys.setdefault(thing, len(self._keys))

    def _collector_number(self, node: int, collector: Collector) -> int:
        number = self._collector_keys[node, collector] = self._number(self._collector_key(node, collector))
        return number

    def _node_key(self, node: int) -> Any:
        view = self.ledger.views[node]
        condemns = frozenset(view.condemns.values())
        gone = view.gone if self.universe.heirs else None  # Only who adopts asks.
        return view.live, view.condemned, condemns, view.retired, gone, view.sessions, view.names, view.commits

    def _collector_key(self, node: int, collector: Collector) -> Any:
        view = self.ledger.views[node]
        if collector.phase == READY:
            marked = self.ledger.views[collector.mark]
            after = tuple(number for number in collector.listed if view.relied.get(number, 0) > marked.position)
            return collector._replace(mark=0), after, self._arrived(view, marked)
        if collector.phase == KILL:
            return collector._replace(condemn=0), view.condemns.get(collector.condemn)
        return collector

    def _arrived(self, view: View, marked: View) -> tuple[int, ...]:
        """META strata that were added after a mark."""
        return tuple(number for number in view.strata if self._is_meta(number) and number not in marked.strata)

    # --- steps --------------------------------------------------------------------------------------------------------

    def steps(self, world: World) -> Iterator[World]:
        """Every world that may come next."""
        yield from self._delete(world)
        for index, actor in enumerate(world.actors):
            if isinstance(actor, Writer):
                yield from self._writer(world, index, actor)
            elif isinstance(actor, Collector):
                yield from self._collector(world, index, actor)
            elif isinstance(actor, Merger):
                yield from self._merger(world, index, actor)
            elif isinstance(actor, Heir):
                yield from self._heir(world, index, actor)
            else:
                yield from self._reader(world, index, actor)

    def _log(self, world: World, change: Change, index: int, actor: Any) -> World:
        """The record is appended; what it adds was finished before."""
        node = self.ledger.append(world.node, change)
        return with_actor(World(node, world.files | mask(change.added), world.actors), index, actor)

    def _delete(self, world: World) -> Iterator[World]:
        """Whoever finds killed or removed strata in the state deletes their files, and then says so."""
        view = self.ledger.views[world.node]
        there = [number for number in sorted(view.retired) if world.files >> number & 1]
        for number in there:
            yield world._replace(files=world.files & ~(1 << number))
        early = "delete before saying so" in self._omitted
        gone = tuple(sorted(view.retired if early else view.retired.difference(there)))
        if gone:
            yield world._replace(node=self.ledger.append(world.node, Change(self._session, files_deleted=gone)))

    # --- writers ------------------------------------------------------------------------------------------------------

    def _writer(self, world: World, index: int, writer: Writer) -> Iterator[World]:
        script = self.universe.writers[index]
        if len(writer.told) == len(script):
            return
        kind, *details = script[len(writer.told)]
        if writer.phase == UNSURE:
            yield self._look_itself_up(world, index, writer)
        elif writer.phase == READY or kind in ("drop", "name"):
            yield from self._commit(world, index, writer)
        else:
            after = self._put(world, writer, details[0])
            if kind == "put":
                yield with_actor(world, index, after._replace(phase=READY))
            elif kind == "abandon":
                yield with_actor(world, index, told(after._replace(found=()), ABSENT))
            else:
                yield with_actor(world, index, told(after._replace(found=(), open=after.found), ABSENT))

    def _put(self, world: World, writer: Writer, content: int) -> Writer:
        """Look a content up, and, if it has to be written, what it links to before it."""
        view = self.ledger.views[world.node]
        found: dict[int, int] = {}
        missing: list[int] = []
        waiting = [content]
        while waiting:
            wanted = waiting.pop()
            places = [*holding(writer.own, wanted), *view.places(wanted)]
            if places:
                found[wanted] = places[0]
            elif wanted not in missing:
                missing.append(wanted)
                waiting.extend(bits(self._children.get(wanted, 0)))
        new = self._new(world, self._split(sum(missing)))
        places_of_new = {wanted: number for number in new for wanted in bits(contents_of(number))}
        children = {child for wanted in missing for child in bits(self._children.get(wanted, 0))}
        everywhere = found | places_of_new
        linked = {(child, everywhere[child]) for child in children}
        return writer._replace(
            found=tuple(sorted(everywhere.items())),
            own=writer.own + new,
            linked=tuple(sorted({*writer.linked, *linked})),
        )

    def _commit(self, world: World, index: int, writer: Writer) -> Iterator[World]:
        """Look again for what is gone or condemned, then append; if something is nowhere, the batch is refused."""
        view = self.ledger.views[world.node]
        kind, _ = self.universe.writers[index][len(writer.told)]
        needs = writer.open if kind == "name" else writer.found
        own, linked = self._loggable(view, writer)
        relied = self._relied(view, own, needs)
        if relied is None:
            self.events["refused"] += 1
            refused = writer._replace(phase=LOOK, found=(), own=own, linked=linked)
            yield with_actor(world, index, refused if kind == "put" else told(refused, ABSENT))
            return
        relied |= self._relied(view, own, linked) or set()
        self.events["relied on one found again"] += bool(relied - {number for _, number in (*needs, *linked)})
        try:
            after = self._log(world, self._change(view, index, writer, own, relied), index, told(writer, COMMITTED))
        except Conflict as conflict:
            if conflict.rule != 1:
                raise Broken(STUCK) from conflict
            self.events["revoked"] += 1
            rest = len(self.universe.writers[index]) - len(writer.told)
            yield with_actor(world, index, Writer(told=writer.told + (ABSENT,) * rest))
            return
        yield after
        if index in self.universe.lossy:
            yield with_actor(after, index, writer._replace(phase=UNSURE))

    def _loggable(self, view: View, writer: Writer) -> tuple[tuple[int, ...], Places]:
        """Its own strata that a record may name, and what their grains link to: that has to count as well."""
        if "rely on what grains link to" in self._omitted:
            return writer.own, ()
        own, linked = self._whole(view, writer.own, writer.linked)
        self.events["did not log a parent without child"] += own != writer.own
        return own, linked

    def _change(self, view: View, index: int, writer: Writer, own: tuple[int, ...], relied: set[int]) -> Change:
        step = len(writer.told)
        kind, detail = self.universe.writers[index][step]
        revived = set() if "revive" in self._omitted else relied.intersection(view.condemned)
        self.events["revived"] += bool(revived)
        return Change(
            self._sessions[index],
            (index, step),
            added=own,
            relied=tuple(sorted(relied)),
            revived=tuple(sorted(revived)),
            names=() if kind == "drop" else ((b"%d.%d" % (index, step), detail),),
            dropped=(detail,) if kind == "drop" else (),
        )

    def _look_itself_up(self, world: World, index: int, writer: Writer) -> World:
        is_found = (index, len(writer.told)) in self.ledger.views[world.node].commits
        if is_found and "look-up before repeating" not in self._omitted:
            self.events["found itself"] += 1
            return with_actor(world, index, told(writer, COMMITTED))
        return with_actor(world, index, writer._replace(phase=READY, own=(), linked=()))

    def _relied(self, view: View, own: tuple[int, ...], needs: Places) -> set[int] | None:
        """What a record relies on: where it was found, or where it is found again; None if it is nowhere."""
        relied: set[int] = set()
        for content, number in needs:
            if number in own or self._is_careless(view, number):
                continue
            wanted = content
            if "find again what links to the same" in self._omitted and content & self.universe.twins:
                wanted = self.universe.twins
            live = holding(view.live, wanted)
            if number in live:
                relied.add(number)
            elif holding(own, wanted):
                continue
            elif live:
                relied.add(live[0])
            elif number in view.condemned:
                relied.add(number)
            elif places := view.places(wanted):
                relied.add(places[0])
            else:
                return None
        return relied

    def _is_careless(self, view: View, number: int) -> bool:
        """Whether a writer does not care about what it found in a stratum."""
        is_old = number in self.ledger.views[0].strata
        return (
            "rely on what was found" in self._omitted
            or ("rely on own strata" in self._omitted and not is_old)
            or ("look again for what is gone" in self._omitted and number in view.gone)
        )

    def _whole(self, view: View, own: tuple[int, ...], linked: Places) -> tuple[tuple[int, ...], Places]:
        """The own strata whose grains link to nothing that is nowhere."""
        while True:
            lost = 0
            for content, number in linked:
                if number not in own and not holding(own, content) and not view.places(content):
                    lost |= content
            rest = tuple(number for number in own if not self._linked(contents_of(number)) & lost)
            if rest == own:
                children = 0
                for number in own:
                    children |= self._linked(contents_of(number))
                return own, tuple(place for place in linked if place[0] & children)
            own = rest

    # --- collectors ---------------------------------------------------------------------------------------------------

    def _collector(self, world: World, index: int, collector: Collector) -> Iterator[World]:
        if collector.phase == LOOK:
            view = self.ledger.views[world.node]
            for listed in self._candidates(view):
                plan = self._plan(world, listed)
                if plan is not None:
                    yield with_actor(world, index, plan)
            for condemn, listed in view.condemns.items():
                yield with_actor(world, index, Collector(KILL, listed=listed, condemn=condemn))
            return
        yield with_actor(world, index, Collector())  # It was interrupted, or gives up; nobody knows its copies.
        if collector.phase == READY:
            yield from self._condemn(world, index, collector)
        else:
            yield from self._kill(world, index, collector)

    def _candidates(self, view: View) -> Iterator[tuple[int, ...]]:
        """Any strata with something dead in them: what is worth it is not the model's business."""
        named = self._named(view)
        partly_dead = [number for number in view.live if contents_of(number) & ~named]
        for count in range(1, LISTED_MAX + 1):
            yield from itertools.combinations(partly_dead, count)

    def _plan(self, world: World, listed: tuple[int, ...]) -> Collector | None:
        """Mark, and copy what is live or held and lies nowhere else; None if nothing would be gained."""
        view = self.ledger.views[world.node]
        staying = [number for number in view.strata if number not in listed]
        if "condemned parents stay" in self._omitted:
            staying = [number for number in staying if number in view.live]
        kept_contents = self._named(view)
        if "dead parents hold" not in self._omitted:
            held = 0
            for number in staying:
                held |= self._linked(contents_of(number))
            kept_contents |= held if "what is held holds" in self._omitted else self._closure(held)
        there = 0
        for number in listed:
            if not contents_of(number) & ~kept_contents:
                return None
            there |= contents_of(number)
        countable = [number for number in staying if number in view.live]
        copied, kept = 0, set()
        for content in bits(there & kept_contents):
            elsewhere = holding(countable, content)
            if elsewhere:
                kept.add(elsewhere[0])
            else:
                copied |= content
        copies = self._new(world, self._split(copied))
        return Collector(READY, world.node, listed, copies, tuple(sorted(kept)))

    def _condemn(self, world: World, index: int, collector: Collector) -> Iterator[World]:
        view, marked = self.ledger.views[world.node], self.ledger.views[collector.mark]
        if not self._is_closed(view, marked, collector):
            self.events["found a parent behind its mark"] += 1
            yield with_actor(world, index, Collector())
            return
        copies = () if "copies and condemn in one record" in self._omitted else collector.copies
        change = Change(
            self._session,
            added=copies,
            relied=() if "rely on kept copies" in self._omitted else collector.kept,
            condemned=collector.listed,
            mark=view.position if "condemn as of the mark" in self._omitted else marked.position,
        )
        try:
            after = self._log(world, change, index, Collector())
        except Conflict as conflict:
            self.events[f"rule {conflict.rule} refused a condemn"] += 1
            yield with_actor(world, index, Collector())
            return
        self.events["condemned with copies" if collector.copies else "condemned"] += 1
        self.events["relied on kept copies"] += bool(collector.kept)
        yield after
        if "finish copies before the record" in self._omitted and collector.copies:
            yield after._replace(files=after.files & ~mask(collector.copies))
        if "kill before deleting" in self._omitted:
            yield after._replace(files=after.files & ~mask(collector.listed))

    def _is_closed(self, view: View, marked: View, collector: Collector) -> bool:
        """Whether no parent that came after the mark links to what would be gone."""
        if "look at what came after the mark" in self._omitted:
            return True
        linked, there, elsewhere = 0, 0, 0
        for number in self._arrived(view, marked):
            linked |= self._linked(contents_of(number))
        for number in collector.listed:
            there |= contents_of(number)
        counting = view.strata if "condemned copies do not count" in self._omitted else view.live
        for number in (*collector.copies, *(one for one in counting if one not in collector.listed)):
            elsewhere |= contents_of(number)
        return not linked & there & ~elsewhere

    def _kill(self, world: World, index: int, collector: Collector) -> Iterator[World]:
        is_listed = "list killed strata" not in self._omitted
        change = Change(self._session, killed=collector.listed, condemn=collector.condemn, files_kept=is_listed)
        try:
            yield self._log(world, change, index, Collector())
            self.events["killed"] += 1
        except Conflict as conflict:
            self.events[f"rule {conflict.rule} refused a kill"] += 1
            yield with_actor(world, index, Collector())

    # --- merges, heirs, readers ---------------------------------------------------------------------------------------

    def _merger(self, world: World, index: int, merger: Merger) -> Iterator[World]:
        """Replace two strata of a kind by one with all of their grains."""
        view = self.ledger.views[world.node]
        if not merger.copy:
            if merger.left:
                for pair in itertools.combinations(view.live, 2):
                    if self._is_meta(pair[0]) == self._is_meta(pair[1]):
                        yield with_actor(world, index, self._merge(world, merger, pair))
            return
        change = Change(self._session, added=(merger.copy,), removed=merger.listed, files_kept=True)
        try:
            yield self._log(world, change, index, Merger(merger.left - 1))
            self.events["merged"] += 1
        except Conflict as conflict:
            self.events[f"rule {conflict.rule} refused a merge"] += 1
            yield with_actor(world, index, Merger(merger.left))

    def _merge(self, world: World, merger: Merger, pair: tuple[int, ...]) -> Merger:
        contents = contents_of(pair[0]) | contents_of(pair[1])
        if "merge all grains" in self._omitted:
            contents &= self._named(self.ledger.views[world.node]) or contents
        return merger._replace(listed=pair, copy=self._new(world, [contents])[0])

    def _heir(self, world: World, index: int, heir: Heir) -> Iterator[World]:
        """Take a writer for dead: look into the folder, later revoke its session and adopt what no record named."""
        if heir.is_done:
            return
        writer = world.actors[heir.writer]
        if (heir.found, heir.linked) != (writer.own, writer.linked) and writer.own:
            yield with_actor(world, index, heir._replace(found=writer.own, linked=writer.linked))
        view = self.ledger.views[world.node]
        adopted = tuple(number for number in heir.found if number not in view.gone and number not in view.strata)
        linked: Places = ()
        if "adopt with reliance" not in self._omitted:
            adopted, linked = self._whole(view, adopted, heir.linked)
        relied = self._relied(view, adopted, linked) or set()
        session = self._sessions[heir.writer]
        change = Change(
            self._session,
            added=adopted,
            owner=session,
            relied=tuple(sorted(relied)),
            revived=tuple(sorted(relied.intersection(view.condemned))),
            revoked=(session,),
        )
        self.events["adopted"] += bool(adopted)
        yield self._log(world, change, index, heir._replace(is_done=True, found=(), linked=()))

    def _reader(self, world: World, index: int, reader: Reader) -> Iterator[World]:
        """Open once; then read all names at any time, and at a missing file follow the log and look again."""
        view = self.ledger.views[world.node]
        places = [view.places(content)[0] for content in bits(self._named(view))]
        now = Reader(is_open=True, strata=tuple(sorted(set(places))))
        if not reader.is_open:
            yield with_actor(world, index, now)
        elif mask(reader.strata) & ~world.files:
            if "follow the log at a missing file" in self._omitted or mask(now.strata) & ~world.files:
                raise Broken(READER)
            self.events["reader looked again"] += 1
            yield with_actor(world, index, now)
