"""Contents in cold storage are made readable again: by `db.thaw`, all their parts, and nothing twice."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.errors import (
    ContentNotFound,
    GrainNotReady,
    InvalidArgument,
)
from basin.storage.memory_objects import MemoryObjects
from tests.engine.cold_bucket import ColdBucket, bucket, content

__all__ = ["bucket"]


class TestThaw:
    def test_what_was_thawed_is_read(self, bucket: ColdBucket) -> None:
        with bucket.create() as database:
            keys = []
            for number in range(3):
                keys.append(database.blobs.put(content(number)))
                database.commit()
        database = bucket.open("r")
        seen: list[tuple[int, int]] = []
        report = database.thaw([keys[0], str(keys[1])], progress=lambda *both: seen.append(both))
        assert (report.strata, report.requested, report.waiting) == (2, 2, 0)
        assert seen[0] == (0, report.size)
        assert seen[-1] == (report.size, report.size)
        assert database.blobs.get_many(keys[:2])[1][:4] == (1).to_bytes(4, "big")
        with pytest.raises(GrainNotReady):
            database.blobs[keys[2]]

    def test_nothing_is_asked_for_twice(self, bucket: ColdBucket) -> None:
        with bucket.create() as database:
            key = database.blobs.put(b"cold" * 1000)
        database = bucket.open("r")
        assert isinstance(bucket.watched.store, MemoryObjects)
        bucket.watched.store.restore_s = 3600
        first = database.thaw(wait=False)
        second = database.thaw([key], wait=False)
        assert (first.requested, first.waiting) == (1, 1)
        assert (second.requested, second.waiting) == (0, 1)
        with pytest.raises(GrainNotReady):
            database.blobs[key]
        bucket.watched.store._place.restored_s.update(dict.fromkeys(bucket.watched.store._place.restored_s, 0.0))
        third = database.thaw()
        assert (third.requested, third.waiting) == (0, 0)
        assert bucket.watched.count("restore") == 1
        assert database.blobs[key] == b"cold" * 1000
        assert database.stats()["requests"]["restore"] == 1

    def test_all_parts_of_a_large_content_are_thawed(self, bucket: ColdBucket) -> None:
        large = os.urandom(400_000)
        with bucket.create(part_max=65_536, part_size=65_536, stratum_size=140_000) as database:
            other = database.blobs.put(b"other" * 1000)
            database.commit()
            key = database.blobs.put(large)
        database = bucket.open("r")
        assert database.thaw([key]).strata > 2
        assert database.blobs[key] == large
        with pytest.raises(GrainNotReady):
            database.blobs[other]

    def test_what_an_error_names_is_thawed(self, bucket: ColdBucket) -> None:
        with bucket.create() as database:
            database["name"] = b"value" * 1000
        database = bucket.open("r")
        with pytest.raises(GrainNotReady) as found:
            database["name"]
        command, address = found.value.restore.rsplit(" ", 1)
        assert command == "basin thaw"
        database.thaw([address])
        assert database["name"] == b"value" * 1000

    def test_the_hot_has_nothing_to_be_thawed(self, tmp_path: Path) -> None:
        with basin.open(tmp_path / "b", profile="open") as database:
            key = database.blobs.put(b"hot" * 1000)
            database.commit()
            report = database.thaw([key])
            assert (report.strata, report.requested, report.waiting) == (1, 0, 0)
        with basin.open(f"memory://{secrets.token_hex(6)}", profile="open") as database:
            database.blobs.put(b"hot" * 1000)
            database.commit()
            assert database.thaw().requested == 0

    def test_what_is_not_there_or_makes_no_sense_is_refused(self, bucket: ColdBucket) -> None:
        with bucket.create() as database:
            key = database.blobs.put(b"cold" * 1000)
        database = bucket.open("r")
        with pytest.raises(ContentNotFound):
            database.thaw([basin.ContentKey(os.urandom(32))])
        with pytest.raises(ContentNotFound):
            database.thaw([f"{key}-1"])
        wrong: list[dict[str, Any]] = [{"days": 0}, {"days": 1.5}, {"tier": "Fast"}]
        for one in wrong:
            with pytest.raises(InvalidArgument):
                database.thaw([key], **one)
        for address in ("data/00", "data/" + "0" * 32, "nothing"):
            with pytest.raises(InvalidArgument):
                database.thaw([address])
        assert bucket.watched.count("restore") == 0
