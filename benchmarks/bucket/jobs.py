"""What is timed. A job runs one side once; opening (where it is not the subject), checking and cleaning are outside.

Jobs that write start at an empty prefix each time. Jobs that read share a store that is built once for each side; cold
is a fresh handle with an empty cache folder, warm is what was read once before by the same handle. The server's own
cache is warm for everybody. All that is read is compared with what was stored: a difference ends the benchmark.
"""

from __future__ import annotations

import abc
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from benchmarks.bucket.contestant import Blobs, Names, Streams
from benchmarks.bucket.place import Place
from benchmarks.bucket.proxy import Traffic
from benchmarks.bucket.sides import open_blobs, open_names, open_streams
from benchmarks.bucket.sides.basin_side import Racers
from benchmarks.bucket.workload import (
    BLOB_SIZE,
    NAMED_VALUE_SIZE,
    NAMES_IN_A_COMMIT,
    BucketScale,
    Pairs,
    batches_of,
    make_pairs,
    make_values,
)
from benchmarks.entrant import SUBJECT
from benchmarks.jobs import WorkDiffers, size_text

_CLIENTS: Final = ("basin-s3fs", "basin-obstore")
_NAME_SIDES: Final = (SUBJECT, "slatedb")
_OBJECT_SIDES: Final = (SUBJECT, *_CLIENTS, "s3fs", "obstore")
_fresh = itertools.count()


@dataclass(slots=True)
class Watch:
    """Seconds, and traffic if a proxy counts it, of the blocks `with watch.running():`."""

    traffic_now: Callable[[], Traffic] = Traffic
    wall_s: float = 0
    cpu_s: float = 0
    traffic: Traffic = field(default_factory=Traffic)

    @contextmanager
    def running(self) -> Iterator[None]:
        gc.collect()
        before, wall_s, cpu_s = self.traffic_now(), time.perf_counter(), time.process_time()
        yield
        self.wall_s += time.perf_counter() - wall_s
        self.cpu_s += time.process_time() - cpu_s
        self.traffic = self.traffic_now().since(before)


class Data:
    """What the jobs of one benchmark store, made on first use and kept."""

    def __init__(self, scale: BucketScale, *, seed: int) -> None:
        self.scale = scale
        self.seed = seed

    @cached_property
    def pairs(self) -> Pairs:
        return make_pairs(self.scale.names, seed=self.seed)

    @cached_property
    def stored_pairs(self) -> Pairs:
        return make_pairs(self.scale.stored_names, seed=self.seed)

    @cached_property
    def values(self) -> list[bytes]:
        return make_values(self.scale.blobs, BLOB_SIZE, seed=self.seed)

    @cached_property
    def stream(self) -> bytes:
        return make_values(1, self.scale.stream_size, seed=self.seed)[0]


class Job(abc.ABC):
    """One line of the report. `note` says what each side does, where that is not the same for all."""

    title: str
    sides: tuple[str, ...]
    operations: int
    value_size: int
    note: str = ""

    def prepare(self, side: str, base: Place) -> None:
        """Build what all runs of this side share; nothing, unless a subclass says so."""
        del side, base

    @abc.abstractmethod
    def run(self, side: str, base: Place, watch: Watch) -> None:
        """Do it once. `base` is a place whose prefix is not used by others; its endpoint may be the proxy's."""


def fresh(side: str, base: Place) -> Place:
    """A prefix that nobody has used."""
    return base.at(f"{base.prefix}-run-{next(_fresh)}-{side}")


def require_equal(found: Sequence[object], wanted: Sequence[object], what: str) -> None:
    """Raise `WorkDiffers` unless a side returned what it was given."""
    if list(found) != list(wanted):
        raise WorkDiffers(f"{what}: what was read is not what was stored")


# --- names ------------------------------------------------------------------------------------------------------------


class LoadNames(Job):
    """Many names, which must be durable only in the end, or after every thousand."""

    sides = _NAME_SIDES
    value_size = NAMED_VALUE_SIZE

    def __init__(self, data: Data, *, durable_batches: bool) -> None:
        each = f", durable every {NAMES_IN_A_COMMIT:,}" if durable_batches else ", durable in the end"
        self.title = f"names: put {size_text(NAMED_VALUE_SIZE)}{each}"
        self.operations = data.scale.names
        self.note = (
            "Batches of 1,000. Basin: `put_many`, and `commit` where it must be durable. SlateDB: a `WriteBatch`, and "
            "a flush of its log where it must be durable."
        )
        self._data = data
        self._durable_batches = durable_batches

    def run(self, side: str, base: Place, watch: Watch) -> None:
        place = fresh(side, base)
        with closing(open_names(side, place)) as opened:
            opened.put_batch([(b"first", b"")])  # A session begins, a log file comes about.
            with watch.running():
                if self._durable_batches:
                    for pairs in batches_of(self._data.pairs):
                        opened.put_batch(pairs)
                else:
                    opened.load(batches_of(self._data.pairs))
        with closing(open_names(side, place, reading=True)) as again:
            sample = self._data.pairs[:: max(1, self.operations // 100)]
            require_equal(again.get_each([name for name, _ in sample]), [value for _, value in sample], self.title)
        place.forget_cache()


class CommitNames(Job):
    """Durable commits of single names by several writers of one handle."""

    sides: tuple[str, ...] = (*_NAME_SIDES, *_CLIENTS)
    value_size = NAMED_VALUE_SIZE

    def __init__(self, data: Data, writers: int) -> None:
        self._begin(data, writers, commit_title(writers), data.scale.commits[writers])
        self.note = (
            "Writers of one handle. Basin: threads, which share records of the log. SlateDB: asyncio tasks, each of "
            "which puts and flushes the log (it allows one writing handle; waiting for its timer took 101 ms a commit)."
        )

    def _begin(self, data: Data, writers: int, title: str, operations: int) -> None:
        self.title = title
        self.operations = operations
        self._pairs = make_pairs(operations, seed=data.seed)
        self._writers = writers

    def run(self, side: str, base: Place, watch: Watch) -> None:
        with closing(self._open(side, fresh(side, base))) as opened:
            with watch.running():
                opened.commit_each([self._pairs[number :: self._writers] for number in range(self._writers)])
            found = opened.get_each([name for name, _ in self._pairs])
            require_equal(found, [value for _, value in self._pairs], self.title)

    def _open(self, side: str, place: Place) -> Names | Racers:
        opened = open_names(side, place)
        opened.put_batch([(b"first", b"")])
        return opened


class RaceCommits(CommitNames):
    """The same by handles that race for positions of the log: what Basin allows, and its peer does not."""

    sides = (SUBJECT,)

    def __init__(self, data: Data, writers: int) -> None:
        self._begin(data, writers, race_title(writers), data.scale.races[writers])
        self.note = (
            "Basin alone: handles with sessions of their own, each in its own thread, race for every position of the "
            "log; a loser reads what won, and tries again. In SlateDB a second writer fences the first. SeaweedFS lets "
            "PUTs of one name that come at the same time wait for each other, in steps of a second."
        )

    def _open(self, side: str, place: Place) -> Names | Racers:
        return Racers(place, self._writers)


class ReadNames(Job):
    """Jobs on one store of names, shared by all: loaded in one go and closed."""

    sides: tuple[str, ...] = _NAME_SIDES
    value_size = NAMED_VALUE_SIZE
    store = "names"

    def __init__(self, data: Data) -> None:
        self._data = data

    def prepare(self, side: str, base: Place) -> None:
        place = self.place(side, base)
        marker = place.folder / f"filled-{place.prefix}"
        if marker.exists():
            return
        with closing(open_names(side, place)) as opened:
            self.fill(opened)
        place.forget_cache()
        marker.touch()

    def fill(self, opened: Names) -> None:
        """Store what is read."""
        opened.load(batches_of(self._data.stored_pairs))

    def place(self, side: str, base: Place) -> Place:
        """The shared store."""
        return base.at(f"{base.prefix}-shared-{side}-{self.store}")


class OpenNames(ReadNames):
    """A reading handle opens and gets one value."""

    operations = 1
    sides = (*_NAME_SIDES, *_CLIENTS)

    def __init__(self, data: Data, *, cold: bool, commits: bool = False) -> None:
        super().__init__(data)
        self.store = "commits" if commits else "names"
        behind = f" behind {data.scale.names // NAMES_IN_A_COMMIT} commits" if commits else ""
        self.title = f"open and first get, {'cold' if cold else 'cache folder kept'}{behind}"
        self.note = (
            "A handle that writes nothing. Basin: mode `r`, which fetches keys, log and state. SlateDB: a `DbReader` "
            "that follows the latest manifest (by default it has no cache folder)."
        )
        self._cold = cold

    def fill(self, opened: Names) -> None:
        if self.store == "names":
            super().fill(opened)
            return
        for pairs in batches_of(self._data.pairs):
            opened.put_batch(pairs)

    def run(self, side: str, base: Place, watch: Watch) -> None:
        place = self.place(side, base)
        name, value = (self._data.pairs if self.store == "commits" else self._data.stored_pairs)[0]
        place.forget_cache()
        if not self._cold:
            with closing(open_names(side, place, reading=True)) as before:
                before.get_each([name])
        with watch.running():
            opened = open_names(side, place, reading=True)
            found = opened.get_each([name])
        opened.close()
        require_equal(found, [value], self.title)


class GetNames(ReadNames):
    """Random gets, one after the other."""

    sides = (*_NAME_SIDES, *_CLIENTS)

    def __init__(self, data: Data, *, cold: bool) -> None:
        super().__init__(data)
        self.title = f"get {size_text(NAMED_VALUE_SIZE)}, {'fresh handle' if cold else 'warm'}"
        self.operations = data.scale.cold_reads if cold else data.scale.warm_reads
        self.note = "One call a name. Basin reads from and decrypts blocks of names; SlateDB reads plain blocks."
        self._cold = cold

    def run(self, side: str, base: Place, watch: Watch) -> None:
        place = self.place(side, base)
        place.forget_cache()
        pairs = self._data.stored_pairs[: self.operations]  # They were shuffled when they were made.
        names = [name for name, _ in pairs]
        with closing(open_names(side, place, reading=True)) as opened:
            if not self._cold:
                opened.get_each(names)
            with watch.running():
                found = opened.get_each(names)
        require_equal(found, [value for _, value in pairs], self.title)


class ScanNames(ReadNames):
    """All names and values in order."""

    def __init__(self, data: Data, *, cold: bool) -> None:
        super().__init__(data)
        self.title = f"scan of names, {'fresh handle' if cold else 'warm'}"
        self.operations = data.scale.stored_names
        self.note = "SlateDB: `next_batch(1000)`, reading ahead 4 MiB (by default one block: twenty times as long)."
        self._cold = cold

    def run(self, side: str, base: Place, watch: Watch) -> None:
        place = self.place(side, base)
        place.forget_cache()
        with closing(open_names(side, place, reading=True)) as opened:
            if not self._cold:
                opened.scan()
            with watch.running():
                count = opened.scan()
        require_equal([count], [self.operations], self.title)


# --- values and streams -----------------------------------------------------------------------------------------------


class PutBlobs(Job):
    """Many small values, written together."""

    sides = _OBJECT_SIDES
    value_size = BLOB_SIZE
    note = (
        "Basin: `blobs.put_many` and one commit, hashed, deduplicated, encrypted. s3fs: `pipe` of all, an object each. "
        "obstore: `put_async`, an object each. 32 requests at once."
    )

    def __init__(self, data: Data) -> None:
        self.title = f"put {data.scale.blobs:,} values of {size_text(BLOB_SIZE)}"
        self.operations = data.scale.blobs
        self._data = data

    def run(self, side: str, base: Place, watch: Watch) -> None:
        place = fresh(side, base)
        values = self._data.values
        with closing(open_blobs(side, place)) as opened:
            addresses = opened.put_values(values[:1])
            with watch.running():
                addresses = opened.put_values(values)
        with closing(open_blobs(side, place, reading=True)) as again:
            chosen = range(0, len(values), max(1, len(values) // 50))
            found = again.get_values([addresses[i] for i in chosen], BLOB_SIZE)
        require_equal(found, [values[i] for i in chosen], self.title)
        place.forget_cache()


class StoredOnce(Job):
    """Jobs that read what `prepare` stores once for each side; it keeps what finds it."""

    sides = _OBJECT_SIDES

    def __init__(self, data: Data) -> None:
        self._data = data
        self._addresses: dict[str, Any] = {}

    def place(self, side: str, base: Place) -> Place:
        """The shared store."""
        return base.at(f"{base.prefix}-shared-{side}-{type(self).__name__.lower()}-{self.operations}")


class GetBlobs(StoredOnce):
    """Many small values, read together in random order by a fresh handle."""

    value_size = BLOB_SIZE
    note = (
        "Basin: `blobs.get_many`, decrypted and verified, with an empty cache. s3fs: `cat_ranges`, a GET each. "
        "obstore: `get_async`, a GET each. 32 requests at once."
    )

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.title = f"get {data.scale.blobs:,} values of {size_text(BLOB_SIZE)}, fresh handle"
        self.operations = data.scale.blobs

    def prepare(self, side: str, base: Place) -> None:
        with closing(open_blobs(side, self.place(side, base))) as opened:
            self._addresses[side] = opened.put_values(self._data.values)

    def run(self, side: str, base: Place, watch: Watch) -> None:
        place = self.place(side, base)
        place.forget_cache()
        order = [(number * 7_919) % self.operations for number in range(self.operations)]
        addresses = [self._addresses[side][i] for i in order]
        with closing(open_blobs(side, place, reading=True)) as opened, watch.running():
            found = opened.get_values(addresses, BLOB_SIZE)
        require_equal(found, [self._data.values[i] for i in order], self.title)


class PutStream(Job):
    """One large file from the local disk."""

    sides = _OBJECT_SIDES
    operations = 1
    note = (
        "From a file in the page cache. Basin: `blobs.put(path)` and `commit`: hashed, deduplicated, compression "
        "tried, encrypted. s3fs: `put_file`. obstore: `put`, in parts by its own choice."
    )

    def __init__(self, data: Data) -> None:
        self.value_size = data.scale.stream_size
        self.title = f"put a stream of {size_text(self.value_size)}"
        self._data = data

    def run(self, side: str, base: Place, watch: Watch) -> None:
        place = fresh(side, base)
        source = place.folder / "source"
        source.write_bytes(self._data.stream)
        with closing(open_streams(side, place)) as opened:
            if isinstance(opened, Blobs):
                opened.put_values([b"connected"])
            with watch.running():
                address = opened.put_file(source)
        with closing(open_streams(side, place, reading=True)) as again:
            require_equal([again.get_whole(address, self.value_size)], [self._data.stream], self.title)
        place.forget_cache()
        source.unlink()


class GetStream(StoredOnce):
    """One large body: into memory as a whole, or into a local file."""

    operations = 1

    def __init__(self, data: Data, *, to_file: bool) -> None:
        super().__init__(data)
        self.value_size = data.scale.stream_size
        self.title = f"get a stream of {size_text(self.value_size)} into {'a file' if to_file else 'memory'}"
        self.note = "Fresh handle. Basin decrypts, and verifies every part and the whole. " + (
            "Basin: `blobs.open`, copied. s3fs: `get_file`. obstore: `stream`, written."
            if to_file
            else "Basin: `blobs[key]`. s3fs: `cat_file` of a known size, one GET. obstore: `get`, one GET."
        )
        self._to_file = to_file

    def prepare(self, side: str, base: Place) -> None:
        source = base.folder / "source"
        source.write_bytes(self._data.stream)
        with closing(open_streams(side, self.place(side, base))) as opened:
            self._addresses[side] = opened.put_file(source)
        source.unlink()

    def run(self, side: str, base: Place, watch: Watch) -> None:
        place = self.place(side, base)
        place.forget_cache()
        target = place.folder / "target"
        with closing(open_streams(side, place, reading=True)) as opened, watch.running():
            found = self._get(opened, self._addresses[side], target)
        if self._to_file:
            found = target.read_bytes()
            target.unlink()
        require_equal([found], [self._data.stream], self.title)

    def _get(self, opened: Streams, address: Any, target: Path) -> bytes:
        if self._to_file:
            opened.get_file(address, target)
            return b""
        return opened.get_whole(address, self.value_size)


def commit_title(writers: int) -> str:
    return f"durable commit, {writers} {'writer' if writers == 1 else 'writers'} of one handle"


def race_title(writers: int) -> str:
    return f"durable commit, {writers} handles that race"


def all_jobs(data: Data) -> list[Job]:
    """Every job in the order of the report."""
    return [
        *(LoadNames(data, durable_batches=durable) for durable in (False, True)),
        *(CommitNames(data, writers) for writers in sorted(data.scale.commits)),
        *(RaceCommits(data, writers) for writers in sorted(data.scale.races)),
        *(OpenNames(data, cold=cold) for cold in (True, False)),
        OpenNames(data, cold=True, commits=True),
        *(GetNames(data, cold=cold) for cold in (True, False)),
        *(ScanNames(data, cold=cold) for cold in (True, False)),
        PutBlobs(data),
        GetBlobs(data),
        PutStream(data),
        *(GetStream(data, to_file=to_file) for to_file in (False, True)),
    ]
