"""What a benchmark in a bucket found: the samples of the local benchmark's kind, and the traffic of every job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.entrant import BASIN, SUBJECT
from benchmarks.results import SCHEMA_VERSION, Results, Sample

PEER_VARIANT = "raw"
"""Peers are used as they are: without hash, deduplication and cipher."""


@dataclass(frozen=True, slots=True)
class TrafficSample:
    """Requests, by their kinds, and bytes of bodies of one run of one job, counted by the proxy."""

    job: str
    engine: str
    operations: int
    requests: dict[str, int]
    bytes_out: int
    bytes_in: int

    @property
    def requests_of_operation(self) -> float:
        return sum(self.requests.values()) / self.operations


@dataclass(slots=True)
class BucketResults(Results):
    """Everything of one benchmark in a bucket."""

    server: str = ""
    traffic: list[TrafficSample] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    """What each side does, by job."""

    def traffic_of(self, job: str, engine: str) -> TrafficSample | None:
        """What a job of an engine sent, if it was counted."""
        return next((found for found in self.traffic if (found.job, found.engine) == (job, engine)), None)

    def engines(self) -> list[str]:
        """The engines that ran, Basin first."""
        return list(dict.fromkeys([SUBJECT, *(sample.engine for sample in self.samples)]))

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> BucketResults:
        """The inverse of `to_json`; raise `ValueError` on another schema."""
        fields = dict(plain)
        if fields.pop("schema", None) != SCHEMA_VERSION:
            raise ValueError("results of another version of the benchmark")
        fields["samples"] = [Sample(**sample) for sample in fields["samples"]]
        fields["traffic"] = [TrafficSample(**sample) for sample in fields["traffic"]]
        return cls(**fields)


def variant_of(engine: str) -> str:
    """The variant in which an engine takes part."""
    return BASIN.variant if engine == SUBJECT else PEER_VARIANT
