"""Lives on a simulated bucket with compactors in them: contents are put, deleted and put again while others collect.

Two writers, two compactors and a reader. The writers draw their steps; they put the same few contents again and
again, some in parts, some kept by links only, so that a put often finds what is just being condemned. Batches stay open
for longer than the grace, some looked after by their handle, some not. The reader holds views, and reads through them.

`judge_collected` demands, besides what `judge` does:

- Names, roots, references and families are what the log adds up to, and all that they need is read, byte for byte.
- Two prunes without grace by a handle that comes long after leave no file that no record names, no file that is only
  kept for readers, nothing condemned, nothing for `check` to find; and where much is needed, not much more is stored.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from blake3 import blake3

from basin.api import Database
from basin.engine.basin import Names
from basin.errors import (
    BasinError,
    BasinPoisoned,
    CommitUnknown,
    Conflict,
    ContentNotFound,
    PositionGone,
    StorageUnavailable,
)
from basin.format.layout import STRATUM_FOLDERS, StratumKind
from basin.format.record import Record
from basin.terms import ContentKey, Ref
from basin.testing.bucket import BucketClient, Run, SimulatedBucket, run
from basin.testing.history import Changes
from basin.testing.object_faults import Plan
from tests.engine.bucket_life import (
    INITIAL,
    Life,
    LifeError,
    Step,
    Writer,
    closed_anyhow,
    fill,
    judge,
    live,
    logged,
    opened,
    opened_at_last,
)

GRACE_S: Final = 200.0
"""Three times as long as it takes a handle to look whether somebody condemned what its open batches rely on."""
BEAT_S: Final = 30.0
HELD_BEATS: Final = 16
"""A batch is open for more than two graces."""
POOL: Final = 16
POOL_SIZE: Final = 9_000
PART_SIZE: Final = 2_000
PARTED: Final = frozenset({2, 7, 11})
"""These of the pool are longer than `part_max`, and so in parts."""
FAMILIES: Final = 3
CLAN: Final = 2
"""The family whose parent always has the same children."""
CLAN_CHILDREN: Final = (9, 10)
REFERENCES: Final = 3
FOUNDING: Final[dict[str, Any]] = {"part_max": 10_000, "part_size": PART_SIZE}
SMALL: Final[dict[str, Any]] = {"stratum_size": 40_000}
"""A pool fills several strata, so that merges leave something to collect in."""
LONG_AFTER_S: Final = 400 * 86_400.0
STORED_MAX: Final = 1.25
LARGE: Final = 80_000
"""From so many needed bytes on, headers and indexes are no longer what is stored for the most part."""
FOLDERS: Final = frozenset({*STRATUM_FOLDERS.values(), "log", "checkpoint", "key"})

DRAWN: Final[Mapping[Step, int]] = {
    "gather": 4,
    "drop": 4,
    "again": 5,
    "refer": 2,
    "unrefer": 2,
    "family": 3,
    "disown": 3,
    "adopt": 2,
    "hold": 2,
    "stall": 1,
    "transfer": 1,
    "pause": 3,
}
"""The steps of a writer, and how often each is drawn."""


@cache
def pooled(number: int) -> bytes:
    """A content that does not shrink."""
    size = POOL_SIZE * (2 if number in PARTED else 1)
    return random.Random(f"pool {number}").randbytes(size)


@cache
def pool_key(number: int) -> ContentKey:
    return ContentKey(blake3(pooled(number)).digest())


def parent_of(family: int) -> bytes:
    """The same content whichever children it is put with."""
    return f"parent of family {family} ".encode() * 20


class Plot(NamedTuple):
    """How long it goes on, and who takes part."""

    steps: int = 14
    compactions: int = 10
    pause_s: float = 120.0
    """About how long a compactor rests."""
    rest_s: float = 100.0
    """For how long a writer rests at most."""
    compactors: int = 2
    readers: int = 1
    writers: int = 2
    drawn: Mapping[Step, int] = DRAWN


def _initial() -> Changes:
    return founded_pool()[1]


@dataclass
class CollectedLife(Life):
    """A life with compactors. `grace_s` holds for all."""

    plot: Plot = field(default_factory=Plot)
    is_calm: bool = True
    """Whether nobody is held up and no clock jumps, so that whatever the grace promises is kept."""
    dropped: list[int] = field(default_factory=list)
    """Contents of the pool in the order in which somebody let go of them."""
    initial: Changes = field(default_factory=_initial)

    def start(self) -> Mapping[str, bytes]:
        return founded_pool()[0]

    def options(self) -> dict[str, Any]:
        """Those of every handle."""
        return {**SMALL, "grace_s": self.grace_s, "checkpoint_every": 12, "spool_folder": self.spool_folder}

    def actors(self) -> dict[str, Callable[[BucketClient], None]]:
        plot = self.plot
        return {
            **{f"writer-{n}": lambda client: Collected(self, client).live() for n in range(1, plot.writers + 1)},
            **{f"compactor-{n}": lambda client: Compactor(self, client).live() for n in range(1, plot.compactors + 1)},
            **{f"reader-{n}": lambda client: ViewReader(self, client).live() for n in range(1, plot.readers + 1)},
        }


# --- writing --------------------------------------------------------------------------------------------------------


class Collected(Writer):
    """A writer whose contents are collected, and put again."""

    _life: CollectedLife
    _found_sound = False
    """Whether nothing was condemned of what the last batch that was held put or found, as far as its handle knew."""

    _committed_s = 0.0
    """When it last knew where the log ends."""

    def live(self) -> None:
        """Draw steps and do them."""
        self._random = random.Random()  # Of this actor, and of the seed of this life.
        steps = self._random.choices(
            list(self._life.plot.drawn), list(self._life.plot.drawn.values()), k=self._life.plot.steps
        )
        self.perform(steps)

    def _open(self) -> None:
        self._options = {**self._life.options(), **({"request_attempts": 1} if self._life.impatient else {})}
        super()._open()

    def _repeat(self, step: Step, label: str) -> None:
        if step == "pause":
            time.sleep(self._random.uniform(1, self._life.plot.rest_s))
        else:
            super()._repeat(step, label)

    def _commit(self, step: Step, label: str) -> bool:
        try:
            done = super()._commit(step, label)
            self._committed_s = time.monotonic()
            return done
        except ContentNotFound:
            self._life.seen["found nothing to refer to"] += 1
            return True
        except PositionGone:
            if self._life.is_calm and time.monotonic() - self._committed_s < self._life.grace_s:
                raise
            self._life.seen["missed"] += 1  # It had not looked for longer than the grace, and has caught up by this.
            return False
        except Conflict as conflict:
            if "content_keys" in conflict.fields:
                self._life.seen[f"{step}: told to put again"] += 1
                self._require_kept(step, conflict)
            raise

    def _require_kept(self, step: Step, conflict: Conflict) -> None:
        """What an open batch relied on is not gone, if its handle looked after it."""
        if step == "hold" and self._found_sound and self._life.is_calm and self._life.grace_s:
            raise LifeError(f"a batch that was looked after has lost what it relied on: {conflict}") from conflict

    # --- what the steps change --------------------------------------------------------------------------------------

    def _gather(self, batch: Any, label: str) -> dict[str, Any]:
        return put_here(batch, self._random.sample(range(POOL), 3), label)

    def _drop(self, batch: Any, label: str) -> dict[str, Any]:
        there = [number for number in range(POOL) if f"here/{number:02}" in batch]
        changes: dict[str, Any] = {}
        for number in self._random.sample(there, min(3, len(there))):
            batch.blobs.delete(pool_key(number))
            del batch[f"here/{number:02}"]
            changes[f"here/{number:02}"] = None
            self._life.dropped.append(number)
        return changes

    def _again(self, batch: Any, label: str) -> dict[str, Any]:
        """Put what somebody let go of."""
        return put_here(batch, sorted(set(self._life.dropped[-3:])), label)

    def _refer(self, batch: Any, label: str) -> dict[str, Any]:
        """Refer to what is there, dead or not, without putting it."""
        place = self._random.randrange(REFERENCES)
        recent = self._life.dropped[-6:] or list(range(POOL))
        return refer(batch, place, self._random.choice(recent))

    def _unrefer(self, batch: Any, label: str) -> dict[str, Any]:
        place = self._random.randrange(REFERENCES)
        for name in (f"reference/{place}", f"refers/{place}"):
            batch.delete(name)  # Also where another writer has put it, which this handle has not seen.
        return {f"refers/{place}": None}

    def _family(self, batch: Any, label: str) -> dict[str, Any]:
        """A parent, which keeps its children; the same ones again, or others."""
        family, first = self._random.randrange(FAMILIES), self._random.randrange(POOL - 1)
        return put_family(batch, family, CLAN_CHILDREN if family == CLAN else (first, first + 1))

    def _adopt(self, batch: Any, label: str) -> dict[str, Any]:
        """Refer to a parent that is there, perhaps dead; what it was put with must come back with it."""
        batch[f"parent/{CLAN}"] = Ref(ContentKey(blake3(parent_of(CLAN)).digest()))
        batch[f"family/{CLAN}"] = " ".join(map(str, CLAN_CHILDREN)).encode()
        return {f"family/{CLAN}": list(CLAN_CHILDREN)}

    def _disown(self, batch: Any, label: str) -> dict[str, Any]:
        family = self._random.randrange(FAMILIES)
        children = batch.get(f"family/{family}")
        if children is None:
            return {}
        del batch[f"family/{family}"]
        del batch[f"parent/{family}"]
        self._life.dropped.extend(map(int, children.split()))
        return {f"family/{family}": None}

    def _hold(self, batch: Any, label: str) -> dict[str, Any]:
        """A batch that is open for longer than the grace; its handle looks after it, as its timer does otherwise."""
        core = self._database.core
        core.refresh()
        changes = self._again(batch, label) or self._gather(batch, label)
        self._found_sound = not core._condemned_by_mistake(core.state)  # Else its grace may be over at once.
        for _ in range(HELD_BEATS):
            time.sleep(BEAT_S)
            core._keep_batches()
        return changes

    def _stall(self, batch: Any, label: str) -> dict[str, Any]:
        """The same by a process that does not run meanwhile."""
        changes = self._again(batch, label) or self._gather(batch, label)
        time.sleep(HELD_BEATS * BEAT_S)
        return changes


Collected.builders = {
    **Writer.builders,
    "gather": Collected._gather,
    "drop": Collected._drop,
    "again": Collected._again,
    "refer": Collected._refer,
    "unrefer": Collected._unrefer,
    "family": Collected._family,
    "disown": Collected._disown,
    "adopt": Collected._adopt,
    "hold": Collected._hold,
    "stall": Collected._stall,
}


def put_here(batch: Any, numbers: Sequence[int], label: str) -> dict[str, Any]:
    """Put contents of the pool, each with its root, and a name that says so."""
    for number in numbers:
        batch.blobs.put(pooled(number))
        batch[f"here/{number:02}"] = label.encode()
    return {f"here/{number:02}": label for number in numbers}


def refer(batch: Any, place: int, number: int) -> dict[str, Any]:
    """A name that refers to a content of the pool which must be there."""
    batch[f"reference/{place}"] = Ref(pool_key(number))
    batch[f"refers/{place}"] = b"%d" % number
    return {f"refers/{place}": number}


def put_family(batch: Any, family: int, children: Sequence[int]) -> dict[str, Any]:
    """A name that refers to a parent; without it nothing keeps the children."""
    for number in children:
        batch.blobs.put(pooled(number), root=False)
    parent = batch.blobs.put(parent_of(family), links=[pool_key(number) for number in children], root=False)
    batch[f"parent/{family}"] = Ref(parent)
    batch[f"family/{family}"] = " ".join(map(str, children)).encode()
    return {f"family/{family}": list(children)}


# --- collecting -----------------------------------------------------------------------------------------------------


class Compactor:
    """One compactor: it prunes, and rests."""

    def __init__(self, life: CollectedLife, client: BucketClient) -> None:
        self._life = life
        self._client = client
        self._random = random.Random()
        self._open()

    def live(self) -> None:
        """Compact as often as the plot says."""
        for _ in range(self._life.plot.compactions):
            time.sleep(self._random.uniform(0, 2 * self._life.plot.pause_s))
            self._compact()
        closed_anyhow(self._database)

    def _open(self) -> None:
        self._database = opened_at_last(self._client, "w", **self._life.options())
        self._life.storages.append(self._database.core.storage)

    def _compact(self) -> None:
        seen = self._life.seen
        try:
            report = self._database.compact(prune=True, grace_s=self._life.grace_s)
        except (StorageUnavailable, CommitUnknown):
            seen["compaction unavailable"] += 1
        except (BasinPoisoned, Conflict):  # It was taken for dead.
            seen["compactor poisoned"] += 1
            closed_anyhow(self._database)
            self._open()
        else:
            seen["compactions"] += 1
            seen.update(step.kind for step in report.steps)
            if report.problems:
                raise LifeError(f"a compaction met {report.problems}")


# --- reading --------------------------------------------------------------------------------------------------------


class ViewReader:
    """One reader: it holds a view, and reads contents through it until it is older than the grace."""

    def __init__(self, life: CollectedLife, client: BucketClient) -> None:
        self._life = life
        self._client = client
        self._random = random.Random()

    def live(self) -> None:
        """As often as a compactor compacts."""
        for _ in range(self._life.plot.compactions):
            time.sleep(self._random.uniform(0, 60))
            try:
                self._look()
            except StorageUnavailable:
                self._life.seen["read unavailable"] += 1

    def _look(self) -> None:
        life = self._life
        with opened_at_last(self._client, "r", **life.options()) as database, database.view() as view:
            begun_s = time.monotonic()
            named: dict[str, Any] = {}

            def read() -> tuple[int, Changes]:
                named.update(names_of_pool(view))
                return view.position, named

            try:
                life.history.read(self._client.actor, read)
                for _ in range(3):
                    time.sleep(self._random.uniform(1, life.grace_s or 30.0))
                    if names_of_pool(view) != named:
                        raise LifeError("a view does not stay")
                    require_needed(view, named)
                    life.seen["views read"] += 1
            except PositionGone as error:
                age_s = time.monotonic() - begun_s
                if life.is_calm and age_s < life.grace_s:
                    raise LifeError(f"a view of {age_s:.0f} s met {error}") from error
                life.seen["old views"] += 1


def names_of_pool(names: Names) -> dict[str, Any]:
    """What the names say of the pool, as the history has it."""
    here = {f"here/{number:02}": None for number in range(POOL)}
    found: dict[str, Any] = dict(here)
    found |= {f"refers/{place}": None for place in range(REFERENCES)}
    found |= {f"family/{family}": None for family in range(FAMILIES)}
    found |= {name.decode(): value.decode() for name, value in names.scan(prefix=b"here/")}
    found |= {name.decode(): int(value) for name, value in names.scan(prefix=b"refers/")}
    found |= {name.decode(): [int(one) for one in value.split()] for name, value in names.scan(prefix=b"family/")}
    return found


def needed_by(named: Mapping[str, Any]) -> Iterator[int]:
    """The contents of the pool that are needed, some more than once."""
    for name, value in named.items():
        if value is not None:
            kind, _, which = name.partition("/")
            yield from {"here": [int(which)], "refers": [value], "family": value}[kind]


def require_needed(names: Any, named: Mapping[str, Any]) -> None:
    """All that the names need is read, and is what was put."""
    for number in sorted(set(needed_by(named))):
        if names.blobs[pool_key(number)] != pooled(number):
            raise LifeError(f"content {number} of the pool is not what was put")
    for name, value in named.items():
        kind, _, which = name.partition("/")
        if kind == "family" and value is not None and names[f"parent/{which}"] != parent_of(int(which)):
            raise LifeError(f"the parent of family {which} is not what was put")
        if kind == "refers" and value is not None and names[f"reference/{which}"] != pooled(value):
            raise LifeError(f"reference {which} is not to content {value}")


# --- beginning and end ----------------------------------------------------------------------------------------------


def _found(client: BucketClient) -> None:
    with opened(client, "x", **SMALL, **FOUNDING) as database:
        fill(database, 2)
        for start in range(0, 12, 6):
            with database.batch() as batch:
                put_here(batch, range(start, start + 6), "founder")
        with database.batch() as batch:
            put_family(batch, 0, [3, 4])
            put_family(batch, 1, [13, 14])
            refer(batch, 0, 5)


@cache
def founded_pool() -> tuple[Mapping[str, bytes], Changes, int]:
    """The bodies of a bucket with a basin that holds much of the pool; what its names hold; where its log ends."""
    ran = run(0, {"founder": _found}, latency_ms=lambda _: 0.0)
    ran.require_no_errors()
    bodies = ran.bucket.bodies
    with opened(SimulatedBucket(start=bodies).client("judge"), "r") as database:
        return bodies, {**INITIAL, **names_of_pool(database)}, database.core.state.position


def collected(seed: int, faults: Plan | None, plan: CollectedLife) -> Run[None]:
    """A life, judged."""
    ran = live(seed, faults, plan)
    judge_collected(ran, plan)
    return ran


def judge_collected(ran: Run[None], lived: CollectedLife) -> None:
    """Raise `LifeError` or `HistoryError` unless what is left is right: see the module's header."""
    judge(ran, lived)
    expected: dict[str, Any] = {}
    try:
        with opened(SimulatedBucket(start=ran.bucket.bodies).client("judge"), "r") as database:
            expected.update(require_pool(database, lived))
            lived.seen += records_of_collectors(database)
    except BasinError as error:
        raise LifeError(f"a fresh handle met {type(error).__name__}: {error}") from error
    bodies = cleaned(ran.bucket.bodies)
    try:
        with opened(SimulatedBucket(start=bodies).client("judge"), "r") as database:
            require_pool(database, lived)
            require_clean(database, bodies)
            require_small(database, bodies, expected, lived)
    except BasinError as error:
        raise LifeError(f"after the last prune: {type(error).__name__}: {error}") from error


def require_pool(database: Database, lived: CollectedLife) -> dict[str, Any]:
    """Names and roots are what the log adds up to, and what they need is read; returns what the names hold."""
    log = logged(database)
    expected = {
        name: value for name, value in lived.initial.items() if name.startswith(("here/", "refers/", "family/"))
    }
    for commit in log:
        expected |= {name: value for name, value in commit.changes.items() if name in expected}
    found = names_of_pool(database)
    wrong = [name for name, value in expected.items() if found[name] != value]
    if wrong:
        raise LifeError(f"{wrong[0]} holds {found[wrong[0]]!r}, and the log adds up to {expected[wrong[0]]!r}")
    for folder, marker in (("reference", "refers"), ("parent", "family")):
        there = {name.decode().replace(folder, marker) for name, _ in database.scan(prefix=f"{folder}/".encode())}
        if there != {name for name in expected if name.startswith(marker) and expected[name] is not None}:
            raise LifeError(f"of the names that refer to contents there are only, or still, {sorted(there)}")
    _require_roots(database, expected)
    require_needed(database, expected)
    return expected


def _require_roots(database: Database, expected: Mapping[str, Any]) -> None:
    roots = set(database.blobs)
    for number in range(POOL):
        if (pool_key(number) in roots) != (expected[f"here/{number:02}"] is not None):
            raise LifeError(f"content {number} of the pool has lost its root, or has one again")


def records_of_collectors(database: Database) -> Counter[str]:
    """What stands in the log: condemns, kills, and batches that took something back."""
    log, found = database.core.log, Counter[str]()
    for entry in log.follow(log.cursor_before(founded_pool()[2])):
        record = entry.record
        found["condemns"] += len(record.condemned)
        found["kills"] += len(record.killed)
        found["revivals by batches"] += bool(record.revived and record.batches)
        found["revivals for open batches"] += bool(record.revived and _only_revives(record))
    return found


def _only_revives(record: Record) -> bool:
    return not (record.batches or record.strata_added or record.condemned or record.sessions_revoked)


def cleaned(bodies: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The bodies after two prunes without grace by somebody who comes when all others have been gone for long."""

    def clean(client: BucketClient) -> None:
        time.sleep(LONG_AFTER_S)
        with tempfile.TemporaryDirectory() as folder:
            options = {**SMALL, "grace_s": 0.0, "spool_folder": Path(folder)}
            with opened(client, "w", **options) as database:
                for _ in range(2):
                    time.sleep(60)  # Long enough for a mark of history behind all that was changed.
                    report = database.compact(prune=True)
                    if report.problems:
                        raise LifeError(f"the last prune met {report.problems}")

    ran = run(0, {"cleaner": clean}, start=bodies, latency_ms=lambda _: 0.0)
    for error in ran.errors.values():
        raise LifeError(f"the last prune ended with {type(error).__name__}: {error}") from error
    return ran.bucket.bodies


def require_clean(database: Database, bodies: Mapping[str, bytes]) -> None:
    """No file that no record names; nothing that waits to be deleted; nothing to be found."""
    state = database.core.state
    named = {f"{STRATUM_FOLDERS[StratumKind(known.added.kind)]}/{one}" for one, known in state.strata.items()}
    stored = {name for name in bodies if name.partition("/")[0] in STRATUM_FOLDERS.values()}
    if stored != named:
        raise LifeError(f"garbage: {sorted(stored - named)[:3]}; missing: {sorted(named - stored)[:3]}")
    if state.retired or state.condemns or state.sessions:
        raise LifeError(f"left: files {state.retired}, condemns {state.condemns}, sessions {state.sessions}")
    strange = {name for name in bodies if "/" in name and name.partition("/")[0] not in FOLDERS}
    if strange:
        raise LifeError(f"files in folders of no use: {sorted(strange)[:3]}")
    for finding in database.check():
        raise LifeError(f"after the last prune check finds {finding.kind} in {finding.object}: {finding.detail}")


def require_small(
    database: Database, bodies: Mapping[str, bytes], expected: Mapping[str, Any], lived: CollectedLife
) -> None:
    """Little more is stored than what is needed."""
    numbers = set(needed_by(expected))
    for name in database.scan(prefix=b"parent/"):
        # A parent keeps alive what it was put with at any time, as long as those grains of it stay.
        links = set(database.blobs.links(ContentKey(blake3(parent_of(int(name[0].partition(b"/")[2]))).digest())))
        numbers |= {number for number in range(POOL) if pool_key(number) in links}
    needed = sum(len(pooled(number)) for number in numbers)
    names = {f"{STRATUM_FOLDERS[StratumKind.META]}/{run.id}" for run in database.core.state.name_runs}
    folders = STRATUM_FOLDERS.values()
    stored = sum(len(body) for name, body in bodies.items() if name.partition("/")[0] in folders and name not in names)
    if needed >= LARGE:
        lived.seen["large"] += 1
        if stored > STORED_MAX * needed:
            raise LifeError(f"{stored} bytes are stored, and {needed} are needed")
