"""Whose a name is that must be free: what is stored under it decides, and no reply."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from basin.errors import AlreadyExists, BasinError, ReadOnly, StorageError, StorageUnavailable
from basin.storage.claims import Claim, Outcome, claim
from basin.storage.memory_objects import MemoryObjects
from basin.storage.objects import ByteRange
from basin.storage.requests import RequestPolicy
from basin.testing.watched_objects import Step, Unheard, WatchedObjects

POLICY = RequestPolicy(attempts=4, backoff_first_s=0.001, backoff_max_s=0.002)
NAME = "log/00000000000000000001"
OURS, THEIRS = b"ours, with something random in it", b"theirs"
CREATED = Claim(Outcome.CREATED)

TIMEOUT = StorageUnavailable("no reply in time", reason="timeout")
BROKEN = StorageUnavailable("the connection broke", reason="connection")
SERVER = StorageUnavailable("500 Internal Error", reason="server")
CONTENDED = StorageUnavailable("409 Conflict", reason="contended")
TAKEN = AlreadyExists("412 Precondition Failed", reason="taken")
DENIED = ReadOnly("403 Access Denied", reason="AccessDenied")
NO_BUCKET = StorageError("404 No Such Bucket", reason="NoSuchBucket")


@pytest.fixture
def watched() -> WatchedObjects:
    return WatchedObjects(MemoryObjects())


def claimed(watched: WatchedObjects, *steps: Step) -> Claim:
    """Claim `NAME` from a store that goes through `steps` with our puts."""
    watched.script("put_new", *steps)
    return claim(watched, NAME, OURS, POLICY)


def requests(watched: WatchedObjects) -> list[str]:
    return [call.kind for call in watched.calls]


def stored(watched: WatchedObjects) -> bytes:
    return watched.store.get(ByteRange(NAME))


def others_come(watched: WatchedObjects) -> Step:
    """Before our put arrives, somebody else's does."""
    return lambda: watched.store.put(NAME, THEIRS)


def test_a_free_name_is_one_put(watched: WatchedObjects) -> None:
    assert claimed(watched) == CREATED
    assert requests(watched) == ["put_new"]
    assert stored(watched) == OURS


def test_a_taken_name_is_one_put_and_read_twice(watched: WatchedObjects) -> None:
    watched.store.put(NAME, THEIRS)
    assert claimed(watched) == Claim(Outcome.TAKEN, THEIRS)
    assert requests(watched) == ["put_new", "get", "get"]
    assert stored(watched) == THEIRS


@pytest.mark.parametrize("error", [TIMEOUT, BROKEN, SERVER, CONTENDED])
def test_a_reply_that_was_lost_is_found_out(watched: WatchedObjects, error: StorageUnavailable) -> None:
    assert claimed(watched, Unheard(error)) == CREATED
    assert requests(watched) == ["put_new", "get"]


def test_a_store_that_says_taken_of_our_own_body_does_not_deceive(watched: WatchedObjects) -> None:
    """The first reply was lost on its way, and a library sent the request twice without telling."""
    assert claimed(watched, Unheard(TAKEN)) == CREATED
    assert requests(watched) == ["put_new", "get"]


@pytest.mark.parametrize("error", [TIMEOUT, BROKEN, SERVER, CONTENDED])
def test_somebody_else_was_first_and_our_reply_was_lost(watched: WatchedObjects, error: StorageUnavailable) -> None:
    watched.store.put(NAME, THEIRS)
    assert claimed(watched, error) == Claim(Outcome.TAKEN, THEIRS)
    assert requests(watched) == ["put_new", "get", "get"]


@pytest.mark.parametrize("error", [TIMEOUT, BROKEN, SERVER, CONTENDED])
def test_what_did_not_arrive_is_sent_again(watched: WatchedObjects, error: StorageUnavailable) -> None:
    assert claimed(watched, error) == CREATED
    assert requests(watched) == ["put_new", "get", "put_new"]
    assert stored(watched) == OURS


def test_a_conflict_then_nothing_then_ours(watched: WatchedObjects) -> None:
    assert claimed(watched, CONTENDED, Unheard(TAKEN)) == CREATED
    assert requests(watched) == ["put_new", "get", "put_new", "get"]


def test_a_conflict_then_nothing_then_somebody_else(watched: WatchedObjects) -> None:
    assert claimed(watched, CONTENDED, others_come(watched)) == Claim(Outcome.TAKEN, THEIRS)


def test_our_own_first_request_arrives_late(watched: WatchedObjects) -> None:
    """It timed out, nothing was there; before it is sent again, it takes effect after all."""
    assert claimed(watched, TIMEOUT, lambda: watched.store.put(NAME, OURS)) == CREATED
    assert requests(watched) == ["put_new", "get", "put_new", "get"]
    assert watched.sent == [OURS, OURS]


def test_it_arrives_late_behind_somebody_else(watched: WatchedObjects) -> None:
    assert claimed(watched, TIMEOUT, Unheard(TIMEOUT)) == CREATED
    watched.store.put(NAME, THEIRS)
    assert claimed(watched, TIMEOUT) == Claim(Outcome.TAKEN, THEIRS)


def test_a_read_that_fails_is_no_answer(watched: WatchedObjects) -> None:
    watched.script("get", SERVER)
    assert claimed(watched, Unheard(TIMEOUT)) == CREATED
    assert requests(watched) == ["put_new", "get", "put_new", "get"]


class Misread(MemoryObjects):
    """Bodies come back as `readings` say, one after the other, and then as they are."""

    def __init__(self, *readings: bytes) -> None:
        super().__init__()
        self.readings = list(readings)

    def get(self, wanted: ByteRange) -> bytes:
        body = super().get(wanted)
        return self.readings.pop(0) if self.readings else body


@pytest.mark.parametrize("misread", [OURS[:-1], b"", b"\0" + OURS[1:]])
@pytest.mark.parametrize("step", [Unheard(TIMEOUT), Unheard(TAKEN)], ids=["silence", "taken"])
def test_our_own_body_that_is_misread_once_is_ours(step: Step, misread: bytes) -> None:
    """Else the same changes would be committed a second time."""
    assert claimed(WatchedObjects(Misread(misread)), step) == CREATED


def test_readings_that_differ_decide_nothing() -> None:
    watched = WatchedObjects(Misread(b"one", b"other", b"x"))
    watched.store.put(NAME, THEIRS)
    watched.script("put_new", TIMEOUT)
    assert claimed(watched) == Claim(Outcome.TAKEN, THEIRS)
    assert watched.count("put_new") == 3
    assert stored(watched) == THEIRS


@pytest.mark.parametrize("error", [TIMEOUT, CONTENDED])
def test_what_never_settles_is_unknown(watched: WatchedObjects, error: StorageUnavailable) -> None:
    made = claimed(watched, *[error] * 10)
    assert made.outcome is Outcome.UNKNOWN
    assert made.error is not None
    assert made.error.fields["reason"] == error.fields["reason"]
    assert watched.count("put_new") == POLICY.attempts
    assert watched.sent == [OURS] * POLICY.attempts


def test_a_store_that_is_taken_and_empty_is_unknown(watched: WatchedObjects) -> None:
    assert claimed(watched, *[TAKEN] * 10).outcome is Outcome.UNKNOWN
    assert watched.count("put_new") == POLICY.attempts


def test_a_store_that_cannot_be_read_is_unknown(watched: WatchedObjects) -> None:
    """Although ours is there all the time."""
    watched.script("get", *[SERVER] * 10)
    made = claimed(watched, Unheard(TIMEOUT))
    assert made.outcome is Outcome.UNKNOWN
    assert stored(watched) == OURS
    assert watched.count("put_new") == POLICY.attempts


@pytest.mark.parametrize("error", [DENIED, NO_BUCKET])
def test_a_refusal_at_once_says_that_nothing_was_stored(watched: WatchedObjects, error: BasinError) -> None:
    with pytest.raises(type(error)) as caught:
        claimed(watched, error)
    assert caught.value.fields["reason"] == error.fields["reason"]
    assert requests(watched) == ["put_new"]


@pytest.mark.parametrize("error", [DENIED, NO_BUCKET])
def test_a_refusal_after_a_doubt_is_unknown(watched: WatchedObjects, error: BasinError) -> None:
    """The permission ended meanwhile; the request that timed out may still arrive."""
    made = claimed(watched, TIMEOUT, *[error] * 10)
    assert made.outcome is Outcome.UNKNOWN
    assert made.error is not None
    assert made.error.fields["reason"] == error.fields["reason"]


def test_a_refusal_after_a_doubt_may_still_be_settled(watched: WatchedObjects) -> None:
    watched.script("get", None, lambda: watched.store.put(NAME, OURS))
    assert claimed(watched, TIMEOUT, DENIED) == CREATED


def test_one_attempt_means_one_put(watched: WatchedObjects) -> None:
    watched.script("put_new", TIMEOUT)
    policy = RequestPolicy(attempts=1)
    assert claim(watched, NAME, OURS, policy).outcome is Outcome.UNKNOWN
    assert requests(watched) == ["put_new", "get"]


def test_no_attempt_begins_after_the_deadline(watched: WatchedObjects) -> None:
    watched.script("put_new", *[TIMEOUT] * 100)
    policy = RequestPolicy(attempts=100, deadline_s=0.1, backoff_first_s=0.05, backoff_max_s=0.05)
    begin = time.monotonic()
    assert claim(watched, NAME, OURS, policy).outcome is Outcome.UNKNOWN
    assert time.monotonic() - begin < 5
    assert 1 < watched.count("put_new") < 50


def test_an_empty_body_is_a_body(watched: WatchedObjects) -> None:
    assert claim(watched, NAME, b"", POLICY) == CREATED
    assert claim(watched, NAME, OURS, POLICY) == Claim(Outcome.TAKEN, b"")


def test_among_many_one_gets_the_name_though_replies_are_lost(watched: WatchedObjects) -> None:
    barrier = threading.Barrier(8)

    def take(racer: int) -> Outcome:
        barrier.wait()
        return claim(watched, NAME, bytes([racer]) * 100, POLICY).outcome

    watched.script("put_new", *(step for _ in range(3) for step in (Unheard(TIMEOUT), Unheard(TAKEN), TIMEOUT)))
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(take, range(8)))
    assert outcomes.count(Outcome.CREATED) == 1
    assert outcomes.count(Outcome.TAKEN) == 7
    assert stored(watched) == bytes([outcomes.index(Outcome.CREATED)]) * 100
