"""A check that reads a share: some runs read everything, wherever they begin and whatever changes between them."""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from math import ceil
from typing import Any, Final, NamedTuple
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basin.api import Database
from basin.engine import rounds
from basin.engine.index import IndexReader
from basin.engine.keyspace import CHECK_KEYSPACE
from basin.engine.rounds import CURSOR, CURSOR_NAME, Check, Coverage
from basin.engine.state import Stratum
from basin.engine.verify import Finding, check_bytes
from basin.errors import InvalidArgument, ReadOnly, StorageUnavailable
from basin.format.layout import STRATUM_FOOTER_SIZE, STRATUM_HEADER_SIZE
from basin.format.scan import GrainFound, scan_grains
from basin.terms import StratumId
from tests.engine.cold_bucket import ColdBucket
from tests.engine.cold_bucket import bucket as cold_bucket  # noqa: F401  (a fixture)
from tests.engine.damaged_basin import PLACES, PROFILES, BucketPlace, DiskPlace, Place, build, content

SHARES: Final = (0.05, 0.3, 1 / 3, 0.5, 1.0)
_LATE: Final = b"\xff" * 16


class Looked(NamedTuple):
    """Bytes of a stratum that were looked at to their end."""

    stratum: StratumId
    begin: int
    end: int


@pytest.fixture
def looked() -> Iterator[list[Looked]]:
    """What is looked at while the test runs, in its order."""
    found: list[Looked] = []

    def watched(walk: Any, known: Stratum, reader: Any, index: Any, begin: int, data: memoryview, places: Any) -> Any:
        yield from check_bytes(walk, known, reader, index, begin, data, places)
        found.append(Looked(known.added.id, begin, begin + len(data)))

    with mock.patch.object(rounds, "check_bytes", watched):
        yield found


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    made = PLACES[request.param]("encrypted")
    build(made)
    return made


def run(place: Place, share: float | bool = True, **options: Any) -> tuple[list[Finding], Coverage]:
    """One run in a handle of its own: what it found, and how far it came."""
    with place.open("w") as database:
        return run_in(database, share, **options)


def run_in(database: Database, share: float | bool = True, **options: Any) -> tuple[list[Finding], Coverage]:
    checking = database.check(share, **options)
    found = list(checking)
    assert checking.coverage is not None
    return found, checking.coverage


def lengths(database: Database) -> dict[StratumId, int]:
    return {identity: known.added.length for identity, known in database.core.state.strata.items()}


def lengths_of(place: Place) -> dict[StratumId, int]:
    with place.open() as database:
        return lengths(database)


def missing(looked: list[Looked], identity: StratumId, begin: int, end: int) -> int:
    """How many of these bytes were not looked at."""
    stretches = sorted((one.begin, one.end) for one in looked if one.stratum == identity)
    count, at = 0, begin
    for first, stop in stretches:
        count += max(0, min(first, end) - at)
        at = max(at, min(stop, end))
    return count + max(0, end - at)


def not_looked_at(looked: list[Looked], strata: dict[StratumId, int]) -> dict[StratumId, int]:
    found = {identity: missing(looked, identity, 0, length) for identity, length in strata.items()}
    return {identity: count for identity, count in found.items() if count}


class TestAnUnchangedBasin:
    @pytest.mark.parametrize("share", SHARES)
    @pytest.mark.parametrize("before", [(), (0.3,), (0.07, 0.5)], ids=["at once", "later", "later still"])
    def test_everything_was_read_after_so_many_runs(
        self, place: Place, looked: list[Looked], share: float, before: tuple[float, ...]
    ) -> None:
        for earlier in before:
            run(place, earlier)
        looked.clear()
        strata = lengths_of(place)
        sizes = [run(place, share)[1].read for _ in range(ceil(1 / share))]
        assert not_looked_at(looked, strata) == {}
        assert sum(one.end - one.begin for one in looked) == sum(sizes)

    def test_no_run_reads_much_more_than_its_share(self, place: Place, looked: list[Looked]) -> None:
        total = sum(lengths_of(place).values())
        largest = 4000  # A block of names.
        for _ in range(5):
            _, coverage = run(place, 0.2)
            assert total * 0.2 <= coverage.read <= total * 0.2 + largest
            assert coverage.total == total
        whole = [one for one in looked if one.begin == 0 and one.end == lengths_of(place)[one.stratum]]
        assert len(looked) > len(whole)  # There were stretches.

    def test_a_run_reads_each_byte_once(self, place: Place, looked: list[Looked]) -> None:
        run(place, 0.4)
        for share in (1.0, 0.9):
            looked.clear()
            run(place, share)
            for first, second in ((one, other) for one in looked for other in looked if one is not other):
                assert first.stratum != second.stratum or first.end <= second.begin or second.end <= first.begin

    def test_a_number_of_bytes_is_as_good(self, place: Place, looked: list[Looked]) -> None:
        strata = lengths_of(place)
        for _ in range(ceil(sum(strata.values()) / 3_000)):
            _, coverage = run(place, read_size=3_000)
            assert coverage.read >= 3_000
        assert not_looked_at(looked, strata) == {}

    def test_it_says_how_far_the_round_is(self, place: Place) -> None:
        total = sum(lengths_of(place).values())
        _, first = run(place, 0.4)
        _, second = run(place, 0.4)
        _, third = run(place, 0.4)
        assert (first.round_passed, first.round_total, first.is_round_complete) == (first.read, total, False)
        assert second.round_passed == first.read + second.read
        assert second.began_ms == first.began_ms < third.began_ms
        # The round that began within the third run has what that run read of the one before.
        assert third.round_passed == first.read + second.read + third.read - total
        assert run(place, 1.0)[1].read == total

    def test_a_whole_run_from_the_beginning_completes_a_round(self, place: Place) -> None:
        assert run(place, 1.0)[1].is_round_complete
        assert not run(place, 0.1)[1].is_round_complete


class Story:
    """Runs of a check, with changes between them that are drawn at random; judges each round at its end."""

    def __init__(self, place: Place, looked: list[Looked], seed: int) -> None:
        self.place, self.looked = place, looked
        self.random = random.Random(seed)
        self.number = 1000
        self.rounds = self.kept = 0
        self.began_ms = 0
        self.at_begin: dict[StratumId, int] = {}
        self.of_round: list[Looked] = []

    def change(self, database: Database) -> None:
        for _ in range(self.random.randrange(4)):
            self.number += 1
            database.put(b"new/%d" % self.number, content(self.number))
        for name in list(database.scan(prefix="new/", keys_only=True)):
            if self.random.random() < 0.1:
                database.delete(name)
        database.commit()
        if self.random.random() < 0.3:
            database.compact(prune=self.random.random() < 0.5, grace_s=0)

    def step(self, share: float) -> None:
        with self.place.open("w", memtable_size=8192, stratum_size=16_384) as database:
            self.change(database)
            self.looked.clear()
            now = lengths(database)
            found, coverage = run_in(database, share)
            assert found == []
            order = [one.stratum for one in self.looked]
            if coverage.began_ms != self.began_ms:
                wrap = next((at for at in range(1, len(order)) if order[at] < order[at - 1]), 0)
                self.judge(self.looked[:wrap], now)
                self.began_ms, self.at_begin, self.of_round = coverage.began_ms, now, list(self.looked)
            else:
                self.of_round += self.looked
            if coverage.is_round_complete:
                self.judge([], now)

    def judge(self, more: list[Looked], now: dict[StratumId, int]) -> None:
        """What was there when the round began, and is there still, was read since."""
        self.rounds += 1
        still = {identity: size for identity, size in self.at_begin.items() if identity in now}
        self.kept += len(still)
        assert not_looked_at(self.of_round + more, still) == {}


class TestAChangingBasin:
    @pytest.mark.parametrize("seed", range(4))
    def test_a_round_reads_what_was_there_and_still_is(self, place: Place, looked: list[Looked], seed: int) -> None:
        print(f"seed {seed}")
        story = Story(place, looked, seed)
        for _ in range(25):
            story.step(0.25)
        assert story.rounds >= 5
        assert story.kept >= 10

    def test_a_round_ends_though_more_comes_than_is_read(self, place: Place, looked: list[Looked]) -> None:
        strata = lengths_of(place)
        began_ms = []
        for number in range(4):
            with place.open("w", stratum_size=16_384) as database:
                database.put_many((b"more/%d/%d" % (number, each), content(each * 7 + number)) for each in range(10))
                database.commit()
                _, coverage = run_in(database, 0.3)
            began_ms.append(coverage.began_ms)
        assert began_ms[0] < began_ms[-1]
        kept = lengths_of(place)
        assert not_looked_at(looked, {one: size for one, size in strata.items() if one in kept}) == {}

    def test_what_grows_is_read_on(self, looked: list[Looked]) -> None:
        """An active stratum on a disk: the cursor stands at its end, and the stratum goes on."""
        place = DiskPlace("open")
        with place.open("x") as database:
            database.put(b"one", content(1))
            database.commit()
            _, coverage = run_in(database, 1.0)
            assert coverage.is_round_complete
            database.put(b"two", content(2))
            database.commit()
            (identity,) = lengths(database)
            before = looked[-1].end
            run_in(database, 0.01)
            assert looked[-1].begin == before
            assert looked[-1].end == lengths(database)[identity]

    def test_a_stratum_that_goes_while_a_run_comes_to_it_is_no_finding(self, place: Place) -> None:
        with place.open("w") as database, place.open("w") as other:
            for number in range(20):
                other.put(b"more/%d" % number, content(number))
                other.commit()
            checking = database.check(1.0)
            is_first = True

            def compacted(*arguments: Any) -> Any:
                nonlocal is_first
                if is_first:
                    is_first = False
                    other.compact(grace_s=0)
                return check_bytes(*arguments)

            with mock.patch.object(rounds, "check_bytes", compacted):
                assert [one for one in checking if one.severity != "info"] == []
            assert not is_first


class TestDamage:
    @pytest.mark.parametrize("where", PLACES)
    @pytest.mark.parametrize("profile", PROFILES)
    def test_damage_anywhere_is_found_within_a_round(self, where: str, profile: str) -> None:
        built = build(PLACES[where](profile)).place
        run(built, 0.3)
        whole = built.files()
        names = [name for name in whole if name.startswith(("data/", "meta/", "index/"))]
        ends = [sum(len(whole[name]) for name in names[: at + 1]) for at in range(len(names))]

        @settings(
            max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
        )
        @given(at=st.integers(0, ends[-1] - 1), bit=st.integers(0, 7))
        def found_within_a_round(at: int, bit: int) -> None:
            number = bisect_right(ends, at)
            name = names[number]
            restore(built, whole)
            built.change(name, at - (ends[number - 1] if number else 0), bit)
            seen: set[str] = set()
            for _ in range(4):
                seen |= {one.object for one in run(built, 0.25)[0] if one.severity == "damage"}
            assert name in seen, (name, at, bit)

        found_within_a_round()

    def test_each_grain_that_does_not_prove_itself_is_found_by_its_run(self, looked: list[Looked]) -> None:
        """One run in four finds it: the one that looks at it, and not the structure."""
        place = build(DiskPlace("encrypted")).place
        stratum = place.largest("data")
        at = len(place.files()[stratum]) // 3
        place.change(stratum, at)
        hits = []
        for _ in range(4):
            looked.clear()
            found, _ = run(place, 0.25)
            hits.append({one.object for one in found})
            reads_it = any(one.stratum.hex() in stratum and one.begin <= at < one.end for one in looked)
            assert hits[-1] == ({stratum} if reads_it else set())
        assert set() in hits

    @pytest.mark.parametrize("longer", [-5, 7, 300])
    def test_a_wrong_length_of_a_grain_leads_no_stretch_astray(self, longer: int) -> None:
        """A stretch that ended where the header says would end in the middle of a grain, and the next begin there."""
        place = DiskPlace("open")
        with place.open("x") as database:
            database.blobs.put_many([content(number) for number in range(8)])
        (stratum,) = place.names("data")
        body = place.files()[stratum]
        grains = list(scan_grains(memoryview(body), STRATUM_HEADER_SIZE, len(body) - STRATUM_FOOTER_SIZE))
        second = grains[1]
        assert isinstance(second, GrainFound)
        length = (second.header.length + longer).to_bytes(4, "little")
        assert body[second.offset + 4 :].startswith(second.header.length.to_bytes(4, "little"))
        place.put(stratum, body[: second.offset + 4] + length + body[second.offset + 8 :])
        with place.open() as database:
            expected = {one.offset for one in database.check() if one.kind == "grain"}
        sizes = {"read_size": second.offset + 1}, {"read_size": len(body)}
        found = {one.offset for size in sizes for one in run(place, **size)[0] if one.kind == "grain"}
        assert found == expected == {second.offset}

    def test_a_missing_stratum_is_told_and_passed_over(self, place: Place, looked: list[Looked]) -> None:
        stratum = place.largest("data")
        place.put(stratum, None)
        strata = {one: size for one, size in lengths_of(place).items() if one.hex() not in stratum}
        for _ in range(3):
            found, coverage = run(place, 1 / 3)
            assert [one.kind for one in found if one.object == stratum] == ["stratum"]
            assert coverage.total == sum(strata.values())
        assert not_looked_at(looked, strata) == {}

    def test_an_entry_that_is_missing_from_an_index_is_found(self) -> None:
        place = DiskPlace("open")
        with place.open("x") as database:
            keys = database.blobs.put_many([b"content %d " % number * 20 for number in range(200)])
            database.commit()
            for writer in database.core.own_strata._writers.values():
                writer.locations.pop(keys[77].digest, None)
        details = [one.detail for _ in range(4) for one in run(place, 0.25)[0]]
        assert sum("is missing from the index" in detail for detail in details) == 1

    def test_an_entry_that_is_missing_from_a_merged_index_is_found(self) -> None:
        place = BucketPlace("open")
        build(place)
        with place.open("w") as database:
            for number in range(40):
                database.put(b"one/%d" % number, content(number))
                database.commit()
            database.compact()
            assert database.core.state.index_runs

        class Forgetful:
            """An index without the first key that it is asked for."""

            lost: bytes | None = None

            def first(self, key: bytes) -> Any:
                Forgetful.lost = Forgetful.lost or key
                return None if key == Forgetful.lost else next(self.find(key), None)

            def find(self, key: bytes) -> Iterator[Any]:
                return iter(()) if key == Forgetful.lost else self.index.find(key)

            def __init__(self, index: IndexReader) -> None:
                self.index = index

        whole = rounds._Round._index_run
        with mock.patch.object(rounds._Round, "_index_run", lambda *given: Forgetful(whole(*given))):  # type: ignore[arg-type]  # there is one
            details = [one.detail for one in run(place, 1.0)[0]]
        assert Forgetful.lost is not None
        assert [f"{Forgetful.lost.hex()} at byte" in one and "this index" in one for one in details] == [True]


def restore(place: Place, whole: dict[str, bytes]) -> None:
    for name in place.files().keys() - whole.keys():
        place.put(name, None)
    for name, body in whole.items():
        if place.files()[name] != body if name in place.files() else True:
            place.put(name, body)


class TestInterrupted:
    def test_what_was_not_looked_at_is_looked_at_by_the_next_run(self, place: Place, looked: list[Looked]) -> None:
        """The interrupt comes in the middle of a stretch."""
        strata = lengths_of(place)

        def interrupted(*arguments: Any) -> Iterator[Finding]:
            yield from check_bytes(*arguments)
            raise KeyboardInterrupt

        run(place, 0.2)
        with mock.patch.object(rounds, "check_bytes", interrupted), pytest.raises(KeyboardInterrupt):
            run(place, 0.5)
        _, coverage = run(place, 0.8)
        assert coverage.read == sum(one.end - one.begin for one in looked[1:])
        assert not_looked_at(looked, strata) == {}

    def test_what_was_looked_at_before_an_interrupt_counts(self, place: Place, looked: list[Looked]) -> None:
        with place.open("w") as database, pytest.raises(KeyboardInterrupt):
            list(database.check(1.0, progress=raising_when(lambda done, total: done > total / 2)))
        before = sum(one.end - one.begin for one in looked[:-1])
        _, coverage = run(place, 0.01)
        assert coverage.round_passed >= before > 0

    def test_a_kill_costs_what_was_read_since_the_cursor_was_stored(self, looked: list[Looked]) -> None:
        place = build(DiskPlace("open")).place
        strata = lengths_of(place)
        images = []
        with mock.patch.object(rounds, "SAVE_INTERVAL_S", 0.0), place.open("w") as database:
            list(database.check(1.0, progress=lambda done, total: images.append((len(looked), place.files()))))
        assert len(images) > 4
        whole = list(looked)
        for count, files in images[:: max(1, len(images) // 4)]:
            killed = DiskPlace("open")
            for name, body in files.items():
                killed.put(name, body)
            before = whole[: max(0, count - 1)]  # The last one was not stored yet.
            looked.clear()
            left = sum(strata.values()) - sum(one.end - one.begin for one in before)
            run(killed, read_size=left)
            assert not_looked_at(before + looked, strata) == {}

    def test_a_bucket_that_does_not_answer_ends_the_run_where_it_is(self, looked: list[Looked]) -> None:
        place = build(BucketPlace("open")).place
        strata = lengths_of(place)
        stored = rounds._stored
        calls: list[int] = []

        def unavailable(*arguments: Any) -> bytes:
            calls.append(1)
            if len(calls) == 3:
                raise StorageUnavailable("no answer", object="data", operation="read")
            return stored(*arguments)

        with mock.patch.object(rounds, "_stored", unavailable), pytest.raises(StorageUnavailable):
            run(place, 1.0)
        assert not_looked_at(looked, strata) != {}
        run(place, 1.0)
        assert not_looked_at(looked, strata) == {}


def raising_when(is_time: Callable[[int, int], bool]) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if is_time(done, total):
            raise KeyboardInterrupt

    return progress


class TestArchived:
    def test_it_is_passed_over_and_told(self, cold_bucket: ColdBucket, looked: list[Looked]) -> None:  # noqa: F811  (the fixture)
        with cold_bucket.create() as database:
            key = database.blobs.put(os.urandom(50_000))
        (name,) = cold_bucket.names("data")
        database = cold_bucket.open()
        strata = lengths(database)
        archived = next(one for one in strata if one.hex() == name)
        found, coverage = run_in(database, 1.0)
        assert [(one.kind, one.object) for one in found] == [("cold", f"data/{name}")]
        assert coverage.archived == strata[archived]
        assert coverage.total == coverage.read == sum(strata.values()) - strata[archived]
        assert coverage.is_round_complete
        database.thaw([key])
        found, coverage = run_in(database, 1.0)
        assert found == []
        assert (coverage.archived, coverage.total) == (0, sum(strata.values()))
        assert not_looked_at(looked, strata) == {}


class TestRefusals:
    @pytest.mark.parametrize("share", [0, 0.0, -0.1, 1.01, 2, float("nan"), float("inf"), "5%", None])
    def test_what_is_no_share(self, share: Any) -> None:
        with DiskPlace("open").open("x") as database, pytest.raises(InvalidArgument):
            database.check(share)

    @pytest.mark.parametrize("size", [0, -1, 1.5, True, "500M"])
    def test_what_is_no_number_of_bytes(self, size: Any) -> None:
        with DiskPlace("open").open("x") as database, pytest.raises(InvalidArgument):
            database.check(read_size=size)

    @pytest.mark.parametrize("share", [0.5, False])
    def test_a_share_and_a_number_of_bytes(self, share: float) -> None:
        with DiskPlace("open").open("x") as database, pytest.raises(InvalidArgument):
            database.check(share, read_size=5)

    def test_a_handle_that_only_reads(self, place: Place) -> None:
        with place.open("r") as database, pytest.raises(ReadOnly):
            database.check(0.5)

    def test_a_check_of_everything_needs_no_cursor(self, place: Place) -> None:
        with place.open("r") as database:
            checking: Check = database.check()
            assert list(checking) == []
            assert checking.coverage is None
            assert list(database.reserved_keyspace(CHECK_KEYSPACE)) == []


class TestTheCursor:
    def test_it_is_no_name_of_the_user(self, place: Place) -> None:
        with place.open("w") as database:
            names, position = list(database), database.head.position
            run_in(database, 0.5)
            assert list(database) == names
            assert database.keyspaces() == []
            assert list(database.changes(position)) == []

    @pytest.mark.parametrize(
        "stored",
        [b"", b"too short", bytes(CURSOR.size), bytes(CURSOR.size + 1), CURSOR.pack(bytes(16), _LATE, 0, _LATE, 0)],
    )
    def test_of_one_that_makes_no_sense_a_round_begins_anew(self, place: Place, stored: bytes) -> None:
        with place.open("w") as database:
            run_in(database, 0.3)
            database.reserved_keyspace(CHECK_KEYSPACE)[CURSOR_NAME] = stored
            _, coverage = run_in(database, 0.3)
        assert coverage.round_passed == coverage.read

    def test_that_of_another_basin_is_not_believed(self) -> None:
        """It comes along with an import, and stands behind strata that nobody has read here."""
        other = build(DiskPlace("open")).place
        place = build(DiskPlace("open")).place
        for one in (other, place):
            with one.open("w", stratum_size=16_384) as database:
                database.put_many((b"more/%d" % number, content(number)) for number in range(20))
        run(place, 0.3)
        with place.open("r") as source, other.open("w") as database:
            database.import_from(source)
            database.commit()
            _, coverage = run_in(database, 0.2)
        assert coverage.round_passed == coverage.read
