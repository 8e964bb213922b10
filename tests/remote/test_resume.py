"""A writer that dies in the middle: what it had sent is kept, and sent no second time; what nobody needs is swept."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from basin.errors import BasinPoisoned, Conflict
from basin.testing.faults import Killed
from basin.testing.object_faults import FaultKind
from tests.conftest import Spawn
from tests.remote.conftest import Bucket, S3Place

ITEMS = 60
ITEM_SIZE = 100_000
OPTIONS: dict[str, Any] = {"stratum_size": 1 << 20}
DIES = 17


def items(count: int = ITEMS) -> list[bytes]:
    """Contents that do not compress, the same in every process."""
    generator = random.Random(20)
    return [generator.randbytes(ITEM_SIZE) for _ in range(count)]


WRITER = f"""
import random
generator = random.Random(20)
items = [generator.randbytes({ITEM_SIZE}) for _ in range({ITEMS})]
db = opened(stratum_size=1 << 20, **eval(sys.argv[2]))
"""

DYING = (
    WRITER
    + f"""
is_logged = eval(sys.argv[2]).get("sync_interval_s", 5) < 1

def ready():
    sent = int(db.stats()["requests"]["put"])
    return sent >= int(sys.argv[3]) and (not is_logged or bool(db.core.state.strata))

with db.batch() as batch:
    for number, item in enumerate(items):
        if number == int(sys.argv[1]):
            until = time.monotonic() + 60
            while not ready() and time.monotonic() < until:
                time.sleep(0.01)
            print(db.core.session, db.stats()["requests"]["put"], len(db.core.state.strata), flush=True)
            os._exit({DIES})
        batch.blobs.put(item)
"""
)


def die(place: S3Place, spawn: Spawn, count: int, options: dict[str, Any], sent: int) -> list[int]:
    """Let a writer die when it has put `count` items, and `sent` strata are in the bucket.

    Returns its session, the strata that it had sent and those that it had logged.
    """
    process = place.start(spawn, DYING, str(count), repr(options), str(sent))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == DIES, printed
    return [int(word) for word in printed.split()]


@pytest.mark.parametrize("timer_s", [0.02, 3600.0], ids=["logged as they land", "not logged"])
def test_the_next_session_of_the_job_sends_only_what_was_not_sent(
    s3_place: S3Place, spawn: Spawn, timer_s: float
) -> None:
    s3_place.open().close()
    session, sent, logged = die(s3_place, spawn, 45, {"job": "nightly", "sync_interval_s": timer_s}, 4)
    assert sent >= 4
    assert (logged > 0) == (timer_s < 1)
    there = set(s3_place.names("data"))
    assert len(there) >= 4

    db = s3_place.open("w", job="nightly", **OPTIONS)
    keys = db.blobs.put_many(items())
    db.commit()
    assert session not in db.core.state.sessions
    figures = db.stats()
    already = ITEMS * ITEM_SIZE - figures["written"]["bytes_new"]
    # Each stratum holds ten items, about; what was in the last one, which was not full, is lost.
    assert already >= 4 * 9 * ITEM_SIZE
    assert figures["requests"]["bytes_out"] < figures["written"]["bytes_new"] * 1.05 + 200_000
    assert db.blobs.get_many(keys) == items()
    assert there <= set(s3_place.names("data"))  # All that it had sent whole was adopted.
    db.close()
    reader = s3_place.open("r")
    assert reader.blobs.get_many(keys) == items()
    assert not list(reader.check())


def test_what_the_timer_logged_is_found_also_without_the_job(s3_place: S3Place, spawn: Spawn) -> None:
    s3_place.open().close()
    session, _, logged = die(s3_place, spawn, 45, {"sync_interval_s": 0.02}, 4)
    assert logged > 0
    db = s3_place.open("w", **OPTIONS)
    db.blobs.put_many(items())
    db.commit()
    assert session in db.core.state.sessions  # Nobody knows that it is dead.
    written = db.stats()["written"]
    assert written["bytes_duplicate"] >= logged * 9 * ITEM_SIZE


def test_files_of_the_dead_session_that_are_no_whole_contents_are_swept(s3_place: S3Place, spawn: Spawn) -> None:
    s3_place.open().close()
    session, *_ = die(s3_place, spawn, 45, {"job": "nightly", "sync_interval_s": 3600.0}, 4)
    place = s3_place.url.removeprefix("s3://")
    client = s3_place.server.client()
    victim = s3_place.names("data")[0]
    body = client.get(f"/{place}/data/{victim}")
    assert body is not None
    assert client.put(f"/{place}/data/{victim}", body[: len(body) // 2]) == 200
    db = s3_place.open("w", job="nightly", **OPTIONS)
    keys = db.blobs.put_many(items())
    db.commit()
    assert session not in db.core.state.sessions
    assert victim not in s3_place.names("data")
    logged = {f"{identity}" for identity in db.core.state.strata}
    assert set(s3_place.names("data")) <= logged
    assert db.blobs.get_many(keys) == items()


def test_without_a_job_the_session_is_dead_after_its_time(s3_place: S3Place, spawn: Spawn) -> None:
    s3_place.open().close()
    session, *_ = die(s3_place, spawn, 45, {"sync_interval_s": 3600.0}, 4)
    time.sleep(1.1)
    db = s3_place.open("w", session_timeout_s=1.0, **OPTIONS)
    db.blobs.put_many(items())
    db.commit()
    assert session not in db.core.state.sessions
    assert db.stats()["written"]["bytes_duplicate"] >= 4 * 9 * ITEM_SIZE


def test_a_writer_that_was_only_paused_cannot_commit_any_more(s3_place: S3Place, spawn: Spawn) -> None:
    program = (
        WRITER
        + """
from basin.errors import BasinPoisoned, Conflict
batch = db.batch()
for item in items[:30]:
    batch.blobs.put(item)
batch[b"name"] = b"of the paused one"
print("paused", flush=True)
sys.stdin.readline()
try:
    batch.__exit__(None, None, None)
except Conflict as error:
    print("told", error.session)
try:
    db[b"name"] = b"again"
except BasinPoisoned:
    print("poisoned")
"""
    )
    s3_place.open().close()
    process = s3_place.start(spawn, program, "0", repr({"job": "nightly", "sync_interval_s": 3600.0}))
    assert process.stdout is not None
    assert process.stdout.readline() == "paused\n"
    db = s3_place.open("w", job="nightly", **OPTIONS)
    db.blobs.put_many(items())
    db[b"name"] = b"of the next one"
    db.commit()
    before = set(s3_place.names("data"))
    printed, _ = process.communicate("go on\n", timeout=60)
    assert printed.split() == ["told", printed.split()[1], "poisoned"]
    db.refresh()
    assert db[b"name"] == b"of the next one"
    assert len(list(db.blobs)) == ITEMS
    assert before <= set(s3_place.names("data"))
    # What landed after the others had looked is no part of the basin, and harms nobody.
    assert {finding.kind for finding in s3_place.open("r").check()} <= {"leftover"}


# --- every place where it can die -----------------------------------------------------------------------------------


def load(bucket: Bucket, actor: str) -> None:
    """Store forty contents under names, in one batch, as a job does."""
    options: dict[str, Any] = {"job": "nightly", "stratum_size": 4096, "sync_interval_s": 3600.0}
    with bucket.open("w", actor=actor, **options) as db, db.batch() as batch:
        for number in range(40):
            batch[b"name %d" % number] = random.Random(number).randbytes(1000)


def test_a_job_that_is_killed_at_any_of_its_requests_is_finished_by_the_next_one(bucket: Bucket) -> None:
    bucket.open().close()
    empty = dict(bucket.simulated.bodies)
    bucket.asked()
    load(bucket, "undisturbed")
    requests = [one for one in bucket.asked() if not one.name.startswith("tmp/")]
    whole = sum(one.size for one in requests)
    tried = 0
    for number in range(4, len(requests), 3):
        killed_at = requests[number]
        bucket.simulated.bodies.clear()
        bucket.simulated.bodies.update(empty)
        actor = f"killed at {number}"
        left = iter(range(1, len(requests) + 1))

        def kill(one: Any, actor: str = actor, left: Any = left, number: int = number) -> FaultKind | None:
            counts = one.actor == actor and not one.name.startswith("tmp/")
            return FaultKind.KILLED_AFTER if counts and next(left) > number and one.kind.startswith("put") else None

        bucket.plan(kill)
        with pytest.raises(Killed):
            load(bucket, actor)
        bucket.plan({})
        bucket.asked()
        load(bucket, f"next after {number}")
        asked = bucket.asked()
        sent = sum(one.size for one in asked if not one.name.startswith("tmp/"))
        assert sent <= whole + 2000, killed_at
        reader = bucket.open("r")
        assert len(reader) == 40
        assert all(reader[b"name %d" % one] == random.Random(one).randbytes(1000) for one in range(40))
        assert not list(reader.check())
        known = {*reader.core.state.strata, *reader.core.state.retired}
        assert set(bucket.names("data")) <= {f"data/{one}" for one in known}
        reader.close()
        tried += 1
    assert tried > 3


def test_a_revoked_session_does_not_commit_and_harms_nothing(bucket: Bucket) -> None:
    paused = bucket.open(job="nightly", stratum_size=4096)
    paused.blobs.put_many([random.Random(number).randbytes(1000) for number in range(20)])
    following = bucket.open("w", job="nightly", stratum_size=4096)
    keys = following.blobs.put_many([random.Random(number).randbytes(1000) for number in range(40)])
    following.commit()
    with pytest.raises(Conflict):
        paused.commit()
    with pytest.raises(BasinPoisoned):
        paused.blobs.put(b"more" * 1000)
    paused.close()
    following.refresh()
    assert len(following.blobs.get_many(keys)) == 40
    assert {finding.kind for finding in bucket.open("r").check()} <= {"leftover"}
