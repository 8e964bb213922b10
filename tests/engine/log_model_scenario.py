"""What the model of the log is made of: a universe, its actors, a world. Values, and no steps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

PARENT: Final = 1
CHILD: Final = 2
"""Contents are bits. With `links`, PARENT links to CHILD, and whoever uploads PARENT uploads both."""

OWN: Final = 16
"""Strata below this number are there from the beginning; those above are uploaded by the step of a writer."""
STEPS_MAX: Final = 4

Step: TypeAlias = tuple[str, *tuple[Any, ...]]
"""What a writer commits: ("put", content), ("drop", name), ("claim",) a name if it is absent, ("sweep", writer),
("adopt", writer, content), ("rewrite", stratum), ("open", content) in a stratum that is still active, and
("finish", step, content) in the one that an earlier step opened."""


@dataclass(frozen=True)
class Scenario:
    """A small universe. `omitted` names steps of the protocol that its actors leave out (see `test_log_model`)."""

    name: str
    writers: tuple[tuple[Step, ...], ...]
    depth: int
    """Records that the actors may log."""
    strata: tuple[int, ...] = (PARENT,)
    """Contents of the strata 1, 2, … that are there from the beginning."""
    names: tuple[tuple[bytes, int], ...] = ()
    collectors: int = 1
    reader: bool = False
    links: bool = False
    stubs: bool = False
    """Whoever reads a taken slot finds it folded into a checkpoint, and has to look itself up in the state."""
    lossy: tuple[int, ...] = (0,)
    """Actors (writers first, then collectors) whose requests may fail on the way."""
    spare: tuple[int, ...] = ()
    """Writers with a second session, for which they leave one that was revoked or has an unknown commit."""
    verbatim: tuple[int, ...] = ()
    """Careless writers: they may store a record once more, as it is, at the end of the log, and ask nobody."""
    rechained: tuple[int, ...] = ()
    """As `verbatim`, but behind the last record and with the strata that it needed before."""
    omitted: frozenset[str] = frozenset()

    def without(self, step: str) -> Scenario:
        """The same universe, whose actors leave out a step of the protocol."""
        return dataclasses.replace(self, omitted=self.omitted | {step})


LOOK, READY, SENT, UNSURE, UNKNOWN, OCCUPY = range(6)
"""Looks its content up; is about to build its record; waits for the reply; got none; gave up; occupies the slot."""
COMMITTED, ABSENT, UNRESOLVED = range(3)
"""What a writer was told of a step. UNRESOLVED: it went on with another session, and never asked."""
CREATED, TAKEN, NO_REPLY = range(3)


class Writer(NamedTuple):
    step: int = 0
    phase: int = LOOK
    choice: int = 0
    """The stratum that the record relies on, or, negated, adds."""
    slot: int = 0
    record: int = -1
    sequence: int = 1
    spare: int = 0
    """1 as soon as it uses its spare session."""
    told: tuple[int, ...] = ()
    doomed: tuple[int, ...] = ()
    """Objects that it is about to delete."""


class Collector(NamedTuple):
    phase: int = LOOK
    mark: int = 0
    condemn: int = 0
    """What it kills, or 0 if it condemns."""
    listed: tuple[int, ...] = ()
    slot: int = 0
    record: int = -1
    doomed: tuple[int, ...] = ()


class Reader(NamedTuple):
    node: int = -1
    """The log that it has read, or -1 before it opens."""


class World(NamedTuple):
    node: int
    objects: int
    """Bit n: the object of stratum n exists."""
    late: tuple[int, ...]
    """Records on their way to the slot behind the last one, for whose reply nobody waits."""
    actors: tuple[Any, ...]


class Report(NamedTuple):
    worlds: int
    transitions: int
    logs: int
    voids: int
    cut: int
    """How often somebody had to stop because `depth` was reached."""
    events: Counter[str]


def uploader(number: int) -> int:
    """The writer that uploads a stratum; -1 for those that are there from the beginning."""
    return max(-1, (number - OWN) // 2 // STEPS_MAX)


def label(index: int, step: int) -> bytes:
    return b"commit %d.%d" % (index, step)
