"""Writing strata anew: the writer that nobody searches, what is carried over, what is refused, what memory it takes."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

import basin
from basin.engine import merging, rewrite
from basin.engine import writer as writer_module
from basin.engine.index import IndexReader
from basin.engine.mark import _content_keys
from basin.engine.merging import SortedEntry, merge_entries, never
from basin.engine.rewrite import grains_at, places_of
from basin.engine.runs import Columns
from basin.engine.writer import StratumWriter
from basin.errors import StorageError
from basin.format.index import Entries, IndexEntry, entries_of
from basin.format.layout import (
    CODEC_STORED,
    FLAG_LINKS,
    MIB,
    PAGE_ENTRIES,
    STRATUM_FOOTER_SIZE,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.payload import join_links
from basin.storage.local import LocalStorage
from basin.terms import StratumId
from tests.engine.test_strata import CONTENTS, LINK, Bench, bench

__all__ = ["bench"]

OPTIONS: dict[str, Any] = {"history_s": 0.0, "inline_max": 0, "stratum_size": 256 << 10}
SECRET = basin.Secret.generate()


def twins(bench: Bench) -> tuple[StratumWriter, StratumWriter]:
    """Two writers of the same bytes; the second is not searched."""
    one, other = bench.writer(), bench.writer()
    other.id, other._keys, other._aead = one.id, one._keys, one._aead
    other.forgo_search()
    return one, other


def grains_of(bench: Bench, writer: StratumWriter) -> bytes:
    writer.flush()
    return bench.content(writer)[STRATUM_HEADER_SIZE:]


# --- a stratum that nobody searches -----------------------------------------------------------------------------------


def test_a_stratum_that_is_not_searched_holds_the_same_bytes(bench: Bench) -> None:
    writers = twins(bench)
    for writer in writers:
        for number, content in enumerate(CONTENTS[:40]):
            if number % 3:
                writer.append(Kind.BLOB, bench.key(content), CODEC_STORED, 0, content)
            else:
                linked = join_links([LINK], content)
                writer.append(Kind.PART, bench.key(content), CODEC_STORED, FLAG_LINKS, linked)
        rest = CONTENTS[40:]
        writer.append_blobs([bench.key(content) for content in rest], [CODEC_STORED] * len(rest), rest)
    one, other = writers
    assert one.entries().tobytes() == other.entries().tobytes()
    assert one.grain_count == other.grain_count == len(CONTENTS)
    assert one.room == other.room
    first, second = one.complete(), other.complete()
    footer = slice(-STRATUM_FOOTER_SIZE)  # Its hash is also of the header, which names another stratum.
    assert grains_of(bench, one)[footer] == grains_of(bench, other)[footer]
    assert (first.count, first.firsts.tolist()) == (second.count, second.firsts.tolist())
    assert not other.locations


def test_a_key_that_comes_twice_is_indexed_twice(bench: Bench) -> None:
    _, writer = twins(bench)
    places = [bench.put(writer, b"the same") for _ in range(3)]
    assert writer.grain_count == 3
    assert writer.entries()["offset"].tolist() == [place.offset for place in places]


def test_an_interrupted_append_ends_a_stratum_that_is_not_searched(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, writer = twins(bench)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_write_grain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.put(writer, b"lost")
    monkeypatch.undo()
    with pytest.raises(StorageError):
        bench.put(writer, b"next")


def test_grains_are_carried_over_as_they_are_stored() -> None:
    made = Bench("open")
    one, other = twins(made)
    keys = [made.key(content) for content in CONTENTS]
    one.append_blobs(keys, [CODEC_STORED] * len(keys), CONTENTS)
    stored = grains_of(made, one)
    places = sorted((place >> 32, place & 0xFFFFFFFF) for place in one.locations.values())
    at = STRATUM_HEADER_SIZE
    other.append_stored([stored[offset - at : offset - at + length] for offset, length in places])
    assert grains_of(made, other) == stored
    assert one.entries().tobytes() == other.entries().tobytes()


@pytest.mark.parametrize(("profile", "searched"), [("encrypted", False), ("open", True)])
def test_nothing_is_carried_over_where_it_would_not_be_found_or_opened(profile: str, searched: bool) -> None:
    made = Bench(profile)
    writer = twins(made)[0 if searched else 1]
    with pytest.raises(StorageError):
        writer.append_stored([bytes(100)])


def test_large_data_is_not_copied_on_its_way(tmp_path: Path) -> None:
    made = Bench("open")
    writer = local_writer(made, tmp_path)
    data = random.Random(1).randbytes(8 * MIB)
    tracemalloc.start()
    try:
        writer.append(Kind.BLOB, made.key(data), CODEC_STORED, 0, data)
        writer.flush()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MIB
    stored = (tmp_path / writer.name).read_bytes()
    assert stored.endswith(data)
    assert writer.describe(0).hash == blake3(stored).digest()


# --- memory -----------------------------------------------------------------------------------------------------------


def local_writer(made: Bench, folder: Path) -> StratumWriter:
    storage = LocalStorage(folder)
    for name in ("data", "meta", "index"):
        (folder / name).mkdir(exist_ok=True)
    return StratumWriter(
        storage, made.keyring, StratumKind.DATA, session=1, identity=StratumId(bytes(16)), key_material=bytes(32)
    )


def some_keys(start: int) -> list[bytes]:
    return [blake3(number.to_bytes(4, "little")).digest() for number in range(start, start + 1000)]


def test_a_grain_of_a_stratum_that_is_not_searched_takes_44_bytes(tmp_path: Path) -> None:
    made = Bench("open")
    writer = local_writer(made, tmp_path)
    writer.forgo_search()
    count = 30_000
    tracemalloc.start()
    try:
        for start in range(0, count, 1000):
            writer.append_blobs(some_keys(start), [CODEC_STORED] * 1000, [bytes(100)] * 1000)
        writer.flush()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        writer.complete()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held < 55 * count
    assert peak - held < 130 * count  # 44 sorted, 44 until a grain of pages is full, and the order, tags and filter


@dataclass(frozen=True)
class SomeDirectory:
    strata: list[StratumId]
    count: int
    page_count: int


class SomeIndex:
    """Entries in memory, which counts the pages that are asked for."""

    def __init__(self, number: int, count: int, rng: random.Random) -> None:
        self.id = StratumId(number.to_bytes(16, "big"))
        rows = [IndexEntry(rng.randbytes(32), at, 100, 0, 1, 0) for at in range(count)]
        self._entries = entries_of(rows)
        self.directory = SomeDirectory([self.id], count, -(-count // PAGE_ENTRIES))
        self.most = 0

    def entries(self, start: int, stop: int) -> Entries:
        self.most = max(self.most, stop - start)
        return self._entries[start * PAGE_ENTRIES : stop * PAGE_ENTRIES]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_merge_of_many_indexes_holds_as_many_pages_as_one_of_few(
    count: int, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_INDEX_PAGES_HELD", 120)
    indexes = [SomeIndex(number, 700 + number, rng) for number in range(count)]
    strata = [index.id for index in indexes]
    merged = np.concatenate(list(merge_entries(cast("list[IndexReader]", indexes), strata, never)))
    assert len(merged) == sum(index.directory.count for index in indexes)
    assert (np.diff(merged["prefix"].astype(np.uint64)) > 0).all()
    assert sorted(merged["stratum"].tolist()) == sorted(
        number for number, index in enumerate(indexes) for _ in range(index.directory.count)
    )
    assert sum(index.most for index in indexes) <= 120


# --- what is read -----------------------------------------------------------------------------------------------------


def test_grains_are_read_together_and_come_back_in_their_order(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "_GAP", 500)
    writer = bench.writer()
    places = [bench.put(writer, content) for content in CONTENTS]
    writer.flush()
    reader = bench.reader(writer)
    reads: list[int] = []
    read_raw = reader.read_raw

    def counted(offset: int, size: int) -> bytes:
        reads.append(size)
        return read_raw(offset, size)

    monkeypatch.setattr(reader, "read_raw", counted)
    chosen = [place for number, place in enumerate(places) if number % 40 < 20 or number == 39]
    rows = places_of([(place.offset, place.length) for place in chosen])
    stored = bench.content(writer)
    found = list(grains_at(reader, rows, 4000))
    assert found == [(place.offset, stored[place.offset : place.offset + place.length]) for place in chosen]
    assert max(reads) <= 4000
    assert len(CONTENTS) // 40 <= len(reads) < len(chosen) // 4
    assert list(grains_at(reader, places_of([]))) == []
    assert [len(grain) for _, grain in grains_at(reader, rows, 10)] == [place.length for place in chosen]


# --- whole rewrites ---------------------------------------------------------------------------------------------------


def opened(folder: Path, profile: str, mode: Any = "w") -> Any:
    secret = SECRET if profile == "encrypted" else None
    kind: dict[str, Any] = {"secret": secret} if secret is not None else {"profile": "open" if mode == "c" else None}
    return basin.open(folder, mode, **kind, **OPTIONS)


@pytest.fixture(params=["open", "encrypted"])
def worn(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[basin.ContentKey, bytes]]:
    """Profile and folder of a basin of small contents of which every third is dead; and the others."""
    rng = random.Random(5)
    with opened(tmp_path / "basin", request.param, "c") as db:
        contents = {}
        with db.batch() as batch:
            for _ in range(900):
                content = rng.randbytes(rng.choice([60, 300, 3000]))
                contents[batch.blobs.put(content)] = content
        with db.batch() as batch:
            for key in list(contents)[::3]:
                batch.blobs.delete(key)
                del contents[key]
    return request.param, tmp_path / "basin", contents


@pytest.mark.parametrize("placed_together", [7, 1 << 13])
def test_what_is_written_anew_is_what_was_there(
    worn: tuple[str, Path, dict[basin.ContentKey, bytes]], placed_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "_PLACED_TOGETHER", placed_together)
    profile, folder, contents = worn
    with opened(folder, profile) as db:
        kinds = {step.kind for step in db.compact(grace_s=0).steps}
        assert "rewrite" in kinds
        assert "revive" not in kinds  # What was not copied would come back with the stratum that it lay in.
        assert {key: db.blobs[key] for key in db.blobs} == contents
        assert [finding for finding in db.check() if finding.severity != "info"] == []


def test_no_stratum_has_more_grains_than_it_may(
    worn: tuple[str, Path, dict[basin.ContentKey, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, folder, contents = worn
    monkeypatch.setattr(rewrite, "STRATUM_GRAINS_MAX", 100)
    monkeypatch.setattr(writer_module, "STRATUM_GRAINS_MAX", 100)
    monkeypatch.setattr(rewrite, "_TOGETHER", 16)
    with opened(folder, profile) as db:
        before = set(db.core.state.strata)
        db.compact(grace_s=0)
        counts = [
            known.added.grain_count
            for identity, known in db.core.state.strata.items()
            if known.added.kind == StratumKind.DATA and identity not in before
        ]
        assert max(counts) == 100
        assert {key: db.blobs[key] for key in db.blobs} == contents


def test_a_damaged_grain_stays_where_it_is(
    worn: tuple[str, Path, dict[basin.ContentKey, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, folder, contents = worn
    monkeypatch.setattr(rewrite, "_TOGETHER", 4)  # Or it comes among the first, which are copied one by one.
    with opened(folder, profile) as db:
        core = db.core
        grain_keys = core.keyring.grain_keys
        damaged = list(contents)[len(contents) // 2]
        place = core.locator.find(grain_keys.grain_key(damaged.digest))
        before = {path.name for path in (folder / "data").iterdir()}
    path = folder / "data" / str(place.stratum)
    stored = bytearray(path.read_bytes())
    stored[place.offset + place.length - 1] ^= 1
    path.write_bytes(stored)
    with opened(folder, profile) as db:
        report = db.compact(grace_s=0)
        assert any(str(place.stratum) in problem for problem in report.problems)
        assert {path.name for path in (folder / "data").iterdir()} == before
        for key, content in contents.items():
            if key != damaged:
                assert db.blobs[key] == content


# --- shortcuts --------------------------------------------------------------------------------------------------------

VERSIONS = st.integers(1, 40)


@given(
    st.dictionaries(st.binary(max_size=2), st.tuples(VERSIONS, st.integers(0, 2), st.integers(0, 3)), max_size=20),
    VERSIONS,
    VERSIONS,
)
def test_one_version_of_each_name_is_retained_as_several_would_be(
    rows: dict[bytes, tuple[int, int, int]], floor: int, bottom: int
) -> None:
    entries: list[SortedEntry] = sorted(
        (name, ~version, kind, b"", expiry) for name, (version, kind, expiry) in rows.items()
    )
    bottom = min(floor, bottom)
    nowhere = [(b"\xff\xff", b"\xff\xff", 0)]  # covers no name, and keeps the shortcut from being taken
    short = merging._retained(entries, [], 2, floor=floor, bottom=bottom)
    assert short == merging._retained(entries, nowhere, 2, floor=floor, bottom=bottom)


def test_content_keys_of_a_block_of_roots_are_those_of_any_block() -> None:
    from basin.engine.mark import _ROOTS

    keys = [bytes([number]) * 32 for number in range(6)]
    roots = [_ROOTS + key for key in keys]
    assert _content_keys(columns_of(roots, [1] * 6)) == keys
    assert _content_keys(columns_of(roots, [1, 0, 1, 1, 1, 1])) == keys[:1] + keys[2:]
    assert _content_keys(columns_of([*roots[:3], roots[3] + b"x", *roots[4:]], [1] * 6)) == keys[:3] + keys[4:]
    assert _content_keys(columns_of([b"\0\0\0\0a", *roots[1:]], [1] * 6)) == keys[1:]


def columns_of(names: list[bytes], kinds: list[int]) -> Columns:
    return Columns(names, [1] * len(names), kinds, [b""] * len(names), [0] * len(names))
