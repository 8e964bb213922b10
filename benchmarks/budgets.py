"""The promises about speed and memory, as a table, and what a run says about each.

The floor is what has to hold, the goal what is aimed for. A ratio of 1.2 says: Basin does in one second what the
peer does in 1.2. Work is equal on both sides unless the text says "raw": then the peer neither hashes, compresses
nor encrypts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.entrant import SUBJECT
from benchmarks.results import MemorySample, Results
from benchmarks.workload import MIB

OPEN_MAX_S: Final = 1.0
OPEN_GRAINS: Final = 10_000_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """One budget beside what was measured. `better` is "more" for ratios, "less" for seconds and MiB."""

    text: str
    unit: str
    better: str
    floor: float
    goal: float
    measured: float | None

    @property
    def met(self) -> str:
        """One of "goal", "floor", "no" or "not measured"."""
        if self.measured is None:
            return "not measured"
        if self._reaches(self.goal):
            return "goal"
        return "floor" if self._reaches(self.floor) else "no"

    def _reaches(self, bound: float) -> bool:
        assert self.measured is not None
        return self.measured >= bound if self.better == "more" else self.measured <= bound


@dataclass(frozen=True, slots=True)
class Ratio:
    """A promise of the kind: Basin's `job` against the `peer_job` of a peer."""

    job: str
    peer: str
    variant: str
    floor: float
    goal: float
    peer_job: str | None = None

    def judge(self, results: Results) -> Verdict:
        """What a run says."""
        against = "raw" if self.variant == "raw" else "same work"
        other = f" ({self.peer_job})" if self.peer_job else ""
        measured = results.ratio(self.job, self.peer, self.variant, peer_job=self.peer_job)
        return Verdict(f"{self.job} / {self.peer} {against}{other}", "x", "more", self.floor, self.goal, measured)


RATIOS: Final = (
    Ratio("put_many 100 B", "rocksdict", "raw", 0.75, 1.0, peer_job="put 100 B"),
    Ratio("put_many 100 B", "rocksdict", "work", 1.0, 1.0, peer_job="put 100 B"),
    Ratio("put_many 4 KiB", "rocksdict", "work", 1.0, 1.5),
    Ratio("put_many 4 KiB", "lmdb", "work", 1.0, 1.5),
    Ratio("put_many 4 KiB", "sqlite", "work", 3.0, 3.0),
    Ratio("get 100 B", "rocksdict", "work", 0.9, 1.2),
    Ratio("get 100 B", "lmdb", "work", 0.45, 0.45),
    Ratio("get_many 100 B", "rocksdict", "work", 1.0, 1.2),
    Ratio("get_many 100 B", "lmdb", "work", 1.0, 1.0),
    Ratio("get 4 KiB", "rocksdict", "work", 1.0, 1.5),
    Ratio("get 4 KiB", "lmdb", "work", 0.8, 0.8),
    Ratio("durable commit, 1 thread", "sqlite", "raw", 1.2, 1.4),
    Ratio("names: scan", "plyvel", "raw", 0.7, 1.0),
)


def judge(results: Results) -> list[Verdict]:
    """All budgets that concern the engine on a local disk."""
    verdicts = [ratio.judge(results) for ratio in RATIOS]
    for sample in results.memory:
        if sample.engine == SUBJECT:
            verdicts.extend(_judge_memory(sample))
    verdicts.append(_judge_open(results.memory_of(SUBJECT, OPEN_GRAINS)))
    return verdicts


def _judge_memory(sample: MemorySample) -> list[Verdict]:
    """160 MiB and 1.2 bytes a grain; aimed for are 100 MiB and 1 byte. Peaks, of reader and writer."""
    floor = 160 + 1.2 * sample.grains / MIB
    goal = 100 + 1.0 * sample.grains / MIB
    peaks = {"reading": sample.resident_peak, "writing": sample.fill_resident_peak}
    return [
        Verdict(f"resident memory {role}, {sample.grains:,} grains", "MiB", "less", floor, goal, peak / MIB)
        for role, peak in peaks.items()
    ]


def _judge_open(sample: MemorySample | None) -> Verdict:
    """Counted until the first value is read, so that an open which only postpones its work gains nothing."""
    measured = sample.first_read_s if sample else None
    text = f"open until the first read, {OPEN_GRAINS:,} grains"
    return Verdict(text, "s", "less", OPEN_MAX_S, OPEN_MAX_S, measured)
