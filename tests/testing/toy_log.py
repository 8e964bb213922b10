"""A toy log of numbered slots, taken by conditional puts, with sabotaged variants: code under test for the simulator.

Sound, it stands every fault of the simulated bucket; each sabotage must be caught by the history checker. Actors move
money between accounts, so that the sum is known, and read all of them.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import xxhash

from basin.errors import AlreadyExists, CommitUnknown, Conflict, ObjectMissing, StorageUnavailable
from basin.storage.objects import ByteRange
from basin.testing.bucket import BucketClient, Run, run
from basin.testing.faults import Killed
from basin.testing.history import History, LoggedCommit, check_history, check_sum
from basin.testing.object_faults import Fault, FaultKind, Plan

ACCOUNTS = ("a", "b", "c")
TOTAL = 300
INITIAL = dict.fromkeys(ACCOUNTS, 100)


def slot_name(position: int) -> str:
    return f"log/{position:020d}"


def framed(content: Any) -> bytes:
    body = json.dumps(content).encode()
    return xxhash.xxh3_64_digest(body) + body


def unframed(frame: bytes) -> Any:
    if xxhash.xxh3_64_digest(frame[8:]) != frame[:8]:
        raise StorageUnavailable("the bytes were damaged on their way")
    return json.loads(frame[8:])


class ToyLog:
    """A state folded from slots; knows the slots up to `position`."""

    def __init__(self, client: BucketClient) -> None:
        self.client = client
        self.position = 0
        self.state: dict[str, Any] = {}

    def catch_up(self) -> None:
        while True:
            try:
                self._apply(self.slot(self.position + 1))
            except ObjectMissing:
                return

    def append(self, label: str, changes: Mapping[str, Any]) -> int:
        """Take the next slot; raise `Conflict` or `CommitUnknown`."""
        frame = framed([label, changes, os.urandom(8).hex()])
        for _ in range(6):
            if self.take(slot_name(self.position + 1), frame):
                self._apply(unframed(frame))
                return self.position
        raise CommitUnknown("given up", token=b"")

    def take(self, name: str, frame: bytes) -> bool:
        """Try to take a slot, and look whose it is. False: it cannot be known yet."""
        try:
            self.client.put_new(name, frame)
            return True
        except (AlreadyExists, StorageUnavailable):
            return self.is_ours(name, frame)

    def is_ours(self, name: str, frame: bytes) -> bool:
        try:
            stored = self.client.get(ByteRange(name))
            unframed(stored)
        except (ObjectMissing, StorageUnavailable):
            time.sleep(0.1)
            return False
        if stored != frame:
            raise Conflict("taken")
        return True

    def slot(self, position: int) -> Any:
        for _ in range(6):
            try:
                return unframed(self.client.get(ByteRange(slot_name(position))))
            except StorageUnavailable:
                time.sleep(0.1)
        raise StorageUnavailable("given up")

    def _apply(self, slot: Any) -> None:
        self.state.update(slot[1])
        self.position += 1


class BelievesTaken(ToyLog):
    """Sabotage: "taken" is somebody else's doing, always."""

    def take(self, name: str, frame: bytes) -> bool:
        try:
            self.client.put_new(name, frame)
            return True
        except AlreadyExists:
            raise Conflict("taken") from None
        except StorageUnavailable:
            return self.is_ours(name, frame)


class BelievesFailed(ToyLog):
    """Sabotage: no reply means that nothing happened."""

    def take(self, name: str, frame: bytes) -> bool:
        try:
            self.client.put_new(name, frame)
            return True
        except StorageUnavailable:
            raise Conflict("no reply") from None
        except AlreadyExists:
            return self.is_ours(name, frame)


class BelievesDone(ToyLog):
    """Sabotage: no reply means that it happened."""

    def take(self, name: str, frame: bytes) -> bool:
        try:
            self.client.put_new(name, frame)
            return True
        except StorageUnavailable:
            return True
        except AlreadyExists:
            return self.is_ours(name, frame)


class Overwrites(ToyLog):
    """Sabotage: puts without the condition."""

    def take(self, name: str, frame: bytes) -> bool:
        self.client.put(name, frame)
        return True


class NeverLooks(ToyLog):
    """Sabotage: knows what it knew at first."""

    def catch_up(self) -> None:
        if not self.position:
            super().catch_up()


class ReadsTwice(ToyLog):
    """Sabotage: catches up while the state is being read."""


def transfers(history: History, count: int, kind: type[ToyLog]) -> Callable[[BucketClient], None]:
    """An actor: `count` times, move money between two accounts, as the log stands then."""

    def actor(client: BucketClient) -> None:
        log = kind(client)
        generator = random.Random(client.actor)
        for number in range(count):
            for attempt in range(8):
                log.catch_up()
                source, target = generator.sample(ACCOUNTS, 2)
                amount = generator.randint(1, 20)
                changes = {source: log.state.get(source, 100) - amount, target: log.state.get(target, 100) + amount}
                label = f"{client.actor}-{number}-{attempt}"
                try:
                    history.commit(client.actor, label, changes, partial(log.append, label, changes))
                    break
                except Conflict:
                    continue
                except CommitUnknown:
                    break

    return actor


def reads(history: History, count: int, kind: type[ToyLog]) -> Callable[[BucketClient], None]:
    """An actor: `count` times, catch up and read all accounts."""

    def actor(client: BucketClient) -> None:
        log = kind(client)

        def read() -> tuple[int | None, dict[str, Any]]:
            log.catch_up()
            if kind is ReadsTwice:
                first = log.state.get("a", 100)
                log.catch_up()
                return None, {name: log.state.get(name, 100) for name in ACCOUNTS} | {"a": first}
            return log.position, {name: log.state.get(name, 100) for name in ACCOUNTS}

        for _ in range(count):
            history.read(client.actor, read, fresh=True)
            time.sleep(0.05)

    return actor


def life(history: History, kind: type[ToyLog]) -> dict[str, Callable[[BucketClient], None]]:
    return {
        "writer-1": transfers(history, 5, kind),
        "writer-2": transfers(history, 5, kind),
        "reader": reads(history, 8, kind),
    }


def logged(bodies: Mapping[str, bytes]) -> list[LoggedCommit]:
    return [
        LoggedCommit(int(name.removeprefix("log/")), *unframed(bodies[name])[:2])
        for name in sorted(bodies)
        if name.startswith("log/")
    ]


def checked_life(seed: int, faults: Plan | None = None, kind: type[ToyLog] = ToyLog) -> Run[None]:
    """Run the toy's life and check its history."""
    history = History()
    ran = run(seed, life(history, kind), faults)
    survivors = {name: error for name, error in ran.errors.items() if not isinstance(error, Killed)}
    assert survivors == {}
    log = logged(ran.bucket.bodies)
    check_history(history, log, initial=INITIAL)
    check_sum(history, log, ACCOUNTS, TOTAL, initial=INITIAL)
    return ran


def at_random(seed: int, kinds: tuple[FaultKind, ...], share: float = 0.1) -> Callable[[Any], Fault | None]:
    generator = random.Random(seed)
    return lambda _: generator.choice(kinds) if generator.random() < share else None
