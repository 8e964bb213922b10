"""The budget of what was read: what is held never exceeds it, and nothing is lost but by its age."""

from __future__ import annotations

import random
import sys
import threading

from basin.engine.cache import Cache


def test_the_oldest_goes_first_whichever_dict_it_is_in() -> None:
    cache, one, other = Cache(800), dict[int, bytes](), dict[int, bytes]()
    for number in range(8):
        cache.keep(one if number % 2 else other, number, b"x", 100)
    assert (sorted(one), sorted(other)) == ([1, 3, 5, 7], [0, 2, 4, 6])
    cache.keep(one, 8, b"x", 100)
    cache.keep(one, 9, b"x", 100)
    assert (sorted(one), sorted(other)) == ([3, 5, 7, 8, 9], [2, 4, 6])


def test_what_is_there_stays_as_it_is() -> None:
    cache, entries = Cache(800), dict[int, bytes]()
    cache.keep(entries, 1, b"first", 100)
    cache.keep(entries, 1, b"second", 100)
    assert entries == {1: b"first"}


def test_what_is_large_beside_the_budget_is_not_kept() -> None:
    cache, entries = Cache(800), dict[int, bytes]()
    cache.keep(entries, 1, b"large", 101)
    Cache(0).keep(entries, 2, b"anything", 1)
    assert entries == {}


def test_what_was_cleared_and_read_again_is_not_dropped_in_place_of_the_old() -> None:
    cache, entries = Cache(800), dict[int, bytes]()
    cache.keep(entries, 1, bytes([1]) * 2, 100)
    entries.clear()
    cache.keep(entries, 1, bytes([1]) * 3, 100)
    for number in range(2, 9):
        cache.keep(entries, number, b"x", 100)
    assert entries[1] == bytes([1]) * 3
    cache.keep(entries, 9, b"x", 100)
    assert sorted(entries) == list(range(2, 10))


def test_threads_never_hold_more_than_the_budget(rng: random.Random) -> None:
    cache, shared = Cache(80_000), [dict[int, bytes]() for _ in range(4)]
    held: list[int] = []

    def work(seed: int) -> None:
        random_numbers = random.Random(seed)
        for _ in range(3000):
            size = random_numbers.randrange(1, 9000)
            cache.keep(random_numbers.choice(shared), random_numbers.randrange(500), bytes(size), size)
            with cache._mutex:
                held.append(sum(len(value) for entries in shared for value in entries.values()))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(rng.random(),), daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(before)
    assert len(held) == 4 * 3000
    assert 60_000 < max(held) <= 80_000


def test_a_cleared_cache_holds_nothing_and_goes_on() -> None:
    cache, entries = Cache(800), dict[int, bytes]()
    for number in range(8):
        cache.keep(entries, number, b"x", 100)
    cache.clear()
    assert entries == {}
    for number in range(8):
        cache.keep(entries, number, b"x", 100)
    assert len(entries) == 8
