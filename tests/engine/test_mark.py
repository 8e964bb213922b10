"""Marking, against a search over names and links that keeps everything in memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import basin
from basin.api import Database
from basin.engine import mark as mark_module
from basin.engine import wanted as wanted_module
from basin.engine.mark import Marks, mark
from basin.engine.merging import never
from basin.engine.wanted import Wanted, prefixes_of
from basin.storage.row_spool import RowSpool

OPTIONS: dict[str, Any] = {"stratum_size": 64 << 10, "history_s": 0.0, "history_size": 0, "inline_max": 64}


@pytest.fixture(params=["in memory", "in files, and swept"])
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time as if everything were too much for memory."""
    if request.param != "in memory":
        monkeypatch.setattr(wanted_module, "IN_MEMORY_MAX", 8)
        monkeypatch.setattr(wanted_module, "CHUNK", 5)
        monkeypatch.setattr(mark_module, "_FRESH_MAX", 3)
        monkeypatch.setattr(mark_module, "_SLICE_PAGES", 1)


def grow(db: Database, rng: random.Random, count: int) -> dict[basin.ContentKey, list[basin.ContentKey]]:
    """Contents that link to some of those before; few have a root or a name. Returns their links."""
    links: dict[basin.ContentKey, list[basin.ContentKey]] = {}
    for number in range(count):
        linked = rng.sample(list(links), min(len(links), rng.choice([0, 0, 1, 3])))
        key = db.blobs.put(rng.randbytes(rng.choice([100, 3000])), links=linked, root=rng.random() < 0.1)
        links[key] = linked
        if rng.random() < 0.05:
            db[b"name-%d" % number] = basin.Ref(key)
        if number % 17 == 0:
            db.commit()
    db.commit()
    return links


def reached(
    links: dict[basin.ContentKey, list[basin.ContentKey]], start: set[basin.ContentKey]
) -> set[basin.ContentKey]:
    found, waiting = set(start), list(start)
    while waiting:
        for key in links[waiting.pop()]:
            if key not in found:
                found.add(key)
                waiting.append(key)
    return found


def kept_keys(db: Database, marks: Marks) -> list[basin.ContentKey]:
    """The content key of every grain that is kept."""
    keys = []
    for source in marks._sources:
        for first, entries in source.all():
            rows = np.arange(first, first + len(entries))
            for entry in entries[mark_module._are_set(source.kept, rows)]:
                key = int(entry["prefix"]).to_bytes(8, "big") + entry["rest"].tobytes()
                keys.append(basin.ContentKey(db.core.keyring.grain_keys.content_key(key)))
    return keys


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("encrypted", [False, True])
def test_what_names_reach_is_kept_once_and_nothing_else(tmp_path: Path, encrypted: bool, rng: random.Random) -> None:
    kind: dict[str, Any] = {"secret": basin.Secret.generate()} if encrypted else {"profile": "open"}
    with basin.open(tmp_path / "basin", **kind, **OPTIONS) as db:
        links = grow(db, rng, 300)
        gone = rng.sample(list(db.blobs), 5)
        for key in gone:
            db.blobs.delete(key)
        db.commit()
        start = set(db.blobs) | {db.ref(name) for name in db}
        with db.core.commit_mutex:
            db.core.finish_strata()
        marks = mark(db.core, never, floor=db.core.state.position)
        try:
            expected = reached(links, {key for key in start if key is not None})
            found = kept_keys(db, marks)
            assert set(found) == expected
            assert len(found) == len(expected)
            usage = marks.usage()
            assert sum(used.kept_grains for used in usage.values()) == len(expected)
            assert sum(used.grains for used in usage.values()) == len(links)

            marks.hold(usage)
            held = expected | reached(links, {key for linked in links.values() for key in linked})
            assert set(kept_keys(db, marks)) == held
        finally:
            marks.close()


def test_of_several_copies_the_newest_is_kept_and_those_with_other_links_too(tmp_path: Path) -> None:
    with (
        basin.open(tmp_path / "basin", profile="open", **OPTIONS) as one,
        basin.open(tmp_path / "basin", **OPTIONS) as two,
    ):
        child, other = one.blobs.put(b"child" * 50, root=False), one.blobs.put(b"other" * 50, root=False)
        one.commit()
        two.refresh()
        with one.batch() as first, two.batch() as second:
            plain = first.blobs.put(b"plain" * 50)
            second.blobs.put(b"plain" * 50)
            parent = first.blobs.put(b"parent" * 50, links=[child])
            second.blobs.put(b"parent" * 50, links=[child])
        one.refresh()
        one.blobs.put(b"parent" * 50, links=[other])
        one.commit()
        one.core.finish_strata()
        two.core.finish_strata()
        one.refresh()
        marks = mark(one.core, never)
        try:
            found = sorted(map(str, kept_keys(one, marks)))
            assert found == sorted(map(str, [child, other, plain, parent, parent]))
        finally:
            marks.close()


def test_wanted_keys_come_back_sorted_and_once(limits: None, tmp_path: Path, rng: random.Random) -> None:
    wanted = Wanted(str(tmp_path))
    keys = [rng.randbytes(32) for _ in range(200)]
    for _ in range(3):
        for at in range(0, 200, 7):
            wanted.add(prefixes_of(b"".join(keys[at : at + 7])))
    chunks = list(wanted.take())
    assert np.concatenate(chunks).tolist() == sorted(int.from_bytes(key[:8], "big") for key in keys)
    assert not wanted
    wanted.close()
    assert list(tmp_path.iterdir()) == []


def test_wanted_keys_take_the_same_memory_however_many_they_are(tmp_path: Path) -> None:
    """Four MiB, and two more at most when Python's table of strings grows by the names of files."""
    source = np.random.default_rng(1)
    wanted = Wanted(str(tmp_path))
    count, step = 1_000_000, 1000
    tracemalloc.start()
    try:
        for _ in range(0, count, step):
            wanted.add(source.integers(0, 1 << 64, step, dtype=np.uint64))
        taken = sum(len(chunk) for chunk in wanted.take())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        wanted.close()
    assert taken == count
    assert peak < 6.5 * (1 << 20)


def test_a_spool_gives_each_part_its_rows_in_order(tmp_path: Path) -> None:
    spool = RowSpool(np.uint32, str(tmp_path))
    spool.add(np.array([2, 0, 2]), np.array([5, 6, 7], dtype=np.uint32))
    spool.add(np.array([0]), np.array([8], dtype=np.uint32))
    assert spool.parts() == [0, 2]
    assert [spool.read(part).tolist() for part in (0, 1, 2)] == [[6, 8], [], [5, 7]]
    spool.close()
    assert list(tmp_path.iterdir()) == []
