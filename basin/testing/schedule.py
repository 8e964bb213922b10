"""`Scheduler`: runs actors (plain functions) one at a time under a virtual clock, in an order drawn by a seed.

Invariants:

- Each actor has a thread, and exactly one of these threads runs. It hands over only where it waits: in `wait` (as a
  request of a simulated bucket does), in `wait_until`, and in `time.sleep`. Who goes on is drawn among all who are
  due.
- The clock stands still while an actor runs, and moves to the next due time when nobody is due.
- The same seed and the same actors give the same order, times and random bytes.
- Nobody waits for ever: when all actors wait for what no other one will do, when one is blocked in something that the
  scheduler does not see (a lock that another actor holds), or when the steps run out, every actor is abandoned and the
  run fails with `Stalled` and a picture of all actors.

While a scheduler runs, the functions of `time`, `random` and `os` in `_VIRTUAL` answer actors from the virtual clock
and from the actor's own generator, which seeds its new `random.Random()`s too; all other threads get the real ones. Not
seen are a name that was imported by itself (`from time import sleep`), a generator made before the run, and a wait with
a timeout in `threading`.

Knows nothing of buckets. Imports the standard library only.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

EPOCH_MS: Final = 1_767_225_600_000
"""The wall clock of every actor at the beginning of a run: 2026-01-01, so that no run depends on when it is made."""

_MONOTONIC_START_NS: Final = 1_000 * 1_000_000_000
"""As on a machine that has been up for a while: code that takes 0 for "never" is found."""

_JOIN_S: Final = 2.0


class Stalled(AssertionError):
    """The run cannot go on: all actors wait, one is blocked outside the scheduler, or there were too many steps."""


class Abandoned(BaseException):
    """Raised in an actor whose run has failed. Nothing may catch it and go on: every later wait raises it as well."""


class Actor:
    """One function with its thread, its clock and its generator. `random` is also what `os.urandom` draws from."""

    def __init__(self, name: str, scheduler: Scheduler) -> None:
        self.name = name
        self.random: random.Random = random.Random(f"{scheduler.seed}/{name}")
        self.wake_ns = 0
        self.ready: Callable[[], bool] | None = None
        self.waits_for = "its beginning"
        self.done = False
        self.thread: threading.Thread | None = None
        self.turn = threading.Lock()  # Held but for the moment in which the actor is told to go on.
        self.turn.acquire()
        self._scheduler = scheduler
        self._wall_offset_ns = 0

    def jump_clock(self, delta_ms: int) -> None:
        """Move this actor's wall clock, and no other clock, by `delta_ms`."""
        self._wall_offset_ns += delta_ms * 1_000_000

    def time_ns(self) -> int:
        """What `time.time_ns` tells this actor."""
        return EPOCH_MS * 1_000_000 + self._scheduler.now_ns + self._wall_offset_ns

    def monotonic_ns(self) -> int:
        """What `time.monotonic_ns` tells this actor."""
        return _MONOTONIC_START_NS + self._scheduler.now_ns

    def sleep(self, seconds: float) -> None:
        """What `time.sleep` does for this actor."""
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        self._scheduler.wait(seconds * 1000, "sleep")


class _Delivery(NamedTuple):
    """Something that happens by itself at a time."""

    due_ns: int
    number: int
    what: str
    action: Callable[[], None]


class Outcomes(NamedTuple, Generic[T]):
    """What the actors returned or raised, by name; each name is in one of the two."""

    results: dict[str, T]
    errors: dict[str, BaseException]


class Scheduler:
    """Runs actors once. `wait`, `call_later` and the clock may be used by any thread; a thread that is no actor does
    not wait.

    `steps_max` bounds the number of times that anybody is given the turn; `stall_s` is how long (in real seconds) an
    actor may run without handing over.
    """

    def __init__(self, seed: int, *, steps_max: int = 1_000_000, stall_s: float = 30.0) -> None:
        self.seed = seed
        self.random = random.Random(f"{seed}/schedule")
        self.now_ns = 0
        self.steps = 0
        self._steps_max = steps_max
        self._stall_s = stall_s
        self._actors: list[Actor] = []
        self._running: Actor | None = None
        self._deliveries: list[_Delivery] = []
        self._delivery_count = 0
        self._failure: BaseException | None = None
        self._finished = threading.Event()
        self._mutex = threading.Lock()

    @property
    def now_ms(self) -> float:
        """Virtual milliseconds since the beginning."""
        return self.now_ns / 1_000_000

    def wait(self, delay_ms: float, what: str) -> None:
        """Let others run until at least `delay_ms` from now. `what` is for the picture of a run that stalled."""
        self._suspend(self.now_ns + int(delay_ms * 1_000_000), None, what)

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Let others run until `ready()` holds. It is called after every step, by any actor's thread."""
        self._suspend(self.now_ns, ready, what)

    def call_later(self, delay_ms: float, what: str, action: Callable[[], None]) -> None:
        """Have `action`, which must not wait, happen `delay_ms` from now, or at the end of the run."""
        with self._mutex:
            self._delivery_count += 1
            due_ns = self.now_ns + int(delay_ms * 1_000_000)
            self._deliveries.append(_Delivery(due_ns, self._delivery_count, what, action))

    def settle(self) -> None:
        """Let everything happen that `call_later` has in store, in order of time."""
        while self._deliveries:
            delivery = min(self._deliveries)
            self.now_ns = max(self.now_ns, delivery.due_ns)
            self._deliver(delivery)

    def run(self, actors: Mapping[str, Callable[[], T]]) -> Outcomes[T]:
        """Run the actors to their ends. Raises `Stalled`; what an actor raises stands in the outcomes."""
        outcomes: Outcomes[T] = Outcomes({}, {})
        with _virtual_functions():
            for name, function in actors.items():
                self._start(name, function, outcomes)
            try:
                self._pass_on()
                self._watch()
            except Abandoned:
                pass
            finally:
                if not self._finished.is_set() and self._failure is None:
                    self._fail(Stalled("the run was interrupted"))
                for actor in self._actors:
                    if actor.thread is not None:
                        actor.thread.join(_JOIN_S)  # One that is blocked for ever stays behind, as a daemon.
        if self._failure is not None:
            raise self._failure
        return outcomes

    def _start(self, name: str, function: Callable[[], T], outcomes: Outcomes[T]) -> None:
        actor = Actor(name, self)
        self._actors.append(actor)
        actor.thread = threading.Thread(
            target=self._run_actor, args=(actor, function, outcomes), name=f"actor {name}", daemon=True
        )
        actor.thread.start()

    def _run_actor(self, actor: Actor, function: Callable[[], T], outcomes: Outcomes[T]) -> None:
        _ACTORS[threading.get_ident()] = actor
        try:
            actor.turn.acquire()
            self._require_going_on()
            outcomes.results[actor.name] = function()
        except BaseException as error:  # noqa: BLE001 (whatever an actor raises is its outcome)
            outcomes.errors[actor.name] = error
        finally:
            actor.done = True
            actor.waits_for = "nothing: it ended"
            del _ACTORS[threading.get_ident()]
        if self._failure is None:
            try:
                self._pass_on()
            except Abandoned:
                return  # `run` raises the failure.

    def _suspend(self, wake_ns: int, ready: Callable[[], bool] | None, what: str) -> None:
        actor = current_actor()
        if actor is None or actor not in self._actors:
            return
        self._require_going_on()
        actor.wake_ns, actor.ready, actor.waits_for = wake_ns, ready, what
        self._pass_on(actor)
        self._require_going_on()

    def _require_going_on(self) -> None:
        if self._failure is not None:
            raise Abandoned(str(self._failure))

    def _pass_on(self, own: Actor | None = None) -> None:
        """Give the turn to whoever is drawn, and wait for the next turn of `own`, if that is somebody else."""
        try:
            chosen = self._chosen()
        except BaseException as error:
            self._fail(error)
            raise Abandoned(str(error)) from error
        self._running = chosen
        if chosen is None:
            self._finished.set()
        elif chosen is not own:
            self._wake(chosen)
            if own is not None:
                own.turn.acquire()

    def _chosen(self) -> Actor | None:
        """Let the clock go on until an actor is due and drawn; `None` if all have ended, and nothing is under way."""
        waiting = [actor for actor in self._actors if not actor.done]
        if not waiting:
            self.settle()
            return None
        while True:
            self.steps += 1
            if self.steps > self._steps_max:
                raise Stalled(f"more than {self._steps_max:,} steps:\n{self._picture()}")
            able = [actor for actor in waiting if actor.ready is None or actor.ready()]
            with self._mutex:
                expected: list[Actor | _Delivery] = [*able, *self._deliveries]
            if not expected:
                raise Stalled(f"all actors wait for each other:\n{self._picture()}")
            self.now_ns = max(self.now_ns, min(map(_due_ns, expected)))
            drawn = self.random.choice([one for one in expected if _due_ns(one) <= self.now_ns])
            if isinstance(drawn, Actor):
                return drawn
            self._deliver(drawn)

    def _deliver(self, delivery: _Delivery) -> None:
        with self._mutex:
            self._deliveries.remove(delivery)
        delivery.action()

    def _wake(self, actor: Actor) -> None:
        with self._mutex:
            if actor.turn.locked():
                actor.turn.release()

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._finished.set()
        for actor in self._actors:
            self._wake(actor)

    def _watch(self) -> None:
        """Wait for the end, and fail when nobody has been given the turn for a while."""
        seen = -1
        while not self._finished.wait(self._stall_s):
            if self.steps == seen:
                self._fail(Stalled(f"no actor hands over for {self._stall_s} s:\n{self._picture()}"))
            seen = self.steps

    def _picture(self) -> str:
        """Every actor with what it waits for and where it stands."""
        lines = [f"at {self.now_ms:.3f} ms, after {self.steps:,} steps, seed {self.seed}"]
        frames = sys._current_frames()
        for actor in self._actors:
            state = "runs" if actor is self._running else f"waits for {actor.waits_for}, from {actor.wake_ns / 1e6} ms"
            lines.append(f"actor {actor.name} {'ended' if actor.done else state}")
            thread = actor.thread
            frame = frames.get(thread.ident or 0) if thread is not None else None
            if frame is not None and not actor.done:
                lines += [text.rstrip() for text in traceback.format_stack(frame)]
        lines += [f"under way: {delivery.what}, at {delivery.due_ns / 1e6} ms" for delivery in self._deliveries]
        return "\n".join(lines)


def _due_ns(expected: Actor | _Delivery) -> int:
    return expected.wake_ns if isinstance(expected, Actor) else expected.due_ns


_ACTORS: Final[dict[int, Actor]] = {}
"""The actors of all schedulers by the identity of their threads."""


def current_actor() -> Actor | None:
    """The actor that this thread is, if it is one."""
    return _ACTORS.get(threading.get_ident())


_Virtual: TypeAlias = Callable[[Actor], Callable[..., Any]]

_VIRTUAL: Final[dict[tuple[ModuleType, str], _Virtual]] = {
    (time, "time_ns"): lambda actor: actor.time_ns,
    (time, "time"): lambda actor: lambda: actor.time_ns() / 1e9,
    (time, "monotonic_ns"): lambda actor: actor.monotonic_ns,
    (time, "monotonic"): lambda actor: lambda: actor.monotonic_ns() / 1e9,
    (time, "perf_counter"): lambda actor: lambda: actor.monotonic_ns() / 1e9,
    (time, "sleep"): lambda actor: actor.sleep,
    (os, "urandom"): lambda actor: actor.random.randbytes,
    # What code under test draws for jitter.
    (random, "random"): lambda actor: actor.random.random,
    (random, "uniform"): lambda actor: actor.random.uniform,
    (random, "randint"): lambda actor: actor.random.randint,
    (random, "randrange"): lambda actor: actor.random.randrange,
    (random, "choice"): lambda actor: actor.random.choice,
    (random, "expovariate"): lambda actor: actor.random.expovariate,
}


class _SeededRandom(random.Random):
    """`random.Random`; one that an actor makes without a seed is seeded by the actor's generator."""

    def __init__(self, x: Any = None) -> None:
        actor = current_actor()
        super().__init__(actor.random.getrandbits(64) if x is None and actor is not None else x)


_patch_mutex: Final = threading.Lock()
_real_functions: Final[dict[tuple[ModuleType, str], Callable[..., Any]]] = {}
_patch_users: Final[list[object]] = []


@contextmanager
def _virtual_functions() -> Iterator[None]:
    """Put the functions of `_VIRTUAL` in place for as long as anybody needs them."""
    user = object()
    with _patch_mutex:
        if not _patch_users:
            for (module, name), virtual in _VIRTUAL.items():
                real = _real_functions[module, name] = getattr(module, name)
                setattr(module, name, _dispatching(real, virtual))
            _real_functions[random, "Random"] = random.Random
            setattr(random, "Random", _SeededRandom)  # noqa: B010 (mypy lets no class be assigned to)
        _patch_users.append(user)
    try:
        yield
    finally:
        with _patch_mutex:
            _patch_users.remove(user)
            if not _patch_users:
                for (module, name), real in _real_functions.items():
                    setattr(module, name, real)


def _dispatching(real: Callable[..., Any], virtual: _Virtual) -> Callable[..., Any]:
    """`real`, but for actors what `virtual` makes of it."""

    def dispatch(*arguments: Any, **named: Any) -> Any:
        actor = current_actor()
        return (real if actor is None else virtual(actor))(*arguments, **named)

    return dispatch
