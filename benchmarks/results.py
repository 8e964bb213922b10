"""What a benchmark found, and the arithmetic of ratios: pure values, to and from JSON.

A ratio above 1 always means that Basin is the better one: it is peer's seconds over Basin's seconds for equal work,
or peer's bytes over Basin's. Ratios are taken within each round, where both ran close together, and then their
median.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from benchmarks.entrant import BASIN, SUBJECT

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one job by one entrant."""

    job: str
    engine: str
    variant: str
    round: int
    operations: int
    value_size: int
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class MemorySample:
    """One store that was filled and reopened. Times in seconds, memory in bytes."""

    engine: str
    variant: str
    grains: int
    fill_s: float
    fill_resident_peak: int
    open_s: float
    first_read_s: float
    resident: int
    resident_peak: int
    anonymous: int


@dataclass(slots=True)
class Results:
    """Everything of one benchmark."""

    scale: str
    seed: int
    rounds: int
    started: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)

    def jobs(self) -> list[str]:
        """Titles of the jobs that ran, in the order of the report (that of their first appearance)."""
        return list(dict.fromkeys(sample.job for sample in self.samples))

    def seconds(self, job: str, engine: str, variant: str) -> dict[int, float]:
        """Seconds for one operation, by round."""
        return {
            sample.round: sample.wall_s / sample.operations
            for sample in self.samples
            if (sample.job, sample.engine, sample.variant) == (job, engine, variant)
        }

    def median_seconds(self, job: str, engine: str, variant: str) -> float | None:
        """The median of `seconds`; `None` if it did not run."""
        found = self.seconds(job, engine, variant)
        return statistics.median(found.values()) if found else None

    def ratios(self, job: str, engine: str, variant: str, *, peer_job: str | None = None) -> list[float]:
        """How many times as fast as the peer Basin was, in each round that has both."""
        ours = self.seconds(job, SUBJECT, BASIN.variant)
        theirs = self.seconds(peer_job or job, engine, variant)
        return [theirs[number] / ours[number] for number in sorted(ours.keys() & theirs.keys())]

    def ratio(self, job: str, engine: str, variant: str, *, peer_job: str | None = None) -> float | None:
        """The median of `ratios`; `None` if there is none."""
        found = self.ratios(job, engine, variant, peer_job=peer_job)
        return statistics.median(found) if found else None

    def memory_of(self, engine: str, grains: int) -> MemorySample | None:
        """The reopened store of `engine` with so many grains, if it was measured."""
        return next((found for found in self.memory if (found.engine, found.grains) == (engine, grains)), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"schema": SCHEMA_VERSION, **asdict(self)}

    def to_text(self) -> str:
        """As `to_json`, written so that a change of one sample is a change of one line."""
        fields = []
        for name, value in self.to_json().items():
            if isinstance(value, list):
                lines = ",\n".join(f"  {json.dumps(sample)}" for sample in value)
                fields.append(f' "{name}": [\n{lines}\n ]')
            else:
                fields.append(f' "{name}": {json.dumps(value)}')
        return "{\n" + ",\n".join(fields) + "\n}\n"

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Results:
        """The inverse of `to_json`; raise `ValueError` on another schema."""
        fields = dict(plain)
        if fields.pop("schema", None) != SCHEMA_VERSION:
            raise ValueError("results of another version of the benchmark")
        fields["samples"] = [Sample(**sample) for sample in fields["samples"]]
        fields["memory"] = [MemorySample(**sample) for sample in fields["memory"]]
        return cls(**fields)
