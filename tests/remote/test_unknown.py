"""Replies that do not come: a commit happens once or not at all, and what cannot be known can be settled later."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

from basin.errors import BasinError, CommitUnknown, InvalidArgument, ReadOnly, StorageUnavailable
from basin.storage.requests import RequestPolicy
from basin.testing.object_faults import FaultKind, ObjectRequest
from tests.remote.conftest import IMPATIENT, Bucket, S3Place
from tests.s3_proxy import FaultProxy, Rule

QUICK = RequestPolicy(attempts=3, backoff_first_s=0.001, backoff_max_s=0.002)
RECORD = re.compile(r"log/\d{20}")

Resolver = Callable[[Bucket, Any], Any]


def silence(write: FaultKind, actor: str = "handle") -> Callable[[ObjectRequest], FaultKind | None]:
    """A plan: to `actor`, records are written as `write` says, and cannot be read."""

    def plan(request: ObjectRequest) -> FaultKind | None:
        if request.actor != actor or not RECORD.fullmatch(request.name):
            return None
        return write if request.kind == "put_new" else FaultKind.TIMEOUT

    return plan


def quick(bucket: Bucket, mode: str = "c", **options: Any) -> Any:
    """A handle that gives up soon."""
    return bucket.open(mode, policy=QUICK, request_attempts=QUICK.attempts, request_deadline_s=1.0, **options)


def started(bucket: Bucket, **options: Any) -> Any:
    """A handle whose session has begun, with one name."""
    db = quick(bucket, **options)
    db[b"before"] = b"value"
    db.commit()
    bucket.asked()
    return db


def unknown(bucket: Bucket, db: Any, write: FaultKind, **rows: bytes) -> CommitUnknown:
    """Let a commit of `rows` end without an answer; from then on all goes well again."""
    for name, value in rows.items():
        db[name] = value
    bucket.plan(silence(write))
    with pytest.raises(CommitUnknown) as caught:
        db.commit()
    bucket.plan({})
    return caught.value


# --- one lost reply is nothing --------------------------------------------------------------------------------------

ONCE = [
    FaultKind.LOST_REPLY,
    FaultKind.RESET_AFTER,
    FaultKind.SERVER_ERROR_AFTER,
    FaultKind.TIMEOUT,
    FaultKind.RESET,
    FaultKind.SERVER_ERROR,
    FaultKind.SLOW_DOWN,
    FaultKind.CONTENDED,
    FaultKind.ERROR_INSIDE,
    FaultKind.RESENT,
    FaultKind.DUPLICATE,
    FaultKind.LATE,
]


def increment(transaction: Any) -> None:
    transaction[b"counter"] = b"%d" % (int(transaction.get(b"counter", b"0")) + 1)


@pytest.mark.parametrize("in_transaction", [False, True], ids=["batch", "transaction"])
@pytest.mark.parametrize("fault", ONCE, ids=lambda fault: fault.name.lower())
def test_a_commit_with_one_fault_is_committed_once(bucket: Bucket, fault: FaultKind, in_transaction: bool) -> None:
    db = started(bucket)
    once = iter([fault])
    before = db.core.state.position
    bucket.plan(lambda one: next(once, None) if one.kind == "put_new" and RECORD.fullmatch(one.name) else None)
    if in_transaction:
        db.run(increment)
    else:
        db[b"counter"] = b"1"
        db.commit()
    db[b"name"] = b"value"
    db.commit()
    bucket.simulated.settle()
    assert bucket.simulated.fired
    assert db.refresh() == before + 2
    assert [change.position for change in bucket.open("r").changes(before)] == [before + 1, before + 2]
    assert dict(db.items()) == {b"before": b"value", b"counter": b"1", b"name": b"value"}


@pytest.mark.parametrize("fault", [one for one in ONCE if one is not FaultKind.CONTENDED], ids=lambda one: one.name)
def test_a_stratum_whose_reply_is_lost_is_stored_all_the_same(bucket: Bucket, fault: FaultKind) -> None:
    db = started(bucket)
    once = iter([fault])
    bucket.plan(lambda one: next(once, None) if one.kind == "put" and one.name.startswith("data/") else None)
    key = db.blobs.put(b"content" * 1000)
    db.commit()
    bucket.simulated.settle()
    assert bucket.open("r").blobs[key] == b"content" * 1000


# --- an outcome that is unknown -------------------------------------------------------------------------------------


def same_handle(_: Bucket, db: Any) -> Any:
    return db


def another_handle(bucket: Bucket, _: Any) -> Any:
    return bucket.open("w", actor="another")


def handle_after_reopening(bucket: Bucket, db: Any) -> Any:
    db.close()
    return bucket.open("w", actor="another")


RESOLVERS = [same_handle, another_handle, handle_after_reopening]


@pytest.mark.parametrize("resolver", RESOLVERS, ids=lambda one: one.__name__)
@pytest.mark.parametrize(
    ("write", "outcome"),
    [(FaultKind.LOST_REPLY, "committed"), (FaultKind.TIMEOUT, "absent"), (FaultKind.LATE, "absent")],
    ids=["stored", "lost", "late"],
)
def test_an_unknown_commit_is_settled_by_any_writer(
    bucket: Bucket, write: FaultKind, outcome: str, resolver: Resolver
) -> None:
    db = started(bucket)
    error = unknown(bucket, db, write, name=b"value")
    settling = resolver(bucket, db)
    assert settling.resolve(error.token) == outcome
    assert settling.resolve(error.token) == outcome
    bucket.simulated.settle()  # What was late arrives, and finds its place taken.
    assert settling.resolve(error.token) == outcome
    fresh = bucket.open("r")
    assert fresh.get(b"name") == (b"value" if outcome == "committed" else None)
    assert sum(change.name == b"name" for change in fresh.changes(0)) == (outcome == "committed")
    assert not list(fresh.check())


def test_the_error_says_what_to_do_and_travels(bucket: Bucket) -> None:
    db = started(bucket)
    error = unknown(bucket, db, FaultKind.LOST_REPLY, name=b"value")
    assert "db.resolve(token)" in str(error)
    assert error.position == db.core.state.position + 1
    copied = pickle.loads(pickle.dumps(error))
    assert copied.token == error.token
    assert another_handle(bucket, db).resolve(copied.token) == "committed"


def test_a_reader_settles_what_is_stored_and_says_that_it_may_not_settle_the_rest(bucket: Bucket) -> None:
    db = started(bucket)
    stored = unknown(bucket, db, FaultKind.LOST_REPLY, stored=b"value")
    reader = bucket.open("r", actor="reader")
    assert reader.resolve(stored.token) == "committed"
    assert reader[b"stored"] == b"value"
    db[b"between"] = b"value"
    db.commit()
    lost = unknown(bucket, db, FaultKind.TIMEOUT, lost=b"value")
    with pytest.raises(ReadOnly):
        reader.resolve(lost.token)
    assert db.resolve(lost.token) == "absent"
    assert reader.resolve(lost.token) == "absent"


@pytest.mark.parametrize("token", [b"", b"short", "text", bytes(41), None])
def test_what_is_no_token_is_refused(bucket: Bucket, token: Any) -> None:
    with pytest.raises(InvalidArgument):
        started(bucket).resolve(token)


def test_a_token_of_another_basin_is_refused_or_absent(bucket: Bucket) -> None:
    db = started(bucket)
    before = db.core.state.position
    with pytest.raises(InvalidArgument):
        db.resolve((before + 5).to_bytes(8, "big") + bytes(32))
    assert db.resolve(before.to_bytes(8, "big") + bytes(32)) == "absent"
    assert db.refresh() == before


def test_resolving_without_an_answer_raises_and_can_be_repeated(bucket: Bucket) -> None:
    db = started(bucket)
    error = unknown(bucket, db, FaultKind.LOST_REPLY, name=b"value")
    bucket.plan(silence(FaultKind.TIMEOUT))
    with pytest.raises(StorageUnavailable):
        db.resolve(error.token)
    bucket.plan({})
    assert db.resolve(error.token) == "committed"


# --- afterwards -----------------------------------------------------------------------------------------------------

OUTCOMES = [FaultKind.LOST_REPLY, FaultKind.TIMEOUT, FaultKind.LATE]


@pytest.mark.parametrize("write", OUTCOMES, ids=lambda one: one.name.lower())
def test_the_handle_goes_on_and_sees_what_became_of_it(bucket: Bucket, write: FaultKind) -> None:
    db = started(bucket)
    unknown(bucket, db, write, name=b"value")
    db[b"after"] = b"value"
    db.commit()
    bucket.simulated.settle()
    db.refresh()
    names = {b"before", b"after"} | ({b"name"} if write is FaultKind.LOST_REPLY else set())
    assert set(db) == names
    assert set(bucket.open("r")) == names
    with db.transaction() as transaction:
        transaction[b"more"] = transaction[b"after"]
    db.close()
    assert bucket.open("r")[b"more"] == b"value"
    assert not list(bucket.open("r").check())


@pytest.mark.parametrize("write", OUTCOMES, ids=lambda one: one.name.lower())
def test_contents_of_an_unknown_commit_are_kept_and_can_be_put_again(bucket: Bucket, write: FaultKind) -> None:
    db = started(bucket)
    content = os.urandom(10_000)
    bucket.plan(silence(write))
    key = db.blobs.put(content)
    with pytest.raises(CommitUnknown):
        db.commit()
    bucket.plan({})
    assert not bucket.asked().named("", "delete")
    sent = bucket.names("data")
    assert len(sent) == 1
    assert db.blobs.put(content) == key
    db.commit()
    bucket.simulated.settle()
    assert bucket.names("data") == sent
    reader = bucket.open("r")
    assert reader.blobs[key] == content
    assert list(reader.blobs) == [key]
    assert not list(reader.check())


@pytest.mark.parametrize("write", OUTCOMES, ids=lambda one: one.name.lower())
def test_a_large_batch_whose_outcome_is_unknown_loses_no_file(bucket: Bucket, write: FaultKind) -> None:
    db = started(bucket)
    rows = {b"name %06d" % number: os.urandom(100) for number in range(12_000)}
    bucket.plan(silence(write))
    with pytest.raises(CommitUnknown) as caught, db.batch() as batch:
        batch.put_many(rows.items())
    bucket.plan({})
    asked = bucket.asked()
    assert asked.named("meta/", "put")
    assert not asked.named("", "delete")
    outcome = db.resolve(caught.value.token)
    bucket.simulated.settle()
    reader = bucket.open("r")
    assert outcome == ("committed" if write is FaultKind.LOST_REPLY else "absent")
    assert dict(reader.scan(prefix=b"name")) == (rows if outcome == "committed" else {})
    with db.batch() as batch:
        batch.put_many(rows.items())
    db.close()
    reader.refresh()
    assert dict(reader.scan(prefix=b"name")) == rows


@pytest.mark.parametrize("write", OUTCOMES, ids=lambda one: one.name.lower())
def test_a_session_whose_beginning_is_unknown_begins_once(bucket: Bucket, write: FaultKind) -> None:
    bucket.open().close()
    db = quick(bucket, "w")
    error = unknown(bucket, db, write, name=b"value")
    db[b"after"] = b"value"
    db.commit()
    bucket.simulated.settle()
    key = db.blobs.put(b"content" * 1000)
    db.commit()
    assert set(db.core.state.sessions) == {db.core.session}
    assert db.resolve(error.token) == ("committed" if write is FaultKind.LOST_REPLY else "absent")
    assert (b"name" in db) == (write is FaultKind.LOST_REPLY)
    db.close()
    reader = bucket.open("r")
    assert reader.blobs[key] == b"content" * 1000
    assert not reader.core.state.sessions
    assert not list(reader.check())


def test_a_batch_is_not_taken_for_committed_because_the_beginning_of_its_session_is(bucket: Bucket) -> None:
    bucket.open().close()
    db = quick(bucket, "w")
    bucket.plan(silence(FaultKind.LOST_REPLY))
    error: BasinError | None = None
    try:
        with db.batch() as batch:
            batch.blobs.put(b"content" * 1000)  # Needs a session, whose record gets no answer.
    except BasinError as caught:
        error = caught
    bucket.plan({})
    assert not isinstance(error, CommitUnknown) or db.resolve(error.token) == "absent"
    assert not list(db.blobs)


def test_a_session_whose_beginning_is_unknown_may_be_another_handles(bucket: Bucket) -> None:
    bucket.open().close()
    db = quick(bucket, "w")
    other = bucket.open("w", actor="other")
    error = unknown(bucket, db, FaultKind.LATE, name=b"value")
    other[b"other"] = b"value"
    other.commit()
    bucket.simulated.settle()
    db[b"after"] = b"value"
    db.commit()
    assert db.resolve(error.token) == "absent"
    assert set(db.core.state.sessions) == {db.core.session, other.core.session}
    other.refresh()
    assert set(other) == {b"other", b"after"}


def test_a_transaction_whose_outcome_is_unknown_is_not_run_again(bucket: Bucket) -> None:
    db = started(bucket)
    runs: list[int] = []

    def count(transaction: Any) -> None:
        if not runs:
            bucket.plan(silence(FaultKind.LOST_REPLY))
        runs.append(1)
        transaction[b"counter"] = b"%d" % (int(transaction.get(b"counter", b"0")) + 1)

    with pytest.raises(CommitUnknown) as caught:
        db.run(count)
    bucket.plan({})
    assert len(runs) == 1
    assert db.resolve(caught.value.token) == "committed"
    db.run(count)
    assert db[b"counter"] == b"2"


@pytest.mark.parametrize("write", OUTCOMES, ids=lambda one: one.name.lower())
def test_upkeep_whose_record_is_unknown_is_done_by_a_later_commit(bucket: Bucket, write: FaultKind) -> None:
    db = started(bucket, checkpoint_every=4)
    plan = silence(write)
    in_upkeep = False

    def from_the_flush_on(request: ObjectRequest) -> FaultKind | None:
        nonlocal in_upkeep
        in_upkeep |= request.kind == "put" and request.name.startswith("meta/")
        return plan(request) if in_upkeep else None

    bucket.plan(from_the_flush_on)
    number = 0
    while not in_upkeep:
        number += 1
        db[b"name"] = b"%d" % number
        db.commit()
    bucket.plan({})
    assert not db.core.state.name_runs
    bucket.simulated.settle()
    for number in range(12):
        db[b"more"] = b"%d" % number
        db.commit()
    assert db.core.state.name_runs
    assert bucket.names("checkpoint")
    reader = bucket.open("r")
    assert reader[b"more"] == b"11"
    assert {finding.kind for finding in reader.check()} <= {"leftover"}


def test_a_close_whose_end_is_unknown_has_lost_nothing(bucket: Bucket) -> None:
    db = started(bucket)
    db[b"name"] = b"value"
    db.commit()
    bucket.plan(silence(FaultKind.TIMEOUT))
    with contextlib.suppress(BasinError):
        db.close()
    bucket.plan({})
    assert db.closed
    reader = bucket.open("r")
    assert set(reader) == {b"before", b"name"}
    assert not list(reader.check())


# --- over a network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        Rule("drop_after", "PUT", "/log/0"),
        Rule("drop_before", "PUT", "/log/0"),
        Rule("reset", "PUT", "/log/0"),
        Rule("delay_reply", "PUT", "/log/0", delay_s=6),
        Rule("status_after", "PUT", "/log/0", status=500, code="InternalError"),
        Rule("status", "PUT", "/log/0", status=409, code="ConditionalRequestConflict"),
        Rule("duplicate", "PUT", "/log/0"),
    ],
    ids=lambda rule: rule.action,
)
def test_one_lost_reply_on_the_way_is_committed_once(s3_place: S3Place, s3_proxy: FaultProxy, rule: Rule) -> None:
    options = {**IMPATIENT, "request_attempts": 4}
    db = s3_place.open(endpoint=s3_proxy.endpoint, **options)
    db[b"before"] = b"value"
    before = db.commit()
    s3_proxy.clear()
    s3_proxy.add(Rule(rule.action, rule.method, rule.match, status=rule.status, code=rule.code, delay_s=rule.delay_s))
    db[b"name"] = b"value"
    assert db.commit() == before + 1
    assert rule.action in [exchange.action for exchange in s3_proxy.exchanges]
    reader = s3_place.open("r")
    assert [change.position for change in reader.changes(before)] == [before + 1]


@pytest.mark.parametrize("action", ["drop_after", "drop_before"])
def test_an_endless_silence_is_an_unknown_outcome_that_another_handle_settles(
    s3_place: S3Place, s3_proxy: FaultProxy, action: Any
) -> None:
    db = s3_place.open(endpoint=s3_proxy.endpoint, **IMPATIENT)
    db[b"before"] = b"value"
    db.commit()
    s3_proxy.add(Rule(action, "PUT", "/log/0", count=None), Rule("drop_before", "GET", "/log/0", count=None))
    db[b"name"] = b"value"
    with pytest.raises(CommitUnknown) as caught:
        db.commit()
    outcome = "committed" if action == "drop_after" else "absent"
    assert s3_place.open("w").resolve(caught.value.token) == outcome
    s3_proxy.clear()
    assert db.resolve(caught.value.token) == outcome
    db[b"after"] = b"value"
    db.commit()
    assert (b"name" in s3_place.open("r")) == (outcome == "committed")
    assert s3_place.open("r")[b"after"] == b"value"


def test_a_commit_while_nothing_can_be_reached_waits_for_better_times(s3_place: S3Place, s3_proxy: FaultProxy) -> None:
    db = s3_place.open(endpoint=s3_proxy.endpoint, **IMPATIENT)
    db[b"before"] = b"value"
    db.commit()
    s3_proxy.add(Rule("reset", count=None))
    key = db.blobs.put(b"content" * 1000)
    with pytest.raises(StorageUnavailable):
        db.commit()
    s3_proxy.clear()
    db.commit()
    assert s3_place.open("r").blobs[key] == b"content" * 1000
