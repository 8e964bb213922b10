"""The order of a benchmark: rounds, each of which runs every job by every entrant, shuffled by a printed seed.

Within a round the jobs are shuffled, and within a job the entrants, which run one directly after the other: a
machine that is slower for a minute is so for both sides of a ratio, and no engine always comes first.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.entrant import Entrant
from benchmarks.jobs import Job
from benchmarks.memory import measure_fill, measure_reopen
from benchmarks.results import MemorySample, Sample

SLOW_TO_FILL = frozenset({"lmdb", "sqlite", "diskcache"})
"""B-trees, which rewrite a page for nearly every random key of a commit: they are filled and reopened at a million
grains only, because ten million would write tens of gigabytes."""
_SLOW_FILL_MAX = 1_000_000


def run_jobs(
    jobs: Sequence[Job],
    entrants: Sequence[Entrant],
    workspace: Path,
    *,
    rounds: int,
    seed: int,
    on_run: Callable[[str], None],
) -> list[Sample]:
    """Run everything; `on_run` hears what comes next. Samples are in the order of `jobs`."""
    for job in jobs:
        for entrant in entrants:
            on_run(f"preparing {job.title}: {entrant}")
            job.prepare(entrant, workspace)
    order = random.Random(seed)
    samples = []
    for round_number in range(rounds):
        for job in order.sample(jobs, len(jobs)):
            for entrant in order.sample(entrants, len(entrants)):
                on_run(f"round {round_number + 1} of {rounds}, {job.title}: {entrant}")
                samples.append(_run_once(job, entrant, workspace, round_number))
    places = {job.title: place for place, job in enumerate(jobs)}
    return sorted(samples, key=lambda sample: (places[sample.job], sample.round))


def run_memory(
    entrants: Sequence[Entrant],
    workspace: Path,
    *,
    grain_counts: Sequence[int],
    seed: int,
    on_run: Callable[[str], None],
) -> list[MemorySample]:
    """Fill, reopen, delete; one store at a time, because ten million grains take gigabytes."""
    samples = []
    for grains in grain_counts:
        for entrant in entrants:
            if entrant.variant == "work" or (grains > _SLOW_FILL_MAX and entrant.engine in SLOW_TO_FILL):
                continue
            on_run(f"reopen with {grains:,} grains: {entrant}")
            samples.append(_reopen_once(entrant, workspace, grains=grains, seed=seed))
    return samples


def _run_once(job: Job, entrant: Entrant, workspace: Path, round_number: int) -> Sample:
    timing = job.run(entrant, workspace)
    return Sample(
        job=job.title,
        engine=entrant.engine,
        variant=entrant.variant,
        round=round_number,
        operations=job.operations,
        value_size=job.value_size,
        wall_s=round(timing.wall_s, 7),
        cpu_s=round(timing.cpu_s, 7),
    )


def _reopen_once(entrant: Entrant, workspace: Path, *, grains: int, seed: int) -> MemorySample:
    folder = workspace / f"grains-{entrant.folder_name}"
    try:
        filled = measure_fill(entrant, folder, grains=grains, seed=seed)
        reopened = measure_reopen(entrant, folder, grains=grains, seed=seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return MemorySample(
        engine=entrant.engine,
        variant=entrant.variant,
        grains=grains,
        fill_s=filled.fill_s,
        fill_resident_peak=filled.resident_peak,
        open_s=reopened.open_s,
        first_read_s=reopened.first_read_s,
        resident=reopened.resident,
        resident_peak=reopened.resident_peak,
        anonymous=reopened.anonymous,
    )
