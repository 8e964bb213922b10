"""`explain_space`: every byte of contents is needed, held, dead or condemned, and says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import basin
from basin.format.layout import MIB

SIZE = 50_000


def test_bytes_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    with basin.open(tmp_path / "basin", profile="open", history_s=0.0, part_max=MIB) as db:
        keys = [db.blobs.put(os.urandom(SIZE)) for _ in range(10)]
        large = db.blobs.put(os.urandom(3 * MIB))
        db.put_many((b"%d" % number, b"old") for number in range(100))
        db.commit()
        db.put_many((b"%d" % number, b"new") for number in range(100))
        for key in keys[4:]:
            db.blobs.delete(key)
        db.blobs.delete(large)
        db.commit()

        space = db.explain_space()
        assert 4 * SIZE < space.needed < 4.1 * SIZE
        assert 6 * SIZE < space.dead < 6.1 * SIZE  # and the large one's list of parts
        assert 3 * MIB < space.held < 3.1 * MIB
        assert space.condemned == 0
        assert space.superseded >= 0.5
        assert sum(one.dead for one in space.strata) == space.dead

        db.compact(grace_s=3600)
        space = db.explain_space()
        assert space.condemned > 0
        assert space.held >= 3 * MIB  # The dead list of parts is condemned, and may come back until it is killed.
        condemned = [one for one in space.strata if one.condemned_ms]
        assert condemned
        assert all(one.due_ms == one.condemned_ms + 3_600_000 for one in condemned)
        assert space.due_ms == max(one.due_ms for one in condemned)

        db.compact(grace_s=0)
        space = db.explain_space()
        assert (space.condemned, space.held, space.due_ms) == (0, 0, 0)
        assert space.dead <= 0.15 * space.needed
        assert 4 * SIZE < space.needed < 4.1 * SIZE


@pytest.mark.parametrize("pinned", [False, True])
def test_what_only_the_past_needs_is_told(tmp_path: Path, *, pinned: bool) -> None:
    with basin.open(tmp_path / "basin", profile="open", history_s=0.0 if pinned else 3600.0) as db:
        keys = [db.blobs.put(os.urandom(SIZE)) for _ in range(5)]
        if pinned:
            db.pin("before")
        db.commit()
        assert db.explain_space().past == 0
        for key in keys[2:]:
            db.blobs.delete(key)
        db.commit()
        space = db.explain_space()
        assert 5 * SIZE < space.needed < 5.1 * SIZE
        assert 3 * SIZE < space.past < 3.1 * SIZE
        assert space.dead == 0
        if pinned:
            db.unpin("before")
            space = db.explain_space()
            assert space.past == 0
            assert 3 * SIZE < space.dead < 3.1 * SIZE


def test_every_byte_of_contents_counts_once(tmp_path: Path) -> None:
    with basin.open(tmp_path / "basin", profile="open", history_s=0.0) as db:
        keys = [db.blobs.put(os.urandom(SIZE)) for _ in range(10)]
        db.commit()
        for key in keys[::2]:
            db.blobs.delete(key)
        db.commit()
        space = db.explain_space()
        stored = sum(one.size for one in space.strata)
        overhead = stored - space.needed - space.held - space.dead - space.condemned
        assert 0 < overhead < 0.01 * stored  # Headers, and the index that each stratum has of its own.
        stats = db.stats()["strata"]
        assert stored + space.names + space.indexes == stats["bytes"]
