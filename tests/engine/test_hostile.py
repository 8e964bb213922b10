"""Files that somebody made on purpose, with every checksum right: no crash, no hang, no memory without bound.

In an open basin nothing but content keys proves anything, so wrong names are no defect here; any exception that is not
one of ours is. Contents are still never wrong: their key is their hash.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgpack
import pytest
import xxhash
from blake3 import blake3

from basin.api import Database
from basin.errors import BasinError
from basin.format.crypto import open_stratum_keys, page_tag
from basin.format.grain import encode_body, encode_grain
from basin.format.layout import (
    FOOTER_MAGIC,
    FRAME_HEADER_SIZE,
    GRAIN_HEADER_SIZE,
    INDEX_DIRECTORY_SIZE,
    PAGE_SIZE,
    SEGMENT_HEADER_SIZE,
    STRATUM_FOOTER_SIZE,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.record import FrameCipher, decode_frame_header
from basin.format.scan import GrainFound, scan_grains
from basin.format.stratum import decode_footer, decode_header, encode_footer
from basin.testing.disk import SimulatedDisk
from tests.engine.small_basin import FLUSH, OPTIONS, SAME_BOOT, SmallBasin, open_disk, rich

CASES = 600
OPTIONS_OF = {"r": OPTIONS, "w": FLUSH}
SECONDS_MAX = 10.0
MEMORY_GROWTH_MAX = 512 << 20


def with_checksum(data: bytes) -> bytes:
    return xxhash.xxh32_intdigest(data[4:]).to_bytes(4, "little") + data[4:]


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Other bytes of the same length: a few set to telling values, or a stretch copied elsewhere."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5)) if changed else 0):
        at = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f"))[: len(changed) - at]
            case 2:
                changed[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f"))[: len(changed) - at]
            case _:
                source = rng.randrange(len(changed))
                stretch = changed[source : source + rng.randrange(1, 16)]
                changed[at : at + len(stretch)] = stretch[: len(changed) - at]
    return bytes(changed[: len(data)])


def forged_frames(rng: random.Random, content: bytes, start: int) -> bytes:
    """A segment or checkpoint with one frame changed, header or payload, and its checksum right."""
    places, at = [], start
    while at < len(content):
        size = decode_frame_header(content, at).size
        places.append((at, size))
        at += size
    at, size = rng.choice(places)
    frame = content[at : at + size]
    choice = rng.random()
    if choice < 0.6:
        frame = _with_payload(frame, msgpack.packb(replaced(rng, _payload_of(frame))))
    elif choice < 0.8:
        frame = frame[:8] + mutate(rng, frame[8:FRAME_HEADER_SIZE]) + frame[FRAME_HEADER_SIZE:]
    else:
        frame = frame[:FRAME_HEADER_SIZE] + mutate(rng, frame[FRAME_HEADER_SIZE:])
    return content[:at] + with_checksum(frame) + content[at + size :]


def _payload_of(frame: bytes) -> Any:
    return msgpack.unpackb(FrameCipher(bytes(16), None).open(frame)[1], strict_map_key=False)


def _with_payload(frame: bytes, payload: bytes) -> bytes:
    size = (FRAME_HEADER_SIZE + len(payload)).to_bytes(4, "little")
    return frame[:4] + size + frame[8:12] + bytes(4) + frame[16:FRAME_HEADER_SIZE] + payload


def replaced(rng: random.Random, value: Any) -> Any:
    """The value with one leaf replaced by another of its type, or by one of any type."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return {**value, key: replaced(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.95:
        at = rng.randrange(len(value))
        return [*value[:at], replaced(rng, value[at]), *value[at + 1 :]]
    alike: dict[type, list[Any]] = {
        int: [0, 1, 2, 3, 1 << 31, 1 << 32, (1 << 48) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1],
        bytes: [b"", bytes(16), bytes(32), b"\xff" * 32, b"n" * 70_000],
        list: [[], [[]], [0], [value, value]],
    }
    return rng.choice(alike.get(type(value), []) if rng.random() < 0.9 and type(value) in alike else [*LEAVES])


LEAVES: tuple[Any, ...] = (None, True, -1, 1.5, "text", b"bytes", [], {}, [[]], {"a": 1})


def forged_header(rng: random.Random, content: bytes, size: int) -> bytes:
    header = content[:12] + mutate(rng, content[12 : size - 4])
    return header + xxhash.xxh32_intdigest(header).to_bytes(4, "little") + content[size:]


def forged_stratum(rng: random.Random, content: bytes, descriptor_hash: bytes) -> bytes:
    """A stratum with header, footer, or one grain changed; tags, checksums and the hash of the whole are right."""
    choice = rng.random()
    if choice < 0.1:
        return forged_header(rng, content, STRATUM_HEADER_SIZE)
    footer = decode_footer(content[-STRATUM_FOOTER_SIZE:], len(content))
    body = content[:-STRATUM_FOOTER_SIZE]
    if choice < 0.2:
        packed = mutate(rng, content[-STRATUM_FOOTER_SIZE:][:32]) + content[-STRATUM_FOOTER_SIZE:][32:68]
        return body + packed + xxhash.xxh32_intdigest(packed).to_bytes(4, "little") + FOOTER_MAGIC
    grains = [
        one for one in scan_grains(memoryview(body), STRATUM_HEADER_SIZE, len(body)) if isinstance(one, GrainFound)
    ]
    body = forged_grain(rng, body, rng.choice(grains), grains, descriptor_hash)
    return body + encode_footer(footer._replace(hash=blake3(body).digest()))


def forged_grain(
    rng: random.Random, body: bytes, chosen: GrainFound, grains: list[GrainFound], descriptor_hash: bytes
) -> bytes:
    at, size = chosen.offset, chosen.header.stored_size
    data = mutate(rng, body[at + GRAIN_HEADER_SIZE : at + size])
    if rng.random() < 0.2:
        head = body[at : at + 8] + mutate(rng, body[at + 8 : at + 12]) + body[at + 12 : at + GRAIN_HEADER_SIZE]
        return body[:at] + with_checksum(head + data) + body[at + size :]
    header = chosen.header
    key = blake3(data).digest() if header.kind == Kind.INDEX_DIRECTORY else header.key
    grain = encode_grain(encode_body(header.kind, header.codec, header.flags, key, len(data)), data)
    body = body[:at] + grain + body[at + size :]
    if header.kind == Kind.INDEX_PAGES:
        body = _tagged_again(body, data, grains[-1], descriptor_hash)
    return body


def _tagged_again(body: bytes, pages: bytes, directory: GrainFound, descriptor_hash: bytes) -> bytes:
    """The directory with the right tags of changed pages (of one stratum, at most one page here)."""
    header = decode_header(body)
    keys = open_stratum_keys(descriptor_hash, header.stratum_id, StratumKind(header.kind))
    at = directory.offset + GRAIN_HEADER_SIZE
    payload = bytearray(body[at : directory.offset + directory.header.stored_size])
    strata = int.from_bytes(payload[20:24], "little")
    count = int.from_bytes(payload[16:20], "little")
    tags_at = INDEX_DIRECTORY_SIZE + 16 * strata + 4 * count
    for number in range(count):
        page = pages[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
        payload[tags_at + 16 * number : tags_at + 16 * number + 16] = page_tag(
            keys.tag_key, header.stratum_id, number, page
        )
    data = bytes(payload)
    grain = encode_grain(encode_body(Kind.INDEX_DIRECTORY, 0, 0, blake3(data).digest(), len(data)), data)
    return body[: directory.offset] + grain + body[directory.offset + directory.header.stored_size :]


def forged(rng: random.Random, whole: SmallBasin) -> tuple[str, bytes]:
    """A file of the basin, changed by somebody who knows the format."""
    contents = whole.image.contents()
    name = rng.choice([name for name in contents if name not in ("basin.json", "log/lock")])
    content = contents[name]
    if name.startswith("log/"):
        if rng.random() < 0.1:
            return name, forged_header(rng, content, SEGMENT_HEADER_SIZE)
        return name, forged_frames(rng, content, SEGMENT_HEADER_SIZE)
    if name.startswith("checkpoint/"):
        return name, forged_frames(rng, content, 0)
    return name, forged_stratum(rng, content, blake3(contents["basin.json"]).digest())


def use(db: Database, whole: SmallBasin) -> None:
    """Everything that can be asked; contents that are told must be right."""
    for question, ask in whole.questions.items():
        told = answer(partial(ask, db))
        if question.startswith("content "):
            assert isinstance(told, BasinError) or told == whole.answers[question]
    answer(lambda: list(db.check()))
    answer(lambda: list(db.changes(since=0)))
    answer(db.stats)


def answer(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except BasinError as error:
        return error


def write(db: Database) -> None:
    """A small commit, a large one that flushes and merges, and the end of the session."""
    db.put(b"name", b"new")
    db.blobs.put(b"new content", links=[])
    db.commit()
    for number in range(40):
        db.put(b"many %d" % number, b"value " * 10)
    db.commit()


@pytest.mark.parametrize("part", range(4))
def test_forged_files_are_answered(rng: random.Random, part: int, effort: int) -> None:
    whole = rich("open")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(CASES // 4 * effort):
        name, content = forged(rng, whole)
        if content == whole.image.contents()[name]:
            continue
        case = f"part {part}, case {number}: {name}"
        begun = time.perf_counter()
        image = whole.image.with_content(name, content)
        for mode in ("r", "w"):
            disk = SimulatedDisk.from_image(image, boot=SAME_BOOT)
            db = answer(partial(open_disk, disk, "open", mode, OPTIONS_OF[mode]))
            if isinstance(db, BasinError):
                continue
            try:
                use(db, whole)
                if mode == "w":
                    answer(partial(write, db))
            finally:
                answer(db.close)
        assert time.perf_counter() - begun < SECONDS_MAX, case
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MEMORY_GROWTH_MAX
