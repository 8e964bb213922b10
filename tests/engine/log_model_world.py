"""What the collector's model is made of: a universe, the actors in it, and a world. Values, and no steps.

Imported by `log_model_collector` and its tests.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from tests.engine.log_model_ledger import contents_of

LISTED_MAX: Final = 3
"""Strata of one condemn."""

Step: TypeAlias = tuple[str, *tuple[Any, ...]]
"""("put", content); ("drop", name); ("abandon", content): put in a batch that is rolled back, so that what was written
lies in the stratum that the next commit logs; ("look", content) and later ("name", content): a batch that is open for
long, while the same writer commits others."""

Places: TypeAlias = tuple[tuple[int, int], ...]
"""Contents, and the stratum each was found in."""


@dataclass(frozen=True)
class Universe:
    """A small universe. `omitted` names steps of the protocol that its actors leave out."""

    name: str
    strata: tuple[int, ...]
    """Contents (bits) of the strata that are there from the beginning."""
    writers: tuple[tuple[Step, ...], ...]
    names: tuple[tuple[bytes, int], ...] = ()
    links: tuple[tuple[int, int], ...] = ()
    """Parents and their children."""
    meta: int = 0
    """The contents that lie in META strata; all parents do."""
    twins: int = 0
    """Contents that have one key, and differ in what they link to."""
    collectors: int = 1
    merges: int = 0
    heirs: tuple[int, ...] = ()
    """Writers whom somebody takes for dead: their session is revoked, and what they had finished adopted."""
    reader: bool = False
    lossy: tuple[int, ...] = ()
    """Writers who may not learn that their record was appended, and look themselves up."""
    omitted: frozenset[str] = frozenset()

    def without(self, step: str) -> Universe:
        """The same universe, whose actors leave out a step of the protocol."""
        return dataclasses.replace(self, omitted=self.omitted | {step})


LOOK, READY, UNSURE, KILL = range(4)
COMMITTED, ABSENT = range(2)


class Writer(NamedTuple):
    phase: int = LOOK
    found: Places = ()
    """What the batch in hand relies on."""
    open: Places = ()
    """The same of a batch that was begun earlier."""
    own: tuple[int, ...] = ()
    """Strata that it has finished, and no record names."""
    linked: Places = ()
    """What the grains in its own strata link to, and where that was found."""
    told: tuple[int, ...] = ()


class Collector(NamedTuple):
    phase: int = LOOK
    mark: int = 0
    """The node at which it marked."""
    listed: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    """Strata whose copies make a copy superfluous."""
    condemn: int = 0
    """What it kills."""


class Merger(NamedTuple):
    left: int
    listed: tuple[int, ...] = ()
    copy: int = 0


class Heir(NamedTuple):
    writer: int
    is_done: bool = False
    found: tuple[int, ...] = ()
    linked: Places = ()


class Reader(NamedTuple):
    is_open: bool = False
    strata: tuple[int, ...] = ()
    """Where it looks for what the names need that it knows of."""


class World(NamedTuple):
    node: int
    files: int
    """Bit n: the file of stratum n exists. Only of strata that a record named."""
    actors: tuple[Any, ...]


class Report(NamedTuple):
    worlds: int
    steps: int
    nodes: int
    events: Counter[str]


def mask(numbers: Iterable[int]) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def bits(contents: int) -> list[int]:
    return [1 << bit for bit in range(contents.bit_length()) if contents >> bit & 1]


def holding(numbers: Iterable[int], content: int) -> list[int]:
    return [number for number in numbers if contents_of(number) & content]


def mentioned(actor: Any) -> Iterator[int]:
    """Strata that an actor has in hand."""
    if isinstance(actor, Writer):
        yield from actor.own
        for _, number in (*actor.found, *actor.open, *actor.linked):
            yield number
    elif isinstance(actor, Collector):
        yield from (*actor.listed, *actor.copies, *actor.kept)
    elif isinstance(actor, Merger):
        yield from (*actor.listed, actor.copy)
    elif isinstance(actor, Heir):
        yield from actor.found
    else:
        yield from actor.strata


def told(writer: Writer, answer: int) -> Writer:
    """A step ends. A record that was appended names all that its writer had finished."""
    after = writer._replace(phase=LOOK, found=(), told=(*writer.told, answer))
    return after._replace(own=(), linked=()) if answer == COMMITTED else after


def with_actor(world: World, index: int, actor: Any) -> World:
    actors = world.actors
    return World(world.node, world.files, (*actors[:index], actor, *actors[index + 1 :]))
