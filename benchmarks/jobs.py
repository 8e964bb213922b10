"""What is timed. A job runs one entrant once; opening, checking and cleaning up are outside the clock.

Jobs that write start from an empty store every time. Jobs that read share a store, which is built once for each
entrant, opened anew for every run, and read once before the clock starts ("warm"). Every run compares a sample of
what is stored with what was given; a difference ends the benchmark.
"""

from __future__ import annotations

import abc
import functools
import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.contestant import Contestant
from benchmarks.entrant import Entrant
from benchmarks.workload import (
    KIB,
    MIB,
    NAMED_VALUE_SIZE,
    THREAD_COUNTS,
    VALUE_SIZES,
    Contents,
    Pair,
    Scale,
    batch_size,
    choose,
    make_contents,
    make_named_values,
)

_SAMPLE: Final = 20
_NAMES_IN_A_COMMIT: Final = 1_000
_THREADS_READY_S: Final = 60.0


class WorkDiffers(Exception):
    """An engine does not hold what it was given, so its time means nothing."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: by the clock, and of this process's cores."""

    wall_s: float
    cpu_s: float


class Data:
    """What the jobs of one benchmark store, made on first use and kept: making it is never inside the clock."""

    def __init__(self, scale: Scale, *, seed: int) -> None:
        self.scale = scale
        self.seed = seed
        self.contents = functools.cache(self._make_contents)
        self.names = functools.cache(self._make_names)

    def _make_contents(self, value_size: int) -> Contents:
        contents = make_contents(value_size, self.scale.value_counts[value_size], seed=self.seed)
        if len(set(contents.digests)) != len(contents.digests):
            raise WorkDiffers(f"values of {value_size} bytes repeat: deduplication would be measured, not storing")
        return contents

    def _make_names(self) -> list[Pair]:
        return make_named_values(self.scale.names, seed=self.seed)


class Job(abc.ABC):
    """One line of the report. `operations` are done in one run; `value_size` is what each moves, in bytes."""

    title: str
    operations: int
    value_size: int

    def prepare(self, entrant: Entrant, workspace: Path) -> None:
        """Build what all runs of this entrant share; nothing, unless a subclass says so."""
        del entrant, workspace

    @abc.abstractmethod
    def run(self, entrant: Entrant, workspace: Path) -> Timing:
        """Do it once in the folder `workspace`. Nothing but shared stores is left there."""


class WritingJob(Job):
    """Writes to an empty store."""

    def run(self, entrant: Entrant, workspace: Path) -> Timing:
        folder = workspace / f"run-{entrant.folder_name}"
        contestant = entrant.open(folder, value_size=self.value_size)
        try:
            timing = self.measure(contestant)
            self.verify(contestant)
        finally:
            contestant.close()
            shutil.rmtree(folder)
        return timing

    @abc.abstractmethod
    def measure(self, contestant: Contestant) -> Timing:
        """Write everything, timed."""

    @abc.abstractmethod
    def verify(self, contestant: Contestant) -> None:
        """Compare a sample."""


class ReadingJob(Job):
    """Reads a store that was built before."""

    def run(self, entrant: Entrant, workspace: Path) -> Timing:
        contestant = entrant.open(self.shared_folder(entrant, workspace), value_size=self.value_size)
        try:
            self.verify(contestant)
            return self.measure(contestant)
        finally:
            contestant.close()

    def prepare(self, entrant: Entrant, workspace: Path) -> None:
        folder = self.shared_folder(entrant, workspace)
        if folder.exists():
            return
        contestant = entrant.open(folder, value_size=self.value_size)
        try:
            self.fill(contestant)
        finally:
            contestant.close()

    def shared_folder(self, entrant: Entrant, workspace: Path) -> Path:
        """The store of this entrant and this data, shared with other jobs that read the same data."""
        return workspace / f"shared-{entrant.folder_name}-{type(self).data_name}-{self.value_size}"

    data_name: str

    @abc.abstractmethod
    def fill(self, contestant: Contestant) -> None:
        """Store what will be read."""

    @abc.abstractmethod
    def verify(self, contestant: Contestant) -> None:
        """Compare a sample."""

    @abc.abstractmethod
    def measure(self, contestant: Contestant) -> Timing:
        """Read once, then once more, timed."""


class PutContents(WritingJob):
    """Content, by single puts with a commit for each batch, or by batch calls."""

    def __init__(self, data: Data, value_size: int, *, batched: bool) -> None:
        self.title = f"{'put_many' if batched else 'put'} {size_text(value_size)}"
        self.operations = data.scale.value_counts[value_size]
        self.value_size = value_size
        self._data = data
        self._batched = batched

    def measure(self, contestant: Contestant) -> Timing:
        put = contestant.put_batch if self._batched else contestant.put_each
        batches = list(self._data.contents(self.value_size).batches(batch_size(self.value_size)))

        def put_all() -> None:
            for batch in batches:
                put(batch)

        return timed(put_all)

    def verify(self, contestant: Contestant) -> None:
        verify_contents(contestant, self._data.contents(self.value_size))


class GetContents(ReadingJob):
    """Content in random order, by single gets or by batch calls."""

    data_name = "contents"

    def __init__(self, data: Data, value_size: int, *, batched: bool) -> None:
        self.title = f"{'get_many' if batched else 'get'} {size_text(value_size)}"
        self.operations = min(data.scale.reads_max, data.scale.value_counts[value_size])
        self.value_size = value_size
        self._data = data
        self._batched = batched

    def fill(self, contestant: Contestant) -> None:
        for batch in self._data.contents(self.value_size).batches(batch_size(self.value_size)):
            contestant.put_batch(batch)

    def verify(self, contestant: Contestant) -> None:
        verify_contents(contestant, self._data.contents(self.value_size))

    def measure(self, contestant: Contestant) -> Timing:
        digests = self._data.contents(self.value_size).digests
        chosen = contestant.addresses([digests[i] for i in choose(self.operations, len(digests), seed=self._data.seed)])
        count = batch_size(self.value_size)
        batches = [chosen[start : start + count] for start in range(0, len(chosen), count)]
        get = contestant.get_batch if self._batched else contestant.get_each

        def get_all() -> None:
            for batch in batches:
                get(batch)

        get_all()
        return timed(get_all)


class PutNames(WritingJob):
    """Names with small values, by batch calls."""

    def __init__(self, data: Data) -> None:
        self.title = f"names: put_many {size_text(NAMED_VALUE_SIZE)}"
        self.operations = data.scale.names
        self.value_size = NAMED_VALUE_SIZE
        self._data = data

    def measure(self, contestant: Contestant) -> Timing:
        pairs = self._data.names()
        return timed(lambda: put_names(contestant, pairs))

    def verify(self, contestant: Contestant) -> None:
        verify_names(contestant, self._data.names())


class GetNames(ReadingJob):
    """Names in random order, by single gets or by batch calls."""

    data_name = "names"

    def __init__(self, data: Data, *, batched: bool) -> None:
        self.title = f"names: {'get_many' if batched else 'get'} {size_text(NAMED_VALUE_SIZE)}"
        self.operations = min(data.scale.reads_max, data.scale.names)
        self.value_size = NAMED_VALUE_SIZE
        self._data = data
        self._batched = batched

    def fill(self, contestant: Contestant) -> None:
        put_names(contestant, self._data.names())

    def verify(self, contestant: Contestant) -> None:
        verify_names(contestant, self._data.names())

    def measure(self, contestant: Contestant) -> Timing:
        pairs = self._data.names()
        chosen = [pairs[i][0] for i in choose(self.operations, len(pairs), seed=self._data.seed)]
        get = contestant.get_names_batch if self._batched else contestant.get_names_each
        batches = [chosen[start : start + _NAMES_IN_A_COMMIT] for start in range(0, len(chosen), _NAMES_IN_A_COMMIT)]

        def get_all() -> None:
            for batch in batches:
                get(batch)

        get_all()
        return timed(get_all)


class ScanNames(ReadingJob):
    """Every name and its value, in order."""

    data_name = "names"

    def __init__(self, data: Data) -> None:
        self.title = "names: scan"
        self.operations = data.scale.names
        self.value_size = NAMED_VALUE_SIZE
        self._data = data

    def fill(self, contestant: Contestant) -> None:
        put_names(contestant, self._data.names())

    def verify(self, contestant: Contestant) -> None:
        if contestant.scan_names() != self.operations:
            raise WorkDiffers(f"a scan does not visit all of {self.operations} names")

    def measure(self, contestant: Contestant) -> Timing:
        contestant.scan_names()
        return timed(contestant.scan_names)


class CommitNames(WritingJob):
    """Durable commits of one small name each, from several threads at once."""

    def __init__(self, data: Data, threads: int) -> None:
        self.title = f"durable commit, {threads} thread{'s' if threads > 1 else ''}"
        self.operations = data.scale.commits // threads * threads
        self.value_size = NAMED_VALUE_SIZE
        self._data = data
        self._threads = threads

    def measure(self, contestant: Contestant) -> Timing:
        """The clock starts when every thread has made its first commit."""
        pairs = self._data.names()[: self.operations]
        ready = threading.Barrier(self._threads + 1)

        def commit_share(number: int) -> None:
            commit = contestant.commit_name
            commit(b"thread %d" % number, b"ready")
            ready.wait(_THREADS_READY_S)
            for name, value in pairs[number :: self._threads]:
                commit(name, value)

        with ThreadPoolExecutor(self._threads) as pool:
            shares = [pool.submit(commit_share, number) for number in range(self._threads)]
            settle()
            ready.wait(_THREADS_READY_S)
            started = _now()
            for share in shares:
                share.result()
            return _since(started)

    def verify(self, contestant: Contestant) -> None:
        verify_names(contestant, self._data.names()[: self.operations])


def all_jobs(data: Data) -> list[Job]:
    """Every job in the order of the report."""
    both = (False, True)
    sizes = [size for size in VALUE_SIZES if size in data.scale.value_counts]
    return [
        *(PutContents(data, size, batched=batched) for batched in both for size in sizes),
        *(GetContents(data, size, batched=batched) for batched in both for size in sizes),
        PutNames(data),
        *(GetNames(data, batched=batched) for batched in both),
        ScanNames(data),
        *(CommitNames(data, threads) for threads in THREAD_COUNTS),
    ]


def put_names(contestant: Contestant, pairs: Sequence[Pair]) -> None:
    """Store names, 1,000 in a commit."""
    for start in range(0, len(pairs), _NAMES_IN_A_COMMIT):
        contestant.put_names(pairs[start : start + _NAMES_IN_A_COMMIT])


def verify_contents(contestant: Contestant, contents: Contents) -> None:
    """Raise `WorkDiffers` unless a sample of `contents` reads back equal."""
    for i in choose(_SAMPLE, len(contents.values), seed=len(contents.values)):
        if contestant.read_content(contents.digests[i]) != contents.values[i]:
            raise WorkDiffers(f"{contents.digests[i].hex()} reads back as something else")


def verify_names(contestant: Contestant, pairs: Sequence[Pair]) -> None:
    """Raise `WorkDiffers` unless a sample of `pairs` reads back equal."""
    for i in choose(_SAMPLE, len(pairs), seed=len(pairs)):
        name, value = pairs[i]
        if contestant.read_name(name) != value:
            raise WorkDiffers(f"{name!r} reads back as something else")


def size_text(size: int) -> str:
    """A size in bytes for people: "100 B", "4 KiB", "1 MiB"."""
    if size >= MIB:
        return f"{size // MIB} MiB"
    return f"{size // KIB} KiB" if size >= KIB else f"{size} B"


def settle() -> None:
    """Take earlier work out of the next measurement: write back what others left dirty, collect garbage once.

    Without the sync, the first sync of one engine would also wait for the pages another engine left behind.
    """
    os.sync()
    gc.collect()
    gc.freeze()


def timed(work: Callable[[], object]) -> Timing:
    """Run `work` once on a settled machine."""
    settle()
    started = _now()
    work()
    return _since(started)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> Timing:
    wall_s, cpu_s = _now()
    return Timing(wall_s - started[0], cpu_s - started[1])
