"""What may go wrong with a request to a bucket, and plans that say where.

A fault that cannot happen to a request (no list has a body to cut) does not: `FaultKind.applies_to` says which can.
What a fault leaves open (how late, which bit) is drawn for each request by the seed and the request's number, so that a
fault changes nothing before itself.

`basin.testing.bucket` carries the faults out. Imports the object port's kinds of requests.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from basin.storage.objects import RequestKind


class ObjectRequest(NamedTuple):
    """One request to a bucket. Requests are numbered from 1 as they are sent; `size` is of the body that goes up."""

    number: int
    actor: str
    kind: RequestKind
    name: str
    size: int


class FaultKind(enum.Enum):
    """What goes wrong. "Before" and "after" is meant of the request's effect."""

    SERVER_ERROR = "500 before"
    SLOW_DOWN = "503 before"
    TIMEOUT = "no reply, and no effect"
    RESET = "the connection breaks before"
    SERVER_ERROR_AFTER = "500 after"
    LOST_REPLY = "no reply, although it took effect"
    RESET_AFTER = "the connection breaks after"
    LATE = "no reply; it takes effect later, perhaps after the actor's next requests"
    DUPLICATE = "it arrives a second time, later"
    RESENT = "it arrives twice at once, and the second reply is the one that is seen"
    CONTENDED = "409: another conditional request is under way"
    ERROR_INSIDE = "200 with an error in the reply's body, and no effect"
    SHORT_BODY = "the body that comes back ends early"
    WRONG_BODY = "one bit of the body that comes back is flipped"
    SLOW = "the reply takes long"
    STALE_LIST = "an older listing"
    CONDITION_IGNORED = "the name is taken, and the body is replaced all the same"
    PAUSED = "the actor does not run for a long time, then sends the request"
    CLOCK_FORWARD = "the actor's wall clock jumps forward before it sends the request"
    CLOCK_BACK = "the actor's wall clock jumps back before it sends the request"
    KILLED = "the actor is killed before it sends the request"
    KILLED_AFTER = "the actor is killed before it sees the reply"

    def applies_to(self, kind: RequestKind) -> bool:
        """Whether this can happen to a request of that kind."""
        return kind in _APPLIES.get(self, _ALL)


_ALL: Final[frozenset[RequestKind]] = frozenset({"get", "head", "list", "put", "put_new", "part", "delete", "restore"})
_CHANGING: Final[frozenset[RequestKind]] = frozenset({"put", "put_new", "part", "delete", "restore"})
_DELIVERED: Final = _CHANGING - {"part"}  # A part alone is not visible: early, late or twice makes no difference.

_APPLIES: Final[dict[FaultKind, frozenset[RequestKind]]] = {
    FaultKind.SERVER_ERROR_AFTER: _CHANGING,
    FaultKind.LOST_REPLY: _CHANGING,
    FaultKind.RESET_AFTER: _CHANGING,
    FaultKind.LATE: _DELIVERED,
    FaultKind.DUPLICATE: _DELIVERED,
    FaultKind.RESENT: frozenset({"put_new"}),
    FaultKind.CONTENDED: frozenset({"put_new"}),
    FaultKind.ERROR_INSIDE: _CHANGING,
    FaultKind.SHORT_BODY: frozenset({"get"}),
    FaultKind.WRONG_BODY: frozenset({"get"}),
    FaultKind.STALE_LIST: frozenset({"list"}),
    FaultKind.CONDITION_IGNORED: frozenset({"put_new"}),
    FaultKind.KILLED_AFTER: _CHANGING,
}

TRANSIENT: Final = tuple(
    kind
    for kind in FaultKind
    if kind not in {FaultKind.CONDITION_IGNORED, FaultKind.KILLED, FaultKind.KILLED_AFTER, FaultKind.WRONG_BODY}
)
"""What happens on a healthy store to an actor that lives on: all but rot, a store that breaks its word, and kills."""

_EXPONENTS: Final[dict[FaultKind, tuple[float, float]]] = {
    FaultKind.LATE: (0.0, 5.5),
    FaultKind.DUPLICATE: (0.0, 5.5),
    FaultKind.SLOW: (3.0, 5.0),
    FaultKind.PAUSED: (4.0, 8.5),
    FaultKind.CLOCK_FORWARD: (3.0, 8.5),
    FaultKind.CLOCK_BACK: (3.0, 8.5),
}
"""Bounds of the decimal logarithm of milliseconds: 10^5.5 are five minutes, 10^8.5 are three and a half days."""


@dataclass(frozen=True, slots=True)
class ObjectFault:
    """A fault with its length: how late (after the timeout or reply), how slow, how long a pause or far a jump.

    `delay_ms` None: drawn between the bounds of its kind, evenly among the orders of magnitude.
    """

    kind: FaultKind
    delay_ms: int | None = None

    def drawn_delay_ms(self, generator: random.Random) -> int:
        """The length, from `generator` if it is left open; 0 for a kind that has none."""
        if self.delay_ms is not None:
            return self.delay_ms
        if self.kind not in _EXPONENTS:
            return 0
        return int(10 ** generator.uniform(*_EXPONENTS[self.kind]))


Fault: TypeAlias = ObjectFault | FaultKind

Plan: TypeAlias = Mapping[int, Fault] | Callable[[ObjectRequest], Fault | None]
"""What goes wrong with which request: by its number, or decided by a function."""


def planned(plan: Plan, request: ObjectRequest) -> ObjectFault | None:
    """The fault of `request`, if the plan has one that can happen to it."""
    fault = plan(request) if callable(plan) else plan.get(request.number)
    if isinstance(fault, FaultKind):
        fault = ObjectFault(fault)
    return fault if fault is not None and fault.kind.applies_to(request.kind) else None


def single_faults(
    requests: Sequence[ObjectRequest], kinds: Sequence[FaultKind] = tuple(FaultKind)
) -> Iterator[dict[int, Fault]]:
    """Every plan with one fault: each of `kinds` at each of the requests (of a run without faults) that it can befall.

    Up to its fault, a run with the same seed makes the same requests.
    """
    for request in requests:
        for kind in kinds:
            if kind.applies_to(request.kind):
                yield {request.number: kind}


def sampled_pairs(
    requests: Sequence[ObjectRequest], count: int, *, seed: int, kinds: Sequence[FaultKind] = tuple(FaultKind)
) -> Iterator[dict[int, Fault]]:
    """`count` plans with faults at two different requests, drawn by `seed`.

    The second one may meet another request than in the run without faults, and then may not apply.
    """
    generator = random.Random(f"{seed}/pairs")
    able = [request for request in requests if _applicable(request, kinds)]
    for _ in range(count):
        pair = sorted(generator.sample(able, 2))
        yield {request.number: generator.choice(_applicable(request, kinds)) for request in pair}


def _applicable(request: ObjectRequest, kinds: Sequence[FaultKind]) -> list[FaultKind]:
    return [kind for kind in kinds if kind.applies_to(request.kind)]
