"""The whole life of a basin over a network that fails, and at a server that is killed.

The user of these tests does what the documentation says: tries again after `StorageUnavailable`, asks `resolve` after
`CommitUnknown`. Then every acknowledged commit is there, and nothing that is read is wrong.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import basin
from basin.errors import BasinError, CommitUnknown, StorageUnavailable
from basin.terms import ContentKey
from tests.conftest import Spawn
from tests.remote.conftest import S3Place
from tests.s3_proxy import FaultProxy, Rule, fault_proxy
from tests.storage import s3_servers
from tests.storage.s3_servers import KEY, SECRET, S3Server

T = TypeVar("T")

OPTIONS: dict[str, Any] = {
    "request_attempts": 2,
    "request_deadline_s": 10.0,
    "read_timeout_s": 2.0,
    "part_max": 1 << 20,
    "part_size": 1 << 20,
    "stratum_size": 1 << 20,
    "checkpoint_every": 8,
    "sync_interval_s": 0.5,
}
TRIES = 60


def weather() -> list[Rule]:
    """Rules by which about every fifth request meets something."""
    return [
        Rule("drop_before", count=None, probability=0.03),
        Rule("drop_after", count=None, probability=0.04),
        Rule("reset", count=None, probability=0.03),
        Rule("truncate", "GET", count=None, probability=0.06),
        Rule("status", "PUT", count=None, probability=0.04),
        Rule("status", "GET", count=None, probability=0.04),
        Rule("status_after", "PUT", count=None, probability=0.03, status=500, code="InternalError"),
        Rule("duplicate", "PUT", count=None, probability=0.03),
        Rule("delay", count=None, probability=0.03, delay_s=0.1),
        Rule("delay_reply", count=None, probability=0.01, delay_s=3),
    ]


class Stubborn:
    """A user who gives up only after many tries, and what was acknowledged to them."""

    def __init__(self, place: S3Place, pause_s: float = 0) -> None:
        self.place = place
        self.names: dict[bytes, bytes] = {}
        self.blobs: dict[ContentKey, bytes] = {}
        self.commits = 0
        self.doubts = 0
        self._pause_s = pause_s
        self.db = self.tried(lambda: place.open("c", **OPTIONS))

    def tried(self, work: Callable[[], T]) -> T:
        """The result of `work`, which changes nothing."""
        for _ in range(TRIES):
            with contextlib.suppress(StorageUnavailable):
                return work()
            time.sleep(self._pause_s)
        raise AssertionError(f"no answer in {TRIES} tries")

    def commit(self, fill: Callable[[Any], None]) -> None:
        """One batch, committed once."""
        for _ in range(TRIES):
            batch = self.db.batch()
            try:
                fill(batch)
            except (StorageUnavailable, CommitUnknown):
                continue  # Nothing of it was to be committed yet.
            try:
                with batch:
                    pass
            except StorageUnavailable:
                time.sleep(self._pause_s)
                continue
            except CommitUnknown as error:
                token = error.token
                self.doubts += 1
                if self.tried(lambda token=token: self.resolved(token)) == "absent":  # type: ignore[misc]  # a default
                    continue
            self.commits += 1
            return
        raise AssertionError(f"not committed in {TRIES} tries")

    def resolved(self, token: bytes) -> str:
        """What became of a commit; resolving appends a record, whose own outcome may be unknown."""
        try:
            return self.db.resolve(token)
        except CommitUnknown as error:
            raise StorageUnavailable("ask again", token=token) from error

    def put(self, rows: dict[bytes, bytes]) -> None:
        self.commit(lambda batch: batch.put_many(rows.items()))
        self.names.update(rows)

    def put_blob(self, content: bytes) -> None:
        keys: list[ContentKey] = []
        self.commit(lambda batch: keys.append(batch.blobs.put(content)))
        self.blobs[keys[-1]] = content

    def reopen(self) -> None:
        with contextlib.suppress(BasinError):
            self.db.close()
        self.db = self.tried(lambda: self.place.open("w", **OPTIONS))

    def look(self, chance: random.Random) -> None:
        """Read some of what was acknowledged, through the same network, by the handle and by a new one."""
        for db in (self.db, self.tried(lambda: self.place.open("r", **OPTIONS))):
            for name in chance.sample(sorted(self.names), min(3, len(self.names))):
                assert self.tried(lambda db=db, name=name: db.get(name)) == self.names[name]  # type: ignore[misc]  # as above
            for key in chance.sample(sorted(self.blobs), min(2, len(self.blobs))):
                assert self.tried(lambda db=db, key=key: db.blobs.get(key)) == self.blobs[key]  # type: ignore[misc]  # as above

    def assert_all_is_there(self, place: S3Place) -> None:
        """By a new handle, over a network that works."""
        with place.open("r") as reader:
            assert dict(reader.items()) == self.names
            keys = sorted(self.blobs)
            assert reader.blobs.get_many(keys) == [self.blobs[key] for key in keys]
            assert sorted(reader.blobs) == keys
            assert {finding.kind for finding in reader.check()} <= {"leftover"}


def live(user: Stubborn, chance: random.Random, steps: int) -> None:
    """Do what users do."""
    for step in range(steps):
        action = chance.choice(
            ["names", "names", "large value", "blob", "look", "reopen" if step % 4 == 0 else "names"]
        )
        if action == "names":
            count = chance.randint(1, 20)
            user.put({b"name %d" % chance.randrange(100): b"%d of %d" % (one, step) for one in range(count)})
        elif action == "large value":
            user.put({b"large %d" % chance.randrange(5): chance.randbytes(5000)})
        elif action == "blob":
            user.put_blob(chance.randbytes(chance.choice([10, 10_000, 300_000])))
        elif action == "reopen":
            user.reopen()
        else:
            user.look(chance)
    user.put_blob(chance.randbytes(3 << 20))
    user.look(chance)


@pytest.fixture(params=["ministack", "seaweedfs"])
def stormy(
    request: pytest.FixtureRequest, secret: basin.Secret, key_file: Path, rng: random.Random
) -> Iterator[tuple[S3Place, FaultProxy]]:
    """A place of a server, behind a proxy."""
    server: S3Server = request.getfixturevalue(request.param)
    with fault_proxy(server.endpoint, seed=rng.getrandbits(32)) as proxy:
        place = S3Place(server, server.new_url(), secret, key_file, proxy.endpoint)
        yield place, proxy
        proxy.clear()
        place.close()


@pytest.mark.slow
def test_every_acknowledged_commit_survives_a_network_that_fails(
    stormy: tuple[S3Place, FaultProxy], rng: random.Random
) -> None:
    place, proxy = stormy
    proxy.add(*weather())
    user = Stubborn(place)
    live(user, rng, 16)
    met = [exchange.action for exchange in proxy.exchanges if exchange.action]
    print(f"{user.commits} commits, {user.doubts} doubts, {len(met)} faults in {len(proxy.exchanges)} requests")
    assert len(set(met)) >= 6
    proxy.clear()
    user.assert_all_is_there(S3Place(place.server, place.url, place.secret, place.key_file))


@pytest.mark.slow
def test_two_users_count_together_over_a_network_that_fails(stormy: tuple[S3Place, FaultProxy]) -> None:
    place, proxy = stormy
    users = [Stubborn(place) for _ in range(2)]
    proxy.add(*weather())
    failures: list[BaseException] = []

    def count(user: Stubborn, number: int) -> None:
        try:
            for step in range(8):
                user.put({b"of %d" % number: b"%d" % step, b"%d/%d" % (number, step): b"value"})
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=count, args=(user, number)) for number, user in enumerate(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    proxy.clear()
    users[0].names |= users[1].names
    users[0].assert_all_is_there(S3Place(place.server, place.url, place.secret, place.key_file))


# --- a server that is killed ----------------------------------------------------------------------------------------


def started_again(server: S3Server, spawn: Spawn, folder: Path) -> subprocess.Popen[Any]:
    """Kill the server's process, and start it on the same folder and ports; return when it stores."""
    (process,) = server.processes
    process.kill()
    process.wait()
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    with (folder / "again.txt").open("wb") as output:
        again = spawn(process.args, cwd=folder, env=environment, stdout=output, stderr=output)
    client = server.client(timeout_s=2)
    until = time.monotonic() + s3_servers.READY_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if client.put("/again", b"") in (200, 409) and client.put("/again/object", b"x") == 200:
                return again
        time.sleep(0.1)
    raise AssertionError("the server does not store again")


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_server_that_is_killed(
    secret: basin.Secret, key_file: Path, tmp_path: Path, spawn: Spawn, rng: random.Random
) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    with s3_servers.seaweedfs(folder) as server:
        place = S3Place(server, server.new_url(), secret, key_file)
        user = Stubborn(place, pause_s=0.5)
        ending = threading.Event()
        failures: list[BaseException] = []

        def write() -> None:
            try:
                for step in range(1_000_000):
                    if ending.is_set():
                        return
                    user.put({b"name %d" % step: b"%d" % step})
                    user.put_blob(rng.randbytes(20_000))
            except BaseException as error:
                failures.append(error)
                raise

        writing = threading.Thread(target=write)
        writing.start()
        wait_for_commits(user, 10)
        started_again(server, spawn, folder)
        wait_for_commits(user, user.commits + 6)
        ending.set()
        writing.join()
        assert not failures
        user.assert_all_is_there(place)
        place.close()


def wait_for_commits(user: Stubborn, count: int) -> None:
    until = time.monotonic() + 120
    while user.commits < count:
        assert time.monotonic() < until
        time.sleep(0.05)
