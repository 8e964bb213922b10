"""The hex examples of docs/format.md are what the code writes, and decode to what the text says."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from blake3 import blake3

from basin.format import grain, names, record, segment, stratum
from basin.format.layout import ENTRY_INLINE, RECORD_MAGIC, Kind, StratumKind
from basin.terms import StratumId
from tests.source_tree import ROOT

BASIN_ID = bytes(range(16))
STRATUM_ID = StratumId(bytes(range(16, 32)))
HASH = blake3(b"hello").digest()


class Example(NamedTuple):
    """Bytes that the code writes now, how they are read, and what reading them must give."""

    encoded: bytes
    decode: Callable[[bytes], Any]
    value: Any


def _grain() -> Example:
    body = grain.encode_body(Kind.BLOB, 0, 0, HASH, 5)
    header = grain.GrainHeader(length=45, kind=Kind.BLOB, codec=0, flags=0, key=HASH)
    return Example(
        grain.encode_grain(body, b"hello"), lambda data: (grain.verify_grain(data), data[44:]), (header, b"hello")
    )


def _stratum_header() -> Example:
    header = stratum.StratumHeader(StratumKind.DATA, 0, 0, BASIN_ID, STRATUM_ID, 1, bytes(32), bytes(32))
    return Example(stratum.encode_header(header), stratum.decode_header, header)


def _stratum_footer() -> Example:
    footer = stratum.StratumFooter(300, 200, 2, 500, HASH)
    return Example(stratum.encode_footer(footer), lambda data: stratum.decode_footer(data, 580), footer)


def _names_block() -> Example:
    entries = [
        names.NameEntry(b"\0\0\0\0greeting", 5 << 16, ENTRY_INLINE, b"hello", 0),
        names.NameEntry(b"\0\0\0\0name", 5 << 16, ENTRY_INLINE, b"Ada", 0),
    ]
    return Example(
        names.encode_block(entries), lambda data: [names.decode_block(data).entry(index) for index in (0, 1)], entries
    )


def _segment_header() -> Example:
    header = segment.SegmentHeader(BASIN_ID, 2, 8, HASH, 4096)
    return Example(segment.encode_segment_header(header), segment.decode_segment_header, header)


def _watermark() -> Example:
    mark = segment.Watermark(bytes(range(32, 48)), 2, 4096, 7)
    return Example(segment.encode_watermark(mark), segment.decode_watermark, mark)


def _record_frame() -> Example:
    batch = record.Batch(names=[b"\0\0\0\0greeting"], values=[b"hello"])
    written = record.Record(session=1, sequence=2, previous=HASH, time_ms=1_700_000_000_000, batches=[batch])
    cipher = record.FrameCipher(BASIN_ID, None)
    payload = record.encode_record(written)
    frame = cipher.seal(RECORD_MAGIC, 2, payload, generation=0, randomness=bytes(32))
    return Example(frame, lambda data: record.decode_record(cipher.open(data)[1]), written)


EXAMPLES = {
    "grain": _grain,
    "stratum header": _stratum_header,
    "stratum footer": _stratum_footer,
    "names block": _names_block,
    "segment header": _segment_header,
    "watermark": _watermark,
    "record frame": _record_frame,
}


def documented() -> dict[str, bytes]:
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- example: ([\w ]+) -->\n```hex\n(.*?)```", text, re.DOTALL)
    return {name: bytes.fromhex(hex_digits) for name, hex_digits in found}


def test_every_documented_example_is_checked() -> None:
    assert set(documented()) == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_decodes_to_what_was_encoded(name: str) -> None:
    example = EXAMPLES[name]()
    shown = documented()[name]
    assert shown == example.encoded, "docs/format.md should show:\n" + "\n".join(
        textwrap.wrap(example.encoded.hex(" "), 95)
    )
    assert example.decode(shown) == example.value
