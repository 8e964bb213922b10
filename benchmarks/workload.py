"""The data that every engine stores, and how much of it: seeded, unique, made before any clock starts.

A value is half incompressible (BLAKE3's output) and half text over a vocabulary of 32 words, as in logs: zstd at
level 1 saves a fifth of 1 KiB and two fifths of 1 MiB. No two values are equal, so no engine gains by deduplication.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from blake3 import blake3

Pair: TypeAlias = tuple[bytes, bytes]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
VALUE_SIZES: Final = (100, KIB, 4 * KIB, 64 * KIB, MIB)
NAMED_VALUE_SIZE: Final = 100  # what a name maps to in the jobs on names
THREAD_COUNTS: Final = (1, 4, 16)

_CORPUS_SIZE_MIN: Final = 64 * KIB  # small, because the processes whose memory is measured hold it too
_VOCABULARY_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything one run does."""

    label: str
    value_counts: dict[int, int]
    """Values stored, by value size in bytes."""
    reads_max: int
    """Random reads in a timed run, at most; never more than there are values."""
    names: int
    """Names stored for the jobs on names."""
    commits: int
    """Durable commits in a timed run, over all threads."""
    grain_counts: tuple[int, ...]
    """Sizes, in grains, of the stores that are reopened."""
    rounds: int


FULL: Final = Scale(
    label="full",
    value_counts={100: 50_000, KIB: 20_000, 4 * KIB: 10_000, 64 * KIB: 1_000, MIB: 64},
    reads_max=20_000,
    names=200_000,
    commits=800,
    grain_counts=(1_000_000, 10_000_000),
    rounds=5,
)
QUICK: Final = Scale(
    label="quick",
    value_counts={100: 4_000, KIB: 2_000, 4 * KIB: 2_000, 64 * KIB: 100, MIB: 8},
    reads_max=2_000,
    names=10_000,
    commits=96,
    grain_counts=(20_000,),
    rounds=1,
)


def batch_size(value_size: int) -> int:
    """Values in one commit: 1,000, and fewer where that would exceed 8 MiB."""
    return max(1, min(1_000, 8 * MIB // value_size))


@dataclass(frozen=True, slots=True)
class Contents:
    """Values and the BLAKE3 digest of each, in one order."""

    digests: Sequence[bytes]
    values: Sequence[bytes]

    def batches(self, count: int) -> Iterator[Contents]:
        """The same in pieces of `count` values; the last may be shorter."""
        for start in range(0, len(self.values), count):
            stop = start + count
            yield Contents(self.digests[start:stop], self.values[start:stop])


def make_contents(value_size: int, count: int, *, seed: int, start: int = 0) -> Contents:
    """`count` unique values of `value_size` bytes, and their digests. Equal arguments give equal values."""
    values = [make_value(value_size, number, seed=seed) for number in range(start, start + count)]
    return Contents([blake3(value).digest() for value in values], values)


def make_value(value_size: int, number: int, *, seed: int) -> bytes:
    """Value `number` of a workload: unique for `value_size` of 16 and more."""
    random_size = value_size // 2
    text_size = value_size - random_size
    corpus = _corpus(seed, max(_CORPUS_SIZE_MIN, 4 * value_size))
    offset = number * 7_919 % (len(corpus) - text_size)
    random_half = blake3(b"%d %d %d" % (seed, value_size, number)).digest(length=random_size)
    return random_half + corpus[offset : offset + text_size]


def make_named_values(count: int, *, seed: int) -> list[Pair]:
    """`count` pairs of a name (25 bytes, like a path) and a value, in random order of the names."""
    pairs = [
        (b"folder-%04d/item-%08d" % (number // 256, number), make_value(NAMED_VALUE_SIZE, number, seed=seed))
        for number in range(count)
    ]
    random.Random(seed).shuffle(pairs)
    return pairs


def choose(count: int, population: int, *, seed: int) -> list[int]:
    """`count` different indexes below `population` in random order; all of them if there are fewer."""
    return random.Random(seed).sample(range(population), min(count, population))


@functools.cache
def _corpus(seed: int, size: int) -> bytes:
    """Text without meaning, about as compressible as logs."""
    source = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    vocabulary = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(_VOCABULARY_SIZE)]
    text = " ".join(source.choices(vocabulary, k=size // 3))
    return text.encode()[:size]
