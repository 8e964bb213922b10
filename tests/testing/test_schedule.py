"""The scheduler: one actor at a time, virtual time, the same seed the same run, and nobody waits for ever."""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from typing import Any

import pytest

from basin.testing.bucket import BucketClient, run
from basin.testing.object_faults import TRANSIENT
from basin.testing.schedule import Abandoned, Scheduler, Stalled
from tests.testing.toy_log import at_random, checked_life


class TestTheScheduler:
    def test_the_same_seed_gives_the_same_bytes_and_other_seeds_do_not(self) -> None:
        faults = [at_random(3, TRANSIENT) for _ in range(2)]
        first, second = (checked_life(7, plan) for plan in faults)
        assert first.log == second.log
        assert first.bucket.bodies == second.bucket.bodies
        assert len({checked_life(seed).log for seed in range(10)}) == 10

    def test_actors_interleave(self) -> None:
        def four(client: BucketClient) -> None:
            for number in range(4):
                client.put(f"{client.actor}{number}", b"")

        orders = {
            tuple(entry.request.actor for entry in run(seed, {"a": four, "b": four}).bucket.entries)
            for seed in range(60)
        }
        assert len(orders) > 30
        assert any(order.index("b") < 4 - order[::-1].index("a") for order in orders)

    def test_one_actor_runs_at_a_time(self) -> None:
        inside: list[str] = []

        def careful(client: BucketClient) -> None:
            for _ in range(20):
                inside.append(client.actor)
                assert inside == [client.actor]
                inside.pop()
                time.sleep(0.001)

        run(1, dict.fromkeys("abc", careful)).require_no_errors()

    def test_time_is_virtual_and_random_bytes_are_the_seed_s(self) -> None:
        def script(_: BucketClient) -> tuple[Any, ...]:
            begin, wall = time.monotonic(), time.time_ns()
            time.sleep(3600)
            assert time.monotonic() - begin == pytest.approx(3600)
            assert time.time_ns() - wall == pytest.approx(3600e9)
            return os.urandom(16), uuid.uuid4(), random.random(), random.Random().random(), time.time_ns()

        real = time.perf_counter()
        first, again, other = (run(seed, {"a": script, "b": script}) for seed in (1, 1, 2))
        for ran in (first, again, other):
            ran.require_no_errors()
        assert first.results == again.results
        assert first.results["a"][:4] != first.results["b"][:4]
        assert first.results["a"][0] != other.results["a"][0]
        assert time.perf_counter() - real < 60
        assert first.elapsed_ms == pytest.approx(3_600_000)

    def test_other_threads_keep_the_real_functions(self) -> None:
        seen: dict[str, Any] = {}
        real = (time.time_ns(), time.sleep, os.urandom, random.Random)

        def helper(client: BucketClient) -> None:
            begin = time.perf_counter()
            time.sleep(0.02)
            seen["slept"] = time.perf_counter() - begin
            seen["now"] = time.time_ns()
            seen["bytes"] = os.urandom(8)
            client.put("helped", b"x")

        def script(client: BucketClient) -> None:
            thread = threading.Thread(target=helper, args=(client,))
            thread.start()
            thread.join()

        bytes_seen = set()
        for _ in range(2):
            ran = run(1, {"a": script})
            ran.require_no_errors()
            assert ran.bucket.bodies == {"helped": b"x"}
            bytes_seen.add(seen["bytes"])
            assert seen["slept"] >= 0.02
            assert abs(seen["now"] - real[0]) < 600e9
        assert len(bytes_seen) == 2
        assert (time.sleep, os.urandom, random.Random) == real[1:]

    def test_actors_that_wait_for_each_other_are_found(self) -> None:
        def waits(client: BucketClient) -> None:
            client.put(client.actor, b"")
            client.bucket.scheduler.wait_until(lambda: False, "what never comes")

        with pytest.raises(Stalled, match=r"wait for each other(.|\n)*actor b waits for what never comes") as caught:
            run(1, {"a": waits, "b": waits})
        assert "a put a" in caught.value.__notes__[0]

    def test_an_actor_that_is_blocked_by_another_one_is_found(self) -> None:
        mutex = threading.Lock()
        unwound: list[str] = []

        def holds(client: BucketClient) -> None:
            with mutex:
                try:
                    for _ in range(10):
                        client.put(client.actor, b"")
                except Abandoned:
                    unwound.append(client.actor)
                    raise

        with pytest.raises(Stalled, match=r"no actor hands over(.|\n)*with mutex"):
            run(1, {"a": holds, "b": holds}, stall_s=0.2, latency_ms=lambda _: 0.0)
        assert unwound

    def test_actors_that_never_end_are_found(self) -> None:
        def polls(client: BucketClient) -> None:
            while True:
                client.list("")

        with pytest.raises(Stalled, match=r"more than 500 steps:\nat .* ms, after 501 steps"):
            run(1, {"a": polls}, steps_max=500)

    def test_an_actor_waits_until_another_one_is_done(self) -> None:
        def first(client: BucketClient) -> None:
            time.sleep(5)
            client.put("ready", b"")

        def second(client: BucketClient) -> int:
            client.bucket.scheduler.wait_until(lambda: "ready" in client.bucket.bodies, "the first")
            return client.size("ready")

        ran = run(1, {"second": second, "first": first})
        assert ran.results == {"first": None, "second": 0}

    def test_what_an_actor_raises_is_its_outcome_and_the_others_go_on(self) -> None:
        def fails(_: BucketClient) -> None:
            raise LookupError("mine")

        ran = run(1, {"a": fails, "b": lambda client: client.put("x", b"")})
        assert list(ran.results) == ["b"]
        with pytest.raises(LookupError, match="mine"):
            ran.require_no_errors()

    def test_a_scheduler_alone_runs_plain_functions(self) -> None:
        def script() -> float:
            begin = time.monotonic()
            time.sleep(1.5)
            return time.monotonic() - begin

        assert Scheduler(1).run({"a": script}).results == {"a": 1.5}
