"""Storage classes for the grains of contents: which must be restored, how long they are paid for, what they cost.

Invariants:

- A class that is not in the table is refused when a basin is created: nothing is guessed about it.
- Prices only rank what a compaction may do; no correctness hangs on one.

Pure. Imported by `options`, so that it knows them by their two fields alone.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from basin.storage.archive import ARCHIVE_CLASSES

_DAY_S: Final = 86_400
_GIB: Final = 1 << 30


class Tier(NamedTuple):
    """What one class means to its user. Prices are in US dollars."""

    minimum_days: int = 0
    """An object that is deleted earlier is paid for as if it were not."""
    put_price: float = 0.0
    """Of one request that stores an object."""
    read_price: float = 0.0
    """Of one request that reads an object, with what restoring it costs a request."""
    retrieval_price: float = 0.0
    """Of a GiB that is read, or restored with the tier "Standard"."""


# Amazon's list prices for us-east-1 (aws.amazon.com/s3/pricing), as of 2025, for a thousand requests and a GB:
# which is 2^30 bytes on Amazon's bill. Of the archive classes, Bulk is cheaper than what stands here: nothing for
# GLACIER but the requests, $0.0025 a GB for DEEP_ARCHIVE.
TIERS: Final[dict[str, Tier]] = {
    "STANDARD": Tier(0, 0.005 / 1000, 0.0004 / 1000, 0.0),
    "REDUCED_REDUNDANCY": Tier(0, 0.005 / 1000, 0.0004 / 1000, 0.0),
    "INTELLIGENT_TIERING": Tier(0, 0.005 / 1000, 0.0004 / 1000, 0.0),
    "STANDARD_IA": Tier(30, 0.01 / 1000, 0.001 / 1000, 0.01),
    "ONEZONE_IA": Tier(30, 0.01 / 1000, 0.001 / 1000, 0.01),
    "GLACIER_IR": Tier(90, 0.02 / 1000, 0.01 / 1000, 0.03),
    "GLACIER": Tier(90, 0.03 / 1000, (0.05 + 0.0004) / 1000, 0.01),
    "DEEP_ARCHIVE": Tier(180, 0.05 / 1000, (0.10 + 0.0004) / 1000, 0.02),
}
"""By the names that S3 gives them."""
_HOT: Final = frozenset({"", "STANDARD", "REDUCED_REDUNDANCY"})


class Placed(Protocol):
    """Of the options of a basin, those that say where its contents lie."""

    @property
    def data_url(self) -> str: ...  # the option
    @property
    def data_storage_class(self) -> str: ...  # the option


def is_archived(options: Placed) -> bool:
    """Whether contents cannot be read any more from the moment on when they are stored."""
    return options.data_storage_class in ARCHIVE_CLASSES


def is_cold(options: Placed) -> bool:
    """Whether nothing but reading a content may touch `data/`: it has a root or a class of its own."""
    return bool(options.data_url) or options.data_storage_class not in _HOT


def minimum_storage_s(options: Placed) -> int:
    """Seconds that an object of `data/` is paid for, however early it is deleted."""
    return _tier(options).minimum_days * _DAY_S


def rewrite_price(size: int, requests: int, options: Placed) -> float:
    """US dollars for reading `size` bytes of `data/` in `requests` objects, and storing as many objects anew.

    With the restoration, where one is needed; without what is still to be paid for objects that are deleted before
    their time, and without traffic that leaves the region.
    """
    tier = _tier(options)
    return size / _GIB * tier.retrieval_price + requests * (tier.read_price + tier.put_price)


def _tier(options: Placed) -> Tier:
    return TIERS[options.data_storage_class or "STANDARD"]
