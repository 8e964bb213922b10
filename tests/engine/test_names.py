"""Reading names: runs, memtables and pending changes over one another, against a model of all versions."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import basin
from basin.api import Database, open_storage
from basin.engine.mark import mark
from basin.engine.merging import flush, merge_names, never
from basin.engine.names import find_row, newer_than, scan
from basin.engine.state import last_version
from basin.errors import CorruptionError, InvalidArgument
from basin.format import names as names_module
from basin.format.layout import ENTRY_DELETE, NAMES_BLOCK_SIZE
from basin.format.ordered import decode_tuple, decode_u64, encode_tuple, encode_u64
from basin.format.record import Record
from basin.testing.disk import SimulatedDisk
from basin.testing.simulated import SimulatedStorage

PREFIX = bytes(4)
HIGHEST = (1 << 64) - 1


def open_new() -> Database:
    options: dict[str, Any] = {"reserve_size": 0, "sync_interval_s": 3600.0, "inline_max": 4000}
    return open_storage(SimulatedStorage(SimulatedDisk()), "simulated:", mode="x", profile="open", options=options)


def changed(db: Database, rng: random.Random, model: dict[bytes, bytes]) -> None:
    """One commit of a few random changes."""
    with db.batch() as batch:
        for _ in range(rng.randrange(1, 12)):
            name = b"%02d" % rng.randrange(60)
            match rng.randrange(6):
                case 0:
                    batch.delete(name)
                    model.pop(name, None)
                case 1:
                    stop = b"%02d" % (int(name) + rng.randrange(8))
                    batch.delete_range(name, stop)
                    for gone in [one for one in model if name <= one < stop]:
                        del model[gone]
                case _:
                    model[name] = rng.randbytes(rng.choice([0, 5, 300]))
                    batch[name] = model[name]


@pytest.mark.parametrize("turn", range(5))
def test_every_version_is_found_wherever_it_lies(turn: int, rng: random.Random) -> None:
    """Flushes and merges in between change no answer, at any position."""
    del turn
    with open_new() as db:
        model: dict[bytes, bytes] = {}
        history = []
        for _ in range(60):
            changed(db, rng, model)
            history.append((db.core.state.position, dict(model)))
            match rng.randrange(8):
                case 0:
                    assert flush(db.core)
                case 1 if len(db.core.state.name_runs) > 1:
                    runs = db.core.state.name_runs
                    start = rng.randrange(len(runs) - 1)
                    assert merge_names(db.core, runs[start : start + rng.randrange(2, 5)])
        assert len(db.core.state.name_runs) > 0
        for position, wanted in history:
            with db.at(position) as view:
                assert dict(view) == wanted
                assert list(view.scan(reverse=True)) == sorted(wanted.items(), reverse=True)
                probes = [b"%02d" % number for number in range(60)]
                assert view.get_many(probes) == [wanted.get(name) for name in probes]
                low, high = sorted([b"%02d" % rng.randrange(60), b"%02d" % rng.randrange(60)])
                inside = sorted(pair for pair in wanted.items() if low <= pair[0] < high)
                assert list(view.scan(start=low, stop=high)) == inside
                assert list(view.scan(start=low, stop=high, reverse=True, limit=3)) == inside[::-1][:3]


def test_what_is_newer_is_noticed_wherever_it_lies(rng: random.Random) -> None:
    with open_new() as db:
        for number in range(0, 100, 2):
            db[b"%02d" % number] = b"v"
        db.commit()
        before = last_version(db.core.state.position)
        db[b"50"] = b"changed"
        db.delete(b"70")
        db.delete_range(b"20", b"25")
        db.commit()
        for _ in range(2):
            tables = db.core.current.tables
            assert newer_than(tables, PREFIX + b"49", PREFIX + b"51", before)
            assert newer_than(tables, PREFIX + b"70", PREFIX + b"71", before)
            assert newer_than(tables, PREFIX + b"24", PREFIX + b"26", before)
            assert not newer_than(tables, PREFIX + b"51", PREFIX + b"70", before)
            assert not newer_than(tables, PREFIX + b"25", PREFIX + b"50", before)
            row = find_row((), tables, PREFIX + b"70", HIGHEST)
            assert row is not None
            assert row[1] == ENTRY_DELETE
            assert row[0] > before
            assert find_row((), tables, PREFIX + b"71", HIGHEST) is None
            chunks = scan((), tables, PREFIX, PREFIX + b"\xff", version_max=before, now_ms=0)
            assert sum(len(chunk.names) for chunk in chunks) == 50
            if not db.core.state.name_runs:
                assert flush(db.core)
        assert db.core.state.name_runs


def test_a_scan_sees_one_position_whatever_is_written_meanwhile() -> None:
    with open_new() as db:
        wanted = [(b"%04d" % number, b"v") for number in range(3000)]
        db.put_many(wanted)
        db.commit()
        for reverse in (False, True):
            found = []
            for name, value in db.scan(reverse=reverse):
                found.append((name, value))
                if len(found) % 500 == 0:
                    db.put_many([(b"%04dx" % number, b"new") for number in range(0, 3000, 7)])
                    db.delete_range(b"0000", b"4")
                    db.commit()
                    assert flush(db.core)
            assert sorted(found) == wanted
            db.clear()
            db.put_many(wanted)
            db.commit()


def test_a_merge_of_many_runs_writes_full_blocks(rng: random.Random) -> None:
    """Also where the runs share all their names, of which the newest stays, and where values are large."""
    with open_new() as db:
        model: dict[bytes, bytes] = {}
        for turn in range(6):
            for _ in range(4000):
                model[b"%05d" % rng.randrange(20_000)] = rng.randbytes(2000 if turn == 5 else 20)
            db.put_many(model.items())
            db.commit()
            db.delete(min(model))
            del model[min(model)]
            db.commit()
            assert flush(db.core)
        sources = sum(run.run.entries for run in db.core.current.tables.runs)
        db.core.append(lambda now: Record(floor=now.position))
        assert merge_names(db.core, db.core.state.name_runs)
        (run,) = db.core.current.tables.runs
        assert run.run.entries == len(model) < sources
        sizes = sum(len(PREFIX + name) + len(value) + 8 for name, value in model.items())
        assert len(run.directory.firsts) < 1.2 * sizes / NAMES_BLOCK_SIZE
        assert dict(db) == model


def test_large_values_are_fetched_as_the_scan_goes_on() -> None:
    with open_new() as db:
        wanted = [(b"%03d" % number, bytes([number]) * 5000 if number % 3 else b"small") for number in range(250)]
        db.put_many(wanted)
        assert list(db.items()) == wanted
        assert list(db.values()) == [value for _, value in wanted]
        assert list(db.scan(reverse=True, limit=70)) == wanted[::-1][:70]
        first = next(iter(db.items()))
        assert first == wanted[0]


# --- filters that rest ------------------------------------------------------------------------------------------------


@pytest.fixture
def rested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A basin with one run of 2000 names; as if its filter were a large one."""
    monkeypatch.setattr(names_module, "FILTER_RESTS_FROM", 0)
    path = tmp_path / "basin"
    with basin.open(path, profile="open", history_s=0.0) as db:
        db.put_many([(b"%04d" % number, b"value %d" % number) for number in range(2000)])
        db.commit()
        assert flush(db.core)
    return path


def filters(db: Database) -> list[bool]:
    """Whether the filter of each run is in memory."""
    return [run.directory.filter_words is not None for run in db.core.current.tables.runs]


def test_a_filter_is_read_when_a_name_is_looked_for_and_not_before(rested: Path) -> None:
    with basin.open(rested) as db:
        assert filters(db) == [False]
        assert list(db.scan(start=b"1000", limit=2)) == [(b"1000", b"value 1000"), (b"1001", b"value 1001")]
        assert filters(db) == [False]
        assert db[b"1500"] == b"value 1500"
        assert filters(db) == [True]
        assert b"1500x" not in db


def test_a_run_that_is_merged_away_goes_at_once_and_its_file_with_it(rested: Path) -> None:
    """Not when garbage is looked for: the disk keeps what is open."""
    with basin.open(rested, "w", history_s=0.0) as db:
        db[b"1500"] = b"another"
        db.commit()
        assert flush(db.core)
        assert db[b"1500"] == b"another"
        gc.disable()
        try:
            old = [weakref.ref(run) for run in db.core.current.tables.runs]
            assert len(old) == 2
            assert merge_names(db.core, db.core.state.name_runs)
            assert [run() for run in old] == [None, None]
        finally:
            gc.enable()


def test_a_prune_lets_filters_rest_and_reads_none(rested: Path) -> None:
    with basin.open(rested, "w", history_s=0.0) as db:
        assert db[b"1500"] == b"value 1500"
        db.delete(b"1500")
        db.commit()
        assert filters(db) == [True]
        marks = mark(db.core, never)
        marks.close()
        assert filters(db) == [False]
        assert not db.compact(grace_s=0).problems
        assert set(filters(db)) == {False}
        assert b"1500" not in db
        assert db[b"1501"] == b"value 1501"


def test_a_filter_that_was_damaged_while_it_rested_is_never_an_absent_name(rested: Path) -> None:
    with basin.open(rested) as db:
        (run,) = db.core.current.tables.runs
        name = f"meta/{run.run.id}"
        content = bytearray((rested / name).read_bytes())
        content[run.run.directory_offset + run.run.directory_length - 3] ^= 1
        (rested / name).write_bytes(content)
        for _ in range(2):
            with pytest.raises(CorruptionError) as told:
                db.get(b"1500")
            assert told.value.fields["object"] == name
        assert filters(db) == [False]
        assert len(list(db.scan())) == 2000


# --- codecs that keep order -------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 64) + 1, (1 << 64) - 1),
    st.floats(allow_nan=False),
    st.binary(max_size=6),
    st.text(max_size=4).filter(lambda text: text.isprintable() or "\0" in text),
)
tuples = st.recursive(
    st.lists(scalars, max_size=3).map(tuple),
    lambda inner: st.lists(scalars | inner, max_size=3).map(tuple),
    max_leaves=6,
)
RANKS = {type(None): 0, bool: 1, int: 2, float: 3, bytes: 4, str: 5, tuple: 6}


def order_of(element: Any) -> Any:
    """What the documented order compares."""
    if isinstance(element, tuple):
        return (RANKS[tuple], [order_of(one) for one in element])
    if isinstance(element, str):
        return (RANKS[str], element.encode())
    if isinstance(element, float) and element == 0:
        return (RANKS[float], 0.0, 0 if str(element).startswith("-") else 1)
    return (RANKS[type(element)], 0 if element is None else element, 1)


@settings(max_examples=400)
@given(tuples, tuples)
def test_tuples_sort_as_their_names_do(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    assert str(decode_tuple(encode_tuple(one))) == str(one)
    assert (encode_tuple(one) < encode_tuple(two)) == (order_of(one)[1] < order_of(two)[1])


@settings(max_examples=200)
@given(st.binary(max_size=12))
def test_bytes_that_are_no_tuple_are_refused(data: bytes) -> None:
    try:
        decoded = decode_tuple(data)
    except CorruptionError:
        return
    assert isinstance(decoded, tuple)


def test_numbers_keep_their_order() -> None:
    numbers = [0, 1, 255, 256, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]
    names = [encode_u64(number) for number in numbers]
    assert names == sorted(names)
    assert [decode_u64(name) for name in names] == numbers
    for wrong in (-1, 1 << 64, 1.0, "1", True, None):
        with pytest.raises(InvalidArgument):
            encode_u64(wrong)
    with pytest.raises(CorruptionError):
        decode_u64(bytes(7))


def test_tuples_that_cannot_be_names() -> None:
    deep: Any = ()
    for _ in range(40):
        deep = (deep,)
    for wrong in (
        [1],
        "text",
        (1 << 64,),
        (-(1 << 64),),
        ({},),
        (object(),),
        ((1, [2]),),
        deep,
        ("\ud800",),
    ):
        with pytest.raises(InvalidArgument):
            encode_tuple(wrong)
