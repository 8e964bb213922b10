"""What every side stores, and how much of it: random bytes, seeded, unique, made before any clock starts.

Random, because the server compresses what it can, and a peer that does not compress must not pay for that.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from benchmarks.workload import MIB, Pair

Pairs: TypeAlias = Sequence[Pair]

NAMED_VALUE_SIZE: Final = 100
BLOB_SIZE: Final = 512
NAMES_IN_A_COMMIT: Final = 1_000


@dataclass(frozen=True, slots=True)
class BucketScale:
    """How much of everything one run does."""

    label: str
    names: int
    """Names in the jobs that load a store."""
    stored_names: int
    """Names in the store that is read: when full, more than Basin fetches whole with the first read."""
    commits: dict[int, int]
    """Durable commits in all, by the number of writers of one handle that share them."""
    races: dict[int, int]
    """The same, by the number of handles that race."""
    cold_reads: int
    warm_reads: int
    blobs: int
    stream_size: int
    rounds: int


FULL: Final = BucketScale(
    label="full",
    names=50_000,
    stored_names=200_000,
    commits={1: 200, 8: 400, 64: 640},
    races={8: 160, 64: 128},
    cold_reads=200,
    warm_reads=2_000,
    blobs=10_000,
    stream_size=64 * MIB,
    rounds=5,
)
QUICK: Final = BucketScale(
    label="quick",
    names=10_000,
    stored_names=20_000,
    commits={1: 40, 8: 80},
    races={8: 80},
    cold_reads=50,
    warm_reads=500,
    blobs=2_000,
    stream_size=16 * MIB,
    rounds=1,
)


def make_pairs(count: int, *, seed: int) -> list[Pair]:
    """`count` names (25 bytes, like a path) with values of 100 random bytes, in random order of the names."""
    source = random.Random(seed)
    numbers = source.sample(range(count), count)
    return [(b"folder-%04d/item-%08d" % (n // 256, n), source.randbytes(NAMED_VALUE_SIZE)) for n in numbers]


def batches_of(pairs: Pairs) -> Iterator[Pairs]:
    """The pairs of one commit after the other."""
    for start in range(0, len(pairs), NAMES_IN_A_COMMIT):
        yield pairs[start : start + NAMES_IN_A_COMMIT]


def make_values(count: int, size: int, *, seed: int) -> list[bytes]:
    """`count` values of random bytes."""
    source = random.Random(seed)
    return [source.randbytes(size) for _ in range(count)]
