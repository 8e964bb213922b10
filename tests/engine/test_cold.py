"""Contents in cold storage: nothing but reading one of them touches it, and what must be restored first says so."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

import basin
from basin.api import Database
from basin.engine.hot_indexes import HotIndexes
from basin.engine.options import Options
from basin.engine.plan import SMALL_STRATA_MAX, plan_strata_merge
from basin.engine.tiers import TIERS, is_archived, is_cold, minimum_storage_s, rewrite_price
from basin.errors import (
    GrainNotReady,
    StorageUnavailable,
)
from basin.format.layout import StratumKind
from basin.storage.memory_objects import MemoryObjects
from basin.storage.objects import ByteRange
from tests.engine.cold_bucket import ColdBucket, bucket, content

__all__ = ["bucket"]


class TestNothingTouchesTheCold:
    def test_a_life_without_a_read_only_puts(self, bucket: ColdBucket) -> None:
        contents = [content(number) for number in range(60)]
        with bucket.create(checkpoint_every=5, stratum_size=8192) as database:
            keys = []
            for number, one in enumerate(contents):  # A commit each: upkeep has something to merge.
                keys.append(database.blobs.put(one))
                database[f"name {number}"] = one
                database.commit()
            assert database.blobs.put_many(contents) == keys
            assert all(key in database.blobs for key in keys)
        with bucket.open() as database:
            assert all(key in database.blobs for key in keys)
            assert basin.ContentKey(os.urandom(32)) not in database.blobs
            assert database.blobs.put_many(contents) == keys
            assert len(database) == 60
            assert list(database.blobs) == sorted(keys, key=lambda key: key.digest)
            database.refresh()
            database.stats()
            for number in range(60):
                database[f"again {number}"] = contents[number]
            database.commit()
        assert bucket.touched() == []
        assert bucket.names("data")
        state = bucket.open("r").core.state
        assert sum(known.added.kind == StratumKind.DATA for known in state.strata.values()) == 60

    def test_the_size_and_the_parts_of_a_large_content_are_known(self, bucket: ColdBucket) -> None:
        large = os.urandom(300_000)
        with bucket.create(part_max=65_536, part_size=65_536) as database:
            key = database.blobs.put(large)
        database = bucket.open("r")
        assert database.blobs.size(key) == 300_000
        assert len(database.blobs.parts(key)) == 5
        assert bucket.touched() == []

    def test_a_batch_over_many_strata_is_indexed_before_they_are_gone(self, bucket: ColdBucket) -> None:
        """Look-ups of this very handle go on while its strata are on their way into the cold."""
        contents = [content(number) for number in range(400)]
        with bucket.create(stratum_size=16_384, sync_interval_s=0.01) as database:
            with database.batch() as batch:
                for _ in range(3):
                    for one in contents:
                        batch.blobs.put(one)
            assert all(database.blobs.put(one) is not None for one in contents)
            strata = len(bucket.names("data"))
        assert strata > 10
        assert bucket.touched() == []
        assert len(bucket.names("data")) == strata

    def test_a_record_adds_one_run_of_indexes(self, bucket: ColdBucket) -> None:
        with bucket.create(stratum_size=16_384, sync_interval_s=3600) as database:
            with database.batch() as batch:
                batch.blobs.put_many([os.urandom(1000) for _ in range(100)])
            (run,) = database.core.state.index_runs
            assert run.entries == 100
            data = {known.added.id for known in database.core.state.strata.values() if known.added.kind == 1}
            assert set(run.strata) == data
            assert len(data) > 5

    def test_many_entries_do_not_wait_in_memory(self, bucket: ColdBucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("basin.engine.hot_indexes.ENTRIES_HELD", 30)
        most = written = 0
        real, real_write = HotIndexes.add, HotIndexes.write

        def add(self: HotIndexes, identity: Any, entries: Any) -> None:
            nonlocal most
            real(self, identity, entries)
            most = max(most, self._count)

        def write(self: HotIndexes, *arguments: Any) -> Any:
            nonlocal written
            found = real_write(self, *arguments)
            written += found is not None
            return found

        monkeypatch.setattr(HotIndexes, "add", add)
        monkeypatch.setattr(HotIndexes, "write", write)
        with bucket.create(stratum_size=16_384, sync_interval_s=0.01) as database:
            with database.batch() as batch:
                keys = [batch.blobs.put(os.urandom(1000)) for _ in range(300)]
            assert written > 5
            assert all(key in database.blobs for key in keys)
        assert most < 60
        with bucket.open("r") as reader:
            assert all(key in reader.blobs for key in keys)
        assert bucket.touched() == []

    def test_a_commit_that_failed_in_passing_is_indexed_the_next_time(self, bucket: ColdBucket) -> None:
        database = bucket.create(sync_interval_s=3600)
        database.blobs.put(b"a" * 5000)
        database.commit()
        key = database.blobs.put(b"b" * 5000)
        bucket.watched.down = StorageUnavailable("no reply", reason="timeout")
        with pytest.raises(StorageUnavailable):
            database.commit()
        bucket.watched.down = None
        database.commit()
        assert key in bucket.open("r").blobs
        assert bucket.touched() == []

    def test_one_record_removes_no_run_that_cold_strata_need(self, bucket: ColdBucket) -> None:
        with bucket.create() as database:
            keys = []
            for number in range(30):
                keys.append(database.blobs.put(content(number)))
                database.commit()
            state = database.core.state
            covered = {one for run in state.index_runs for one in run.strata}
            assert {known.added.id for known in state.strata.values() if known.added.kind == 1} <= covered
            assert len(state.index_runs) < 10  # They were merged.
        assert all(key in bucket.open("r").blobs for key in keys)
        assert bucket.touched() == []

    def test_a_second_writer_finds_what_the_first_one_put(self, bucket: ColdBucket) -> None:
        first = bucket.create()
        second = bucket.open()
        key = first.blobs.put(b"x" * 5000)
        first.commit()
        second.refresh()
        assert second.blobs.put(b"x" * 5000) == key
        second.commit()
        assert len(bucket.names("data")) == 1
        assert bucket.touched() == []

    def test_a_session_that_died_leaves_what_it_logged_and_is_swept(self, bucket: ColdBucket) -> None:
        dead = bucket.create(job="nightly", sync_interval_s=3600)
        key = dead.blobs.put(b"logged" * 1000)
        dead.commit()
        dead.blobs.put(b"not logged" * 1000)
        with dead.core.contents.mutex:
            dead.core.own_strata.finish_all()  # It is in the bucket, and no record names it.
        assert len(bucket.names("data")) == 2
        dead.core.abandon()
        with bucket.open(job="nightly") as database:
            database["name"] = b"value"
            database.commit()
            assert key in database.blobs
        assert len(bucket.names("data")) == 1
        assert [call for call in bucket.touched() if call.kind != "delete"] == []


def strata_of_data(database: Database) -> set[Any]:
    """Data strata that the log lists."""
    return {known.added.id for known in database.core.state.strata.values() if known.added.kind == StratumKind.DATA}


class TestOwnStrata:
    """What a handle does between finishing a stratum and logging it: look-ups need not wait for the log."""

    def test_what_no_record_names_yet_is_found_in_the_run(self, bucket: ColdBucket) -> None:
        database = bucket.create(stratum_size=16_384, sync_interval_s=3600)
        with database.batch() as batch:
            keys = [batch.blobs.put(os.urandom(1000)) for _ in range(60)]
            with database.core.contents.mutex:
                finished = database.core.own_strata.finish_all()
            assert strata_of_data(database) == set()
            assert all(key in database.blobs for key in keys)
            assert bucket.touched() == []
            (known, *_) = [one for one in finished if one.kind == StratumKind.DATA]
            assert database.core.locator.kind_of(known.id) == StratumKind.DATA

    def test_once_logged_the_strata_themselves_are_not_searched(self, bucket: ColdBucket) -> None:
        database = bucket.create(stratum_size=16_384, sync_interval_s=3600)
        with database.batch() as batch:
            batch.blobs.put_many([os.urandom(1000) for _ in range(60)])
        assert {index.kind for index in database.core.locator.indexes} == {StratumKind.INDEX}
        assert not any(database.core.locator.is_own(one) for one in strata_of_data(database))

    @pytest.mark.parametrize("step", ["finish_all", "landed"])
    def test_a_stratum_stays_in_the_spool_until_its_index_is_stored(
        self, bucket: ColdBucket, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        database = bucket.create(stratum_size=16_384, sync_interval_s=3600)
        own = database.core.own_strata
        contents = [os.urandom(1000) for _ in range(60)]
        with database.batch() as batch:
            keys = [batch.blobs.put(one) for one in contents]
            until = time.monotonic() + 30
            while not any(writer.is_sent() for writer in own._sending):
                assert time.monotonic() < until
                time.sleep(0.001)

            def fail(*_: Any) -> None:
                raise StorageUnavailable("no reply", reason="timeout")

            with monkeypatch.context() as patched, database.core.contents.mutex:
                patched.setattr(HotIndexes, "write", fail)
                with pytest.raises(StorageUnavailable):
                    getattr(own, step)()
            assert database.blobs.get_many(keys) == contents
            assert bucket.touched() == []

    def test_a_run_waits_for_all_that_it_covers(self, bucket: ColdBucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("basin.engine.hot_indexes.ENTRIES_HELD", 20)
        go_on = threading.Event()
        database = bucket.create(stratum_size=16_384, sync_interval_s=3600)
        own = database.core.own_strata
        bucket.watched.script("put", None, lambda: go_on.wait(30))
        with database.batch() as batch:
            while not own._unlogged:  # Until a run was written, of which one stratum is on its way.
                batch.blobs.put(os.urandom(1000))
            with database.core.contents.mutex:
                assert own.landed() == []
            go_on.set()
        (run, *_) = database.core.state.index_runs
        assert set(run.strata) <= strata_of_data(database)
        covered = {one for run in database.core.state.index_runs for one in run.strata}
        assert covered >= strata_of_data(database)

    def test_what_is_taken_over_from_a_dead_session_gets_a_run(self, bucket: ColdBucket) -> None:
        bucket.options = {"data_storage_class": "STANDARD_IA"}
        dead = bucket.create(job="nightly", sync_interval_s=3600)
        key = dead.blobs.put(b"not logged" * 1000)
        with dead.core.contents.mutex:
            dead.core.own_strata.finish_all()
        dead.core.abandon()
        with bucket.open(job="nightly") as database:
            database["name"] = b"value"
            database.commit()
            assert strata_of_data(database)
            bucket.watched.forget()
            assert key in database.blobs
        assert key in bucket.open("r").blobs
        assert bucket.touched() == []


class TestReading:
    def test_what_is_archived_says_so(self, bucket: ColdBucket) -> None:
        with bucket.create() as database:
            key = database.blobs.put(b"cold" * 1000)
            database["name"] = b"cold value" * 1000
        database = bucket.open("r")
        bucket.watched.forget()
        with pytest.raises(GrainNotReady) as found:
            database.blobs[key]
        (name,) = bucket.names("data")
        assert found.value.object == f"data/{name}"
        assert found.value.storage_class == found.value.tier == "GLACIER"
        assert found.value.restore == f"basin thaw data/{name}"
        assert f"`basin thaw data/{name}`" in str(found.value)
        assert [call.kind for call in bucket.touched()] == ["get"]  # Asked once, and not again.
        for read in (
            lambda: database.blobs.get(key),
            lambda: database.blobs.get_many([key, key]),
            lambda: database.blobs.open(key),
            lambda: database.blobs.read(key, 0, 3),
            lambda: database["name"],
            lambda: database.get("name"),
        ):
            with pytest.raises(GrainNotReady):
                read()

    def test_a_part_of_a_large_one_that_was_restored_is_read(self, bucket: ColdBucket) -> None:
        large = os.urandom(200_000)
        with bucket.create(part_max=65_536, part_size=65_536, stratum_size=70_000) as database:
            key = database.blobs.put(large)
        database = bucket.open("r")
        with database.blobs.open(key) as file, pytest.raises(GrainNotReady):
            file.read(10)
        database.thaw([f"{key}-1"])
        assert database.blobs.read(key, 70_000, 70_010) == large[70_000:70_010]

    def test_a_class_that_is_read_at_once_is_read(self, bucket: ColdBucket) -> None:
        bucket.options = {"data_storage_class": "STANDARD_IA"}
        with bucket.create() as database:
            key = database.blobs.put(b"cool" * 1000)
        bucket.watched.forget()
        assert bucket.open("r").blobs[key] == b"cool" * 1000
        assert [call.kind for call in bucket.touched()] == ["get"]

    def test_contents_without_an_index_are_not_called_absent(self, bucket: ColdBucket) -> None:
        """The run of indexes is lost: the stratum's own one would do, and cannot be read."""
        with bucket.create() as database:
            key = database.blobs.put(b"cold" * 1000)
        bucket.watched.store.delete([f"index/{name}" for name in bucket.names("index")])
        database = bucket.open("r")
        with pytest.raises(GrainNotReady):
            _ = key in database.blobs


class TestChecking:
    def test_what_cannot_be_read_now_is_no_damage(self, bucket: ColdBucket) -> None:
        with bucket.create() as database:
            key = database.blobs.put(b"cold" * 1000)
            database["name"] = b"value" * 1000
        (name,) = bucket.names("data")
        database = bucket.open("r")
        for read_data in (True, False):
            (finding,) = database.check(read_data=read_data)
            assert (finding.kind, finding.severity, finding.object) == ("cold", "info", f"data/{name}")
            assert f"`basin thaw data/{name}`" in finding.detail
        database.thaw([key])
        assert list(database.check()) == []

    def test_without_data_nothing_is_read(self, bucket: ColdBucket) -> None:
        with bucket.create() as database:
            database.blobs.put(b"cold" * 1000)
        database = bucket.open("r")
        list(database.check(read_data=False))
        assert {call.kind for call in bucket.touched()} == {"head"}

    @pytest.mark.parametrize(
        ("change", "kind"), [(None, "stratum"), (-1, "truncated"), (1, "extended")], ids=["missing", "short", "long"]
    )
    def test_a_cold_stratum_of_another_length_is_damage(
        self, bucket: ColdBucket, change: int | None, kind: str
    ) -> None:
        with bucket.create() as database:
            database.blobs.put(b"cold" * 1000)
        store = bucket.watched.store
        assert isinstance(store, MemoryObjects)
        (name,) = bucket.names("data")
        bodies = store._place.bodies
        if change is None:
            store.delete([f"data/{name}"])
        else:
            body = bodies[f"data/{name}"]
            bodies[f"data/{name}"] = body[:change] if change < 0 else body + b"x"
        database = bucket.open("r")
        found = [finding for finding in database.check() if finding.severity == "damage"]
        assert [(finding.kind, finding.object) for finding in found if finding.kind != "missing"] == [
            (kind, f"data/{name}")
        ]

    def test_grains_that_an_index_lacks_are_damage_though_they_are_cold(self, bucket: ColdBucket) -> None:
        with bucket.create(stratum_size=16_384) as database:
            with database.batch() as batch:
                batch.blobs.put_many([os.urandom(1000) for _ in range(30)])
            state = database.core.state
            (run,) = state.index_runs
            whole = bucket.watched.store.get(ByteRange(f"index/{run.id}"))
        bucket.watched.store.put(f"index/{run.id}", whole[:-200] + bytes(200))
        database = bucket.open("r")
        kinds = {finding.kind for finding in database.check() if finding.severity == "damage"}
        assert "index" in kinds

    def test_repair_leaves_the_cold_alone(self, bucket: ColdBucket) -> None:
        with bucket.create() as database:
            keys = [database.blobs.put(content(number)) for number in range(3)]
        with bucket.open() as database:
            assert database.repair(dry_run=True) == []
            assert database.repair(dry_run=False) == []
            assert all(key in database.blobs for key in keys)


class TestTiers:
    def test_what_is_cold(self) -> None:
        assert not is_cold(Options())
        assert not is_cold(Options(data_storage_class="STANDARD"))
        assert is_cold(Options(data_url="/elsewhere"))
        assert [name for name in TIERS if is_archived(Options(data_storage_class=name))] == ["GLACIER", "DEEP_ARCHIVE"]
        assert is_cold(Options(data_storage_class="STANDARD_IA"))

    def test_how_long_it_is_paid_for(self) -> None:
        day_s = 86_400
        assert minimum_storage_s(Options()) == 0
        assert minimum_storage_s(Options(data_storage_class="ONEZONE_IA")) == 30 * day_s
        assert minimum_storage_s(Options(data_storage_class="GLACIER_IR")) == 90 * day_s
        assert minimum_storage_s(Options(data_storage_class="DEEP_ARCHIVE")) == 180 * day_s

    def test_what_a_rewrite_costs(self) -> None:
        gib = 1 << 30
        assert rewrite_price(gib, 0, Options(data_storage_class="DEEP_ARCHIVE")) == pytest.approx(0.02)
        assert rewrite_price(0, 1000, Options(data_storage_class="DEEP_ARCHIVE")) == pytest.approx(0.1504)
        assert rewrite_price(gib, 1000, Options()) == pytest.approx(0.0054)

    def test_small_cold_strata_are_not_merged(self, bucket: ColdBucket) -> None:
        database = bucket.create()
        for number in range(SMALL_STRATA_MAX + 1):
            database.blobs.put(content(number))
            database.commit()
        state = database.core.state
        assert len(plan_strata_merge(state)) > SMALL_STRATA_MAX
        assert plan_strata_merge(state, cold_data=True) == []
