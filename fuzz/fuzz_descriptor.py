"""`basin.json`: what decodes has exactly one spelling. After a `j` come fields alone, which get the right spelling."""

from __future__ import annotations

import json
from collections.abc import Iterator

from basin.format.document import encode_document
from basin.format.slots import Descriptor, decode_descriptor, encode_descriptor
from fuzz.material import BASIN_ID


def one_input(data: bytes) -> None:
    if data[:1] == b"j":
        try:
            fields = json.loads(data[1:])
        except (ValueError, RecursionError):
            return
        if not isinstance(fields, dict):
            return
        data = encode_document("basin", fields)
    if encode_descriptor(decode_descriptor(data)) != data:
        raise AssertionError("a descriptor has two spellings")


def seeds() -> Iterator[bytes]:
    for profile in ("open", "encrypted"):
        encoded = encode_descriptor(
            Descriptor(
                format=1,
                basin_id=BASIN_ID,
                profile=profile,
                chunker="fixed",
                created_ms=1_700_000_000_000,
                options={"inline_max": 512},
            )
        )
        yield encoded
        fields = json.loads(encoded)
        yield b"j" + json.dumps({name: fields[name] for name in fields if name != "checksum"}).encode("ascii")
