"""A store with patience: what it asks again, how long it waits, and when it gives up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from basin.errors import (
    AlreadyExists,
    BasinClosed,
    BasinError,
    InvalidArgument,
    ObjectMissing,
    ReadOnly,
    StorageError,
    StorageUnavailable,
)
from basin.storage.memory_objects import memory_objects
from basin.storage.objects import ByteRange, Listing, ObjectInfo, ObjectStore
from basin.storage.requests import RequestPolicy
from basin.storage.retrying import RetryingObjects
from basin.testing.object_conformance import CALLS, ObjectStoreConformance

POLICY = RequestPolicy(attempts=5, deadline_s=100, backoff_first_s=1, backoff_max_s=3)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "sleep", made.sleep)
    monkeypatch.setattr(time, "monotonic", made.monotonic)
    return made


class Unreliable(ObjectStore):
    """A store of which each call fails with the next of `errors`, as long as there are any, before it is made.

    `bad_ranges` says of single ranges of `get_many` how often they fail.
    """

    def __init__(self, *errors: BasinError, clock: Clock | None = None, attempt_s: float = 0) -> None:
        self.url = "memory://unreliable"
        self.errors = list(errors)
        self.calls: list[str] = []
        self.asked: list[list[str]] = []
        self.bad_ranges: dict[str, list[BasinError]] = {}
        self.clock = clock
        self.attempt_s = attempt_s
        self.store = memory_objects(f"memory://unreliable-{id(self)}")

    def _call(self, call: str) -> None:
        self.calls.append(call)
        if self.clock is not None:
            self.clock.now += self.attempt_s
        if self.errors:
            raise self.errors.pop(0)

    def get(self, wanted: ByteRange) -> bytes:
        self._call("get")
        return self.store.get(wanted)

    def get_many(self, wanted: Sequence[ByteRange]) -> list[bytes | BasinError]:
        self.asked.append([one.name for one in wanted])
        self._call("get_many")
        found = self.store.get_many(wanted)
        for place, one in enumerate(wanted):
            if self.bad_ranges.get(one.name):
                found[place] = self.bad_ranges[one.name].pop(0)
        return found

    def put(self, name: str, data: bytes) -> None:
        self._call("put")
        self.store.put(name, data)

    def put_new(self, name: str, data: bytes) -> None:
        self._call("put_new")
        self.store.put_new(name, data)

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        self._call("put_file")
        self.store.put_file(name, path, storage_class)

    def size(self, name: str) -> int:
        self._call("size")
        return self.store.size(name)

    def delete(self, names: Sequence[str]) -> None:
        self._call("delete")
        self.store.delete(names)

    def list(self, folder: str) -> Listing:
        self._call("list")
        return self.store.list(folder)

    def close(self) -> None:
        self.calls.append("close")
        self.store.close()


def silent(count: int) -> list[StorageUnavailable]:
    return [StorageUnavailable(f"no answer {number}", reason="timeout", number=number) for number in range(count)]


REPEATED = {name: call for name, call in CALLS.items() if name != "put_new"}


class TestRetryingMemoryObjects(ObjectStoreConformance):
    list_size = 10

    def make_store(self, place: str) -> ObjectStore:
        return RetryingObjects(memory_objects(f"memory://{place}"), POLICY)


@pytest.mark.parametrize("operation", REPEATED)
def test_a_call_is_made_until_it_is_answered(clock: Clock, operation: str) -> None:
    unreliable = Unreliable(*silent(4))
    unreliable.store.put("a", b"body")
    result = REPEATED[operation](RetryingObjects(unreliable, POLICY), "a")
    expected = {"get": b"body", "size": 4, "list": Listing([], [])}
    assert result == expected.get(operation)
    assert unreliable.calls == [operation] * 5
    assert len(clock.slept) == 4


def test_what_was_repeated_has_its_effect(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"from a file")
    unreliable = Unreliable()
    store = RetryingObjects(unreliable, POLICY)
    unreliable.errors += silent(2)
    store.put("a", b"body")
    unreliable.errors += silent(2)
    store.put_file("b", path)
    assert unreliable.store.get(ByteRange("a")) == b"body"
    assert unreliable.store.get(ByteRange("b")) == b"from a file"
    unreliable.errors += silent(2)
    assert store.list("") == Listing([ObjectInfo("a", 4), ObjectInfo("b", 11)], [])
    unreliable.errors += silent(2)
    store.delete(["a"])
    assert unreliable.store.list("").objects == [ObjectInfo("b", 11)]


@pytest.mark.parametrize("operation", REPEATED)
def test_the_last_error_is_raised_when_the_attempts_are_used_up(clock: Clock, operation: str) -> None:
    unreliable = Unreliable(*silent(6))
    with pytest.raises(StorageUnavailable) as caught:
        REPEATED[operation](RetryingObjects(unreliable, POLICY), "a")
    assert caught.value.fields == {"reason": "timeout", "number": 4, "attempts": 5}
    assert unreliable.calls == [operation] * 5
    assert len(clock.slept) == 4


def test_put_new_is_never_repeated(clock: Clock) -> None:
    unreliable = Unreliable(*silent(1))
    store = RetryingObjects(unreliable, POLICY)
    with pytest.raises(StorageUnavailable) as caught:
        store.put_new("a", b"x")
    assert caught.value.fields == {"reason": "timeout", "number": 0}
    assert unreliable.calls == ["put_new"]
    assert clock.slept == []
    store.put_new("a", b"x")
    with pytest.raises(AlreadyExists):
        store.put_new("a", b"x")


@pytest.mark.parametrize("operation", REPEATED)
@pytest.mark.parametrize("kind", [ObjectMissing, StorageError, ReadOnly, BasinClosed, InvalidArgument])
def test_other_errors_are_final(clock: Clock, operation: str, kind: type[BasinError]) -> None:
    unreliable = Unreliable(*silent(1), kind("no use", object="a"))
    with pytest.raises(kind) as caught:
        REPEATED[operation](RetryingObjects(unreliable, POLICY), "a")
    assert caught.value.fields == {"object": "a"}
    assert unreliable.calls == [operation] * 2


def test_an_error_that_is_none_of_ours_is_final(clock: Clock) -> None:
    class Interrupted(Unreliable):
        def get(self, wanted: ByteRange) -> bytes:
            self.calls.append("get")
            raise KeyboardInterrupt

    unreliable = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        RetryingObjects(unreliable, POLICY).get(ByteRange("a"))
    assert unreliable.calls == ["get"]


def test_one_attempt_is_never_again(clock: Clock) -> None:
    unreliable = Unreliable(*silent(2))
    with pytest.raises(StorageUnavailable) as caught:
        RetryingObjects(unreliable, RequestPolicy(attempts=1)).size("a")
    assert caught.value.fields["attempts"] == 1
    assert unreliable.calls == ["size"]


def waits(clock: Clock, store: RetryingObjects) -> list[float]:
    clock.slept.clear()
    with pytest.raises(StorageUnavailable):
        store.size("a")
    return list(clock.slept)


def test_waits_grow_within_their_bounds_and_differ(clock: Clock) -> None:
    unreliable = Unreliable(*silent(5 * 200))
    seen = [waits(clock, RetryingObjects(unreliable, POLICY)) for _ in range(200)]
    for place, ceiling in enumerate((1, 2, 3, 3)):
        column = [row[place] for row in seen]
        assert 0 <= min(column) < 0.2 * ceiling
        assert 0.8 * ceiling < max(column) <= ceiling
    assert len({row[0] for row in seen}) == 200


def test_no_attempt_begins_after_the_deadline(clock: Clock) -> None:
    policy = RequestPolicy(attempts=1000, deadline_s=10, backoff_first_s=1, backoff_max_s=1)
    unreliable = Unreliable(*silent(1000), clock=clock)
    begun = clock.now
    with pytest.raises(StorageUnavailable) as caught:
        RetryingObjects(unreliable, policy).get(ByteRange("a"))
    attempts = len(unreliable.calls)
    assert caught.value.fields["attempts"] == attempts
    assert 10 <= attempts < 60
    assert 9 <= clock.now - begun <= 10


def test_slow_attempts_use_up_the_deadline(clock: Clock) -> None:
    policy = RequestPolicy(attempts=1000, deadline_s=10, backoff_first_s=0.01, backoff_max_s=0.01)
    unreliable = Unreliable(*silent(1000), clock=clock, attempt_s=4)
    with pytest.raises(StorageUnavailable) as caught:
        RetryingObjects(unreliable, policy).get(ByteRange("a"))
    assert caught.value.fields["attempts"] == 3


class TestGetMany:
    WANTED = (ByteRange("a"), ByteRange("b"), ByteRange("c"), ByteRange("absent"))

    @pytest.fixture
    def unreliable(self, clock: Clock) -> Unreliable:
        made = Unreliable()
        for name in "abc":
            made.store.put(name, name.encode())
        return made

    def found(self, unreliable: Unreliable) -> list[bytes | type[BasinError]]:
        answers = RetryingObjects(unreliable, POLICY).get_many(self.WANTED)
        return [one if isinstance(one, bytes) else type(one) for one in answers]

    def test_only_what_failed_is_asked_for_again(self, unreliable: Unreliable) -> None:
        unreliable.bad_ranges = {"a": [*silent(1)], "c": [*silent(3)]}
        assert self.found(unreliable) == [b"a", b"b", b"c", ObjectMissing]
        assert unreliable.asked == [["a", "b", "c", "absent"], ["a", "c"], ["c"], ["c"]]

    def test_what_never_answers_stands_in_its_place(self, unreliable: Unreliable) -> None:
        unreliable.bad_ranges = {"b": [*silent(9)], "c": [*silent(2)]}
        answers = RetryingObjects(unreliable, POLICY).get_many(self.WANTED)
        assert answers[0] == b"a"
        assert answers[2] == b"c"
        assert isinstance(answers[1], StorageUnavailable)
        assert answers[1].fields == {"reason": "timeout", "number": 4, "attempts": 5}
        assert isinstance(answers[3], ObjectMissing)
        assert "attempts" not in answers[3].fields
        assert len(unreliable.asked) == 5

    def test_a_call_that_fails_as_a_whole_is_repeated(self, unreliable: Unreliable) -> None:
        unreliable.errors += silent(2)
        assert self.found(unreliable) == [b"a", b"b", b"c", ObjectMissing]
        assert unreliable.asked == [["a", "b", "c", "absent"]] * 3

    def test_a_call_that_always_fails_as_a_whole_is_an_error(self, unreliable: Unreliable) -> None:
        unreliable.errors += silent(9)
        with pytest.raises(StorageUnavailable) as caught:
            self.found(unreliable)
        assert caught.value.fields["attempts"] == 5

    def test_one_name_may_stand_twice(self, unreliable: Unreliable) -> None:
        unreliable.bad_ranges = {"a": [*silent(1)]}
        wanted = [ByteRange("a", 0, 1), ByteRange("a")]
        assert RetryingObjects(unreliable, POLICY).get_many(wanted) == [b"a", b"a"]
        assert unreliable.asked == [["a", "a"], ["a"]]

    def test_without_failures_nothing_is_asked_twice(self, unreliable: Unreliable) -> None:
        assert self.found(unreliable) == [b"a", b"b", b"c", ObjectMissing]
        assert unreliable.calls == ["get_many"]


def test_it_is_called_like_what_it_wraps_and_closes_it() -> None:
    unreliable = Unreliable()
    store = RetryingObjects(unreliable, POLICY)
    assert store.url == unreliable.url
    assert repr(store).startswith("RetryingObjects(")
    store.close()
    assert unreliable.calls == ["close"]


@pytest.mark.parametrize("call", [lambda store: store.get(ByteRange("a")), lambda store: store.put("b", b"x")])
def test_without_a_clock_of_ours_it_does_sleep(call: Callable[[ObjectStore], object]) -> None:
    unreliable = Unreliable(*silent(1))
    unreliable.store.put("a", b"x")
    policy = RequestPolicy(backoff_first_s=0.01, backoff_max_s=0.01)
    call(RetryingObjects(unreliable, policy))
    assert len(unreliable.calls) == 2
