"""What a basin in a bucket costs: requests, counted where they leave the process.

A handle's first record costs the probe beside: five rounds of eight conditional puts at once, one late one and two
reads, and one deletion (`test_the_first_write_of_a_handle_costs_a_probe` has the figures). Everything else is counted
with that behind it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from basin.api import Database, open_storage
from basin.storage.counting import CountingObjects
from basin.storage.memory_objects import memory_objects
from basin.storage.probe import RACERS, ROUNDS
from basin.storage.remote import RemoteStorage
from tests.remote.conftest import POLICY, Bucket, record_name

GETS_OF_OPEN = 6


def after_its_probe(bucket: Bucket, **options: Any) -> Database:
    """A handle that has made its first record."""
    opened = bucket.open(**options)
    opened[b"first"] = b"value"
    opened.commit()
    bucket.asked()
    return opened


def fill(bucket: Bucket, commits: int, **options: Any) -> None:
    """A basin with a checkpoint, and `commits` records that no checkpoint holds."""
    with bucket.open(checkpoint_every=1) as db:
        db[b"first"] = b"value"
    before = len(bucket.names("log"))
    writer = bucket.open(checkpoint_every=1 << 20, **options)
    for number in range(commits):
        writer[b"name %d" % number] = b"value"
        writer.commit()
    writer.core.release("a writer that ends without a word")
    assert len(bucket.names("log")) == before + commits
    bucket.asked()


# --- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "w", "c"])
def test_opening_behind_a_checkpoint_costs_at_most_six_gets_and_no_list(bucket: Bucket, mode: str) -> None:
    with bucket.open(checkpoint_every=1) as db:
        for number in range(5):
            db[b"name %d" % number] = b"value"
            db.commit()
    bucket.asked()
    assert len(bucket.open(mode)) == 5
    asked = bucket.asked()
    newest = max(int(name.removeprefix("checkpoint/")) for name in bucket.names("checkpoint"))
    records = [name for name in bucket.names("log") if name > record_name(newest) and name != "log/hint"]
    assert set(asked.counts) == {"get"}
    # What a scan needs comes beside: the only run of names.
    assert asked.counts["get"] - len(asked.named("meta/")) <= GETS_OF_OPEN + len(records)


@pytest.mark.parametrize("commits", [0, 1, 2, 3, 6, 7, 14, 30, 62, 150])
def test_opening_costs_at_most_six_gets_beside_the_records_since_the_checkpoint(bucket: Bucket, commits: int) -> None:
    fill(bucket, commits)
    reader = bucket.open("r")
    asked = bucket.asked()
    position = reader.core.checkpoint_position
    records = reader.refresh() - position
    assert set(asked.counts) == {"get"}
    assert asked.counts["get"] <= GETS_OF_OPEN + records


def test_opening_reads_each_record_once_and_asks_for_three_that_are_not_there_at_most(bucket: Bucket) -> None:
    fill(bucket, 100)
    reader = bucket.open("r")
    asked = bucket.asked()
    read = asked.named("log/0")
    assert len(read) == len(set(read))
    missing = [name for name in read if name > record_name(reader.core.state.position)]
    assert len(missing) <= 3


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_cold_blob_costs_two_gets_and_then_none(bucket: Bucket) -> None:
    with bucket.open() as db:
        keys = db.blobs.put_many([b"%d" % number * 500 for number in range(1000)])
    reader = bucket.open("r")
    bucket.asked()
    assert reader.blobs.get(keys[17]) == b"17" * 500
    assert bucket.asked().counts == {"get": 2}
    assert reader.blobs.get(keys[18]) == b"18" * 500
    assert bucket.asked().counts == {"get": 1}
    for _ in range(10):
        assert reader.blobs[keys[17]] == b"17" * 500
    assert not bucket.asked()


def test_a_cold_blob_costs_one_get_with_a_warm_cache_folder(bucket: Bucket, tmp_path: Path) -> None:
    with bucket.open() as db:
        key = db.blobs.put(b"content" * 1000)
        others = db.blobs.put_many([os.urandom(100) for _ in range(100)])
    with bucket.open("r", cache_folder=tmp_path / "cache") as warming:
        assert len(warming.blobs.get(others[0])) == 100
    reader = bucket.open("r", cache_folder=tmp_path / "cache")
    bucket.asked()
    assert reader.blobs.get(key) == b"content" * 1000
    assert bucket.asked().counts == {"get": 1}


def test_the_writers_cache_folder_is_warm_for_the_next_handle(bucket: Bucket, tmp_path: Path) -> None:
    with bucket.open(cache_folder=tmp_path / "cache", memtable_size=1024) as db:
        db.put_many([(b"name %04d" % number, b"value") for number in range(200)])
        db.commit()
        assert db.core.state.name_runs
    reader = bucket.open("r", cache_folder=tmp_path / "cache")
    bucket.asked()
    assert reader.get(b"name 0100") == b"value"
    assert not bucket.asked()


def test_a_cold_inline_value_in_a_run_costs_two_gets(bucket: Bucket) -> None:
    with bucket.open(checkpoint_every=1) as db:
        db.put_many([(b"name %06d" % number, b"value %d" % number) for number in range(50_000)])
    reader = bucket.open("r")
    assert len(reader.core.state.name_runs) == 1
    bucket.asked()
    assert reader.get(b"name 031415") == b"value 31415"
    assert bucket.asked().counts["get"] <= 2
    assert reader.get(b"name 031415") == b"value 31415"
    assert not bucket.asked()


def test_a_name_that_is_nowhere_costs_nothing_once_the_directory_is_here(bucket: Bucket) -> None:
    with bucket.open(checkpoint_every=1) as db:
        db.put_many([(b"name %06d" % number, b"value") for number in range(1000)])
    reader = bucket.open("r")
    assert b"name 000001" in reader
    bucket.asked()
    assert sum(b"absent %d" % number in reader for number in range(100)) == 0
    assert not bucket.asked()


def test_cold_indexes_of_several_strata_are_one_round_of_gets_and_then_free(bucket: Bucket) -> None:
    with bucket.open() as db:
        keys = []
        for number in range(3):
            keys.append(db.blobs.put(os.urandom(1000 + number)))
            db.commit()
    reader = bucket.open("r")
    bucket.asked()
    assert reader.blobs.get(keys[0]) is not None
    assert bucket.asked().counts["get"] <= 3 + 1
    assert reader.blobs.get(keys[1]) is not None
    assert bucket.asked().counts == {"get": 1}


def test_many_blobs_are_read_in_merged_ranges(bucket: Bucket) -> None:
    with bucket.open() as db:
        contents = [os.urandom(200) for _ in range(10_000)]
        keys = db.blobs.put_many(contents)
    reader = bucket.open("r")
    bucket.asked()
    assert reader.blobs.get_many(keys) == contents
    assert bucket.asked().counts["get"] <= 4
    assert reader.blobs.get_many(keys[:1000]) == contents[:1000]
    assert not bucket.asked()


def test_many_blobs_are_merged_up_to_ranges_of_eight_mib(bucket: Bucket) -> None:
    with bucket.open() as db:
        contents = [os.urandom(64 << 10) for _ in range(400)]
        keys = db.blobs.put_many(contents)
    reader = bucket.open("r")
    bucket.asked()
    assert reader.blobs.get_many(keys) == contents
    asked = bucket.asked()
    assert 4 <= len(asked.named("data/", "get")) <= 6  # 25 MiB, and the index.


# --- writing --------------------------------------------------------------------------------------------------------


def test_the_first_write_of_a_handle_costs_a_probe(bucket: Bucket) -> None:
    with bucket.open():
        pass
    db = bucket.open()
    bucket.asked()
    db[b"name"] = b"value"
    db.commit()
    asked = bucket.asked()
    probing = [one for one in asked if one.name.startswith("tmp/probe-")]
    kinds = [one.kind for one in probing]
    assert kinds.count("put_new") == ROUNDS * (RACERS + 1)
    assert kinds.count("get") == 2 * ROUNDS
    assert set(kinds) <= {"put_new", "get", "delete"}
    assert [(one.kind, one.name) for one in asked if one not in probing] == [("put_new", record_name(2 + 1))]
    assert not bucket.names("tmp")


def test_a_commit_of_small_values_is_one_put(bucket: Bucket) -> None:
    db = after_its_probe(bucket)
    for number in range(3):
        db.put_many([(b"name %d" % one, b"value %d" % number) for one in range(100)])
        db.commit()
        assert bucket.asked().counts == {"put_new": 1}


def test_a_commit_with_contents_is_two_puts(bucket: Bucket) -> None:
    db = after_its_probe(bucket)
    for number in range(3):
        db[b"large %d" % number] = os.urandom(10_000)
        db.blobs.put(os.urandom(10_000))
        db.commit()
        assert bucket.asked().counts == {"put": 1, "put_new": 1}


def test_a_commit_of_ten_thousand_blobs_is_at_most_four_puts(bucket: Bucket) -> None:
    db = after_its_probe(bucket)
    db.blobs.put_many([os.urandom(100) for _ in range(10_000)])
    db.commit()
    counts = bucket.asked().counts
    assert set(counts) <= {"put", "put_new"}
    assert counts.total() <= 4


def test_a_content_that_is_there_is_not_sent_again(bucket: Bucket) -> None:
    db = after_its_probe(bucket)
    content = os.urandom(100_000)
    db.blobs.put(content)
    db.commit()
    bucket.asked()
    db.blobs.put(content)
    db.commit()
    counts = bucket.asked().counts
    # The index of what this handle sent itself is read back, once.
    assert counts in ({"put_new": 1}, {"put_new": 1, "get": 1})
    db.blobs.put(content)
    db.commit()
    assert bucket.asked().counts == {"put_new": 1}


def test_closing_is_one_put(bucket: Bucket) -> None:
    db = after_its_probe(bucket)
    db.close()
    assert bucket.asked().counts == {"put_new": 1}


def test_closing_a_reader_costs_nothing(bucket: Bucket) -> None:
    after_its_probe(bucket).close()
    reader = bucket.open("r")
    bucket.asked()
    reader.close()
    assert not bucket.asked()


# --- doing nothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "w"])
def test_an_idle_handle_asks_for_nothing(bucket: Bucket, mode: str) -> None:
    after_its_probe(bucket).close()
    options: dict[str, Any] = {"sync_interval_s": 0.01} if mode == "w" else {}
    db = bucket.open(mode, **options)
    if mode == "w":
        db[b"name"] = b"value"
        db.commit()
    bucket.asked()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        assert db.get(b"first") == b"value"
        assert b"absent" not in db
        time.sleep(0.02)
    assert not bucket.asked()


def test_a_handle_that_polls_asks_for_the_next_record_alone(bucket: Bucket) -> None:
    writer = after_its_probe(bucket)
    reader = bucket.open("r", actor="reader", refresh_interval_s=0.05)
    for number in range(4):
        writer[b"name"] = b"%d" % number
        writer.commit()
        reader.refresh()
        bucket.asked()
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            assert reader.get(b"name") == b"%d" % number
            time.sleep(0.005)
        polled = bucket.asked()
        assert {(one.kind, one.name) for one in polled} == {("get", record_name(writer.core.state.position + 1))}
        assert len(polled) <= 4


def test_a_handle_that_polls_sees_what_others_commit_by_itself(bucket: Bucket) -> None:
    writer = after_its_probe(bucket)
    reader = bucket.open("r", actor="reader", refresh_interval_s=0.05)
    lazy = bucket.open("r")
    writer[b"first"] = b"changed"
    writer.commit()
    until = time.monotonic() + 5
    while reader.get(b"first") != b"changed":
        assert time.monotonic() < until
        time.sleep(0.01)
    assert lazy.get(b"first") == b"value"


def test_a_refresh_without_news_is_one_get(bucket: Bucket) -> None:
    db = after_its_probe(bucket)
    db.refresh()
    asked = bucket.asked()
    assert [(one.kind, one.name) for one in asked] == [("get", record_name(db.core.state.position + 1))]


# --- figures --------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_handle_are_those_of_the_store_below(bucket: Bucket, request: pytest.FixtureRequest) -> None:
    store = CountingObjects(memory_objects(f"memory://{request.node.name}"))
    with open_storage(RemoteStorage(store, POLICY), "memory://place", secret=bucket.secret) as db:
        db.blobs.put_many([os.urandom(1000) for _ in range(100)])
        db[b"name"] = b"value"
        db.commit()
        db.refresh()
        figures = db.stats()["requests"]
        counts = {str(kind): count for kind, count in store.counts.items()}
        assert figures == {**counts, "bytes_in": store.bytes_in, "bytes_out": store.bytes_out}
    assert figures["bytes_out"] > 100_000
