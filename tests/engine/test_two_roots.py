"""Contents below a root of their own, on a disk and in memory: found by whoever opens the basin, and nobody else's."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.errors import (
    GrainNotReady,
    InvalidArgument,
    NotABasin,
    ObjectMissing,
)
from basin.storage.memory_objects import memory_objects
from tests.engine.cold_bucket import SECRET, ColdBucket, bucket, content

__all__ = ["bucket"]


class TestTwoRoots:
    def test_on_a_disk(self, tmp_path: Path) -> None:
        hot, cold = tmp_path / "hot", tmp_path / "cold"
        with basin.open(hot, "x", secret=SECRET, data_url=str(cold), stratum_size=16_384) as database:
            keys = [database.blobs.put(content(number)) for number in range(50)]
            database["name"] = b"value" * 1000
            database.commit()
            assert database["name"] == b"value" * 1000
            assert all(key in database.blobs for key in keys)
        assert sorted(path.name for path in cold.iterdir()) == ["basin.json", "data", "tmp"]
        assert not (hot / "data").exists()
        with basin.open(hot, "w", secret=SECRET) as database:
            assert database["name"] == b"value" * 1000
            assert [database.blobs[key][:4] for key in keys] == [number.to_bytes(4, "big") for number in range(50)]
            assert [finding for finding in database.check() if finding.severity == "damage"] == []
            covered = {one for run in database.core.state.index_runs for one in run.strata}
            data = {known.added.id for known in database.core.state.strata.values() if known.added.kind == 1}
            assert data == covered

    def test_misses_and_look_ups_need_no_second_disk(self, tmp_path: Path) -> None:
        hot, cold = tmp_path / "hot", tmp_path / "cold"
        with basin.open(hot, "x", secret=SECRET, data_url=str(cold)) as database:
            key = database.blobs.put(b"cold" * 1000)
            database["name"] = b"hot"
        for path in (cold / "data").iterdir():
            path.unlink()
        with basin.open(hot, "w", secret=SECRET) as database:
            assert key in database.blobs
            assert database["name"] == b"hot"
            assert database.blobs.put(b"cold" * 1000) == key
            database.commit()
            with pytest.raises(ObjectMissing):
                database.blobs[key]

    def test_in_memory_only_data_goes_to_the_second(self) -> None:
        name = secrets.token_hex(6)
        url, data_url = f"memory://{name}-hot", f"memory://{name}-cold"
        with basin.open(url, "x", secret=SECRET, data_url=data_url, data_storage_class="DEEP_ARCHIVE") as database:
            key = database.blobs.put(b"cold" * 1000)
        hot, cold = memory_objects(url), memory_objects(data_url)
        assert cold.list("").folders == ["data"]
        assert "data" not in hot.list("").folders
        (stored,) = cold.list("data").objects
        assert cold.readiness(f"data/{stored.name}").storage_class == "DEEP_ARCHIVE"
        with basin.open(url, "r", secret=SECRET) as database:
            with pytest.raises(GrainNotReady):
                database.blobs[key]
            database.thaw()
            assert database.blobs[key] == b"cold" * 1000

    def test_a_root_holds_the_contents_of_one_basin(self, tmp_path: Path) -> None:
        cold = str(tmp_path / "cold")
        basin.open(tmp_path / "a", "x", secret=SECRET, data_url=cold).close()
        with pytest.raises(NotABasin, match="another basin"):
            basin.open(tmp_path / "b", "x", secret=SECRET, data_url=cold)
        assert not (tmp_path / "b" / "basin.json").exists()
        with pytest.raises(InvalidArgument, match="own place"):
            basin.open(tmp_path / "c", "x", secret=SECRET, data_url=str(tmp_path / "c"))
        basin.open(tmp_path / "c", "x", secret=SECRET).close()

    def test_a_root_that_is_gone_is_named(self, tmp_path: Path) -> None:
        cold = tmp_path / "cold"
        basin.open(tmp_path / "a", "x", secret=SECRET, data_url=str(cold)).close()
        cold.rename(tmp_path / "elsewhere")
        with pytest.raises(ObjectMissing, match="keeps its contents"):
            basin.open(tmp_path / "a", "r", secret=SECRET)

    def test_roots_and_classes_that_do_not_fit_are_refused(self, tmp_path: Path) -> None:
        memory = f"memory://{secrets.token_hex(6)}"
        wrong: list[tuple[str, dict[str, Any]]] = [
            (str(tmp_path / "a"), {"data_url": memory}),
            (memory, {"data_url": str(tmp_path / "cold")}),
            (str(tmp_path / "a"), {"data_storage_class": "GLACIER"}),
            (memory, {"data_storage_class": "FROZEN"}),
            (memory, {"data_url": 5}),
        ]
        for url, options in wrong:
            with pytest.raises(InvalidArgument):
                basin.open(url, "x", secret=SECRET, **options)
        assert not (tmp_path / "cold").exists()

    def test_what_was_fixed_is_not_changed(self, tmp_path: Path) -> None:
        url = tmp_path / "a"
        basin.open(url, "x", secret=SECRET).close()
        with pytest.raises(InvalidArgument, match="fixed"):
            basin.open(url, "w", secret=SECRET, data_url=str(tmp_path / "cold"))
        assert b"data_" not in (url / "basin.json").read_bytes()
        other = tmp_path / "b"
        basin.open(other, "x", secret=SECRET, data_url=str(tmp_path / "cold")).close()
        basin.open(other, "w", secret=SECRET, data_url=str(tmp_path / "cold")).close()

    def test_workers_find_the_second_root(self, bucket: ColdBucket, tmp_path: Path) -> None:
        cold = tmp_path / "cold"
        with basin.open(tmp_path / "a", "x", secret=SECRET, data_url=str(cold)) as database:
            ticket = database.ticket()
            from basin.api import _ingest

            report = _ingest(ticket, [b"one" * 1000, (b"name", b"two" * 1000)], SECRET)
            database.adopt([report])
            assert database["name"] == b"two" * 1000
            assert len(report.index_runs) == 1
            covered = {one for run in database.core.state.index_runs for one in run.strata}
            assert len(covered) == 1
        assert len(list((cold / "data").iterdir())) == 1

    def test_what_workers_archived_is_adopted_unread(self) -> None:
        from basin.api import _ingest

        name = secrets.token_hex(6)
        with basin.open(f"memory://{name}", "x", secret=SECRET, data_storage_class="GLACIER") as database:
            report = _ingest(database.ticket(), [b"one" * 1000], SECRET)
            database.adopt([report])
            (key,) = report.content_keys
            assert basin.ContentKey(key) in database.blobs
            assert database.blobs.put(b"one" * 1000).digest == key
            with pytest.raises(GrainNotReady):
                database.blobs[basin.ContentKey(key)]
