"""The hex examples of docs/format.md are what the code writes, and decode to what the text says."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from blake3 import blake3

from basin.engine.state import State, state_from_map, state_to_map
from basin.format import (
    checkpoint,
    clast,
    flat,
    grain,
    hint,
    index,
    names,
    ordered,
    payload,
    record,
    segment,
    slots,
    stratum,
    tree,
)
from basin.format.layout import ENTRY_INLINE, RECORD_MAGIC, Kind, StratumKind
from basin.terms import StratumId
from tests.source_tree import ROOT

BASIN_ID = bytes(range(16))
STRATUM_ID = StratumId(bytes(range(16, 32)))
MASTER = bytes(range(64, 96))
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


def _payload() -> Example:
    linked = payload.join_links([HASH], b"hello")
    return Example(linked, payload.split_links, payload.Payload([HASH], b"hello"))


def _clast() -> Example:
    lengths = [1 << 20, 17]
    value = clast.Clast((1 << 20) + 17, [], [HASH, MASTER], [0, 1 << 20, (1 << 20) + 17])
    encoded = clast.encode_clast(lengths, 0)
    return Example(encoded, lambda data: clast.decode_clast(payload.Payload([HASH, MASTER], data)), value)


def _clast_of_lists() -> Example:
    value = clast.Clast((1 << 34) + 5, [], [HASH, MASTER], [0, 1 << 34, (1 << 34) + 5], (1 << 14, 1))
    encoded = clast.encode_clast_of_lists([1 << 34, 5], [1 << 14, 1], 0)
    return Example(encoded, lambda data: clast.decode_clast(payload.Payload([HASH, MASTER], data)), value)


def _part_list() -> Example:
    value = clast.Clast((1 << 20) + 17, [], [HASH, MASTER], [0, 1 << 20, (1 << 20) + 17])
    encoded = clast.encode_part_list([HASH, MASTER], [1 << 20, 17])
    return Example(encoded, lambda data: clast.decode_part_list(payload.Payload([HASH, MASTER], data)), value)


def _index() -> tuple[bytes, bytes, index.IndexEntry]:
    """A page, the directory that leads to it, and the only entry."""
    entry = index.IndexEntry(bytes(range(96, 128)), 128, 49, 0, Kind.BLOB, 0)
    builder = index.IndexBuilder([STRATUM_ID], 1, MASTER, STRATUM_ID)
    pieces = [*builder.feed(index.entries_of([entry])), *builder.finish(177)]
    return b"".join(pieces), builder.directory(), entry


def _index_page() -> Example:
    page, _, entry = _index()
    return Example(page, lambda data: list(index.decode_page(data)), [entry])


def _index_directory() -> Example:
    page, encoded, entry = _index()

    def decode(data: bytes) -> Any:
        directory = index.IndexDirectory(data, MASTER, STRATUM_ID)
        directory.verify_page(0, page)
        return directory.strata, directory.count, directory.page_extent(0), directory.may_contain(entry.key)

    return Example(encoded, decode, ([STRATUM_ID], 1, (177 + 44, 44), True))


def _names_directory() -> Example:
    found = [b"\0\0\0\0greeting", b"\0\0\0\0name"]
    encoded = names.encode_directory(
        entries=2,
        firsts=found[:1],
        last=found[1],
        offsets=[128],
        lengths=[112],
        ranges=[(b"\0\0\0\0a", b"\0\0\0\0b", 4 << 16)],
        filter_bytes=names.build_filter(found),
    )

    def decode(data: bytes) -> Any:
        directory = names.decode_directory(data)
        places = directory.entries, directory.firsts, directory.last, [*directory.offsets], [*directory.lengths]
        return places, directory.ranges, [directory.may_contain(name) for name in found]

    ranges = [(b"\0\0\0\0a", b"\0\0\0\0b", 4 << 16)]
    return Example(encoded, decode, ((2, found[:1], found[1], [128], [112]), ranges, [True, True]))


def _tuple() -> Example:
    elements = (None, True, -2, 258, 1.5, b"a\0b", "text", (7,))
    return Example(ordered.encode_tuple(elements), ordered.decode_tuple, elements)


def _checkpoint() -> Example:
    cipher = record.FrameCipher(BASIN_ID, None)
    state = State(position=7, hash=HASH, time_ms=1_700_000_000_000, sessions={1: 6}, flushed=5)
    encoded = checkpoint.encode_checkpoint(cipher, 7, state_to_map(state), generation=0, randomness=bytes(32))
    return Example(encoded, lambda data: state_from_map(checkpoint.decode_checkpoint(cipher, data, 7)), state)


def _generation() -> Example:
    keys = slots.SlotKeys(private_key=bytes(range(96, 128)), id_key=bytes(range(128, 160)))
    slot = slots.create_slot(
        bytes(32),
        kind=slots.KIND_KEY_FILE,
        basin_id=BASIN_ID,
        slot_id="0123456789abcdef",
        keys=keys,
        salt=bytes(16),
        created_ms=0,
    )[1]
    sealed = slots.seal_generation(
        MASTER,
        generation=3,
        basin_id=BASIN_ID,
        slot_id=slot.slot_id,
        public_key=slot.public_key,
        id_key=keys.id_key,
        ephemeral_private_key=bytes(range(176, 208)),
    )
    return Example(sealed, lambda data: slots.open_generation(data, generation=3, slot=slot, keys=keys), MASTER)


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
    encoded = record.encode_record(written)
    frame = cipher.seal(RECORD_MAGIC, 2, encoded, generation=0, randomness=bytes(32))
    return Example(frame, lambda data: record.decode_record(cipher.open(data)[1]), written)


def _hint() -> Example:
    known = hint.Hint(7, 3, {"keys/0123456789abcdef/0000000000": b"sealed"})
    return Example(hint.encode_hint(known), hint.decode_hint, known)


def _stub() -> Example:
    cipher, folded = record.FrameCipher(BASIN_ID, None), hint.Stub(9, HASH)
    frame = hint.encode_stub(cipher, 7, folded, generation=0, randomness=bytes(range(32)))
    return Example(frame, lambda data: hint.decode_stub(cipher, data, 7), folded)


def _flat_file() -> Example:
    table = flat.encode_flat_table([("basin.json", 5, HASH)])
    end = flat.FlatEnd(21, len(table), blake3(table).digest())
    encoded = flat.encode_flat_header() + b"hello" + table + flat.encode_flat_end(end)

    def decode(data: bytes) -> Any:
        flat.decode_flat_header(data[:16])
        found = flat.decode_flat_end(data[-64:], len(data))
        return flat.decode_flat_table(data[found.table_offset : -64], found), data[16:21]

    return Example(encoded, decode, ([flat.FlatFile("basin.json", 16, 5, HASH)], b"hello"))


def _page() -> tuple[tree.Page, list[tree.Entry]]:
    page = tree.Page([b"", b"a"], [0, 1, 2], [b"a", b"x"], bytes([1, 0]), [5, 5], [1, 0], [None, HASH])
    rows = [tree.Entry(b"", b"a", tree.RowKind.DIRECTORY, 5, 1), tree.Entry(b"a", b"x", tree.RowKind.FILE, 5, 0, HASH)]
    return page, rows


def _tree_page() -> Example:
    page, rows = _page()
    content, links = tree.encode_page(page)
    return Example(content, lambda data: list(tree.decode_page(data, links).entries()), rows)


def _tree_node() -> Example:
    key = blake3(tree.encode_page(_page()[0])[0]).digest()
    node = tree.Node(0, 1, 5, b"", [tree.NodeEntry(b"", b"a", 2, key, None)])
    content, links = tree.encode_node(node)
    return Example(content, lambda data: tree.decode_node(data, links), node)


def _metadata_list() -> Example:
    content, links = tree.encode_metadata_list(300, [HASH, None])
    return Example(content, lambda data: tree.decode_metadata_list(data, links), (300, [HASH, None]))


EXAMPLES = {
    "grain": _grain,
    "stratum header": _stratum_header,
    "stratum footer": _stratum_footer,
    "payload": _payload,
    "clast": _clast,
    "clast of lists": _clast_of_lists,
    "part list": _part_list,
    "index page": _index_page,
    "index directory": _index_directory,
    "names block": _names_block,
    "names directory": _names_directory,
    "tuple": _tuple,
    "segment header": _segment_header,
    "watermark": _watermark,
    "record frame": _record_frame,
    "checkpoint": _checkpoint,
    "hint": _hint,
    "stub": _stub,
    "generation": _generation,
    "flat file": _flat_file,
    "tree page": _tree_page,
    "tree node": _tree_node,
    "metadata list": _metadata_list,
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
