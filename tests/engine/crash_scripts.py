"""The scripts that the crash explorer walks through: each one concern of the engine, on a basin of a few kilobytes.

A script begins on a disk on which `prepare` ran and everything is durable, and ends with handles closed or killed.
Limits of the engine that a tiny basin would never reach are lowered by `limits`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from basin.api import open_storage
from basin.engine import core, file_log, merging, plan, state
from basin.engine.checkpoints import checkpoint, raise_floor
from basin.engine.ingest import write_items
from basin.engine.secret import Secret
from basin.errors import BasinPoisoned, StorageError
from basin.format.layout import SEGMENT_HEADER_SIZE
from basin.testing.disk import DiskImage, Effect
from basin.testing.explore import ExplorationReport, explore
from basin.testing.faults import Fault, FaultStorage, Killed, Plan, no_fault
from basin.testing.simulated import SimulatedStorage
from tests.engine.crash_story import SECRET, Story, prepared, scattered

Play = Callable[[Story], None]
Limits = dict[tuple[Any, str], int]


@dataclass(frozen=True)
class Script:
    """One script: what it begins with, what it does, how handles are opened, and which limits are lowered."""

    play: Play
    prepare: Play | None = None
    options: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=dict)
    torn: bool = False
    """Whether the log begins with the part of a record behind its end that a power cut left."""

    def begin(self) -> tuple[DiskImage, Story]:
        """The disk that the script begins on, and its story."""
        if self.prepare is None:
            return DiskImage({}, frozenset()), Story(bulky=True, **self.options)
        image, start = prepared(self.prepare, **self.options)
        if self.torn:
            name = max(name for name in image.files if name.endswith(".log"))
            content = image.files[name].content
            image = image.with_content(name, content + content[SEGMENT_HEADER_SIZE:][:150] + bytes(100))
        return image, Story(start, bulky=True, **self.options)

    def explore(self, aim: int, effort: int = 1) -> tuple[ExplorationReport, Story]:
        """Visit about `aim` of the states in which a crash of the script could have left the disk."""
        with lowered(self.limits):
            image, story = self.begin()

            def play(storage: SimulatedStorage, acknowledge: Callable[[], None]) -> None:
                story.begin(storage.disk, acknowledge)
                self.play(story)
                _go_on(story)

            report = explore(
                play,
                story.check,
                start=image,
                recover=story.recover,
                recoveries=4 * effort,
                aim=aim,
                remounts=True,
            )
        return report, story


@contextlib.contextmanager
def lowered(limits: Limits) -> Iterator[None]:
    """Lower limits of engine modules, as (module, name), for a while."""
    before = {(module, name): getattr(module, name) for module, name in limits}
    try:
        for (module, name), value in limits.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def _go_on(story: Story) -> None:
    """What every script ends with: a process that finds what the others left, and commits."""
    with story.open() as database:
        story.put(database, {b"go": b"on"}, scattered("went on", 100))
        story.put(database, {b"go": b"further"})
        story.delete(database, b"go")
        story.put(database, {}, scattered("went on", 100), scattered("the end", 2000))


def _names(label: str, count: int, size: int = 20) -> dict[bytes, bytes]:
    return {f"{label}-{number}".encode(): scattered(f"{label}{number}", size) for number in range(count)}


# --- beginnings -------------------------------------------------------------------------------------------------------


def _little(story: Story) -> None:
    with story.open() as database:
        story.put(database, _names("first", 4) | {b"long": scattered("long", 200)}, scattered("old content", 300))


def _sessions(count: int) -> Play:
    """Several handles after each other, each leaving small strata behind."""

    def prepare(story: Story) -> None:
        for number in range(count):
            with story.open() as database:
                story.put(database, _names(f"session{number}", 2), scattered(f"content {number}", 250))

    return prepare


def _pairs(story: Story) -> None:
    """Several handles after each other, each leaving a stratum of two contents."""
    for number in range(3):
        with story.open() as database:
            pair = scattered(f"content {number}", 900), scattered(f"staying {number}", 900)
            story.put(database, _names(f"session{number}", 2), *pair)


def _runs(count: int) -> Play:
    """As many sorted runs of names as the next flush makes one of."""

    def prepare(story: Story) -> None:
        with story.open() as database:
            for number in range(count):
                story.put(database, _names(f"run{number}", 4, 50) | {b"again": str(number).encode()})
                merging.flush(database.core)

    return prepare


# --- scripts ----------------------------------------------------------------------------------------------------------


def create(story: Story) -> None:
    with story.open() as database:
        story.put(database, {b"a": b"1"})


def commits(story: Story) -> None:
    with story.open() as database:
        story.put(database, _names("inline", 3))
        story.put(database, {b"long": scattered("a longer value", 700)}, scattered("new content", 900))
        story.put(database, {b"first-1": b"changed"}, scattered("old content", 300))


def two_writers(story: Story) -> None:
    one, two = story.open(), story.open()
    story.put(one, {b"a": b"one"}, scattered("content of one", 400))
    story.put(two, {b"a": b"two", b"b": b"two"}, scattered("content of two", 400))
    story.put(one, {b"b": b"one"}, scattered("content of two", 400))
    two.close()
    story.put(one, {b"c": b"one"})
    one.close()


def large_blob(story: Story) -> None:
    with story.open() as database:
        story.put(database, {b"a": b"before"})
        story.put(database, {b"b": b"with it"}, scattered("many parts", 5000))
        story.put(database, {b"c": b"after"})


def full_strata(story: Story) -> None:
    """Strata end in the middle of batches."""
    with story.open() as database:
        for number in range(4):
            story.put(database, {b"n": str(number).encode()}, *(scattered(f"{number}.{one}", 900) for one in range(3)))


def flush(story: Story) -> None:
    with story.open() as database:
        for number in range(4):
            story.put(database, _names(f"flush{number}", 6, 60))


def names_merge(story: Story) -> None:
    with story.open() as database:
        story.put(database, _names("run1", 2, 40) | {b"again": b"new"})
        story.delete(database, b"run2-1", b"run0-0")
        merging.flush(database.core)
        story.put(database, {b"z": b"merged"})


def strata_merge(story: Story) -> None:
    with story.open() as database:
        story.put(database, {b"a": b"1"}, scattered("last small one", 200))
    with story.open() as database:
        story.put(database, {b"b": b"2"}, scattered("content 1", 250))


def prune(story: Story) -> None:
    """Dead names and contents, a large one with its parts among them, are condemned, killed and deleted at once."""
    with story.open() as database:
        large, small = scattered("large", 9000), scattered("small", 900)
        story.put(database, _names("going", 3, 300), large, small, scattered("staying", 700))
        story.delete(database, b"going-0", contents=(large, small))
        database.compact(grace_s=0)
        story.put(database, {b"a": b"1"}, small)
        database.compact(grace_s=0)
        story.put(database, {b"b": b"2"})


def prune_beside_a_writer(story: Story) -> None:
    """What one handle finds stored and refers to, another one condemns meanwhile; the next prune kills what is left.

    The strata of earlier sessions hold what is needed as well, so they are written anew.
    """
    writer, compactor = story.open(), story.open()
    found, going = scattered("content 0", 900), scattered("content 1", 900)
    story.delete(writer, b"session0-0", contents=(found, going))
    with story.committing(story.model.plus({b"a": b"1"}, found)), writer.batch() as batch:
        batch.blobs.put(found)
        batch[b"a"] = b"1"
        compactor.compact(grace_s=3600)
    story.put(writer, {b"b": b"2"}, scattered("content 2", 900))
    done = compactor.compact(grace_s=0)
    if not {"kill", "rewrite"} <= {step.kind for step in done.steps}:
        raise AssertionError("there was nothing to prune")
    writer.refresh()  # Else it would find there what has been killed, and be told so by a `Conflict`.
    story.put(writer, {b"c": b"3"}, going)
    compactor.close()
    writer.close()


def index_merge(story: Story) -> None:
    with story.open() as database:
        story.put(database, {b"a": b"1"}, scattered("one more", 200))
    with story.open() as database:
        story.put(database, {b"b": b"2"}, scattered("content 0", 250), scattered("and another", 200))


def checkpoints(story: Story) -> None:
    with story.open() as database:
        for number in range(3):
            story.put(database, {b"n": str(number).encode()}, scattered(f"content {number}", 100))
            raise_floor(database.core)
            checkpoint(database.core)
        story.put(database, {b"n": b"last"})


def old_log(story: Story) -> None:
    """History ends at once: the floor rises, old versions, checkpoints and segments go."""
    with story.open() as database:
        for number in range(4):
            story.put(database, _names("same", 3, 40) | {b"n": str(number).encode()})
            merging.flush(database.core)
            raise_floor(database.core)
            checkpoint(database.core)


def segments(story: Story) -> None:
    with story.open() as database:
        for number in range(6):
            story.put(database, {b"n": str(number).encode(), b"m": scattered(f"m{number}", 50)})
            if number == 3:
                story.put(database, {}, scattered("in between", 200))


def torn_tail(story: Story) -> None:
    with story.open() as database:
        story.settle(database)
        story.put(database, {b"a": b"after the tear"})
        story.put(database, {b"b": b"more"}, scattered("new content", 300))


def killed_in_write(story: Story) -> None:
    """Processes are killed while they write or sync; the next one goes on in the same boot."""
    moments = ((Fault.KILL_IN_WRITE, "append", "log/"), (Fault.KILL, "sync", "data/"), (Fault.KILL, "sync", "log/"))
    for fault, operation, folder in moments:
        label = f"{operation} {folder}"
        storage = FaultStorage(SimulatedStorage(story.disk))
        database = story.open(storage)
        story.put(database, {b"a": label.encode()}, scattered(label, 200))
        storage.plan = _at(fault, operation, folder)
        try:
            story.put(database, {b"a": b"killed", b"torn": scattered(label, 60)}, scattered("killed " + label, 600))
        except Killed:
            storage.close()
        else:
            raise AssertionError(f"nobody was killed at {label}")
        with story.open() as survivor:
            story.settle(survivor)
            story.put(survivor, {b"b": label.encode()}, scattered("killed " + label, 600))


def _at(fault: Fault, operation: str, folder: str) -> Plan:
    """A plan: `fault` at every such operation on a file of the folder; at a sync only after something was appended."""
    appended: set[str] = set()

    def plan(_call: int, called: str, name: str) -> Fault | None:
        due = called == operation and name.startswith(folder) and (operation != "sync" or name in appended)
        if called == "append":
            appended.add(name)
        return fault if due else None

    return plan


def failed_syncs(story: Story) -> None:
    """A sync fails, and what it was for is never written; the next process goes on in the same boot."""
    for number, folder in enumerate(("log/", "data/", "log/", "meta/")):
        storage = FaultStorage(SimulatedStorage(story.disk))
        database = story.open(storage)
        if number:
            story.put(database, {b"a": b"before " + str(number).encode()})
        storage.plan = _at(Fault.SYNC_LOST, "sync", folder)
        try:
            if number == 0:  # The first record of a session, longer than a sector.
                names = _names("not synced", 30, 60)
                with story.committing(story.model.plus(names)), database.batch() as batch:
                    batch.put_many(names.items())
            story.put(database, {b"a": b"not synced", b"b": scattered(folder, 30)}, scattered(f"lost {number}", 300))
            if folder == "meta/":
                merging.flush(database.core)
        except StorageError:
            pass
        else:
            raise AssertionError(f"no sync in {folder} failed")
        storage.plan = no_fault
        with contextlib.suppress(BasinPoisoned):
            story.put(database, {b"a": b"tried again"}, scattered(f"again {number}", 300))
        database.close()
        with story.open() as survivor:
            story.settle(survivor)
            story.put(survivor, {b"c": str(number).encode()}, scattered(f"lost {number}", 300))


def failed_finish(story: Story) -> None:
    """The sync that ends a stratum fails, or never happens: the file looks whole to the process that takes over."""
    for fault in (Fault.SYNC_LOST, Fault.KILL):
        contents = [scattered(f"{fault} {number}", 1500) for number in range(4)]
        storage = FaultStorage(SimulatedStorage(story.disk))
        database = story.open(storage)
        with story.committing(story.model.plus({b"a": fault.name.encode()})), database.batch() as batch:
            batch[b"a"] = fault.name.encode()
        storage.plan = _at(fault, "sync", "data/")
        try:
            story.put(database, {b"a": b"not synced"}, *contents)
        except (StorageError, Killed):
            storage.close()
        with story.open() as survivor:
            story.settle(survivor)
            story.put(survivor, {b"b": b"others"}, *contents)
        with story.open() as survivor:
            story.put(survivor, {b"c": b"more"}, contents[0])


def dead_session(story: Story) -> None:
    """A killed process leaves an active stratum and a finished one that no record names; the next one takes over."""
    storage = SimulatedStorage(story.disk)
    database = story.open(storage)
    story.put(database, {b"a": b"1"}, scattered("kept", 500))
    database.blobs.put(scattered("never committed", 1500))
    database.blobs.put(scattered("never committed either", 1500))
    storage.close()
    with story.open() as survivor:
        story.put(survivor, {b"b": b"2"}, scattered("never committed", 1500), scattered("kept", 500))
        story.put(survivor, {b"c": b"3"})


def deletes(story: Story) -> None:
    with story.open() as database:
        story.delete(database, b"first-1", b"first-2", contents=(scattered("old content", 300),))
        story.put(database, {b"first-1": b"again"}, scattered("old content", 300))
        story.delete(database, b"first-1", b"long")
        merging.flush(database.core)
        story.delete(database, b"first-0")


def delete_range(story: Story) -> None:
    with story.open() as database:
        for start, stop in ((b"run1", b"run2"), (b"run0-1", b"run0-3")):
            gone = {name for name in story.model.names if start <= name < stop}
            model = story.model.minus(gone.__contains__)
            with story.committing(model), database.batch() as batch:
                batch.delete_range(start, stop)
            story.put(database, {b"run1-0": b"new " + start})
            merging.flush(database.core)


def transactions(story: Story) -> None:
    one, two = story.open(), story.open()
    for database in (one, two, one, two):
        before = int(story.model.names.get(b"count", b"0"))
        model = story.model.plus({b"count": str(before + 1).encode()}, scattered(f"receipt {before}", 300))
        with story.committing(model), database.transaction() as work:
            work[b"count"] = str(int(work.get(b"count", b"0")) + 1).encode()
            work.blobs.put(scattered(f"receipt {before}", 300))
    one.close()
    two.close()


def large_batch(story: Story) -> None:
    """A batch that is written as a run of names and adopted by its record."""
    with story.open() as database:
        story.put(database, _names("large", 30, 50))
        story.put(database, {b"large-1": b"small"})
        model = story.model.minus(lambda name: name.startswith(b"large-2")).plus(_names("more", 25, 50))
        with story.committing(model), database.batch() as batch:
            batch.delete_range(b"large-2", b"large-3")
            batch.put_many(_names("more", 25, 50).items())


def keyspaces(story: Story) -> None:
    with story.open() as database:
        logs = {b"x": scattered("x", 30), b"y": scattered("y", 90)}
        with story.committing(story.model.with_others("logs", logs)), database.batch() as batch:
            batch.keyspace("logs").update(logs)
        story.put(database, {b"a": b"1"})
        with story.committing(story.model.with_others("logs", {})):
            database.drop_keyspace("logs")
            database.commit()


def secret_added(story: Story) -> None:
    with story.open() as database:
        story.put(database, {b"a": b"before"})
        added = Secret.generate()
        with story.committing():
            slot = database.secrets.add(added)
        story.secrets.append((story.acknowledged, added))
        story.put(database, {b"a": b"after"}, scattered("new content", 200))
        story.secrets.remove((story.acknowledged - 1, added))
        with story.committing():
            database.secrets.remove(slot)


def rotation(story: Story) -> None:
    with story.open() as database:
        story.put(database, {b"a": b"old keys"}, scattered("under the old keys", 300))
        with story.committing():
            database.secrets.rotate()
        story.put(database, {b"b": b"new keys"}, scattered("under the new keys", 300))
    with story.open() as database:
        story.put(database, {b"c": b"another process"}, scattered("under the old keys", 300))


def dropped_keys(story: Story) -> None:
    """A rotation to its end: two secrets, everything written anew, the old keys, log and checkpoints gone."""
    with story.open() as database:
        added = Secret.generate()
        with story.committing():
            database.secrets.add(added)
        story.secrets.append((story.acknowledged, added))
        with story.committing():
            database.secrets.rotate()
        story.put(database, {b"b": b"new keys"}, scattered("under the new keys", 300))
    with story.open() as database:
        database.compact(prune=False)
        with story.committing():
            database.secrets.drop(forget_history=True)
        story.put(database, {b"c": b"dropped"}, scattered("under the old keys", 300))


def ingest(story: Story) -> None:
    """Two workers write strata for a coordinator, which adopts them in one record."""
    with story.open() as database:
        ticket = database.ticket()
        contents = [scattered(f"ingested {number}", 400) for number in range(4)]
        reports = []
        for part in (contents[:2], contents[2:]):
            worker = open_storage(
                SimulatedStorage(story.disk), "simulated:", mode="r", secret=SECRET, options=story.options
            )
            reports.append(write_items(worker.core, ticket.session, part, lambda name: name))
            worker.core.release("done")
        with story.committing(story.model.plus({}, *contents)):
            database.adopt(reports)
        story.put(database, {b"a": b"after"})


def repair(story: Story) -> None:
    """Every merged index and the checkpoints are gone; repair makes them anew."""
    for folder in ("index", "checkpoint"):
        for name in SimulatedStorage(story.disk).list(folder):
            story.disk.apply(Effect("delete", f"{folder}/{name}"))
        story.disk.apply(Effect("sync_folder", folder))
    story.sound_from = 1
    with story.open() as database:
        with story.committing():
            done = database.repair(dry_run=False)
        if not done:
            raise AssertionError("there was nothing to repair")
        story.put(database, {b"a": b"repaired"}, scattered("new content", 200))
        story.put(database, {b"b": b"repaired"}, scattered("content 1", 250))


def _indexed(story: Story) -> None:
    _sessions(5)(story)
    with story.open() as database:
        checkpoint(database.core)


SCRIPTS: Final[dict[str, Script]] = {
    "create": Script(create),
    "commits": Script(commits, _little),
    "two-writers": Script(two_writers, _little),
    "large-blob": Script(large_blob, _little),
    "full-strata": Script(full_strata, _little, {"stratum_size": 4096}),
    "flush": Script(flush, _little, {"memtable_size": 1024}),
    "names-merge": Script(names_merge, _runs(3)),
    "strata-merge": Script(strata_merge, _sessions(3), limits={(plan, "SMALL_STRATA_MAX"): 4}),
    "index-merge": Script(index_merge, _sessions(3)),
    "prune": Script(prune, _sessions(3), {"history_s": 0.0, "stratum_size": 4096}, {(state, "_MARK_EVERY_MS"): 0}),
    "prune-beside-writer": Script(
        prune_beside_a_writer, _pairs, {"history_s": 0.0, "stratum_size": 4096}, {(state, "_MARK_EVERY_MS"): 0}
    ),
    "checkpoint": Script(checkpoints, _little, limits={(file_log, "SEGMENT_SIZE"): 512}),
    "old-log": Script(
        old_log, _runs(2), {"history_s": 0.0}, {(file_log, "SEGMENT_SIZE"): 1024, (state, "_MARK_EVERY_MS"): 0}
    ),
    "segments": Script(segments, _little, limits={(file_log, "SEGMENT_SIZE"): 1024}),
    "torn-tail": Script(torn_tail, _little, torn=True),
    "killed-in-write": Script(killed_in_write, _little),
    "failed-syncs": Script(failed_syncs, _little),
    "failed-finish": Script(failed_finish, _little, {"stratum_size": 4096}),
    "dead-session": Script(dead_session, _little, {"stratum_size": 4096}),
    "deletes": Script(deletes, _little),
    "delete-range": Script(delete_range, _runs(2)),
    "transactions": Script(transactions, _little),
    "large-batch": Script(large_batch, _little, limits={(core, "BATCH_INLINE_MAX"): 512}),
    "keyspaces": Script(keyspaces, _little),
    "secret-added": Script(secret_added, _little),
    "rotation": Script(rotation, _little),
    "dropped-keys": Script(dropped_keys, _little),
    "ingest": Script(ingest, _little),
    "repair": Script(repair, _indexed),
}
DISTINCT_FLOOR: Final = 100_000
"""So many different disks are visited in one test session, all scripts together."""
DISTINCT_FLOOR_EACH: Final = -(-DISTINCT_FLOOR // len(SCRIPTS))
"""So many by each script: together they reach `DISTINCT_FLOOR`, whichever process runs which."""
