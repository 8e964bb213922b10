"""Readers of a bucket that are behind: what they know of was merged away and deleted, and they find it all the same."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

import basin
from basin.api import Database
from basin.engine import upkeep
from basin.errors import ObjectMissing, PositionGone
from basin.storage.memory_objects import memory_objects

NAMES = {b"%04d" % number: b"value %d" % number * 3 for number in range(400)}


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


def opened(url: str, mode: Any = "c", **options: Any) -> Database:
    return basin.open(url, mode=mode, profile="open", grace_s=0.0, sync_interval_s=3600.0, **options)


@pytest.fixture
def writer(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """Flushes often, merges what it can, and keeps nothing that it merged away."""
    monkeypatch.setattr(upkeep, "KEPT_DELETED_MIN", 1)
    with opened(url, checkpoint_every=10, memtable_size=4096) as db:
        yield db


def write(db: Database, names: dict[bytes, bytes]) -> None:
    for name, value in names.items():
        db[name] = value
        db.commit()


def first(names: dict[bytes, bytes], count: int) -> dict[bytes, bytes]:
    return dict(list(names.items())[:count])


def gone(url: str, db: Database) -> bool:
    """Whether a run of names that the handle knows of is no longer in the bucket."""
    stored = {found.name for found in memory_objects(url).list("meta").objects}
    return any(str(run.id.hex()) not in stored for run in db.core.state.name_runs)


def test_a_reader_that_is_behind_finds_names_in_what_their_runs_were_merged_into(url: str, writer: Database) -> None:
    write(writer, first(NAMES, 60))
    reader = opened(url, "r")
    assert reader.core.state.name_runs
    write(writer, NAMES)
    assert gone(url, reader)
    position = reader.core.state.position
    assert reader[b"0007"] == NAMES[b"0007"]
    assert reader.core.state.position > position
    reader.close()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_goes_on_where_its_runs_were_merged_away(
    url: str, writer: Database, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basin.storage.pieces._MEMORY_MAX", 0)  # Each block is read when the scan comes to it.
    write(writer, first(NAMES, 300))
    reader = opened(url, "r")
    scan = reader.scan(reverse=reverse)
    seen = [next(scan)]
    write(writer, dict.fromkeys(NAMES, b"newer"))
    assert gone(url, reader)
    seen += list(scan)
    assert seen == sorted(first(NAMES, 300).items(), reverse=reverse)
    reader.close()


def test_a_view_shows_its_position_after_its_runs_were_merged_away(url: str, writer: Database) -> None:
    write(writer, first(NAMES, 60))
    reader = opened(url, "r")
    with reader.view() as view:
        write(writer, dict.fromkeys(NAMES, b"newer"))
        assert gone(url, reader)
        assert view[b"0007"] == NAMES[b"0007"]
        assert dict(view) == first(NAMES, 60)
    reader.close()


def test_a_view_below_the_history_floor_is_gone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "KEPT_DELETED_MIN", 1)
    monkeypatch.setattr("basin.engine.state._MARK_EVERY_MS", 0)
    with opened(url, checkpoint_every=10, memtable_size=4096, history_s=0.0) as writer, opened(url, "r") as reader:
        write(writer, first(NAMES, 60))
        reader.refresh()
        with reader.view() as view:
            write(writer, dict.fromkeys(NAMES, b"newer"))
            assert gone(url, reader)
            with pytest.raises(PositionGone):
                dict(view)


def test_a_run_that_is_simply_missing_is_reported(url: str, writer: Database) -> None:
    write(writer, first(NAMES, 60))
    runs = [f"meta/{run.id.hex()}" for run in writer.core.state.name_runs]
    memory_objects(url).delete(runs)
    with opened(url, "r") as reader, pytest.raises(ObjectMissing):
        dict(reader)


def test_contents_are_found_where_their_strata_were_merged_into(url: str, writer: Database) -> None:
    keys = []
    for number in range(4):
        keys.append(writer.blobs.put(b"content %d " % number * 100))
        writer.commit()
    reader = opened(url, "r")
    reader.core.locator.settle()
    for number in range(40):
        keys.append(writer.blobs.put(b"other %d " % number * 100))
        writer.commit()
    stored = {found.name for found in memory_objects(url).list("data").objects}
    assert any(identity.hex() not in stored for identity in reader.core.state.strata)
    assert reader.blobs[keys[0]] == b"content 0 " * 100
    assert reader.blobs.get_many(keys[:4]) == [b"content %d " % number * 100 for number in range(4)]
    assert reader.blobs[keys[-1]] == b"other 39 " * 100
    reader.close()
