"""Compaction and prune: what is needed stays, byte for byte; what is not goes; nobody in between loses anything.

Longer than 600 lines: all of it runs on the same four kinds of basins, and looks at them in the same ways.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.api import Database
from basin.engine import compaction
from basin.engine import core as core_module
from basin.engine.collect import Pruner
from basin.engine.recovery import revoke
from basin.errors import BasinPoisoned, Conflict, PositionGone, StorageError
from basin.format.layout import MIB, StratumKind
from basin.format.record import Condemn, Kill, Record
from basin.terms import StratumId
from basin.testing.disk import SimulatedDisk
from basin.testing.faults import Fault, FaultStorage, Killed, Plan, no_fault, nth_call
from basin.testing.simulated import SimulatedStorage
from tests.engine.crash_story import Story, prepared, scattered

SECRET = basin.Secret.generate()
OPTIONS: dict[str, Any] = {"stratum_size": 256 << 10, "history_s": 0.0, "history_size": 0, "part_max": MIB}
TINY: dict[str, Any] = {"stratum_size": 4096, "history_s": 0.0}
Open = Callable[..., Database]


@pytest.fixture(params=["disk", "disk, encrypted", "bucket", "bucket, encrypted"])
def reopened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens handles on one basin, which are closed in the end."""
    where, _, encrypted = request.param.partition(", ")
    url = str(tmp_path / "basin") if where == "disk" else f"memory://{uuid.uuid4().hex}"
    handles: list[Database] = []

    def call(mode: str = "c", **options: Any) -> Database:
        kind: dict[str, Any] = {"secret": SECRET} if encrypted else {"profile": "open" if mode == "c" else None}
        db = basin.open(url, mode, **kind, **{**OPTIONS, "refresh_interval_s": 0.0, **options})  # type: ignore[arg-type]  # a mode
        handles.append(db)
        return db

    yield call
    for db in handles:
        db.close()


def churn(
    db: Database, rng: random.Random, rounds: int = 12
) -> tuple[dict[bytes, bytes], dict[basin.ContentKey, bytes]]:
    """Puts, overwrites, deletes of single names and of ranges; small and large blobs. Returns what must be there."""
    names: dict[bytes, bytes] = {}
    blobs: dict[basin.ContentKey, bytes] = {}
    for number in range(rounds):
        with db.batch() as batch:
            for _ in range(40):
                name = b"name-%03d" % rng.randrange(150)
                if name in names and rng.random() < 0.3:
                    batch.delete(name)
                    del names[name]
                else:
                    batch[name] = names[name] = rng.randbytes(rng.choice([10, 700, 5000]))
        content = rng.randbytes(rng.choice([3000, 3 * MIB]))
        blobs[db.blobs.put(content)] = content
        if number % 3:
            key = rng.choice(list(blobs))
            db.blobs.delete(key)
            del blobs[key]
        if number == rounds // 2:
            db.delete_range(b"name-02", b"name-05")
            names = {name: value for name, value in names.items() if not b"name-02" <= name < b"name-05"}
        db.commit()
    return names, blobs


def require_all(db: Database, names: dict[bytes, bytes], blobs: dict[basin.ContentKey, bytes]) -> None:
    assert dict(db.items()) == names
    assert set(db.blobs) == set(blobs)
    for key, content in blobs.items():
        assert db.blobs[key] == content
    assert [finding for finding in db.check() if finding.severity != "info"] == []


def bytes_of_contents(db: Database) -> int:
    names = {run.id for run in db.core.state.name_runs}
    return sum(
        known.added.length
        for identity, known in db.core.state.strata.items()
        if known.added.kind != StratumKind.INDEX and identity not in names and not known.condemned
    )


def files_of(db: Database) -> set[str]:
    return {f"{folder}/{name}" for folder in ("data", "meta", "index") for name in db.core.storage.list(folder)}


def files_in_state(db: Database) -> set[str]:
    folders = {StratumKind.DATA: "data", StratumKind.META: "meta", StratumKind.INDEX: "index"}
    return {f"{folders[StratumKind(known.added.kind)]}/{one}" for one, known in db.core.state.strata.items()}


def test_a_prune_keeps_what_is_needed_and_nothing_else(reopened: Open, rng: random.Random) -> None:
    db = reopened()
    names, blobs = churn(db, rng)
    before = bytes_of_contents(db)
    report = db.compact(grace_s=0)
    assert report.problems == []
    require_all(db, names, blobs)
    needed = sum(map(len, blobs.values())) + sum(len(value) for value in names.values() if len(value) > 512)
    assert bytes_of_contents(db) <= 1.25 * needed < before
    assert files_of(db) <= files_in_state(db) | {
        f"{folder}/{one}" for one in db.core.state.retired for folder in ("data", "meta", "index")
    }
    db.close()
    require_all(reopened("w"), names, blobs)


def test_a_second_prune_has_nothing_to_do(reopened: Open, rng: random.Random) -> None:
    db = reopened()
    churn(db, rng, rounds=6)
    db.compact(grace_s=0)
    again = db.compact(grace_s=0)
    assert not {step.kind for step in again.steps} & {"condemn", "rewrite", "kill", "merge-strata", "merge-names"}


def test_what_is_condemned_stays_for_the_grace_and_comes_back_when_it_is_put_again(reopened: Open) -> None:
    db = reopened()
    contents = [random.Random(number).randbytes(20_000) for number in range(30)]
    keys = [db.blobs.put(content) for content in contents]
    db.commit()
    for key in keys:
        db.blobs.delete(key)
    db.commit()
    report = db.compact(grace_s=3600)
    assert report.bytes_condemned > 500_000
    assert report.files_deleted == 0
    stored = db.stats()["written"]["bytes_new"]
    assert db.blobs.put(contents[3]) == keys[3]
    db.commit()
    assert db.stats()["written"]["bytes_new"] == stored
    db.compact(grace_s=0)
    assert db.blobs[keys[3]] == contents[3]
    assert keys[4] not in db.blobs
    assert list(db.check()) == []


@pytest.mark.parametrize("between", ["condemned", "killed"])
def test_an_open_batch_loses_nothing_without_being_told(reopened: Open, between: str) -> None:
    db, other = reopened(), reopened("w")
    content = random.Random(1).randbytes(50_000)
    key = db.blobs.put(content)
    db.commit()
    other.refresh()
    batch = other.batch()
    batch.__enter__()
    batch[b"found"] = basin.Ref(batch.blobs.put(content, root=False))
    db.blobs.delete(key)
    db.commit()
    db.compact(grace_s=0 if between == "killed" else 3600)
    other.refresh()
    try:
        batch.__exit__(None, None, None)
    except Conflict as conflict:
        told = conflict.fields["content_keys"]
    else:
        told = []
    if told:
        assert (between, told) == ("killed", [key])
        assert b"found" not in other
    else:
        assert other[b"found"] == content
        db.compact(grace_s=0)
        other.refresh()
        assert other[b"found"] == content


def test_a_batch_that_goes_on_keeps_what_it_put_itself(reopened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "KEEP_BATCHES_S", 0.0)
    db, other = reopened(), reopened("w", sync_interval_s=3000.0)
    contents = [random.Random(number).randbytes(60_000) for number in range(20)]
    with other.batch() as batch:
        keys = [batch.blobs.put(content) for content in contents]
        other[b"commits what is full"] = b""
        other.commit()
        db.compact(grace_s=3600)
        assert db.core.state.condemns
        other.core._keep_batches()
        db.refresh()
        assert not db.core.state.condemns
    db.compact(grace_s=0)
    other.refresh()
    assert [other.blobs[key] for key in keys] == contents


@pytest.mark.parametrize("how", ["rolled back", "conflict"])
def test_a_parent_of_a_batch_that_lost_is_logged_with_what_it_links_to(reopened: Open, how: str) -> None:
    db, other = reopened(), reopened("w")
    child_content = random.Random(5).randbytes(50_000)
    child = db.blobs.put(child_content)
    db[b"read"] = b"1"
    db.commit()
    other.refresh()
    transaction = other.transaction()
    transaction.__enter__()
    transaction.get(b"read")
    parent = transaction.blobs.put(b"parent", links=[child], root=False)
    transaction[b"lost"] = basin.Ref(parent)
    db.blobs.delete(child)
    db[b"read"] = b"2"
    db.commit()
    db.compact(grace_s=3600)
    if how == "conflict":
        with pytest.raises(Conflict):
            transaction.__exit__(None, None, None)
    else:
        transaction.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    other[b"later"] = b"this logs the parent"
    other.commit()
    db.compact(grace_s=0)
    try:
        db[b"found"] = basin.Ref(parent)
    except KeyError:
        return  # It was not logged at all.
    db.commit()
    db.compact(grace_s=0)
    assert db.blobs[child] == child_content


def test_what_a_dead_parent_links_to_stays_as_long_as_the_parent(reopened: Open) -> None:
    db = reopened()
    kept = [db.blobs.put(random.Random(number).randbytes(20_000)) for number in range(30)]
    for number in range(0, 30, 2):
        db.blobs.put(b"parent %d" % number, links=kept[number : number + 2])
    child = db.blobs.put(b"child" * 100, root=False)
    parent = db.blobs.put(b"dead parent", links=[child])
    db.commit()
    db.blobs.delete(parent)
    db.commit()
    db.compact(grace_s=0)
    assert parent in db.blobs  # Too little to write its stratum anew.
    db[b"found"] = basin.Ref(parent)
    db.commit()
    db.compact(grace_s=0)
    assert db.blobs[child] == b"child" * 100


def test_a_view_below_the_floor_says_so_where_its_contents_are_gone(reopened: Open) -> None:
    with reopened(history_s=0.0, history_size=0) as db:
        db[b"name"] = random.Random(1).randbytes(9000)
        db.commit()
        with reopened("r", history_s=0.0) as reader, reader.view() as view:
            assert b"name" in view
            key = view.ref(b"name")
            assert key is not None
            db[b"name"] = random.Random(2).randbytes(9000)
            db.commit()
            for _ in range(2):
                db.compact(grace_s=0)
            for read in (
                lambda: view[b"name"],
                lambda: view.get_many([b"name"]),
                lambda: list(view.scan()),
                lambda: view.blobs[key],
                lambda: view.blobs.get(key, b"default"),
                lambda: view.blobs.get_many([key]),
            ):
                if db.core.is_remote:
                    with pytest.raises(PositionGone):
                        read()
                else:
                    with contextlib.suppress(PositionGone):  # A stratum that is still appended to may stay.
                        assert read() != b"default"
            assert reader[b"name"] == random.Random(2).randbytes(9000)


def test_old_positions_are_read_or_gone(reopened: Open) -> None:
    db = reopened()
    reader = reopened("r")
    old = random.Random(1).randbytes(9000)
    db[b"name"] = old
    pinned = db.pin("before")
    for number in range(5):
        db[b"name"] = random.Random(10 + number).randbytes(9000)
        db.commit()
    reader.refresh()
    view = reader.view()
    newest = view[b"name"]
    db.compact(grace_s=0)
    assert db.at(pinned)[b"name"] == old
    assert view[b"name"] == newest
    db.unpin("before")
    db[b"name"] = b"new"
    db.commit()
    db.compact(grace_s=0)
    with pytest.raises(PositionGone):
        db.at(pinned)
    with contextlib.suppress(PositionGone):
        assert view[b"name"] == newest
    assert db.pins() == {}


def test_copies_of_one_content_end_as_one(reopened: Open) -> None:
    one, two = reopened(), reopened("w")
    contents = [random.Random(number).randbytes(30_000) for number in range(20)]
    with one.batch() as first, two.batch() as second:
        for content in contents:
            first.blobs.put(content)
            second.blobs.put(content)
    one.refresh()
    assert bytes_of_contents(one) > 1.9 * 600_000
    one.compact(grace_s=0)
    assert bytes_of_contents(one) < 1.2 * 600_000
    assert sorted(one.blobs.get_many(list(one.blobs))) == sorted(contents)


def test_writers_readers_and_two_compactors_at_once(reopened: Open) -> None:
    handles = [reopened(), reopened("w"), reopened("w"), reopened("w")]
    stop = threading.Event()
    failures: list[BaseException] = []
    models: list[dict[bytes, bytes]] = [{}, {}]

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  # told below
                failures.append(error)
                stop.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def write(number: int) -> None:
        db, model, rng = handles[number], models[number], random.Random(number)
        pool = [random.Random(seed).randbytes(3000) for seed in range(30)]  # both writers put the same contents
        while not stop.is_set():
            name = b"%d-%d" % (number, rng.randrange(20))
            try:
                if name in model and rng.random() < 0.4:
                    with db.batch() as batch:
                        del batch[name]
                    del model[name]
                else:
                    value = rng.choice(pool)
                    with db.batch() as batch:
                        batch[name] = value
                    model[name] = value
            except Conflict:
                continue

    def compact(number: int) -> None:
        while not stop.is_set():
            assert handles[number].compact(grace_s=0).problems == []

    threads = [
        guarded(lambda: write(0)),
        guarded(lambda: write(1)),
        guarded(lambda: compact(2)),
        guarded(lambda: compact(3)),
    ]
    stop.wait(2.0)
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    handles[0].refresh()
    assert dict(handles[0].items()) == {**models[0], **models[1]}
    assert list(handles[0].check()) == []


def test_an_interrupted_compaction_leaks_nothing(reopened: Open, rng: random.Random) -> None:
    db = reopened()
    names, blobs = churn(db, rng, rounds=6)
    db.close()
    for limit in range(1, 40, 4):
        compactor = reopened("w", job="compactor")
        steps = iter(range(limit))

        def interrupted(_progress: Any, steps: Iterator[int] = steps) -> None:
            if next(steps, None) is None:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compaction, "_PROGRESS_EVERY_S", 0.0)
            try:
                compactor.compact(grace_s=0, progress=interrupted)
            except KeyboardInterrupt:
                compactor.core.release("killed")
            else:
                compactor.close()
                break
    last = reopened("w", job="compactor")
    assert last.compact(grace_s=0).problems == []
    require_all(last, names, blobs)
    retired = {f"{folder}/{one}" for one in last.core.state.retired for folder in ("data", "meta", "index")}
    assert files_of(last) <= files_in_state(last) | retired


def test_it_stops_when_told_and_keeps_the_rate(reopened: Open, rng: random.Random) -> None:
    db = reopened()
    names, blobs = churn(db, rng, rounds=6)
    stop = threading.Event()
    stop.set()
    assert db.compact(stop=stop).stopped
    report = db.compact(grace_s=0, rate=20 * MIB)
    assert report.seconds >= 0.9 * report.bytes_processed / (20 * MIB)
    require_all(db, names, blobs)


def test_a_damaged_parent_stops_a_prune(tmp_path: Path) -> None:
    with basin.open(tmp_path / "basin", profile="open", **OPTIONS) as db:
        db.blobs.put(random.Random(1).randbytes(3 * MIB))
        dead = db.blobs.put(random.Random(2).randbytes(3 * MIB))
        db.commit()
        db.blobs.delete(dead)
    names = set(db.core.state.name_runs)
    for path in (tmp_path / "basin" / "meta").iterdir():
        if path.name not in {str(run.id) for run in names}:
            data = bytearray(path.read_bytes())
            data[150:170] = bytes(20)
            path.write_bytes(data)
    with basin.open(tmp_path / "basin", "w", **OPTIONS) as db:
        before = files_of(db)
        report = db.compact(grace_s=0)
        assert report.problems
        assert report.bytes_condemned == 0
        assert {file for file in before if file.startswith("data/")} <= files_of(db)


@pytest.mark.parametrize("what", ["the same again", "a parent of it, whose batch loses"])
def test_what_was_relied_on_since_the_mark_is_not_condemned(
    reopened: Open, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    db, other = reopened(), reopened("w")
    key = db.blobs.put(b"x" * 2000)
    db.commit()
    db.blobs.delete(key)
    db.commit()
    other.refresh()
    append = Pruner._append_condemn

    def put_first(self: Pruner, *arguments: Any) -> bool:
        with contextlib.suppress(ZeroDivisionError), other.batch() as batch:
            if what == "the same again":
                batch.blobs.put(b"x" * 2000)
            else:
                batch.blobs.put(b"parent" * 100, links=[key], root=False)
                raise ZeroDivisionError
        other[b"logged"] = b"with what landed"
        other.commit()
        return append(self, *arguments)

    monkeypatch.setattr(Pruner, "_append_condemn", put_first)
    db.compact(grace_s=3600)
    assert not db.core.state.condemns
    assert db.blobs[key] == b"x" * 2000
    assert list(db.check()) == []


def test_what_has_expired_goes_an_hour_later(reopened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms = [time.time_ns() // 1_000_000]
    monkeypatch.setattr("time.time_ns", lambda: now_ms[0] * 1_000_000)
    db = reopened()
    values = [random.Random(number).randbytes(9000) for number in range(20)]
    for number, value in enumerate(values):
        db.put(b"%02d" % number, value, ttl=60 if number % 2 else 7200)
    db.commit()
    stays = {b"%02d" % number: value for number, value in enumerate(values) if not number % 2}
    now_ms[0] += 61_000
    db.compact(grace_s=0)
    assert dict(db.items()) == stays
    assert bytes_of_contents(db) > 180_000
    now_ms[0] += 3_600_000
    db.compact(grace_s=0)
    require_all(db, stays, {})
    assert bytes_of_contents(db) < 110_000


def test_the_grace_counts_from_the_condemn(reopened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms = [time.time_ns() // 1_000_000]
    monkeypatch.setattr("time.time_ns", lambda: now_ms[0] * 1_000_000)
    db = reopened()
    key = db.blobs.put(b"x" * 20_000)
    db.commit()
    db.blobs.delete(key)
    db.compact(grace_s=60)
    (condemned,) = [one for one, known in db.core.state.strata.items() if known.condemned]
    now_ms[0] += 59_000
    db.compact(grace_s=60)
    assert f"data/{condemned}" in files_of(db)
    assert db.core.state.strata[condemned].condemned
    now_ms[0] += 2_000
    db.compact(grace_s=60)
    assert condemned not in db.core.state.strata
    now_ms[0] += 61_000
    db.compact(grace_s=60)
    assert f"data/{condemned}" not in files_of(db)


def retired_files(db: Database) -> set[str]:
    return {f"{folder}/{one}" for one in db.core.state.retired for folder in ("data", "meta", "index")}


def condemn(db: Database, identity: StratumId) -> bool:
    return db.core.append(lambda now: Record(condemned=[Condemn(now.position, [identity])]))


def kill(db: Database) -> bool:
    return db.core.append(
        lambda now: (
            Record(killed=[Kill(at, list(listed)) for at, listed in now.condemns.items()]) if now.condemns else None
        )
    )


def test_a_dead_writers_parent_is_adopted_only_with_what_it_links_to(reopened: Open) -> None:
    with reopened(sync_interval_s=3600.0) as founder:
        child = founder.blobs.put(b"child" * 300, root=False)
    dying, db = reopened("w", sync_interval_s=3600.0), reopened("w", sync_interval_s=3600.0)
    db[b"x"] = b"y"
    db.commit()
    place = db.core.locator.find(db.core.keyring.grain_keys.grain_key(child.digest))
    assert place is not None
    parent = dying.blobs.put(b"parent" * 300, links=[child])
    dying.core.own_strata.finish_all()  # What a commit writes before its record: the process dies in between.
    session = dying.core.session
    assert session
    assert condemn(db, place.stratum)
    assert kill(db)
    dying.core.release("killed")
    revoke(db.core, session)
    with pytest.raises(KeyError):
        db[b"found"] = basin.Ref(parent)
    assert [file for file in files_of(db) - files_in_state(db) if file.startswith("meta/")]
    db.compact(grace_s=0)
    assert files_of(db) <= files_in_state(db) | retired_files(db)
    assert list(db.check()) == []


def test_a_dead_writers_parent_revives_what_it_links_to(reopened: Open) -> None:
    with reopened(sync_interval_s=3600.0) as founder:
        child = founder.blobs.put(b"child" * 300, root=False)
    dying, db = reopened("w", sync_interval_s=3600.0), reopened("w", sync_interval_s=3600.0)
    db[b"x"] = b"y"
    db.commit()
    place = db.core.locator.find(db.core.keyring.grain_keys.grain_key(child.digest))
    assert place is not None
    parent = dying.blobs.put(b"parent" * 300, links=[child])
    dying.core.own_strata.finish_all()
    session = dying.core.session
    assert session
    assert condemn(db, place.stratum)
    dying.core.release("killed")
    revoke(db.core, session)
    assert not kill(db)
    db[b"found"] = basin.Ref(parent)
    db.commit()
    db.compact(grace_s=0)
    assert db.blobs[child] == b"child" * 300


@pytest.mark.parametrize("killed", [False, True], ids=["condemned", "killed"])
def test_a_found_parent_keeps_what_it_was_put_with(reopened: Open, killed: bool) -> None:
    def put(links: list[basin.ContentKey], *, content: bytes = b"parent" * 300) -> basin.ContentKey:
        with reopened(sync_interval_s=3600.0) as writer:
            return writer.blobs.put(content, links=links, root=False)

    with reopened(sync_interval_s=3600.0):
        pass
    one, two = put([], content=b"one" * 300), put([], content=b"two" * 300)
    put([one])
    with reopened("r") as reader:
        before = set(reader.core.state.strata)
    put([two])
    writer, db = reopened("w", sync_interval_s=3600.0), reopened("w", sync_interval_s=3600.0)
    parents = [
        identity
        for identity, known in writer.core.state.strata.items()
        if identity not in before and known.added.kind == StratumKind.META
    ]
    assert len(parents) == 1
    parent = writer.blobs.put(b"parent" * 300, links=[two])
    assert condemn(db, parents[0])
    if killed:
        assert kill(db)
        with pytest.raises(Conflict) as told:
            writer.commit()
        assert told.value.fields["content_keys"] == [parent]
    else:
        writer.commit()
        assert not kill(db)
        db.compact(grace_s=0)
        assert db.blobs[two] == b"two" * 300


def test_a_reader_of_any_position_gets_what_was_there_or_is_told(reopened: Open) -> None:
    """Each commit writes one value under two names: a reader must find them equal, and those of its position."""
    writer, compactor, reader = reopened(), reopened("w"), reopened("w")
    values: dict[int, bytes] = {}
    failures: list[BaseException] = []
    stop = threading.Event()

    def require(names: basin.View, expected: bytes | None = None) -> None:
        found = names[b"one"]
        assert found == names[b"two"]
        assert expected is None or found == expected

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:  # noqa: BLE001  # told below
                failures.append(error)
                stop.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def write() -> None:
        value = random.Random(len(values)).randbytes(3000)
        with writer.batch() as batch:
            batch[b"one"] = value
            batch[b"two"] = value
        values[batch.position] = value

    def compact() -> None:
        assert compactor.compact(grace_s=0).problems == []

    counts = Counter[str]()

    def read() -> None:
        reader.refresh()
        view = reader.view()
        try:
            position = reader.pin("reader")
        except PositionGone:  # The floor was raised just then.
            view.close()
            return
        pinned = reader.at(position)
        for _ in range(3):
            require(pinned, values.get(position))
            try:
                require(view)
            except PositionGone:
                counts["gone"] += 1
            else:
                counts["read"] += 1
            time.sleep(0.005)
        view.close()
        pinned.close()
        reader.unpin("reader")
        with contextlib.suppress(PositionGone):
            old = random.choice(list(values))
            require(reader.at(old), values[old])

    write()
    threads = [guarded(write), guarded(compact), guarded(read)]
    stop.wait(2.0)
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert counts["read"] > 5


def _churned(story: Story) -> None:
    for number in range(3):
        with story.open() as database:
            gone = scattered(f"gone {number}", 900), scattered(f"gone, in parts {number}", 5000)
            names = {f"{number}-{at}".encode(): scattered(f"{number}.{at}", 300) for at in range(4)}
            story.put(database, names, scattered(f"stays {number}", 900), scattered(f"in parts {number}", 5000), *gone)
            story.delete(database, f"{number}-0".encode(), contents=gone)


@pytest.mark.parametrize("fault", [Fault.KILL, Fault.EIO, Fault.SYNC_LOST])
def test_a_compaction_that_fails_at_any_storage_call_loses_and_leaks_nothing(fault: Fault) -> None:
    image, start = prepared(_churned, **TINY)

    def compact(plan: Plan) -> tuple[FaultStorage, Story]:
        story = Story(start, **TINY)
        story.begin(SimulatedDisk.from_image(image, boot=1))
        storage = FaultStorage(SimulatedStorage(story.disk), plan)
        with contextlib.suppress(Killed, StorageError, BasinPoisoned):
            with story.open(storage) as database:
                report = database.compact(grace_s=0)
                assert storage.fired or report.bytes_freed > 10_000
            assert fault != Fault.KILL or not storage.fired
        storage.close()
        return storage, story

    numbers = [
        number for number, (operation, _) in enumerate(compact(no_fault)[0].history, 1) if fault.applies_to(operation)
    ]
    assert len(numbers) > 10
    fired = 0
    for number in numbers[:: max(1, len(numbers) // 60)]:
        storage, story = compact(nth_call(fault, number))
        fired += storage.fired
        with story.open() as database:
            assert database.compact(grace_s=0).problems == [], number
            story.compare(database, 0)
            assert [finding for finding in database.check() if finding.severity != "info"] == [], number
            assert files_of(database) <= files_in_state(database), number
            assert bytes_of_contents(database) < 40_000, number
    assert fired > 10
