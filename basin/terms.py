"""The vocabulary as types: what Basin's modules pass to each other.

Values only: no I/O, no clock, no randomness. Anybody may import this module. `docs/glossary.md` has the words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

from basin.errors import InvalidArgument

Position: TypeAlias = int
"""Number of a record in the log; position 0 is the empty basin before its first record."""

CONTENT_KEY_SIZE: Final = 32
STRATUM_ID_SIZE: Final = 16

_PART_ADDRESS: Final = re.compile(r"([0-9a-f]{64})-(0|[1-9][0-9]{0,9})")


class ContentKey:
    """The BLAKE3 hash (32 bytes) of a content's plaintext. Hashable, ordered; `str()` is 64 hex digits.

    Deliberately no subclass of `bytes`, so that a content key is never stored as a value by mistake.
    """

    __slots__ = ("digest",)

    digest: bytes

    def __init__(self, digest: bytes) -> None:
        """Raise `InvalidArgument` unless `digest` is `bytes` of length 32."""
        if type(digest) is not bytes or len(digest) != CONTENT_KEY_SIZE:
            raise InvalidArgument("a content key is made of 32 bytes")
        object.__setattr__(self, "digest", digest)

    @classmethod
    def of_many(cls, digests: Sequence[bytes]) -> list[ContentKey]:
        """Content keys of digests that are known to be 32 bytes each, at half the cost."""
        new, assign = object.__new__, cls.__dict__["digest"].__set__
        keys = [new(cls) for _ in digests]
        for key, digest in zip(keys, digests, strict=True):
            assign(key, digest)
        return keys

    @classmethod
    def parse(cls, text: str) -> ContentKey:
        """Read 64 hex digits (lower or upper case)."""
        try:
            return cls(bytes.fromhex(text) if len(text) == 2 * CONTENT_KEY_SIZE else b"")
        except ValueError:
            raise InvalidArgument(f"not a content key: {text[:80]!r}", text=text) from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a content key does not change")

    def __bytes__(self) -> bytes:
        return self.digest

    def __str__(self) -> str:
        return self.digest.hex()

    def __repr__(self) -> str:
        return f"ContentKey({self.digest.hex()})"

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContentKey) and self.digest == other.digest

    def __lt__(self, other: ContentKey) -> bool:
        return self.digest < other.digest

    def __reduce__(self) -> tuple[type[ContentKey], tuple[bytes]]:
        return (ContentKey, (self.digest,))


class PartAddress(NamedTuple):
    """Part `number` (from 0) of the content `whole`; written `"<hex>-<n>"`."""

    whole: ContentKey
    number: int

    def __str__(self) -> str:
        return f"{self.whole}-{self.number}"


def parse_address(text: str) -> ContentKey | PartAddress:
    """Read `"<hex>"` or `"<hex>-<n>"`; raise `InvalidArgument` on anything else."""
    matched = _PART_ADDRESS.fullmatch(text)
    if matched:
        return PartAddress(ContentKey.parse(matched[1]), int(matched[2]))
    return ContentKey.parse(text)


class StratumId(bytes):
    """16 bytes that name a stratum for ever: 6 of time (milliseconds, big-endian, so names sort), 10 random."""

    __slots__ = ()

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"StratumId({self.hex()})"

    @property
    def time_ms(self) -> int:
        """When the stratum was begun, by its writer's clock."""
        return int.from_bytes(self[:6], "big")


class Location(NamedTuple):
    """Where one grain lies: `length` is its whole stored size in bytes, checksum field included."""

    stratum: StratumId
    offset: int
    length: int


class Head(NamedTuple):
    """The newest log position a client knows, and the BLAKE3 hash of its record: remember it to detect rollback."""

    position: Position
    hash: bytes


class Ref(NamedTuple):
    """A value that is a reference to stored content, in place of the bytes themselves."""

    content_key: ContentKey
