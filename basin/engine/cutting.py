"""Where a large content is cut into parts: at fixed sizes, or by what it says, so that versions of it share parts.

Invariants:

- Where a part ends depends on the content alone, from the part's first byte on, and on the basin's seed: not on how
  the source delivered it, nor on what is a hole in a file and what are zeros that were written.
- `size_max` zeros from a part's first byte on are one part, so that runs of zeros are stored once.

Only this module knows pyfastcdc. Nothing stored depends on it: a clast lists its parts, wherever they were cut.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, Protocol

from blake3 import blake3

from basin.engine.keyring import Keyring
from basin.errors import InvalidArgument, UnsupportedVersion
from basin.format.layout import MIB

FIXED: Final = "fixed"
FASTCDC: Final = "fastcdc"
CHUNKERS: Final = (FASTCDC, FIXED)

_AVERAGE_NUMERATOR: Final = 13
_AVERAGE_DENOMINATOR: Final = 16
"""With these, and parts normalised at level 2, 1 GiB of random bytes made parts of 0.99 MiB where 1 MiB was asked for,
with a standard deviation of 0.3 MiB, and none of them reached 4 MiB. Level 1 spreads twice as much."""
_NORMALISATION: Final = 2
_PART_SIZE_MIN: Final = 320
_PART_SIZE_MAX: Final = 4 * MIB
_LARGEST_MIN: Final = 1024
"""What pyfastcdc takes: a smallest part of 64 bytes to 1 MiB, an average from 256 bytes, a largest part from 1 KiB."""
_SEED_CONTEXT: Final = "basin 1 seed of the cutting of large contents"
_SEEDS: Final = struct.Struct("<64Q")


class Cutter(Protocol):
    """Cuts streams of bytes, of which it sees a window at a time. Safe for threads: it remembers nothing of them."""

    @property
    def size_max(self) -> int:
        """Bytes of the largest part; so many must be in the window for its next part to be certain."""
        ...

    def cut(self, window: memoryview, *, is_last: bool) -> Iterator[int]:
        """Lengths of the parts that are certain, from the window's first byte on; all of it if nothing follows it."""
        ...


class FixedCutter:
    """Parts of one size; the last may be smaller."""

    def __init__(self, size: int) -> None:
        self.size_max = size

    def cut(self, window: memoryview, *, is_last: bool) -> Iterator[int]:
        rest = len(window)
        while rest >= self.size_max:
            yield self.size_max
            rest -= self.size_max
        if is_last and rest:
            yield rest


class ContentCutter:
    """Parts as FastCDC (2020) cuts them: `size` bytes in the mean, a quarter of that at least."""

    def __init__(self, size: int, size_max: int, seeds: Iterator[int]) -> None:
        """`seeds` are tried until one does not cut zeros before `size_max`; one in 250,000 does."""
        from pyfastcdc import FastCDC

        self.size_max = min(4 * size, size_max)
        zeros = memoryview(bytes(self.size_max))
        for seed in seeds:
            self._engine = FastCDC(
                size * _AVERAGE_NUMERATOR // _AVERAGE_DENOMINATOR,
                min_size=size // 4,
                max_size=self.size_max,
                normalized_chunking=_NORMALISATION,
                seed=seed,
            )
            if next(self._engine.cut_buf(zeros)).length == self.size_max:
                return
        raise InvalidArgument("no seed cuts zeros at the largest part")

    def cut(self, window: memoryview, *, is_last: bool) -> Iterator[int]:
        rest = len(window)
        if not rest:
            return
        parts = self._engine.cut_buf(window)
        while rest >= self.size_max or (is_last and rest):
            length = next(parts).length
            yield length
            rest -= length


def cuts_by_content(part_size: int, part_max: int) -> bool:
    """Whether parts of these sizes can be cut by content. With less room above the mean, most would end there."""
    return _PART_SIZE_MIN <= part_size <= _PART_SIZE_MAX and part_max >= max(2 * part_size, _LARGEST_MIN)


def make_cutter(chunker: str, part_size: int, part_max: int, keyring: Keyring) -> Cutter:
    """The cutter of a basin. Costs a millisecond. Raises `UnsupportedVersion` for a chunker that is not known."""
    if chunker == FIXED:
        return FixedCutter(part_size)
    if chunker == FASTCDC:
        return ContentCutter(part_size, part_max, seeds_of(keyring))
    raise UnsupportedVersion(f"contents are cut by {chunker!r}, which needs a newer Basin", version=chunker)


def seeds_of(keyring: Keyring) -> Iterator[int]:
    """Seeds of 63 bits that only holders of the basin's keys know, so that lengths of parts tell nobody else a content.

    They come from the image of a hash under the id key, which no rotation changes. The hash is of another BLAKE3 mode
    than content keys, so that image is no grain key. In an open basin they come from its id. pyfastcdc adds a seed to a
    table by exclusive or: who sees many lengths of known contents may find it.
    """
    label = blake3(b"", derive_key_context=_SEED_CONTEXT).digest()
    image = keyring.grain_keys.grain_key(label)
    words = blake3(image + keyring.basin_id, derive_key_context=_SEED_CONTEXT).digest(_SEEDS.size)
    return (word >> 1 or 1 for word in _SEEDS.unpack(words))
