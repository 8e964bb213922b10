"""The promises about buckets, as a table, and what a run says about each.

Ratios are against the peer as it is, which neither hashes nor encrypts. Requests are those of the counted run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.bucket.jobs import commit_title
from benchmarks.bucket.results import PEER_VARIANT, BucketResults
from benchmarks.bucket.workload import BLOB_SIZE, BucketScale
from benchmarks.budgets import Verdict
from benchmarks.entrant import SUBJECT
from benchmarks.jobs import size_text

_STREAM_PEERS: Final = ("s3fs", "obstore")


@dataclass(frozen=True, slots=True)
class RequestBudget:
    """So many requests of these kinds an operation of a job, at most."""

    job: str
    kinds: tuple[str, ...]
    floor: float
    goal: float

    def judge(self, results: BucketResults) -> Verdict:
        found = results.traffic_of(self.job, SUBJECT)
        sent = None if found is None else sum(found.requests.get(kind, 0) for kind in self.kinds) / found.operations
        text = f"{'+'.join(self.kinds)} of {self.job}"
        return Verdict(text, "requests", "less", self.floor, self.goal, sent)


def judge(results: BucketResults, scale: BucketScale) -> list[Verdict]:
    """All budgets that concern a bucket."""
    stream = size_text(scale.stream_size)
    streams = [
        f"put a stream of {stream}",
        *(f"get a stream of {stream} into {where}" for where in ("memory", "a file")),
    ]
    requests = (
        RequestBudget(commit_title(1), ("PUT",), 2, 1),
        RequestBudget("get 100 B, fresh handle", ("GET",), 2, 1),
        RequestBudget("open and first get, cold", ("GET",), 8, 6),  # 6 of the open, 2 of the get
        RequestBudget("open and first get, cold", ("LIST",), 0, 0),
    )
    return [
        _small_values(results, scale),
        *(_stream(results, job) for job in streams),
        *(budget.judge(results) for budget in requests),
    ]


def _small_values(results: BucketResults, scale: BucketScale) -> Verdict:
    job = f"put {scale.blobs:,} values of {size_text(BLOB_SIZE)}"
    return Verdict(f"{job} / s3fs", "x", "more", 50, 50, results.ratio(job, "s3fs", PEER_VARIANT))


def _stream(results: BucketResults, job: str) -> Verdict:
    """Against the better one of the plain clients."""
    ratios = [results.ratio(job, peer, PEER_VARIANT) for peer in _STREAM_PEERS]
    found = [ratio for ratio in ratios if ratio is not None]
    return Verdict(f"{job} / the better of s3fs and obstore", "x", "more", 0.9, 1.0, min(found, default=None))
