"""A life of the whole engine on a simulated bucket: two writers and a reader, what they saw, and whether it was right.

`life` runs it under a seed and faults, and `judge` demands of what is left, by a handle that knew nothing before:

- The log explains everything that the actors saw (see `basin.testing.history`), and no money came or went.
- The names hold what the log adds up to; every content that was committed can be read.
- `check` finds nothing, but files left behind by who was killed or taken for dead, or whose requests came late.
- No actor ended with an error.

What a life does, beside moving money: contents, the same ones by both writers; a batch of more than a MiB, which is a
run of names; records large enough for stubs; deletions; changes outside of batches; and upkeep, for which `founded`
leaves nearly everything due: flushes, merges of runs, of small strata and of indexes, checkpoints, the floor of
history, the deletion of kept files. A commit of unknown outcome is resolved, and a handle that writes no more is
replaced.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from basin.api import Database, open_storage
from basin.engine.basin import Batch, Names
from basin.engine.keyspace import DEFAULT_KEYSPACE, prefix_of
from basin.engine.options import make_options
from basin.engine.state import first_version
from basin.engine.verify import Finding
from basin.errors import (
    BasinError,
    BasinPoisoned,
    CommitUnknown,
    Conflict,
    ObjectMissing,
    PositionGone,
    StorageUnavailable,
)
from basin.storage.protocol import Storage
from basin.storage.remote import RemoteStorage
from basin.terms import ContentKey
from basin.testing.bucket import BucketClient, Run, SimulatedBucket, run
from basin.testing.faults import Killed
from basin.testing.history import Changes, History, LoggedCommit, check_history, check_sum
from basin.testing.object_faults import FaultKind, Plan

URL: Final = "simulated://bucket"
ACCOUNTS: Final = ("account/a", "account/b", "account/c")
BALANCE: Final = 100
TOTAL: Final = BALANCE * len(ACCOUNTS)
NOTES: Final = 4
DUE_COUNT: Final = 14
"""After this many contents of the founder the next one makes all of upkeep due: a fourth run of names, an eighth small
stratum, a sixteenth kept file."""
LARGE_COUNT: Final = 17
LARGE_SIZE: Final = 65_000
"""17 values of this size are above a MiB."""
WIDE_SIZE: Final = 20_000
LABELS: Final = b"label/"
INITIAL: Final[Changes] = {
    **dict.fromkeys(ACCOUNTS, BALANCE),
    **{f"note/{number}": "founder" for number in range(NOTES)},
    "large": "founder",
}

OPTIONS: Final[dict[str, Any]] = {
    "threads": 1,
    "sync_interval_s": 3600.0,
    "inline_max": 65_536,
    "history_s": 1.0,
    "session_timeout_s": 3600.0,
}

_ATTEMPTS: Final = 6
_OPENINGS: Final = 8

Step: TypeAlias = str
"""One of a writer's `builders`; or "loose", "reopen", "wait", "absence"."""
Builder: TypeAlias = Callable[[Any, Any, str], dict[str, Any]]
"""Makes the changes of a step: the writer, its batch and the label of the commit; returns what it changed."""


class Script(NamedTuple):
    """What the writers do, how often the reader looks, whether `founded` leaves much to do for upkeep; which writer is
    the impatient one, if one is; and how old a view gets before it is read.
    """

    first: tuple[Step, ...]
    second: tuple[Step, ...]
    rounds: int
    is_due: bool
    checkpoint_every: int
    impatient: str = "writer-2"
    view_s: float = 3.0


COMMITS: Final = Script(
    ("transfer", "contents", "large", "transfer"), ("contents", "transfer", "note", "loose"), 1, False, 8
)
UPKEEP: Final = Script(
    ("contents", "wait", "reopen", "transfer"), ("wide", "wait", "wait", "transfer", "transfer"), 1, True, 4, "writer-1"
)
ABSENCE: Final = Script(("large", "transfer"), ("absence", "transfer", "transfer"), 1, False, 8)
"""The second writer comes when the first one, should it be held up, is taken for dead."""
SCRIPTS: Final = {"commits": COMMITS, "upkeep": UPKEEP}

LEAVING: Final = frozenset(
    {
        FaultKind.KILLED,
        FaultKind.KILLED_AFTER,
        FaultKind.LATE,
        FaultKind.DUPLICATE,
        FaultKind.PAUSED,
        FaultKind.CLOCK_FORWARD,
        FaultKind.CLOCK_BACK,
    }
)
"""Faults after which a file may lie there that no record names: whoever wrote it was killed, or was taken for dead and
swept before it came; or it came after it had been deleted."""


class LifeError(AssertionError):
    """What is left of a life is not what it should be."""


class QuietStorage(RemoteStorage):
    """A bucket whose word is taken for it: the probe is not what is tested, and would be half of all requests."""

    def require_create_only(self) -> None:
        """Nothing is asked."""


@dataclass
class Life:
    """What a life is to do, and what its actors saw.

    `impatient`: one writer asks once and never again, so that single faults reach what is above the retries.
    `grace_s`: how long files of removed strata are kept; with 0, reads at a position that has passed may fail.
    """

    script: Script = COMMITS
    impatient: bool = False
    grace_s: float = 0.0
    spool_folder: Path | None = None
    storages: list[Storage] = field(default_factory=list)
    """Those of the writers: one who is killed closes nothing."""
    history: History = field(default_factory=History)
    contents: dict[str, bytes] = field(default_factory=dict)
    """What was put, by content key; whether it was committed, the log knows."""
    seen: Counter[str] = field(default_factory=Counter)
    """How often what came about that is no error."""
    initial: Changes = field(default_factory=lambda: INITIAL)
    """What the names hold at the beginning."""

    def start(self) -> Mapping[str, bytes]:
        """The bodies of the bucket at the beginning."""
        return founded(is_due=self.script.is_due)

    def actors(self) -> dict[str, Callable[[BucketClient], None]]:
        """By name, for `run`."""
        return {
            "writer-1": lambda client: Writer(self, client).perform(self.script.first),
            "writer-2": lambda client: Writer(self, client).perform(self.script.second),
            "reader": lambda client: Reader(self, client).perform(),
        }


def opened(
    client: BucketClient, mode: Literal["r", "w", "x"], *, spool_folder: Path | None = None, **given: Any
) -> Database:
    """A handle on a connection of its own; the probe is left out."""
    options = {**OPTIONS, **given}
    policy = make_options(options, remote=True).request_policy()
    storage = QuietStorage(client.reconnect(), policy, spool_folder=spool_folder, uploads=0)
    try:
        return open_storage(storage, URL, mode=mode, profile="open", options=options)
    except BaseException:
        storage.close()
        raise


def opened_at_last(client: BucketClient, mode: Literal["r", "w"], **given: Any) -> Database:
    """`opened`, with a user's patience."""
    for _ in range(_OPENINGS):
        try:
            return opened(client, mode, **given)
        except StorageUnavailable:
            time.sleep(1)
    return opened(client, mode, **given)


def closed_anyhow(database: Database) -> None:
    """Close, and leave what cannot be finished to whoever comes next."""
    try:
        database.close()
    except (StorageUnavailable, CommitUnknown, BasinPoisoned, Conflict):
        return


# --- writing --------------------------------------------------------------------------------------------------------


class Writer:
    """One writer: a handle, which it replaces when it has to, and a generator of its own."""

    builders: Mapping[Step, Builder]

    def __init__(self, life: Life, client: BucketClient) -> None:
        self._life = life
        self._client = client
        impatient = life.impatient and life.script.impatient == client.actor
        self._options: dict[str, Any] = {
            **({"request_attempts": 1} if impatient else {}),
            "grace_s": life.grace_s,
            "checkpoint_every": life.script.checkpoint_every,
            "spool_folder": life.spool_folder,
        }
        self._random = random.Random(client.actor)
        self._open()

    def perform(self, steps: Sequence[Step]) -> None:
        """Do all steps, then close."""
        for number, step in enumerate(steps):
            if step == "reopen":
                self._reopen()
            elif step == "wait":
                time.sleep(11)  # Long enough for a mark of history.
            elif step == "absence":
                time.sleep(2 * OPTIONS["session_timeout_s"])
            else:
                self._repeat(step, f"{self._client.actor}-{number}")
        closed_anyhow(self._database)

    def _reopen(self) -> None:
        closed_anyhow(self._database)
        self._open()

    def _open(self) -> None:
        self._database = opened_at_last(self._client, "w", **self._options)
        self._life.storages.append(self._database.core.storage)

    def _repeat(self, step: Step, label: str) -> None:
        """Try a step until it is committed, or it is known or unknowable what became of it."""
        for attempt in range(_ATTEMPTS):
            try:
                if self._commit(step, f"{label}-{attempt}"):
                    return
            except BasinPoisoned:
                self._life.seen["poisoned"] += 1
                self._reopen()
            except StorageUnavailable:
                self._life.seen["unavailable"] += 1
            except Conflict:
                self._life.seen["conflict"] += 1
            except ObjectMissing:
                if self._life.grace_s:
                    raise
                self._life.seen["missed"] += 1  # A file that this handle still needed, which nothing kept.
                self._reopen()
        self._life.seen["given up"] += 1

    def _commit(self, step: Step, label: str) -> bool:
        """One attempt; False if nothing was committed, for sure."""
        if step == "loose":
            return self._commit_loose(label)
        try:
            batch = self._database.transaction() if step in ("transfer", "note") else self._database.batch()
            changes = self.builders[step](self, batch, label)
            _label(batch, label, changes)
        except CommitUnknown:
            self._life.seen["unknown beginning"] += 1  # Of a record before the batch's, which was not committed yet.
            return False
        failed = (Conflict, StorageUnavailable, BasinPoisoned)
        try:
            self._life.history.commit(self._client.actor, label, changes, partial(_committed, batch), failed=failed)
        except CommitUnknown as unknown:
            return self._resolved(label, unknown.fields["token"])
        return True

    def _commit_loose(self, label: str) -> bool:
        """Changes outside of any batch: those wait on when the bucket does not answer."""
        database, name = self._database, f"loose/{self._client.actor}"

        def action() -> None:
            database[name] = label.encode()
            _label(database, label, {name: label})
            for attempt in range(_ATTEMPTS):
                try:
                    database.commit()  # Where the log ends then may be behind upkeep: it is no position of the commit.
                    return
                except StorageUnavailable:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    self._life.seen["waited on"] += 1
                    time.sleep(1)

        try:
            self._life.history.commit(
                self._client.actor, label, {name: label}, action, failed=(Conflict, BasinPoisoned)
            )
        except CommitUnknown as unknown:
            return self._resolved(label, unknown.fields["token"])
        except StorageUnavailable:
            self._life.seen["waiting"] += 1  # For good: some later commit may take it along.
        return True

    def _resolved(self, label: str, token: bytes) -> bool:
        """Find out what became of a commit: by this handle, or by another one. False: it did not happen."""
        self._life.seen["unknown"] += 1
        for _ in range(_ATTEMPTS):
            try:
                committed = self._database.resolve(token) == "committed"
            except BasinPoisoned:
                self._reopen()
            except (StorageUnavailable, CommitUnknown):
                time.sleep(1)
            else:
                self._life.seen["resolved"] += 1
                self._life.history.resolve(label, committed=committed)
                return committed
        self._life.seen["unresolved"] += 1
        return True

    # What each step changes. The names hold what the history says they do.

    def _transfer(self, batch: Batch, label: str) -> dict[str, Any]:
        source, target = self._random.sample(ACCOUNTS, 2)
        amount = self._random.randint(1, 20)
        changes = {source: int(batch[source]) - amount, target: int(batch[target]) + amount}
        for name, value in changes.items():
            batch[name] = b"%d" % value
        return changes

    def _contents(self, batch: Batch, label: str) -> dict[str, Any]:
        own, shared = f"content of {label} ".encode() * 30, b"content of all " * 40
        keys = [str(self._put(batch, data)) for data in (own, shared)]
        batch[f"content/{label}"] = " ".join(keys).encode()
        return {f"content/{label}": keys}

    def _put(self, batch: Any, data: bytes) -> ContentKey:
        key: ContentKey = batch.blobs.put(data)
        self._life.contents[str(key)] = data
        return key

    def _large(self, batch: Batch, label: str) -> dict[str, Any]:
        put_large(batch, label)
        return {"large": label}

    def _wide(self, batch: Batch, label: str) -> dict[str, Any]:
        batch["wide"] = self._random.randbytes(WIDE_SIZE)
        return {"wide": label}

    def _note(self, batch: Batch, label: str) -> dict[str, Any]:
        """Delete the first note that there is."""
        for number in range(NOTES):
            if f"note/{number}".encode() in batch:
                del batch[f"note/{number}"]
                return {f"note/{number}": None}
        return {}


Writer.builders = {
    "transfer": Writer._transfer,
    "contents": Writer._contents,
    "large": Writer._large,
    "wide": Writer._wide,
    "note": Writer._note,
}


def _committed(batch: Batch) -> int:
    """Commit a batch; returns its position."""
    batch.__exit__(None, None, None)
    return batch.position


def _label(names: Names, label: str, changes: Changes) -> None:
    """Leave in the commit itself what it is."""
    names[LABELS + label.encode()] = json.dumps(changes).encode()


def put_large(names: Names, label: str, size: int = LARGE_SIZE) -> None:
    """Give all large names the same value; by default that is more than a MiB."""
    value = label.encode().ljust(size, b".")
    for number in range(LARGE_COUNT):
        names[f"large/{number:02}"] = value


# --- reading --------------------------------------------------------------------------------------------------------


class Reader:
    """One reader: it opens anew for every look."""

    def __init__(self, life: Life, client: BucketClient) -> None:
        self._life = life
        self._client = client

    def perform(self) -> None:
        """Open and read; open, and read later what was to be seen then."""
        for _ in range(self._life.script.rounds):
            self._attempt(self._look_back)
            self._attempt(self._look)
            time.sleep(5)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Perform `action`, but for a bucket that does not answer, or a file that is gone where nobody keeps it."""
        try:
            action()
        except StorageUnavailable:
            self._life.seen["read unavailable"] += 1
        except (ObjectMissing, PositionGone):
            if self._life.grace_s:
                raise
            self._life.seen["read missed"] += 1

    def _look(self) -> None:
        """Opening is catching up: what was acknowledged before is to be seen."""

        def read() -> tuple[None, Changes]:
            with opened_at_last(self._client, "r") as database:
                return None, {name.decode(): int(value) for name, value in database.scan(prefix=b"account/")}

        self._life.history.read(self._client.actor, read, fresh=True)

    def _look_back(self) -> None:
        """Whatever the writers do meanwhile, a view stays."""
        with opened_at_last(self._client, "r") as database, database.view() as view:
            time.sleep(self._life.script.view_s)
            self._life.history.read(self._client.actor, lambda: (view.position, _values(view)))
            content = view.blobs[view["founded/0"].decode()]
            if content != content_of_founder(0):
                raise LifeError(f"a content of {len(content)} bytes is not what was put")


def _values(names: Names) -> dict[str, Any]:
    """Accounts, notes, and the large names as one, whose parts must agree."""
    found: dict[str, Any] = {name: int(names[name]) for name in ACCOUNTS}
    for number in range(NOTES):
        value = names.get(f"note/{number}")
        found[f"note/{number}"] = None if value is None else value.decode()
    values = {names[f"large/{number:02}"].partition(b".")[0].decode() for number in (0, LARGE_COUNT - 1)}
    found["large"] = values.pop() if len(values) == 1 else sorted(values)
    return found


def content_of_founder(number: int) -> bytes:
    """What `founded` puts first."""
    return b"founded %d " % number * 50


# --- beginning and end ----------------------------------------------------------------------------------------------


def _found(client: BucketClient, *, is_due: bool) -> None:
    """Create the basin; if wanted with nearly everything due that upkeep does."""
    with opened(client, "x", checkpoint_every=4 if is_due else 100) as database:
        fill(database, DUE_COUNT if is_due else 2)


def fill(database: Database, count: int) -> None:
    """Write what `INITIAL` says, `count` contents, and a wide value."""
    with database.batch() as batch:
        for name in ACCOUNTS:
            batch[name] = b"%d" % BALANCE
        for number in range(NOTES):
            batch[f"note/{number}"] = b"founder"
    with database.batch() as batch:
        put_large(batch, "founder", 100)
    for number in range(count):
        with database.batch() as batch:
            key = str(batch.blobs.put(content_of_founder(number)))
            batch[f"founded/{number}"] = key.encode()
    with database.batch() as batch:
        batch["wide"] = random.Random(0).randbytes(WIDE_SIZE)


@cache
def founded(*, is_due: bool) -> Mapping[str, bytes]:
    """The bodies of a bucket with a basin, in which `INITIAL` holds. Made in no time, so that clocks agree."""
    ran = run(0, {"founder": partial(_found, is_due=is_due)}, latency_ms=lambda _: 0.0)
    ran.require_no_errors()
    return ran.bucket.bodies


def life(seed: int, faults: Plan | None = None, plan: Life | None = None) -> tuple[Run[None], Life]:
    """`live`, and `judge`."""
    lived = plan if plan is not None else Life()
    ran = live(seed, faults, lived)
    judge(ran, lived)
    return ran, lived


def live(seed: int, faults: Plan | None, lived: Life) -> Run[None]:
    """Run a life, whatever comes of it."""
    start = lived.start()
    with tempfile.TemporaryDirectory() as folder:
        lived.spool_folder = Path(folder)
        try:
            return run(seed, lived.actors(), faults, start=start)
        finally:
            for storage in lived.storages:
                storage.close()


def judge(ran: Run[None], lived: Life) -> None:
    """Raise `LifeError` or `HistoryError` unless what is left is right: see the module's header."""
    for actor, error in ran.errors.items():
        if not isinstance(error, Killed):
            raise LifeError(f"{actor} ended with {type(error).__name__}: {error}") from error
    try:
        with opened(SimulatedBucket(start=ran.bucket.bodies).client("judge"), "r") as database:
            log = logged(database)
            check_history(lived.history, log, initial=lived.initial)
            check_sum(lived.history, log, ACCOUNTS, TOTAL, initial=lived.initial)
            _require_sum_of(database, log)
            _require_contents(database, lived, log)
            _require_no_findings(database.check(), ran, lived)
    except BasinError as error:
        raise LifeError(f"a fresh handle met {type(error).__name__}: {error}") from error


def _require_no_findings(findings: Iterable[Finding], ran: Run[None], lived: Life) -> None:
    """Nothing but files that somebody may have left behind."""
    kinds = {kind for _, kind in ran.bucket.fired}
    may_leave = bool(kinds & LEAVING or (lived.impatient and kinds))
    wrong = [found for found in findings if found.kind != "leftover" or not may_leave]
    if wrong:
        raise LifeError(f"check found {wrong[0].kind} in {wrong[0].object}: {wrong[0].detail} ({len(wrong)} in all)")


def logged(database: Database) -> list[LoggedCommit]:
    """The commits of the actors in the order of the log: the version of a label is where it was committed."""
    prefix = prefix_of(DEFAULT_KEYSPACE)
    found = []
    for name, value in database.scan(prefix=LABELS):
        row = database.scope.find(prefix + name)
        if row is None:
            raise LifeError(f"{name!r} was scanned, and cannot be found")
        found.append((row[0], name.removeprefix(LABELS).decode(), json.loads(value)))
    unit = first_version(1)
    return [LoggedCommit(version // unit, label, changes) for version, label, changes in sorted(found)]


def _require_sum_of(database: Database, log: Sequence[LoggedCommit]) -> None:
    """The names hold what the commits add up to."""
    expected: dict[str, Any] = dict(INITIAL)
    for commit in log:
        expected.update(commit.changes)
    found = _values(database)
    for name, value in found.items():
        if value != expected[name]:
            raise LifeError(f"{name} holds {value!r}, and the log adds up to {expected[name]!r}")
    large = {value.partition(b".")[0] for _, value in database.scan(prefix=b"large/")}
    if large != {expected["large"].encode()}:
        raise LifeError(f"a batch is torn: the large names hold {sorted(large)}")
    loose = {name: value for name, value in expected.items() if name.startswith("loose/")}
    if loose != {name.decode(): value.decode() for name, value in database.scan(prefix=b"loose/")}:
        raise LifeError(f"changes outside of batches are not those of the log: {loose}")


def _require_contents(database: Database, lived: Life, log: Sequence[LoggedCommit]) -> None:
    """Every content that a commit in the log put, and the founder's."""
    for name, value in database.scan(prefix=b"founded/"):
        number = int(name.rpartition(b"/")[2])
        if database.blobs[value.decode()] != content_of_founder(number):
            raise LifeError(f"the content of {name!r} is not what was put")
    for key in _content_keys(log):
        try:
            found = database.blobs[key]
        except BasinError as error:
            raise LifeError(f"a content that was committed cannot be read: {type(error).__name__}: {error}") from error
        if found != lived.contents[key]:
            raise LifeError(f"content {key} is not what was put")


def _content_keys(log: Sequence[LoggedCommit]) -> Iterator[str]:
    for commit in log:
        for name, value in commit.changes.items():
            if name.startswith("content/"):
                yield from value
