"""What the processes of `test_compaction_kills` do to one basin: write, read, and compact, until they are killed.

- A writer's step is a function of its number. A line of its journal, written with one `write`, says `begin N` before
  the commit and `done N` after it. Whoever replaces a writer that was killed looks first whether the step that was
  begun is in the basin, and says `done N` or `lost N`. So for each view that shows step N of a writer as the last, the
  journal says exactly what the view must hold: nothing is missing, and nothing that was deleted is back.
- The reader compares whole views with the journals, and once more after it has held them. One that it pinned must be
  readable as long as it likes; of another it may be told that history has passed over it, and nothing else.
- The compactor prunes without a pause. `Watch` sees each `Moment` of that, and kills the process at the appointed one.

`python -m tests.engine.compaction_kills WORLD` forks them as it is told on standard input: so they have all imported.

Longer than 600 lines: what a writer does, what a journal says of it and what a reader expects have to agree.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from blake3 import blake3

import basin
from basin.api import Database, DatabaseBatch, DatabaseView
from basin.engine import compaction
from basin.engine.collect import Pruner
from basin.engine.compaction import Compaction, Progress
from basin.engine.core import Core
from basin.errors import BasinPoisoned, Conflict, ContentNotFound, PositionGone
from basin.format.layout import StratumKind
from basin.format.record import Condemn, Record
from basin.storage.local import LocalStorage
from basin.storage.remote import RemoteStorage
from basin.terms import ContentKey, Ref

WRITERS: Final = 2
SLOTS: Final = 10
"""Names of each writer that hold contents."""
POOL: Final = 96
POOL_SIZE: Final = 4_000
PARTED: Final = frozenset({5, 17, 30, 71})
"""These of the pool are longer than `part_max`, and so in parts."""
FOUNDING: Final[dict[str, Any]] = {"part_max": 10_000, "part_size": 2_000}
OPTIONS: Final[dict[str, Any]] = {
    "stratum_size": 40_000,
    "memtable_size": 4_000,
    "history_s": 0.0,
    "checkpoint_every": 40,
    "reserve_size": 0,
}
"""Strata so small that there is always something to merge, and no history but what is pinned."""
GRACES_S: Final = (0.0, 0.2)
MARKED_S: Final = 0.1
"""A compactor that is killed at random rests up to this between mark and condemn, so that writers come in between."""
HELD_S: Final = 1.5
"""The reader holds a view for up to this, and a writer now and then a batch for up to twice the longest grace."""
RESTED_S: Final = 0.015
"""A writer leaves the cores to others for up to this after each step."""
PIN: Final = "reader"


# --- what the writers write -----------------------------------------------------------------------------------------


@cache
def pooled(number: int) -> bytes:
    """A content that does not shrink."""
    return random.Random(f"pool {number}").randbytes(POOL_SIZE * (3 if number in PARTED else 1))


@cache
def pool_key(number: int) -> ContentKey:
    return ContentKey(blake3(pooled(number)).digest())


def parent_of(children: Sequence[int]) -> bytes:
    """The content that keeps `children` by links."""
    return b"parent of %r " % (children,) * 20


class Change(NamedTuple):
    """One change of a step: to a slot of the writer, to a root, or to its family."""

    kind: Literal["put", "note", "delete", "keep", "drop", "family", "disown"]
    slot: int = 0
    contents: tuple[int, ...] = ()
    """Numbers in the pool."""


KINDS: Final = {"put": 8, "note": 1, "delete": 3, "keep": 4, "drop": 3, "family": 2, "disown": 1}


def changes_of(worker: int, step: int) -> list[Change]:
    """What a step changes, in order."""
    rng = random.Random(f"step {step} of {worker}")
    changes = []
    for kind in rng.choices(list(KINDS), list(KINDS.values()), k=rng.randrange(1, 6)):
        slot, content = rng.randrange(SLOTS), rng.randrange(POOL)
        match kind:
            case "put":
                changes.append(Change("put", slot, (content,)))
            case "keep" | "drop":
                # The roots of one writer are none of another's.
                changes.append(Change(kind, 0, (content - content % WRITERS + worker,)))
            case "family":
                changes.append(Change("family", 0, (content, rng.randrange(POOL))))
            case "note" | "delete" | "disown":
                changes.append(Change(kind, slot))
    return changes


def slot_name(worker: int, slot: int) -> bytes:
    return b"%d/slot/%02d" % (worker, slot)


def last_name(worker: int) -> bytes:
    """The name that holds the number of the writer's last step."""
    return b"%d/last" % worker


def family_name(worker: int) -> bytes:
    return b"%d/family" % worker


def note(worker: int, step: int) -> bytes:
    """A value that is kept inline."""
    return b"note of step %d of %d" % (step, worker)


def write(batch: DatabaseBatch, worker: int, step: int) -> None:
    """Do what a step does."""
    for kind, slot, contents in changes_of(worker, step):
        match kind:
            case "put":
                batch[slot_name(worker, slot)] = pooled(contents[0])
            case "note":
                batch[slot_name(worker, slot)] = note(worker, step)
            case "delete":
                batch.delete(slot_name(worker, slot))
            case "keep":
                batch.blobs.put(pooled(contents[0]))
            case "drop":
                batch.blobs.delete(pool_key(contents[0]))
            case "family":
                children = [batch.blobs.put(pooled(number), root=False) for number in contents]
                batch[family_name(worker)] = Ref(batch.blobs.put(parent_of(contents), links=children, root=False))
            case "disown":
                batch.delete(family_name(worker))
    batch[last_name(worker)] = b"%d" % step


@dataclass
class Holdings:
    """What the steps of one writer add up to."""

    names: dict[bytes, bytes] = field(default_factory=dict)
    roots: set[int] = field(default_factory=set)
    family: tuple[int, ...] = ()

    def follow(self, worker: int, step: int) -> None:
        """What `write` does."""
        for kind, slot, contents in changes_of(worker, step):
            match kind:
                case "put":
                    self.names[slot_name(worker, slot)] = pooled(contents[0])
                case "note":
                    self.names[slot_name(worker, slot)] = note(worker, step)
                case "delete":
                    self.names.pop(slot_name(worker, slot), None)
                case "keep":
                    self.roots.add(contents[0])
                case "drop":
                    self.roots.discard(contents[0])
                case "family":
                    self.family = contents
                    self.names[family_name(worker)] = parent_of(contents)
                case "disown":
                    self.family = ()
                    self.names.pop(family_name(worker), None)
        self.names[last_name(worker)] = b"%d" % step


def needed_size(everything: Sequence[Holdings]) -> int:
    """Bytes of all contents that some name, root or family needs, each counted once."""
    values = {value for one in everything for value in one.names.values()}
    values |= {pooled(number) for one in everything for number in (*one.roots, *one.family)}
    return sum(map(len, values))


# --- the journal ----------------------------------------------------------------------------------------------------


class Journal:
    """What one writer did, written outside of the basin."""

    def __init__(self, folder: Path, worker: int) -> None:
        self.worker = worker
        self._path = folder / f"writer-{worker}"
        self._offset = 0
        self.begun = 0
        self.done = 0
        """The last steps."""
        self.lost: set[int] = set()
        """Steps that were begun, and are not in the basin."""
        self._expected = Holdings()
        self._expected_step = 0

    def read(self) -> None:
        """Take in the lines that came since."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                break  # A kill has cut it short, or it is just being written.
            self._offset += len(line)
            word, _, number = line.decode().partition(" ")
            match word:
                case "begin":
                    self.begun = int(number)
                case "done":
                    self.done = int(number)
                case "lost":
                    self.lost.add(int(number))

    @property
    def is_settled(self) -> bool:
        """Whether it is known of each step whether it is in the basin."""
        return self.begun in (0, self.done) or self.begun in self.lost

    def expected(self, last: int) -> Holdings:
        """What a view must hold in which `last` is the last step. Never for an earlier one than before."""
        assert self._expected_step <= last <= self.begun, f"{last} of {self.worker} after {self._expected_step}"
        assert last not in self.lost, f"step {last} of writer {self.worker} was lost, and is back"
        for step in range(self._expected_step + 1, last + 1):
            if step not in self.lost:
                self._expected.follow(self.worker, step)
        self._expected_step = last
        return Holdings(dict(self._expected.names), set(self._expected.roots), self._expected.family)


class Lines:
    """A file to which each process appends whole lines, which a kill leaves whole."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(self._file, b"\n")

    def write(self, text: str) -> None:
        os.write(self._file, f"{text}\n".encode())


# --- the world ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Where the basin is, and the folder of the journals. It travels as JSON."""

    url: str
    folder: str
    secret_file: str = ""
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def open(self, mode: Literal["r", "w", "x"], **options: Any) -> Database:
        secret = basin.Secret.from_file(self.secret_file) if self.secret_file else None
        where: dict[str, Any] = {}
        if self.storage_options:
            where = {"storage_options": dict(self.storage_options), "disk_cache_size": 0}
        if mode == "x":
            where |= {"profile": "encrypted" if secret else "open", **FOUNDING}
        return basin.open(self.url, mode, secret=secret, **{**OPTIONS, **where, **options})

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def is_over(self) -> bool:
        """Whether those that are not killed shall end."""
        return (self.path / "over").exists()


# --- writing --------------------------------------------------------------------------------------------------------


def run_writer(world: World, worker: int, rng: random.Random) -> None:
    """Write until killed; now and then close the basin and open it again."""
    lines, journal = Lines(world.path / f"writer-{worker}"), Journal(world.path, worker)
    while not world.is_over:
        with world.open("w", job=f"writer-{worker}") as database:
            journal.read()
            settle(database, journal, lines)
            for step in range(journal.begun + 1, journal.begun + rng.randrange(2, 80)):
                lines.write(f"begin {step}")
                while not is_written(database, worker, step, lines, rng):
                    pass
                if database.core.poisoned is not None or world.is_over:
                    break
                lines.write(f"done {step}")
                time.sleep(rng.uniform(0, RESTED_S))
        journal.read()


def settle(database: Database, journal: Journal, lines: Lines) -> None:
    """Say what became of the step that was begun last."""
    database[b"%d/opened" % journal.worker] = b""
    database.commit()  # From here on nothing of whoever was here before can arrive any more.
    last = int(database.get(last_name(journal.worker), b"0"))
    if not journal.is_settled:
        assert last in (journal.begun, journal.done), (last, journal.begun, journal.done)
        lines.write(f"{'done' if last == journal.begun else 'lost'} {journal.begun}")
        journal.read()
    assert last == journal.done, f"step {journal.done} was acknowledged, and {last} is the last"


def is_written(database: Database, worker: int, step: int, lines: Lines, rng: random.Random) -> bool:
    """Commit a step; False if contents went while it was going on, and have to be put again."""
    try:
        with database.batch() as batch:
            write(batch, worker, step)
            if rng.random() < 0.05:
                time.sleep(rng.uniform(0, 2 * max(GRACES_S)))
    except BasinPoisoned:
        return True  # Whether it was will be seen by whoever opens next.
    except Conflict as conflict:
        if "content_keys" not in conflict.fields:
            raise  # Nobody else writes these names.
        lines.write(f"again {step}")
        return database.core.poisoned is not None
    return True


# --- reading --------------------------------------------------------------------------------------------------------


def run_reader(world: World, rng: random.Random) -> None:
    """Compare views with the journals, at once and after a while, until it is over."""
    lines, journals = Lines(world.path / "reader"), [Journal(world.path, worker) for worker in range(WRITERS)]
    with world.open("w", job="reader", cache_size=1 << 16) as database:  # Nothing stays in memory.
        while not world.is_over:
            for journal in journals:
                journal.read()
            acknowledged = [journal.done for journal in journals]
            if rng.random() < 0.5:
                with database.at(database.pin(PIN)) as view:
                    hold(view, journals, acknowledged, rng)
                lines.write("pinned")
                database.unpin(PIN)
            else:
                database.refresh()
                with database.view() as view:
                    lines.write("held" if is_held(database, view, journals, acknowledged, rng) else "gone")


def is_held(
    database: Database, view: DatabaseView, journals: Sequence[Journal], acknowledged: Sequence[int], rng: random.Random
) -> bool:
    """Hold a view that nothing protects; False if history has passed over it."""
    try:
        hold(view, journals, acknowledged, rng)
    except (PositionGone, ContentNotFound):  # What is reached by its key alone is just not found.
        database.refresh()
        if view.position >= database.core.state.floor:
            raise
        return False
    return True


def hold(view: DatabaseView, journals: Sequence[Journal], acknowledged: Sequence[int], rng: random.Random) -> None:
    """Look, wait, and look again."""
    expected = expected_in(view, journals, acknowledged)
    require_all(view, expected)
    time.sleep(rng.uniform(0, HELD_S))
    require_all(view, expected)


def expected_in(view: DatabaseView, journals: Sequence[Journal], acknowledged: Sequence[int]) -> list[Holdings]:
    """What a view must hold, by the last steps that it shows, which are not older than what was acknowledged before."""
    last = [int(view.get(last_name(worker), b"0")) for worker in range(WRITERS)]
    expected = []
    for journal, found, before in zip(journals, last, acknowledged, strict=True):
        journal.read()
        assert found >= before, f"step {before} of writer {journal.worker} was acknowledged, and {found} is the last"
        expected.append(journal.expected(found))
    return expected


def require_all(view: Any, expected: Sequence[Holdings]) -> None:
    """A view holds what it must and nothing else, byte for byte."""
    for worker, one in enumerate(expected):
        found = {name: value for name, value in view.scan(prefix=b"%d/" % worker) if not name.endswith(b"/opened")}
        wrong = [name for name in found.keys() | one.names.keys() if found.get(name) != one.names.get(name)]
        assert not wrong, [(name, name in found, name in one.names) for name in wrong]
    roots = {pool_key(number) for one in expected for number in one.roots}
    assert set(view.blobs) == roots, "roots are missing, or back"
    for number in sorted({number for one in expected for number in (*one.roots, *one.family)}):
        assert view.blobs[pool_key(number)] == pooled(number), f"content {number}"


# --- compacting -----------------------------------------------------------------------------------------------------

Moment: TypeAlias = str
"""`begin`, `during` or `end` of a step; `marked`, before a prune condemns anything; `did` something that a plan names;
`before` or `after` a kind of record is appended; `delete`, before a file is."""

STEPS: Final = (
    "names",
    "prune",
    "merge-names",
    "merge-strata",
    "re-encrypt",
    "merge-indexes",
    "delete-files",
    "sweep",
    "checkpoint",
)
READING: Final = ("prune", "merge-names", "merge-strata", "re-encrypt", "merge-indexes")
"""Steps that say how far they are."""
DELETING: Final = (
    "opening",
    "merge-names",
    "merge-strata",
    "re-encrypt",
    "merge-indexes",
    "delete-files",
    "checkpoint",
)
DOINGS: Final = (
    "revive",
    "kill",
    "condemn",
    "rewrite",
    "merge-names",
    "merge-strata",
    "re-encrypt",
    "merge-indexes",
    "delete-files",
)
"""What `CompactionStep.kind` may be."""
RECORDS: Final = ("session", "revocation", "flush", "floor", "expiry", *DOINGS)
MOMENTS: Final[tuple[Moment, ...]] = (
    *(f"{word} {step}" for step in STEPS for word in ("begin", "end")),
    *(f"during {step}" for step in READING),
    "marked",
    *(f"did {doing}" for doing in DOINGS),
    *(f"{word} {kind}" for kind in RECORDS for word in ("before", "after")),
    *(f"delete in {step}" for step in DELETING),
)


def kind_of(record: Record, step: str) -> str:
    """Which of `RECORDS` it is, or "other". The one that begins a session says so only when it is appended."""
    kinds: list[tuple[str, object]] = [
        ("revocation", record.sessions_revoked),
        ("kill", record.killed),
        ("rewrite", record.condemned and record.strata_added),
        ("condemn", record.condemned),
        ("delete-files", record.files_deleted),
        ("floor", record.floor),
        ("expiry", record.expire_through_ms),
        ("merge-names", record.name_runs_removed),
        ("flush", record.name_runs_added),
        (step, record.strata_removed or record.index_runs_added),
        ("revive", record.revived),
    ]
    return next((kind for kind, is_such in kinds if is_such), "other")


class Watch:
    """Sees what the compactions of this process do, says so in a file, and kills the process at the appointed moment.

    The file gets `PID MOMENT` for each moment when it is first seen, and `PID killed MOMENT` as the last line.
    """

    def __init__(self, lines: Lines, doom: Moment, count: int, rng: random.Random) -> None:
        """Death comes with `doom` when it happens for the `count`-th time."""
        self._lines = lines
        self._doom = doom
        self._left = count
        self._rng = rng
        self._seen: set[Moment] = set()
        self._step = "opening"
        self._bytes_done = 0

    def at(self, moment: Moment) -> None:
        """It is `moment`."""
        if moment not in self._seen:
            self._seen.add(moment)
            self._lines.write(f"{os.getpid()} {moment}")
        if moment == self._doom:
            self._left -= 1
            if self._left == 0:
                self._lines.write(f"{os.getpid()} killed {moment}")
                os.kill(os.getpid(), signal.SIGKILL)

    def progress(self, progress: Progress) -> None:
        """What a compaction calls."""
        if progress.step != self._step:
            self._step = progress.step
            self.at(f"begin {self._step}")
        elif progress.bytes_done > self._bytes_done:
            self.at(f"during {self._step}")
        self._bytes_done = progress.bytes_done

    def install(self) -> None:
        """Be told of all moments of this process, from now on."""
        instead(compaction, "_PROGRESS_EVERY_S", lambda _: 0.0)
        instead(Compaction, "_step", self._told_of_steps)
        instead(Compaction, "_done", self._told_of_doings)
        instead(Pruner, "_condemn", self._told_of_marks)
        instead(Core, "_append_record", self._told_of_records)
        for storage in (LocalStorage, RemoteStorage):
            instead(storage, "delete", self._told_of_deletions)
        instead(RemoteStorage, "delete_many", self._told_of_deletions)

    def _told_of_steps(self, original: Callable[..., None]) -> Callable[..., None]:
        def step(itself: Compaction, name: str, work: Callable[[], None]) -> None:
            original(itself, name, work)
            self.at(f"end {name}")

        return step

    def _told_of_doings(self, original: Callable[..., None]) -> Callable[..., None]:
        def done(itself: Compaction, kind: str, *arguments: Any) -> None:
            self.at(f"did {kind}")
            original(itself, kind, *arguments)

        return done

    def _told_of_marks(self, original: Callable[..., None]) -> Callable[..., None]:
        def condemn(itself: Pruner, *arguments: Any) -> None:
            self.at("marked")
            if not self._doom:
                time.sleep(self._rng.uniform(0, MARKED_S))
            original(itself, *arguments)

        return condemn

    def _told_of_records(self, original: Callable[..., bool]) -> Callable[..., bool]:
        def append_record(itself: Core, record: Record, **options: Any) -> bool:
            kind = kind_of(record, self._step) if itself.session else "session"
            self.at(f"before {kind}")
            appended = original(itself, record, **options)
            if appended:
                self.at(f"after {kind}")
            return appended

        return append_record

    def _told_of_deletions(self, original: Callable[..., None]) -> Callable[..., None]:
        def delete(itself: Any, what: Any) -> None:
            self.at(f"delete in {self._step}")
            original(itself, what)

        return delete


def instead(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Put what `wrapper` makes of an attribute in its place: this process ends by a kill, and takes nothing back."""
    setattr(owner, name, wrapper(getattr(owner, name)))


def run_compactor(world: World, number: int, rng: random.Random, doom: Moment, count: int) -> None:
    """Compact until killed."""
    watch = Watch(Lines(world.path / "moments"), doom, count, rng)
    watch.install()
    with world.open("w", job=f"compactor-{number}") as database:
        while not world.is_over:
            if "re-encrypt" in doom:
                database.secrets.rotate()
            if "revive" in doom:
                condemn_by_mistake(database)
            report = database.compact(prune=True, grace_s=rng.choice(GRACES_S), progress=watch.progress)
            assert report.problems == [], report.problems


def condemn_by_mistake(database: Database) -> None:
    """Condemn the largest stratum of contents, as a peer would that was wrong about what is needed."""

    def build(now: Any) -> Record | None:
        free = [
            known.added for known in now.strata.values() if known.added.kind == StratumKind.DATA and not known.condemned
        ]
        chosen = max(free, key=lambda added: (added.status != 0, added.length), default=None)
        return None if chosen is None else Record(condemned=[Condemn(now.position, [chosen.id])])

    database.core.refresh()
    database.core.append(build)


# --- processes ------------------------------------------------------------------------------------------------------


def live(world: World, role: str, number: int, seed: int, doom: Moment, count: int) -> None:
    """The life of a forked process."""
    rng = random.Random(seed)
    match role:
        case "writer":
            run_writer(world, number, rng)
        case "reader":
            run_reader(world, rng)
        case "compactor":
            run_compactor(world, number, rng, doom, count)


def fork(world: World, arguments: Sequence[Any]) -> int:
    """Start a process; what it dies of, but for a kill, stands in the file `failures`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        live(world, *arguments)
        code = 0
    finally:
        if code:
            Lines(world.path / "failures").write(f"{arguments}: {traceback.format_exc()}")
        os._exit(code)


def commands() -> Iterator[list[Any]]:
    """What the test wants."""
    for line in sys.stdin:
        yield json.loads(line)


def main(world: World) -> None:
    """Answer each command with a line: `["start", …]` with a process id, `["look", pid]` with how it ended, or null."""
    alive: set[int] = set()
    for word, *arguments in commands():
        answer: int | None
        if word == "start":
            answer = fork(world, arguments)
            alive.add(answer)
        else:
            found, status = os.waitpid(arguments[0], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
            if found:
                alive.discard(found)
        print(json.dumps(answer), flush=True)  # the answer to whoever holds the other end of the pipe
    for pid in alive:  # Nobody is there any more to do it.
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(World(**json.loads(sys.argv[1])))
