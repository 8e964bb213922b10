"""`basin.json`: what decodes has exactly one spelling."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.slots import Descriptor, decode_descriptor, encode_descriptor
from fuzz.material import BASIN_ID


def one_input(data: bytes) -> None:
    if encode_descriptor(decode_descriptor(data)) != data:
        raise AssertionError("a descriptor has two spellings")


def seeds() -> Iterator[bytes]:
    for profile in ("open", "encrypted"):
        yield encode_descriptor(
            Descriptor(
                format=1,
                basin_id=BASIN_ID,
                profile=profile,
                chunker="fixed",
                created_ms=1_700_000_000_000,
                options={"inline_max": 512},
            )
        )
