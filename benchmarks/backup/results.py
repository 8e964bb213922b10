"""What a benchmark of backups found, and the arithmetic of ratios: pure values, to and from JSON.

A ratio above 1 always means that Basin is the better one: it is the peer's figure over Basin's. Ratios are taken within
each round, where both ran close together; what is reported is their median.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from benchmarks.backup.sides import SUBJECT

SCHEMA_VERSION: Final = 1
METRICS: Final = ("wall_s", "cpu_s", "peak", "grown")


@dataclass(frozen=True, slots=True)
class Sample:
    """One command of one side. Seconds and bytes; `grown` is by how much the repository grew, 0 if it only reads."""

    material: str
    step: str
    side: str
    round: int
    wall_s: float
    cpu_s: float
    peak: int
    grown: int


@dataclass(slots=True)
class BackupResults:
    """Everything of one benchmark."""

    scale: str
    rounds: int
    seed: int
    started: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    """Of Basin and its libraries; those of the peers stand in their labels."""
    floor: int
    """Bytes; a smaller peak could not be seen."""
    materials: dict[str, str] = field(default_factory=dict)
    """What was backed up, by title."""
    sides: dict[str, str] = field(default_factory=dict)
    """What each side does, by its label, in the order of the columns."""
    absent: list[str] = field(default_factory=list)
    """Who is missing, and why."""
    samples: list[Sample] = field(default_factory=list)

    def steps(self, material: str) -> list[str]:
        """In the order in which they run."""
        return list(dict.fromkeys(sample.step for sample in self.samples if sample.material == material))

    def values(self, material: str, step: str, side: str, metric: str) -> dict[int, float]:
        """One of `METRICS`, by round."""
        return {
            sample.round: float(getattr(sample, metric))
            for sample in self.samples
            if (sample.material, sample.step, sample.side) == (material, step, side)
        }

    def median(self, material: str, step: str, side: str, metric: str) -> float | None:
        """The median of `values`; None if it did not run."""
        found = self.values(material, step, side, metric)
        return statistics.median(found.values()) if found else None

    def ratios(self, material: str, step: str, side: str, metric: str) -> list[float]:
        """A peer's figure over Basin's in each round that has both, and in which Basin's is not 0."""
        ours = self.values(material, step, SUBJECT, metric)
        theirs = self.values(material, step, side, metric)
        return [theirs[number] / ours[number] for number in sorted(ours.keys() & theirs.keys()) if ours[number]]

    def to_text(self) -> str:
        """JSON, in which a change of one sample is a change of one line."""
        plain = {"schema": SCHEMA_VERSION, **asdict(self)}
        samples = ",\n".join(f"  {json.dumps(sample)}" for sample in plain.pop("samples"))
        fields = [f' "{name}": {json.dumps(value)}' for name, value in plain.items()]
        return "{\n" + ",\n".join([*fields, f' "samples": [\n{samples}\n ]']) + "\n}\n"

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> BackupResults:
        """The inverse of `to_text`, once it is parsed; raise `ValueError` on another schema."""
        fields = dict(plain)
        if fields.pop("schema", None) != SCHEMA_VERSION:
            raise ValueError("results of another version of the benchmark")
        fields["samples"] = [Sample(**sample) for sample in fields["samples"]]
        return cls(**fields)
