"""The simulated bucket: its rules without faults, each fault by itself, plans; then a toy log, sound and sabotaged."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from basin.errors import AlreadyExists, BasinClosed, InvalidArgument, ObjectMissing, StorageUnavailable
from basin.storage.objects import ByteRange, Listing, ObjectInfo
from basin.testing.bucket import TIMEOUT_MS, BucketClient, Run, SimulatedBucket, run
from basin.testing.faults import Killed
from basin.testing.history import HistoryError
from basin.testing.object_conformance import ObjectStoreConformance
from basin.testing.object_faults import TRANSIENT, Fault, FaultKind, ObjectFault, Plan, sampled_pairs, single_faults
from tests.testing.toy_log import (
    BelievesDone,
    BelievesFailed,
    BelievesTaken,
    NeverLooks,
    Overwrites,
    ReadsTwice,
    ToyLog,
    at_random,
    checked_life,
)


def one_actor(
    script: Callable[[BucketClient], Any],
    faults: Plan | None = None,
    *,
    start: Mapping[str, bytes] | None = None,
    page_size: int = 1_000,
) -> Run[Any]:
    ran = run(1, {"a": script}, faults, start=start, page_size=page_size)
    ran.require_no_errors()
    return ran


def reason_of(call: Callable[[], Any]) -> str:
    with pytest.raises(StorageUnavailable) as caught:
        call()
    return str(caught.value.reason)


class TestConformance(ObjectStoreConformance):
    @pytest.fixture(autouse=True)
    def buckets(self) -> None:
        self.bucket_of: dict[str, SimulatedBucket] = {}

    def make_store(self, place: str) -> BucketClient:
        return self.bucket_of.setdefault(place, SimulatedBucket()).client("conformance")


class TestTheBucketWithoutFaults:
    def test_bodies_ranges_and_sizes(self) -> None:
        client = SimulatedBucket().client("a")
        client.put("data/x", b"0123456789")
        client.put("data/x", b"abcdefghij")
        assert client.get(ByteRange("data/x")) == b"abcdefghij"
        assert client.get(ByteRange("data/x", 2, 5)) == b"cde"
        assert client.get(ByteRange("data/x", 8, 50)) == b"ij"
        assert client.get(ByteRange("data/x", 20, 50)) == b""
        assert client.size("data/x") == 10
        for missing in (lambda: client.get(ByteRange("data/y")), lambda: client.size("data/y")):
            with pytest.raises(ObjectMissing):
                missing()

    def test_a_conditional_put_has_one_winner(self) -> None:
        client = SimulatedBucket().client("a")
        client.put_new("x", b"1")
        with pytest.raises(AlreadyExists):
            client.put_new("x", b"2")
        assert client.get(ByteRange("x")) == b"1"

    def test_a_list_has_objects_and_folders_page_by_page(self) -> None:
        bucket = SimulatedBucket(page_size=2)
        client = bucket.client("a")
        for name in ("top", "f/b", "f/a", "f/sub/one", "f/sub/two", "f/z", "fx"):
            client.put(name, name.encode())
        assert client.list("f") == Listing([ObjectInfo("a", 3), ObjectInfo("b", 3), ObjectInfo("z", 3)], ["sub"])
        assert bucket.counts["list"] == 2
        assert client.list("") == Listing([ObjectInfo("fx", 2), ObjectInfo("top", 3)], ["f"])
        assert client.list("none") == Listing([], [])

    def test_deletes_are_one_request_for_a_thousand_names(self) -> None:
        bucket = SimulatedBucket(start={f"n{number}": b"" for number in range(1_500)})
        bucket.client("a").delete([f"n{number}" for number in range(1_500)] + ["missing"])
        assert bucket.bodies == {}
        assert bucket.counts == {"delete": 2}

    def test_a_large_file_goes_up_in_parts_and_a_large_body_does_not(self, tmp_path: Path) -> None:
        bucket = SimulatedBucket(put_size_max=4)
        client = bucket.client("a")
        path = tmp_path / "file"
        path.write_bytes(b"0123456789")
        client.put_file("x", path)
        assert bucket.bodies == {"x": b"0123456789"}
        assert bucket.counts == {"part": 3, "put": 1}
        for put in (client.put, client.put_new):
            with pytest.raises(InvalidArgument):
                put("y", b"01234")

    def test_a_failed_upload_in_parts_leaves_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"0123456789")
        for number in range(1, 5):
            bucket = SimulatedBucket(put_size_max=4, faults={number: FaultKind.SERVER_ERROR})
            assert reason_of(lambda: bucket.client("a").put_file("x", path)) == "server"  # noqa: B023 (called at once)
            assert bucket.bodies == {}

    def test_names_are_checked_and_a_closed_client_refuses(self) -> None:
        client = SimulatedBucket().client("a")
        with pytest.raises(InvalidArgument):
            client.put("Upper", b"")
        client.close()
        with pytest.raises(BasinClosed):
            client.size("x")
        client.reconnect().put("x", b"")

    def test_many_plain_threads_race_and_one_wins_each_name(self) -> None:
        bucket = SimulatedBucket()
        won: list[int] = []

        def race() -> None:
            client = bucket.client("thread")
            for number in range(50):
                try:
                    client.put_new(f"n{number}", b"x")
                    won.append(number)
                except AlreadyExists:
                    pass

        threads = [threading.Thread(target=race) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == list(range(50))
        assert [request.number for request in bucket.requests] == list(range(1, 201))


BEFORE = {
    FaultKind.SERVER_ERROR: "server",
    FaultKind.SLOW_DOWN: "throttled",
    FaultKind.TIMEOUT: "timeout",
    FaultKind.RESET: "connection",
    FaultKind.CONTENDED: "contended",
    FaultKind.ERROR_INSIDE: "server",
}
AFTER = {
    FaultKind.SERVER_ERROR_AFTER: "server",
    FaultKind.LOST_REPLY: "timeout",
    FaultKind.RESET_AFTER: "connection",
}


class TestEachFault:
    @pytest.mark.parametrize("kind", BEFORE)
    def test_an_error_before_has_no_effect(self, kind: FaultKind) -> None:
        def script(client: BucketClient) -> str:
            return reason_of(lambda: client.put_new("x", b"1"))

        ran = one_actor(script, {1: kind})
        assert ran.results == {"a": BEFORE[kind]}
        assert ran.bucket.bodies == {}
        assert ran.bucket.fired == [(1, kind)]

    @pytest.mark.parametrize("kind", AFTER)
    def test_an_error_after_has_its_effect(self, kind: FaultKind) -> None:
        def script(client: BucketClient) -> str:
            return reason_of(lambda: client.put_new("x", b"1"))

        ran = one_actor(script, {1: kind})
        assert ran.results == {"a": AFTER[kind]}
        assert ran.bucket.bodies == {"x": b"1"}

    def test_a_timeout_takes_its_time(self) -> None:
        ran = run(1, {"a": lambda client: client.put("x", b"")}, {1: FaultKind.TIMEOUT}, latency_ms=lambda _: 3.0)
        assert ran.elapsed_ms == 3 + TIMEOUT_MS

    def test_what_is_late_comes_after_the_actor_s_next_requests(self) -> None:
        def script(client: BucketClient) -> list[Any]:
            seen: list[Any] = [reason_of(lambda: client.put("x", b"late"))]
            client.put("x", b"next")
            seen.append(client.get(ByteRange("x")))
            time.sleep(3600)
            return [*seen, client.get(ByteRange("x"))]

        ran = one_actor(script, {1: ObjectFault(FaultKind.LATE, 60_000)})
        assert ran.results == {"a": ["timeout", b"next", b"late"]}
        assert b"arrives late: done" in ran.log

    def test_a_late_conditional_put_keeps_its_condition(self) -> None:
        def script(client: BucketClient) -> None:
            assert reason_of(lambda: client.put_new("x", b"late")) == "timeout"
            client.put_new("x", b"next")

        ran = one_actor(script, {1: FaultKind.LATE})
        assert ran.bucket.bodies == {"x": b"next"}  # Late at the latest by the end of the run.
        assert ran.log.endswith(b"arrives late: AlreadyExists\n")

    def test_late_arrivals_are_drawn_before_and_after_what_follows(self) -> None:
        def script(client: BucketClient) -> bytes:
            assert reason_of(lambda: client.put("x", b"late")) == "timeout"
            time.sleep(5)
            client.put("x", b"next")
            return b""

        left = {run(seed, {"a": script}, {1: FaultKind.LATE}).bucket.bodies["x"] for seed in range(20)}
        assert left == {b"late", b"next"}

    def test_a_duplicate_arrives_again(self) -> None:
        def script(client: BucketClient) -> bytes:
            client.put_new("x", b"1")
            client.delete(["x"])
            time.sleep(3600)
            return client.get(ByteRange("x"))

        assert one_actor(script, {1: FaultKind.DUPLICATE}).results == {"a": b"1"}

    def test_a_request_that_is_sent_twice_hears_of_itself(self) -> None:
        def script(client: BucketClient) -> bytes:
            with pytest.raises(AlreadyExists):
                client.put_new("x", b"1")
            return client.get(ByteRange("x"))

        assert one_actor(script, {1: FaultKind.RESENT}).results == {"a": b"1"}

    def test_a_body_is_short_or_has_one_wrong_bit(self) -> None:
        body = bytes(range(100))

        def script(client: BucketClient) -> tuple[bytes, bytes, bytes]:
            found = [client.get(ByteRange("x", 10, 90)) for _ in range(3)]
            return found[0], found[1], found[2]

        ran = one_actor(script, {1: FaultKind.SHORT_BODY, 2: FaultKind.WRONG_BODY}, start={"x": body})
        short, wrong, right = ran.results["a"]
        assert right == body[10:90]
        assert len(short) < 80
        assert right.startswith(short)
        difference = int.from_bytes(wrong, "big") ^ int.from_bytes(right, "big")
        assert difference.bit_count() == 1

    def test_a_list_is_slow(self) -> None:
        ran = one_actor(lambda client: client.list(""), {1: ObjectFault(FaultKind.SLOW, 50_000)}, start={"x": b""})
        assert ran.results == {"a": Listing([ObjectInfo("x", 0)], [])}
        assert ran.elapsed_ms >= 50_000

    def test_a_stale_list_is_an_older_one(self) -> None:
        def script(client: BucketClient) -> list[Listing]:
            client.put("f/one", b"11")
            client.put("elsewhere", b"")
            client.put("f/one", b"1")
            client.put("f/two", b"22")
            client.delete(["f/one"])
            return [client.list("f"), client.list("f")]

        one, long_one, two = ObjectInfo("one", 1), ObjectInfo("one", 2), ObjectInfo("two", 2)
        older = [[one, two], [one], [long_one], []]
        found = []
        for seed in range(40):
            stale, true = run(seed, {"a": script}, {6: FaultKind.STALE_LIST}).results["a"]
            assert true.objects == [two]
            found.append(stale.objects)
        assert all(listing in found for listing in older)
        assert all(listing in older for listing in found)

    def test_a_condition_is_ignored(self) -> None:
        def script(client: BucketClient) -> None:
            client.put_new("x", b"1")
            client.put_new("x", b"2")

        ran = one_actor(
            script, lambda request: FaultKind.CONDITION_IGNORED if request.kind == "put_new" else FaultKind.STALE_LIST
        )
        assert ran.bucket.bodies == {"x": b"2"}

    def test_a_paused_actor_sends_its_request_long_after(self) -> None:
        def slow(client: BucketClient) -> float:
            client.put("x", b"slow")
            return time.monotonic()

        def quick(client: BucketClient) -> bytes:
            time.sleep(600)
            client.put("x", b"quick")
            return client.get(ByteRange("x"))

        def plan(request: Any) -> Fault | None:
            return ObjectFault(FaultKind.PAUSED, 3_600_000) if request.actor == "slow" else None

        ran: Run[Any] = run(1, {"slow": slow, "quick": quick}, plan)
        assert ran.results["quick"] == b"quick"
        assert ran.bucket.bodies == {"x": b"slow"}
        assert ran.results["slow"] >= 3600

    @pytest.mark.parametrize(("kind", "sign"), [(FaultKind.CLOCK_FORWARD, 1), (FaultKind.CLOCK_BACK, -1)])
    def test_a_wall_clock_jumps_and_no_other_does(self, kind: FaultKind, sign: int) -> None:
        def script(client: BucketClient) -> tuple[float, float]:
            wall, steady = time.time_ns(), time.monotonic_ns()
            if client.actor == "a":
                client.list("")
            return (time.time_ns() - wall) / 1e9, (time.monotonic_ns() - steady) / 1e9

        ran: Run[Any] = run(1, {"a": script, "b": script}, {1: ObjectFault(kind, 7_000_000)})
        wall, steady = ran.results["a"]
        assert wall - steady == pytest.approx(sign * 7000)
        assert 0 <= steady < 10
        assert ran.results["b"] == (0.0, 0.0)

    @pytest.mark.parametrize(("kind", "left"), [(FaultKind.KILLED, b"0"), (FaultKind.KILLED_AFTER, b"1")])
    def test_a_killed_actor_does_nothing_more(self, kind: FaultKind, left: bytes) -> None:
        def script(client: BucketClient) -> None:
            try:
                client.put("x", b"1")
            finally:
                with pytest.raises(Killed):
                    client.delete(["x"])
                client.reconnect().delete(["x"])

        ran = run(1, {"a": script}, {1: kind}, start={"x": b"0"})
        assert isinstance(ran.errors["a"], Killed)
        assert ran.bucket.bodies == {"x": left}
        assert len(ran.bucket.requests) == 1

    def test_a_fault_that_cannot_happen_does_not(self) -> None:
        ran = one_actor(lambda client: client.put("x", b""), {1: FaultKind.STALE_LIST})
        assert ran.bucket.fired == []
        assert ran.bucket.bodies == {"x": b""}

    def test_faults_work_without_a_run(self) -> None:
        bucket = SimulatedBucket(faults={1: FaultKind.LATE})
        client = bucket.client("a")
        assert reason_of(lambda: client.put("x", b"late")) == "timeout"
        assert bucket.bodies == {}
        bucket.settle()
        assert bucket.bodies == {"x": b"late"}


class TestPlans:
    def test_every_kind_at_every_request_that_it_can_befall(self) -> None:
        requests = checked_life(1).bucket.requests
        plans = list(single_faults(requests))
        assert len(plans) == sum(kind.applies_to(request.kind) for request in requests for kind in FaultKind)
        assert {kind for plan in plans for kind in plan.values()} == set(FaultKind) - {FaultKind.STALE_LIST}

    def test_pairs_are_of_two_requests_and_of_the_seed(self) -> None:
        requests = checked_life(1).bucket.requests
        pairs = list(sampled_pairs(requests, 50, seed=1))
        assert pairs == list(sampled_pairs(requests, 50, seed=1)) != list(sampled_pairs(requests, 50, seed=2))
        assert {len(plan) for plan in pairs} == {2}

    def test_before_its_fault_a_run_is_the_run_without(self) -> None:
        clean = checked_life(1).bucket
        for number in (5, 20, 40):
            faulty = checked_life(1, {number: FaultKind.SLOW}).bucket
            assert faulty.requests[:number] == clean.requests[:number]
            assert faulty.log != clean.log

    def test_what_a_fault_draws_moves_nothing_else(self) -> None:
        def script(client: BucketClient) -> None:
            for _ in range(10):
                client.get(ByteRange("x"))

        def seen(faults: Plan) -> list[Any]:
            ran = run(1, {"a": script, "b": script}, faults, start={"x": b"body"})
            return [(entry.at_ns, entry.request) for entry in ran.bucket.entries]

        assert seen({3: FaultKind.WRONG_BODY, 8: FaultKind.SHORT_BODY}) == seen({})


class TestTheToyLog:
    def test_it_stands_a_single_fault_of_every_kind_at_every_request(self) -> None:
        kinds = [kind for kind in FaultKind if kind is not FaultKind.CONDITION_IGNORED]
        requests = checked_life(1).bucket.requests
        plans = list(single_faults(requests, kinds))
        fired = [checked_life(1, plan).bucket.fired for plan in plans]
        assert fired == [list(plan.items()) for plan in plans]
        print(f"{len(plans)} single faults at {len(requests)} requests")

    def test_it_stands_pairs_and_many_faults_under_many_seeds(self) -> None:
        requests = checked_life(1).bucket.requests
        for plan in sampled_pairs(requests, 100, seed=1, kinds=TRANSIENT):
            checked_life(1, plan)
        for seed in range(60):
            checked_life(seed, at_random(seed, TRANSIENT))

    @pytest.mark.parametrize(
        ("kind", "faults", "words"),
        [
            (BelievesTaken, (FaultKind.RESENT, FaultKind.LOST_REPLY), {"revived"}),
            (BelievesFailed, (FaultKind.LATE,), {"revived"}),
            (BelievesFailed, (FaultKind.SERVER_ERROR_AFTER,), {"revived"}),
            (BelievesDone, (FaultKind.TIMEOUT,), {"lost"}),
            (Overwrites, (), {"lost", "misplaced", "stale"}),
            (NeverLooks, (), {"stale"}),
            (ReadsTwice, (), {"torn"}),
        ],
    )
    def test_a_sabotaged_one_is_caught(
        self, kind: type[ToyLog], faults: tuple[FaultKind, ...], words: set[str]
    ) -> None:
        def caught(seed: int) -> str:
            try:
                checked_life(seed, at_random(seed, faults) if faults else None, kind)
            except HistoryError as error:
                return str(error)
            return ""

        said = [caught(seed) for seed in range(30)]
        assert any(f"{word}: " in text for text in said for word in words)

    def test_a_store_that_ignores_conditions_is_caught(self) -> None:
        with pytest.raises(HistoryError, match="lost"):
            for seed in range(30):
                checked_life(seed, lambda _: FaultKind.CONDITION_IGNORED)
