"""Headers and footers of strata: what decodes encodes to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.layout import FOOTER_MAGIC, STRATUM_FOOTER_SIZE, StratumKind
from basin.format.stratum import (
    StratumFooter,
    StratumHeader,
    decode_footer,
    decode_header,
    encode_footer,
    encode_header,
)
from fuzz.material import BASIN_ID, KEY, OTHER_KEY, STRATUM_ID, with_checksum_behind


def one_input(data: bytes) -> None:
    if data[:1] == b"h":
        header = with_checksum_behind(data[1:])
        if encode_header(decode_header(header)) != header:
            raise AssertionError("a header encodes differently")
    else:
        footer = with_checksum_behind(data[9:]) + FOOTER_MAGIC
        file_size = int.from_bytes(data[1:9], "little")
        if encode_footer(decode_footer(footer, file_size)) != footer:
            raise AssertionError("a footer encodes differently")


def seeds() -> Iterator[bytes]:
    for kind in StratumKind:
        yield b"h" + encode_header(StratumHeader(kind, 1, 3, BASIN_ID, STRATUM_ID, 7, KEY, OTHER_KEY))[:-4]
    footer = encode_footer(StratumFooter(128, 200, 3, 328, KEY))
    yield b"f" + (328 + STRATUM_FOOTER_SIZE).to_bytes(8, "little") + footer[: -4 - len(FOOTER_MAGIC)]
