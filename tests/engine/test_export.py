"""Flat files: a whole basin in one file, which answers as its source, in place and over http, and writes nothing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.api import Database
from basin.engine import export
from basin.errors import (
    AlreadyExists,
    BasinError,
    ChecksumMismatch,
    CorruptionError,
    InvalidArgument,
    NotABasin,
    ObjectMissing,
    PositionGone,
    ReadOnly,
    RollbackDetected,
    WrongSecret,
)
from basin.format.flat import FLAT_END_SIZE, FLAT_HEADER_SIZE, decode_flat_end
from basin.format.layout import MIB
from basin.storage.flat_target import FlatTarget
from basin.testing.disk import SimulatedDisk
from tests.engine.flat_material import QUIET, SECRET, SMALL, damage, everything, little_of_everything, names_in, told
from tests.engine.small_basin import PROFILES, open_disk, rich, secret_of, small
from tests.storage.flat_server import flat_server


@pytest.fixture(params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return tmp_path / "FILE.basin"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Database]:
    """An encrypted basin on the disk, for writing, with a little of everything."""
    with little_of_everything(tmp_path / "source") as db:
        yield db


# --- the whole basin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small, rich], ids=["small", "rich"])
def test_a_flat_file_answers_as_its_source(make: Callable[[str], Any], profile: str, flat: Path) -> None:
    made = make(profile)
    with open_disk(SimulatedDisk.from_image(made.image), profile) as db:
        report = db.export(flat)
        head = db.head
    assert report.size == flat.stat().st_size
    assert report.position == head.position
    with basin.open(flat, "r", secret=secret_of(profile)) as db:
        assert told(db, made.questions) == made.answers
        assert damage(db) == []
        assert db.head == head
        assert db.stats()["position"] == head.position
    assert names_in(flat.parent) == [flat.name]


def test_what_is_pending_comes_along_and_what_is_committed_later_does_not(source: Database, flat: Path) -> None:
    source[b"pending"] = b"not committed yet"
    before = everything(source)
    source.export(flat)
    source[b"later"] = b"value"
    source.commit()
    with basin.open(flat, "r", secret=SECRET) as db:
        assert everything(db) == before
        assert db.ref(b"fruit/pear") == source.ref(b"fruit/pear")
        assert damage(db) == []


def test_a_handle_that_only_reads_exports_what_others_are_writing(source: Database, tmp_path: Path, flat: Path) -> None:
    """The strata of both writers are active: they have no index but that of the file."""
    with basin.open(tmp_path / "source", "w", secret=SECRET, **SMALL) as second:
        key = second.blobs.put(b"by another writer")
        second.commit()
        with basin.open(tmp_path / "source", "r", secret=SECRET, **SMALL) as reader:
            assert reader.stats()["strata"]["active"] > 2
            before = everything(reader)
            reader.export(flat)
    with basin.open(flat, "r", secret=SECRET) as db:
        assert db.stats()["strata"]["active"] == 0
        assert len(db.core.locator.indexes) == 1
        assert everything(db) == before
        assert db.blobs[key] == b"by another writer"
        assert damage(db) == []


@pytest.mark.parametrize("memtable_size", [1024, 1 << 20], ids=["flushed", "not flushed"])
def test_names_in_runs_and_in_the_log_all_come(tmp_path: Path, flat: Path, memtable_size: int, profile: str) -> None:
    secret = SECRET if profile == "encrypted" else None
    options = {**QUIET, "memtable_size": memtable_size}
    with basin.open(tmp_path / "source", "x", secret=secret, profile=profile, **options) as db:  # type: ignore[arg-type]  # one of the two
        for start in range(0, 300, 30):
            db.put_many((b"name %03d" % number, b"value %d" % number) for number in range(start, start + 30))
            db.delete_range(b"name %03d" % start, b"name %03d" % (start + 3))
            db.commit()
        assert (db.stats()["names"]["runs"] > 0) == (memtable_size == 1024)
    with basin.open(tmp_path / "source", "r", secret=secret) as db:  # Whose last records change no name.
        names = dict(db.scan())
        db.export(flat)
    assert len(names) == 270
    with basin.open(flat, "r", secret=secret) as db:
        assert dict(db.scan()) == names
        assert damage(db) == []


def test_an_empty_basin_is_a_flat_file_as_well(tmp_path: Path, flat: Path) -> None:
    with basin.open(tmp_path / "source", "x", profile="open") as db:
        assert db.export(flat).strata == 0
    with basin.open(flat, "r") as db:
        assert everything(db) == {"names": {}, "keyspaces": {}, "blobs": {}}
        assert damage(db) == []


def test_the_exported_position_is_remembered_as_a_head(source: Database, flat: Path) -> None:
    early = source.head
    source[b"more"] = b"value"
    source.export(flat)
    head = source.head
    basin.open(flat, "r", secret=SECRET, expect_head=head).close()
    basin.open(flat, "r", secret=SECRET, expect_head=early).close()
    source[b"later"] = b"value"
    with pytest.raises(RollbackDetected):
        basin.open(flat, "r", secret=SECRET, expect_head=source.head)
    with pytest.raises(RollbackDetected):
        basin.open(flat, "r", secret=SECRET, expect_head=basin.Head(head.position, bytes(32)))


def test_history_begins_with_the_first_record_that_the_file_holds(tmp_path: Path, flat: Path) -> None:
    with basin.open(tmp_path / "source", "x", profile="open", **QUIET, checkpoint_every=8) as db:
        for number in range(20):
            db[b"name"] = b"%d" % number
            db.commit()
            if number == 2:
                db.pin("early")
        db.export(flat)
        flushed, position = db.stats()["names"]["flushed"], db.head.position
        assert 5 < flushed < position - 2
        changes = list(db.changes(flushed))
        earlier = db.at(flushed + 1)[b"name"]
    assert changes
    with basin.open(flat, "r") as db:
        assert [entry.position for entry in db.log()] == list(range(flushed + 1, position + 1))
        assert list(db.changes(flushed)) == changes
        assert db.at(flushed + 1)[b"name"] == earlier
        assert db.at(position)[b"name"] == b"19"
        assert db.pins() == {}
        for early in (0, flushed):
            with pytest.raises(PositionGone):
                db.at(early)
        with pytest.raises(PositionGone):
            list(db.changes(flushed - 1))


def test_every_secret_that_opens_the_basin_opens_the_file(source: Database, flat: Path) -> None:
    second, removed = basin.Secret.generate(), basin.Secret.generate()
    slot = source.secrets.add(removed)
    source.secrets.rotate()
    source.secrets.add(second)
    source[b"after the rotation"] = b"value" * 20
    source.secrets.remove(slot)
    source.export(flat)
    for secret in (SECRET, second):
        with basin.open(flat, "r", secret=secret) as db:
            assert everything(db) == everything(source)
    with pytest.raises(WrongSecret):
        basin.open(flat, "r", secret=removed)


def test_a_slot_that_the_log_does_not_name_stays_behind(source: Database, tmp_path: Path, flat: Path) -> None:
    planted = "0123456789abcdef"
    (tmp_path / "source" / "keys" / planted).mkdir()
    (tmp_path / "source" / "keys" / planted / "slot.json").write_bytes(b"planted")
    source.export(flat)
    assert planted.encode() not in flat.read_bytes()


def test_from_a_bucket(flat: Path) -> None:
    options: dict[str, Any] = {**SMALL, "checkpoint_every": 3, "memtable_size": 1024}
    with basin.open("memory://export-source", "x", secret=SECRET, **options) as db:
        for number in range(8):
            db[b"name %d" % number] = b"value" * 20
            db.blobs.put(b"content %d" % number)
            db.commit()
        db.keyspace("more")[b"name"] = b"value"
        before = everything(db)
        db.export(flat)
    with basin.open(flat, "r", secret=SECRET) as db:
        assert everything(db) == before
        assert damage(db) == []


def test_contents_with_a_root_of_their_own_come_along(tmp_path: Path, flat: Path) -> None:
    cold = tmp_path / "cold"
    with basin.open(tmp_path / "source", "x", profile="open", data_url=str(cold), **SMALL) as db:
        key = db.blobs.put(b"in the cold")
        db.export(flat)
    shutil.rmtree(cold)
    with basin.open(flat, "r") as db:
        assert db.blobs[key] == b"in the cold"
        assert damage(db) == []


def test_large_contents_and_nothing_is_held_whole(
    tmp_path: Path, flat: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    large = rng.randbytes(9 * MIB)
    sizes: list[int] = []
    create = FlatTarget.create

    def watched(self: FlatTarget, name: str) -> Any:
        inside = create(self, name)
        append = inside.append

        def measured(data: bytes) -> None:
            sizes.append(len(data))
            append(data)

        monkeypatch.setattr(inside, "append", measured)
        return inside

    monkeypatch.setattr(FlatTarget, "create", watched)
    steps: list[tuple[int, int | None]] = []
    with basin.open(tmp_path / "source", "x", secret=SECRET, **QUIET) as db:
        key = db.blobs.put(large)
        db.export(flat, progress=lambda done, total: steps.append((done, total)))
    assert max(sizes) == 4 * MIB
    assert steps[-1][0] == steps[-1][1]
    assert len(steps) >= 3
    with basin.open(flat, "r", secret=SECRET) as db:
        assert db.blobs[key] == large
        with db.blobs.open(key) as file:
            file.seek(5 * MIB)
            assert file.read(100) == large[5 * MIB : 5 * MIB + 100]


# --- what fails -----------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_stays(source: Database, flat: Path) -> None:
    flat.write_bytes(b"mine")
    with pytest.raises(AlreadyExists):
        source.export(flat)
    with pytest.raises(AlreadyExists):
        source.export(flat, prefix=b"fruit/", profile="open")
    assert flat.read_bytes() == b"mine"
    assert names_in(flat.parent) == ["FILE.basin", "source"]


def test_the_name_says_that_it_is_a_flat_file(source: Database, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        source.export(tmp_path / "copy")
    assert names_in(tmp_path) == ["source"]


@pytest.mark.parametrize("given", [{"secret": "another"}, {"profile": "open"}], ids=str)
def test_a_whole_basin_keeps_its_secrets(source: Database, flat: Path, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        source.export(flat, **given)
    assert not flat.exists()


def test_a_damaged_stratum_is_not_exported_as_if_it_were_whole(source: Database, tmp_path: Path, flat: Path) -> None:
    source.close()
    victim = max((tmp_path / "source" / "data").iterdir())
    data = bytearray(victim.read_bytes())
    data[200] ^= 1
    victim.write_bytes(data)
    with basin.open(tmp_path / "source", "r", secret=SECRET) as db, pytest.raises(ChecksumMismatch) as caught:
        db.export(flat)
    assert caught.value.object == f"data/{victim.name}"
    assert names_in(tmp_path) == ["source"]


def test_a_missing_stratum_is_named_and_nothing_is_left(source: Database, tmp_path: Path, flat: Path) -> None:
    source.close()
    victim = max((tmp_path / "source" / "data").iterdir())
    victim.unlink()
    with basin.open(tmp_path / "source", "r", secret=SECRET) as db, pytest.raises(ObjectMissing) as caught:
        db.export(flat)
    assert caught.value.object == f"data/{victim.name}"
    assert names_in(tmp_path) == ["source"]


def many_small_strata(path: Path) -> None:
    """A basin with as many strata as sessions."""
    for number in range(6):
        with basin.open(path, "c", secret=SECRET, **SMALL) as db:
            db.blobs.put(b"content %d" % number)
            db[b"name %d" % number] = b"value" * 20


def merge_all(path: Path) -> None:
    """Merge strata and indexes, and delete those that were merged, as another process would."""
    with basin.open(path, "w", secret=SECRET, **SMALL) as db:
        db.blobs.put(b"by who merges")
        db.commit()
        db.compact(grace_s=0)


def test_strata_that_are_merged_away_meanwhile_are_read_where_they_lie_then(tmp_path: Path, flat: Path) -> None:
    many_small_strata(tmp_path / "source")
    merged: list[int] = []

    def merge_once(done: int, total: int | None) -> None:
        if not merged:
            merged.append(done)
            merge_all(tmp_path / "source")

    with basin.open(tmp_path / "source", "r", secret=SECRET, **SMALL, open_files_max=4) as db:
        before, position = everything(db), db.head.position
        files = names_in(tmp_path / "source" / "data")
        report = db.export(flat, progress=merge_once)
        assert not set(files) & set(names_in(tmp_path / "source" / "data"))
    assert report.position > position
    with basin.open(flat, "r", secret=SECRET) as db:
        after = everything(db)
        assert after["names"] == before["names"]
        assert before["blobs"].items() <= after["blobs"].items()
        assert damage(db) == []


def test_who_is_merged_away_for_ever_gives_up(tmp_path: Path, flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_small_strata(tmp_path / "source")
    attempts: list[int] = []
    with basin.open(tmp_path / "source", "w", secret=SECRET, **SMALL) as db:

        def missing(self: Any, known: Any) -> Any:
            attempts.append(1)
            db[b"more"] = b"%d" % len(attempts)
            db.commit()
            raise ObjectMissing("gone", object="data/gone")

        monkeypatch.setattr(export._Export, "_copy_stratum", missing)
        with pytest.raises(ObjectMissing):
            db.export(flat)
    assert len(attempts) == export._ATTEMPTS
    assert names_in(tmp_path) == ["source"]


# --- reading one ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "c", "x", "n"])
def test_any_mode_but_r_says_what_to_do(source: Database, flat: Path, mode: Any) -> None:
    source.export(flat)
    before = flat.read_bytes()
    for url in (flat, str(flat), flat.as_uri()):
        with pytest.raises(ReadOnly, match="mode='r'"):
            basin.open(url, mode, secret=SECRET)
    assert flat.read_bytes() == before
    assert names_in(flat.parent) == ["FILE.basin", "source"]


def test_the_handle_of_a_flat_file_writes_nothing(source: Database, flat: Path) -> None:
    source.export(flat)
    with basin.open(flat.as_uri(), "r", secret=SECRET) as db:
        for write in (
            lambda: db.put(b"name", b"value"),
            lambda: db.blobs.put(b"content"),
            db.commit,
            db.batch,
            db.transaction,
            lambda: db.import_from(source),
            lambda: db.repair(dry_run=False),
        ):
            with pytest.raises(ReadOnly):
                write()


def test_a_folder_may_have_such_a_name(tmp_path: Path) -> None:
    with basin.open(tmp_path / "folder.basin", "c", profile="open") as db:
        db[b"name"] = b"value"
    with basin.open(tmp_path / "folder.basin", "w") as db:
        assert db[b"name"] == b"value"


def test_another_file_is_no_basin(flat: Path) -> None:
    flat.write_bytes(b"something else altogether, and long enough for both ends of a flat file" * 3)
    with pytest.raises(NotABasin):
        basin.open(flat, "r")


def test_an_exported_file_is_exported_and_imported_again(source: Database, tmp_path: Path, flat: Path) -> None:
    source.export(flat)
    with basin.open(flat, "r", secret=SECRET) as db:
        db.export(tmp_path / "again.basin")
        db.export(tmp_path / "part.basin", prefix=b"fruit/", profile="open")
    with basin.open(tmp_path / "again.basin", "r", secret=SECRET) as db:
        assert everything(db) == everything(source)
        assert db.head == source.head
        assert damage(db) == []


def test_over_http_only_what_is_needed_is_fetched(tmp_path: Path, flat: Path, rng: random.Random) -> None:
    with basin.open(tmp_path / "source", "x", secret=SECRET, **QUIET, stratum_size=4 * MIB) as db:
        keys = db.blobs.put_many([rng.randbytes(4000) for _ in range(4000)])
        db.put_many((b"name %d" % number, b"value %d" % number) for number in range(2000))
        large = rng.randbytes(6 * MIB)
        whole = db.blobs.put(large)
        contents = db.blobs[keys[17]]
        db.export(flat)
    size = flat.stat().st_size
    assert size > 20 * MIB
    with flat_server(tmp_path) as server:
        with basin.open(server.url("FILE.basin"), "r", secret=SECRET) as db:
            assert db[b"name 1500"] == b"value 1500"
            assert db.blobs[keys[17]] == contents
            assert server.sent < MIB
            assert len(server.asked) < 16
            assert db.stats()["requests"]["bytes_in"] == server.sent
            before = server.sent
            assert db.blobs[whole] == large
            assert server.sent - before < 7 * MIB
        for mode in ("w", "c"):
            with pytest.raises(ReadOnly):
                basin.open(server.url("FILE.basin"), mode, secret=SECRET)
        with pytest.raises(NotABasin):
            basin.open(server.url("none.basin"), "r", secret=SECRET)


@pytest.fixture
def small_file(profile: str, flat: Path) -> Path:
    """A flat file that is as small as one can be, of the profile."""
    with open_disk(SimulatedDisk.from_image(small(profile).image), profile) as db:
        db.export(flat)
    return flat


def test_a_flipped_bit_anywhere_is_reported_or_harmless(
    small_file: Path, profile: str, rng: random.Random, effort: int
) -> None:
    """The bits of both ends one by one, of all between some at random."""
    whole = small_file.read_bytes()
    end = decode_flat_end(whole[-FLAT_END_SIZE:], len(whole))
    edges = [*range(FLAT_HEADER_SIZE), *range(end.table_offset, len(whole))]
    inside = rng.sample(range(FLAT_HEADER_SIZE, end.table_offset), 250 * effort)
    questions, answers = small(profile).questions, small(profile).answers
    reported = 0
    for place in [*edges, *inside]:
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        small_file.write_bytes(data)
        try:
            with basin.open(small_file, "r", secret=secret_of(profile), **QUIET) as db:
                found = told(db, questions)
                wrong = {label for label in answers if found[label] != answers[label]}
                assert all(isinstance(found[label], BasinError) for label in wrong), (place, wrong)
                if place not in edges:
                    reported += bool(wrong) or bool(damage(db))
        except BasinError:
            reported += place not in edges
        else:
            assert place not in edges
    assert reported > 0.9 * len(inside)


def test_a_file_cut_short_anywhere_is_refused(small_file: Path, profile: str) -> None:
    size = small_file.stat().st_size
    with small_file.open("r+b") as file:
        for length in range(size - 1, -1, -1):
            file.truncate(length)
            with pytest.raises(CorruptionError):
                basin.open(small_file, "r", secret=secret_of(profile))


def test_a_file_with_more_behind_it_is_refused(small_file: Path, profile: str) -> None:
    with small_file.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CorruptionError):
        basin.open(small_file, "r", secret=secret_of(profile))
