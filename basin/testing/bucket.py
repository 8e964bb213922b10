"""`SimulatedBucket`: an object store in memory with virtual time, a log of all requests, and faults; `run`, for actors.

The rules are those of S3: a body is replaced at once and whole; a conditional put is decided in one moment; a list is
of that moment, page by page. What a client sees of a fault follows the object port:

- 500, 503, a timeout, a broken connection, 409, and 200 with an error inside: `StorageUnavailable` with `reason`
  "server", "throttled", "timeout", "connection", "contended" and "server", whether the request took effect or not.
- A short or a wrong body is returned as if all were well: a store that verifies nothing is the worst one.

A request that an actor sends takes two waits, the way there and the way back; between them it takes effect, in one
moment. From a thread that is no actor it takes no time: it is served at once, one after the other, and what is late
arrives at the end of the run or with `settle`.

Imports the object port, the names' rules and `basin.testing`'s scheduler and faults.
"""

# The client's methods have the port's contracts.

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

import xxhash

from basin.errors import AlreadyExists, BasinClosed, BasinError, InvalidArgument, ObjectMissing, StorageUnavailable
from basin.storage.naming import checked_folder, checked_name
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, Listing, ObjectInfo, ObjectStore, RequestKind
from basin.testing.faults import Killed
from basin.testing.object_faults import FaultKind, ObjectFault, ObjectRequest, Plan, planned
from basin.testing.schedule import Scheduler, Stalled, current_actor

T = TypeVar("T")

TIMEOUT_MS: Final = 10_000
"""Virtual milliseconds after which a client gives a request up."""

DELETE_COUNT_MAX: Final = 1_000
"""Names that one request deletes."""

_STALE_CHANGES_MAX: Final = 8
_LOG_LINES_SHOWN: Final = 40

_REFUSED: Final[dict[FaultKind, tuple[str, str]]] = {
    FaultKind.SERVER_ERROR: ("server", "500 Internal Error"),
    FaultKind.SLOW_DOWN: ("throttled", "503 Slow Down"),
    FaultKind.TIMEOUT: ("timeout", "no reply in time"),
    FaultKind.RESET: ("connection", "the connection broke"),
    FaultKind.CONTENDED: ("contended", "409 Conflict: another request for this name is under way"),
    FaultKind.ERROR_INSIDE: ("server", "200 OK with an error inside: Internal Error"),
}
"""Faults without an effect: reason, text."""

_UNHEARD: Final[dict[FaultKind, tuple[str, str]]] = {
    FaultKind.SERVER_ERROR_AFTER: ("server", "500 Internal Error"),
    FaultKind.LOST_REPLY: ("timeout", "no reply in time"),
    FaultKind.RESET_AFTER: ("connection", "the connection broke"),
}
"""Faults after the effect: reason, text."""


class LogEntry(NamedTuple):
    """What became of a request, noted when its reply (or the request itself, late) arrives."""

    at_ns: int
    request: ObjectRequest
    digest: str
    fault: str
    outcome: str

    def __str__(self) -> str:
        number, actor, kind, name, size = self.request
        at = f"{self.at_ns // 1_000_000}.{self.at_ns // 1000 % 1000:03}"
        return f"{number} {at} {actor} {kind} {name or '/'} {size} {self.digest} [{self.fault}] {self.outcome}"


@dataclass(frozen=True, slots=True)
class _Action(Generic[T]):
    """What a request does: as it should, and as it does under the faults that change it."""

    kind: RequestKind
    name: str
    effect: Callable[[], T]
    data: bytes = b""
    changed: Mapping[FaultKind, Callable[[random.Random], T]] | None = None


@dataclass(frozen=True, slots=True)
class _Reply(Generic[T]):
    """What the client sees, and how long the way back takes."""

    outcome: str
    delay_ms: float
    value: T | None = None
    error: BaseException | None = None


def usual_latency_ms(generator: random.Random) -> float:
    """One way of a request: often no time at all (so that any order is possible), rarely two seconds."""
    draw = generator.random()
    if draw < 0.3:
        return 0.0
    if draw < 0.97:
        return float(generator.randint(1, 60))
    return float(generator.randint(100, 2000))


class SimulatedBucket:
    """The bodies, by name, and what was asked of them. Any number of `client`s use it. Safe for several threads.

    `requests` are all that were sent; `entries` what became of them; `fired` the faults that happened; `killed`
    the actors that are no more. `put_size_max` and `page_size` are smaller than a real store's where a test wants parts
    and pages.
    """

    def __init__(
        self,
        *,
        faults: Plan | None = None,
        start: Mapping[str, bytes] | None = None,
        scheduler: Scheduler | None = None,
        latency_ms: Callable[[random.Random], float] = usual_latency_ms,
        put_size_max: int = PUT_SIZE_MAX,
        page_size: int = 1_000,
    ) -> None:
        self.scheduler = scheduler or Scheduler(0)
        self.faults: Plan = {} if faults is None else faults
        self.bodies: dict[str, bytes] = dict(start or {})
        self.requests: list[ObjectRequest] = []
        self.entries: list[LogEntry] = []
        self.fired: list[tuple[int, FaultKind]] = []
        self.killed: set[str] = set()
        self.put_size_max = put_size_max
        self.page_size = page_size
        self._latency_ms = latency_ms
        self._journal: list[tuple[str, int | None]] = []  # Each change: the name, and its size before.
        self._mutex = threading.RLock()

    @property
    def log(self) -> bytes:
        """Every entry as a line: equal for equal runs."""
        return "".join(f"{entry}\n" for entry in self.entries).encode()

    @property
    def counts(self) -> Counter[RequestKind]:
        """Requests by kind."""
        return Counter(request.kind for request in self.requests)

    def client(self, actor: str) -> BucketClient:
        """A connection of `actor`'s."""
        return BucketClient(self, actor)

    def settle(self) -> None:
        """Let all that is late arrive now. Not while a run goes on."""
        with self._mutex:
            self.scheduler.settle()

    def store(self, name: str, data: bytes) -> None:
        """Effect of a put."""
        self._note(name)
        self.bodies[name] = data

    def create(self, name: str, data: bytes) -> None:
        """Effect of a conditional put: `AlreadyExists` if the name is taken."""
        if name in self.bodies:
            raise AlreadyExists(f"put {name!r}: the name is taken", object=name, operation="put_new")
        self.store(name, data)

    def remove(self, names: Sequence[str]) -> None:
        """Effect of a delete."""
        for name in names:
            if name in self.bodies:
                self._note(name)
                del self.bodies[name]

    def body(self, name: str, operation: str) -> bytes:
        """The bytes of an object, or `ObjectMissing`."""
        found = self.bodies.get(name)
        if found is None:
            raise ObjectMissing(f"{operation} {name!r}: there is no such object", object=name, operation=operation)
        return found

    def sizes(self, folder: str, *, undone: int = 0) -> dict[str, int]:
        """Sizes of what lies in or below `folder`, as they were `undone` of its changes ago."""
        prefix = f"{folder}/" if folder else ""
        sizes = {name: len(data) for name, data in self.bodies.items() if name.startswith(prefix)}
        changes = [change for change in self._journal if change[0].startswith(prefix)] if undone else []
        for name, size in reversed(changes[len(changes) - undone :]):
            if size is None:
                sizes.pop(name, None)
            else:
                sizes[name] = size
        return sizes

    def stale_sizes(self, folder: str, generator: random.Random) -> dict[str, int]:
        """`sizes` as they were before one or some of the folder's last changes."""
        prefix = f"{folder}/" if folder else ""
        count = sum(name.startswith(prefix) for name, _ in self._journal)
        return self.sizes(folder, undone=min(count, generator.randint(1, _STALE_CHANGES_MAX)))

    def _note(self, name: str) -> None:
        found = self.bodies.get(name)
        self._journal.append((name, None if found is None else len(found)))

    def serve(self, client: BucketClient, action: _Action[T]) -> T:
        """Send one request, let it take effect as its fault will have it, and return or raise the reply."""
        with self._mutex:
            request = ObjectRequest(len(self.requests) + 1, client.actor, action.kind, action.name, len(action.data))
            self.requests.append(request)
            fault = planned(self.faults, request)
            generator = random.Random(f"{self.scheduler.seed}/{request.number}")
            if fault is not None:
                self.fired.append((request.number, fault.kind))
        self._depart(request, fault, generator)
        with self._mutex:
            reply = self._reply(request, action, fault, generator)
        self._wait(reply.delay_ms, request)
        self._write(request, action.data, fault, reply.outcome)
        if isinstance(reply.error, Killed):
            self.killed.add(client.actor)
        if reply.error is not None:
            raise reply.error
        return reply.value  # type: ignore[return-value]  # None only where T is None: there is no error

    def _depart(self, request: ObjectRequest, fault: ObjectFault | None, generator: random.Random) -> None:
        """What happens to the actor before its request is sent; then the way there."""
        if fault is not None:
            actor = current_actor()
            delay_ms = fault.drawn_delay_ms(generator)
            if fault.kind is FaultKind.PAUSED:
                self._wait(delay_ms, request)
            elif fault.kind is FaultKind.CLOCK_FORWARD and actor is not None:
                actor.jump_clock(delay_ms)
            elif fault.kind is FaultKind.CLOCK_BACK and actor is not None:
                actor.jump_clock(-delay_ms)
            elif fault.kind is FaultKind.KILLED:
                self.killed.add(request.actor)
                self._write(request, b"", fault, "killed")
                raise Killed(f"before request {request.number}")
        self._wait(self._drawn_latency_ms(), request)

    def _reply(
        self, request: ObjectRequest, action: _Action[T], fault: ObjectFault | None, generator: random.Random
    ) -> _Reply[T]:
        """Let the request take effect (or not, or later), and say what the client will see of it."""
        delay_ms = self._drawn_latency_ms()
        if fault is None:
            return _replied(action.effect, delay_ms)
        kind = fault.kind
        if kind in _REFUSED:
            return _unavailable(request, *_REFUSED[kind], delay_ms)
        if kind is FaultKind.LATE:
            self._deliver_later(request, action, TIMEOUT_MS + fault.drawn_delay_ms(generator), fault)
            return _unavailable(request, "timeout", "no reply in time", delay_ms)
        if action.changed and kind in action.changed:
            changed = action.changed[kind]
            return _replied(lambda: changed(generator), delay_ms)
        reply = _replied(action.effect, delay_ms)
        if kind in _UNHEARD:
            return _unavailable(request, *_UNHEARD[kind], delay_ms)
        if kind is FaultKind.DUPLICATE:
            self._deliver_later(request, action, delay_ms + fault.drawn_delay_ms(generator), fault)
        elif kind is FaultKind.RESENT:
            return _replied(action.effect, delay_ms)
        elif kind is FaultKind.SLOW:
            return _Reply(reply.outcome, delay_ms + fault.drawn_delay_ms(generator), reply.value, reply.error)
        elif kind is FaultKind.KILLED_AFTER:
            return _Reply("killed", 0, error=Killed(f"after request {request.number}"))
        return reply

    def _deliver_later(self, request: ObjectRequest, action: _Action[Any], delay_ms: float, fault: ObjectFault) -> None:
        def arrive() -> None:
            with self._mutex:
                outcome = _replied(action.effect, 0).outcome
                self._write(request, action.data, fault, f"arrives late: {outcome}")

        self.scheduler.call_later(delay_ms, f"request {request.number} {request.kind} {request.name}", arrive)

    def _drawn_latency_ms(self) -> float:
        return self._latency_ms(self.scheduler.random) if current_actor() is not None else 0.0

    def _wait(self, delay_ms: float, request: ObjectRequest) -> None:
        self.scheduler.wait(delay_ms, f"request {request.number} {request.kind} {request.name}")

    def _write(self, request: ObjectRequest, data: bytes, fault: ObjectFault | None, outcome: str) -> None:
        name = "" if fault is None else fault.kind.name.lower()
        digest = xxhash.xxh3_64_hexdigest(data)
        with self._mutex:
            self.entries.append(LogEntry(self.scheduler.now_ns, request, digest, name, outcome))


def _replied(effect: Callable[[], T], delay_ms: float) -> _Reply[T]:
    """The reply of a store that works: the value, or its refusal."""
    try:
        value = effect()
    except BasinError as error:
        return _Reply(type(error).__name__, delay_ms, error=error)
    shown = f"{len(value)} {xxhash.xxh3_64_hexdigest(value)}" if isinstance(value, bytes) else value
    return _Reply("done" if value is None else str(shown), delay_ms, value)


def _unavailable(request: ObjectRequest, reason: str, text: str, delay_ms: float) -> _Reply[Any]:
    error = StorageUnavailable(
        f"{request.kind} {request.name!r}: {text}: try again later",
        object=request.name,
        operation=request.kind,
        reason=reason,
    )
    return _Reply(reason, TIMEOUT_MS if reason == "timeout" else delay_ms, error=error)


class BucketClient(ObjectStore):
    """One actor's connection. After the actor is killed, every call raises `Killed`, on each of its connections."""

    def __init__(self, bucket: SimulatedBucket, actor: str) -> None:
        self.url = "simulated://bucket"
        self.bucket = bucket
        self.actor = actor
        self._open = True

    def reconnect(self) -> BucketClient:
        """A new connection of the same actor, for what it opens after it closed this one."""
        return self.bucket.client(self.actor)

    def get(self, wanted: ByteRange) -> bytes:
        name = checked_name(wanted.name)
        start, stop = wanted.start, wanted.stop
        if start < 0 or (stop is not None and stop < start):
            raise InvalidArgument(f"not a range of bytes: {start} to {stop}", object=name)

        def effect() -> bytes:
            return self.bucket.body(name, "get")[start:stop]

        def short(generator: random.Random) -> bytes:
            whole = effect()
            return whole[: generator.randrange(len(whole))] if whole else whole

        def wrong(generator: random.Random) -> bytes:
            flipped = bytearray(effect())
            if flipped:
                flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
            return bytes(flipped)

        return self._send(
            _Action("get", name, effect, changed={FaultKind.SHORT_BODY: short, FaultKind.WRONG_BODY: wrong})
        )

    def put(self, name: str, data: bytes) -> None:
        body = self._checked_body(name, data)
        self._send(_Action("put", name, lambda: self.bucket.store(name, body), body))

    def put_new(self, name: str, data: bytes) -> None:
        body = self._checked_body(name, data)
        bucket = self.bucket
        ignored = {FaultKind.CONDITION_IGNORED: lambda _: bucket.store(name, body)}
        self._send(_Action("put_new", name, lambda: bucket.create(name, body), body, ignored))

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        if storage_class:
            raise InvalidArgument(f"put_file {name!r}: bodies have no storage classes here", object=name)
        body, size_max = path.read_bytes(), self.bucket.put_size_max
        if len(body) <= size_max:
            return self.put(name, body)
        for offset in range(0, len(body), size_max):
            self._send(_Action("part", checked_name(name), lambda: None, body[offset : offset + size_max]))
        return self._send(_Action("put", name, lambda: self.bucket.store(name, body)))

    def size(self, name: str) -> int:
        return self._send(_Action("head", checked_name(name), lambda: len(self.bucket.body(name, "size"))))

    def delete(self, names: Sequence[str]) -> None:
        wanted = [checked_name(name) for name in names]
        for first in range(0, len(wanted), DELETE_COUNT_MAX):
            group = wanted[first : first + DELETE_COUNT_MAX]
            self._send(_Action("delete", ",".join(group), partial(self.bucket.remove, group)))

    def list(self, folder: str) -> Listing:
        found, after = Listing([], []), ""
        while True:
            page, more = self._page(checked_folder(folder), after)
            found.objects.extend(page.objects)
            found.folders.extend(page.folders)
            if not more:
                return found
            after = more

    def _page(self, folder: str, after: str) -> tuple[Listing, str]:
        """What lies in a folder behind the name `after`, and the last name of this page if there is more."""
        bucket = self.bucket

        def stale(generator: random.Random) -> tuple[Listing, str]:
            return _listed(bucket.stale_sizes(folder, generator), folder, after, bucket.page_size)

        def effect() -> tuple[Listing, str]:
            return _listed(bucket.sizes(folder), folder, after, bucket.page_size)

        return self._send(_Action("list", folder, effect, changed={FaultKind.STALE_LIST: stale}))

    def close(self) -> None:
        self._open = False

    def _checked_body(self, name: str, data: bytes) -> bytes:
        checked_name(name)
        if len(data) > self.bucket.put_size_max:
            raise InvalidArgument(f"put {name!r}: {len(data)} bytes are too many for one request", name=name)
        return bytes(data)

    def _send(self, action: _Action[T]) -> T:
        if self.actor in self.bucket.killed:
            raise Killed(f"{action.kind} {action.name!r}")
        if not self._open:
            raise BasinClosed(f"{action.kind} {action.name!r}: the connection is closed", object=action.name)
        return self.bucket.serve(self, action)


def _listed(sizes: Mapping[str, int], folder: str, after: str, count: int) -> tuple[Listing, str]:
    """The first `count` objects and folders directly in `folder` behind `after`; the last of them if there are more."""
    start = len(folder) + 1 if folder else 0
    children: dict[str, int | None] = {}
    for name in sizes:
        child, slash, _ = name[start:].partition("/")
        children[child] = None if slash else sizes[name]
    behind = sorted(child for child in children if child > after)
    listing = Listing([], [])
    for child in behind[:count]:
        size = children[child]
        if size is None:
            listing.folders.append(child)
        else:
            listing.objects.append(ObjectInfo(child, size))
    return listing, behind[count - 1] if len(behind) > count else ""


@dataclass(frozen=True, slots=True)
class Run(Generic[T]):
    """What came of the actors, and the bucket as they left it, with all that was late."""

    seed: int
    bucket: SimulatedBucket
    results: dict[str, T]
    errors: dict[str, BaseException]

    @property
    def log(self) -> bytes:
        """The bucket's log: equal for equal seeds, actors and faults."""
        return self.bucket.log

    @property
    def elapsed_ms(self) -> float:
        """Virtual milliseconds."""
        return self.bucket.scheduler.now_ms

    def require_no_errors(self) -> None:
        """Raise the first error of an actor, with the end of the log as a note."""
        for actor, error in self.errors.items():
            _annotate(error, self.bucket, f"actor {actor}, ")
            raise error


def run(
    seed: int,
    actors: Mapping[str, Callable[[BucketClient], T]],
    faults: Plan | None = None,
    *,
    start: Mapping[str, bytes] | None = None,
    steps_max: int = 1_000_000,
    stall_s: float = 30.0,
    latency_ms: Callable[[random.Random], float] = usual_latency_ms,
    page_size: int = 1_000,
) -> Run[T]:
    """Run each actor with a client of its own on one bucket that holds `start`, until all have ended.

    Raises `Stalled` (see `basin.testing.schedule`). What an actor raises stands in `Run.errors`.
    """
    scheduler = Scheduler(seed, steps_max=steps_max, stall_s=stall_s)
    bucket = SimulatedBucket(
        faults=faults, start=start, scheduler=scheduler, latency_ms=latency_ms, page_size=page_size
    )
    try:
        outcomes = scheduler.run({name: _with_client(bucket, name, actor) for name, actor in actors.items()})
    except Stalled as error:
        _annotate(error, bucket, "")
        raise
    return Run(seed, bucket, outcomes.results, outcomes.errors)


def _with_client(bucket: SimulatedBucket, name: str, actor: Callable[[BucketClient], T]) -> Callable[[], T]:
    return lambda: actor(bucket.client(name))


def _annotate(error: BaseException, bucket: SimulatedBucket, where: str) -> None:
    shown = "\n".join(map(str, bucket.entries[-_LOG_LINES_SHOWN:]))
    error.add_note(f"{where}seed {bucket.scheduler.seed}, faults that happened {bucket.fired}; last requests:\n{shown}")
