"""The order of a benchmark: the counted run of every job through the proxy, then rounds of timed runs without it.

Within a round the jobs are shuffled, and within a job the sides, which run one directly after the other: a machine that
is slower for a minute is so for both sides of a ratio.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from benchmarks.bucket.jobs import Job, Watch
from benchmarks.bucket.place import Place
from benchmarks.bucket.proxy import counting_proxy
from benchmarks.bucket.results import TrafficSample, variant_of
from benchmarks.jobs import settle
from benchmarks.results import Sample


def sides_of(job: Job, chosen: Sequence[str]) -> list[str]:
    """The sides of a job that take part in this benchmark."""
    return [side for side in job.sides if side in chosen]


def prepare(jobs: Sequence[Job], chosen: Sequence[str], base: Place, on_run: Callable[[str], None]) -> None:
    """Build what the jobs share."""
    for job in jobs:
        for side in sides_of(job, chosen):
            on_run(f"preparing {job.title}: {side}")
            job.prepare(side, base)


def count_traffic(
    jobs: Sequence[Job], chosen: Sequence[str], base: Place, on_run: Callable[[str], None]
) -> list[TrafficSample]:
    """Run every job by every side once, through the proxy."""
    samples = []
    with counting_proxy(base.endpoint) as proxy:
        for job in jobs:
            for side in sides_of(job, chosen):
                on_run(f"counting {job.title}: {side}")
                watch = Watch(proxy.traffic)
                job.run(side, base.through(proxy.endpoint), watch)
                counted = watch.traffic
                samples.append(
                    TrafficSample(
                        job=job.title,
                        engine=side,
                        operations=job.operations,
                        requests=dict(sorted(counted.requests.items())),
                        bytes_out=counted.bytes_out,
                        bytes_in=counted.bytes_in,
                    )
                )
    return samples


def time_jobs(
    jobs: Sequence[Job],
    chosen: Sequence[str],
    base: Place,
    *,
    rounds: int,
    seed: int,
    on_run: Callable[[str], None],
) -> list[Sample]:
    """Run everything `rounds` times. Samples are in the order of `jobs`."""
    order = random.Random(seed)
    samples = []
    for number in range(rounds):
        for job in order.sample(jobs, len(jobs)):
            sides = sides_of(job, chosen)
            for side in order.sample(sides, len(sides)):
                on_run(f"round {number + 1} of {rounds}, {job.title}: {side}")
                samples.append(_timed(job, side, base, number))
    places = {job.title: place for place, job in enumerate(jobs)}
    return sorted(samples, key=lambda sample: (places[sample.job], sample.round))


def _timed(job: Job, side: str, base: Place, number: int) -> Sample:
    settle()
    watch = Watch()
    job.run(side, base, watch)
    return Sample(
        job=job.title,
        engine=side,
        variant=variant_of(side),
        round=number,
        operations=job.operations,
        value_size=job.value_size,
        wall_s=round(watch.wall_s, 7),
        cpu_s=round(watch.cpu_s, 7),
    )
