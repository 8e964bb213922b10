"""`explain_space`: every byte of contents is needed, held, dead or condemned, and says so."""

from __future__ import annotations

import os
from pathlib import Path

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
        assert any(one.condemned_ms for one in space.strata)

        db.compact(grace_s=0)
        space = db.explain_space()
        assert (space.condemned, space.held) == (0, 0)
        assert space.dead <= 0.15 * space.needed
        assert 4 * SIZE < space.needed < 4.1 * SIZE
