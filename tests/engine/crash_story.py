"""What the crash and fault tests share: a script over real handles, and the model it is compared with.

A `Story` runs handles on one simulated disk as processes would, and remembers after each commit what the basin must
hold (`Expected`). `Story.check` opens a disk as a crash left it and compares: the basin holds what the last
acknowledged commit left, or one that was on its way, and nothing in between (D1, D2); every content can be read.

Everything is opened with a raw secret, because argon2id would cost more than all the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from blake3 import blake3

from basin.api import Database, Mode, open_storage
from basin.engine.secret import Secret
from basin.storage.protocol import Storage
from basin.terms import ContentKey
from basin.testing.disk import DiskImage, SimulatedDisk
from basin.testing.simulated import SimulatedStorage

SECRET: Final = Secret.generate()
MARKER: Final = b"~written after the crash"
"""A name that a check may have put: no script uses it, and comparisons leave it out."""

TINY: Final[dict[str, Any]] = {
    "inline_max": 64,
    "part_max": 2048,
    "part_size": 512,
    "memtable_size": 1 << 20,
    "stratum_size": 1 << 20,
    "reserve_size": 0,
    "sync_interval_s": 3600.0,
    "refresh_interval_s": 3600.0,
    "lock_timeout_s": 0.0,
    "threads": 1,
}
"""No timer commits, nothing waits, one thread: a script does the same every time."""

PREPARED_BOOT: Final = 1000
"""The machine's start in which the disk was prepared that a script begins with: the script runs in another one."""


@dataclass(frozen=True)
class Expected:
    """What a basin holds: names of the default keyspace, of others by `(keyspace, name)`, and contents with a root."""

    names: dict[bytes, bytes] = field(default_factory=dict)
    others: dict[tuple[str, bytes], bytes] = field(default_factory=dict)
    contents: frozenset[bytes] = frozenset()

    def plus(self, names: dict[bytes, bytes], *contents: bytes) -> Expected:
        """With these names and contents."""
        return replace(self, names=self.names | names, contents=self.contents.union(contents))

    def minus(self, gone: Callable[[bytes], bool], *contents: bytes) -> Expected:
        """Without the names for which `gone` is true, and without these contents."""
        names = {name: value for name, value in self.names.items() if not gone(name)}
        return replace(self, names=names, contents=self.contents.difference(contents))

    def with_others(self, keyspace: str, names: dict[bytes, bytes]) -> Expected:
        """With exactly these names in another keyspace."""
        rest = {key: value for key, value in self.others.items() if key[0] != keyspace}
        return replace(self, others=rest | {(keyspace, name): value for name, value in names.items()})


def read_everything(database: Database) -> Expected:
    """All names, through scans, and all contents, through their roots."""
    names = {name: value for name, value in database.scan() if name != MARKER}
    others = {
        (keyspace, name): value
        for keyspace in database.keyspaces()
        for name, value in database.keyspace(keyspace).scan()
    }
    return Expected(names, others, frozenset(database.blobs[key] for key in database.blobs))


class Story:
    """A script's handles, and the model after each of its commits. `options` are those of every handle.

    `bases[n]` is what the n-th acknowledged commit left, `attempts[n]` what commits after it would have left that were
    not acknowledged: each of them may be found, until the next acknowledgement.
    """

    def __init__(self, start: Expected | None = None, *, bulky: bool = False, **options: Any) -> None:
        """`bulky`: every `put` also writes several sectors of names and contents, for a crash to tear apart."""
        self.options = TINY | options
        self.bulky = bulky
        self.start = start or Expected()
        self.model = self.start
        self.bases = [self.start]
        self.attempts: list[list[Expected]] = [[]]
        self.checks = 0
        self.secrets: list[tuple[int, Secret]] = [(0, SECRET)]
        """Secrets that open the basin, each from a number of acknowledgements on."""
        self.sound_from = 0
        """From this number of acknowledgements on, `check` finds no damage."""
        self._disk: SimulatedDisk | None = None
        self._acknowledge: Callable[[], None] = lambda: None

    def begin(self, disk: SimulatedDisk, acknowledge: Callable[[], None] = lambda: None) -> None:
        """The script starts over on `disk`."""
        self._disk, self._acknowledge = disk, acknowledge
        self.model = self.start
        self.bases, self.attempts = [self.start], [[]]
        del self.secrets[1:]

    @property
    def disk(self) -> SimulatedDisk:
        """The disk that the script runs on."""
        if self._disk is None:
            raise RuntimeError("the story has not begun")
        return self._disk

    @property
    def acknowledged(self) -> int:
        """How many commits were acknowledged."""
        return len(self.bases) - 1

    def open(self, storage: Storage | None = None, **options: Any) -> Database:
        """A handle of a new process."""
        return open_on(storage or SimulatedStorage(self.disk), **self.options | options)

    # --- the model ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def committing(self, model: Expected | None = None) -> Iterator[None]:
        """Around the call that commits, so that the basin then holds `model`; acknowledges when the call returns."""
        model = model or self.model
        self.attempts[-1].append(model)
        yield
        self.model = model
        self.bases.append(model)
        self.attempts.append([])
        self._acknowledge()

    def put(self, database: Database, names: dict[bytes, bytes], *contents: bytes) -> None:
        """One batch of names and contents."""
        if self.bulky:
            label = str(self.acknowledged)
            names = names | {f"bulk-{at:02}".encode(): scattered(label + str(at), 60) for at in range(16)}
            contents = (*contents, scattered(label, 1800))
        model = self.model.plus(names, *contents)
        with self.committing(model), database.batch() as batch:
            for content in contents:
                batch.blobs.put(content)
            for name, value in names.items():
                batch[name] = value

    def delete(self, database: Database, *names: bytes, contents: tuple[bytes, ...] = ()) -> None:
        """One batch of deletions."""
        model = self.model.minus(lambda name: name in names, *contents)
        with self.committing(model), database.batch() as batch:
            for name in names:
                batch.delete(name)
            for content in contents:
                batch.blobs.delete(content_key(content))

    def settle(self, database: Database) -> None:
        """After a commit that raised: go on from what the basin holds, which must be allowed."""
        self.compare(database, self.acknowledged)
        self.model = read_everything(database)

    # --- the comparison -----------------------------------------------------------------------------------------------

    def check(self, storage: Storage, acknowledged: int) -> None:
        """Raise `AssertionError` unless the basin holds what the last acknowledged commit left, or the next one."""
        self.checks += 1
        valid = [secret for since, secret in self.secrets if since <= acknowledged]
        # Readers repair nothing: they must find everything as it is. Where nothing was acknowledged, there may be none.
        mode: Mode = "r" if acknowledged and self.checks % 4 == 0 else "c"
        database = open_on(storage, valid[self.checks % len(valid)], mode, **self.options)
        self.compare(database, acknowledged)
        if self.checks % 16 == 1:
            self._write(database, acknowledged)
        database.core.release("checked")

    def recover(self, storage: Storage, acknowledged: int) -> None:
        """`check`, and write: what a crash during a recovery interrupts."""
        database = open_on(storage, **self.options)
        self.compare(database, acknowledged)
        self._write(database, acknowledged)
        database.close()

    def compare(self, database: Database, acknowledged: int) -> None:
        """Compare what a handle reads with the model."""
        found = read_everything(database)
        wanted = [self.bases[acknowledged], *self.attempts[acknowledged]]
        if found not in wanted:
            raise AssertionError(f"after {acknowledged} acknowledged commits\n{difference(wanted, found)}")

    def _write(self, database: Database, acknowledged: int) -> None:
        """A basin that a crash left can be written to, and finds no damage in itself."""
        before = read_everything(database)
        with database.batch() as batch:
            batch[MARKER] = b"here"
            batch.blobs.put(b"here, but longer than a name", root=False)
        if read_everything(database) != before or database[MARKER] != b"here":
            raise AssertionError("a commit after the crash changed something else")
        damage = [finding for finding in database.check(read_data=True) if finding.severity == "damage"]
        if damage and acknowledged >= self.sound_from:
            raise AssertionError(f"after {acknowledged} acknowledged commits check reports {damage}")


def scattered(label: str, size: int) -> bytes:
    """Bytes of their own for each label, which do not shrink: they fill as many sectors as they are long."""
    return blake3(label.encode()).digest(size)


def content_key(content: bytes) -> ContentKey:
    """The content key of a content."""
    return ContentKey(blake3(content).digest())


def open_on(storage: Storage, secret: Secret = SECRET, mode: Mode = "c", **options: Any) -> Database:
    """Open a basin, or create it, with a raw secret."""
    return open_storage(storage, "simulated:", mode=mode, secret=secret, options=options)


def difference(wanted: list[Expected], found: Expected) -> str:
    """The names and contents in which `found` differs from each of `wanted`."""
    lines = []
    for number, expected in enumerate(wanted):
        for kind, one, other in (
            ("names", set(expected.names.items()), set(found.names.items())),
            ("other keyspaces", set(expected.others.items()), set(found.others.items())),
            ("contents", set(expected.contents), set(found.contents)),
        ):
            if one != other:
                lost, new = sorted(map(_short, one - other)), sorted(map(_short, other - one))
                lines.append(f"from model +{number}: {kind}: lost {lost[:5]}, unexpected {new[:5]}")
    return "\n".join(lines)


def _short(entry: object) -> str:
    return repr(entry)[:60]


def prepared(write: Callable[[Story], None], **options: Any) -> tuple[DiskImage, Expected]:
    """A disk on which `write` ran, all of it durable, and what it holds."""
    story = Story(**options)
    disk = SimulatedDisk(boot=PREPARED_BOOT)
    story.begin(disk)
    write(story)
    return disk.kill_image(), story.model
