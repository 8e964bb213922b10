"""Whether a store keeps its promise to create a name only once: tried, because an answer proves nothing.

Some stores ignore the condition and overwrite; others answer "taken" when asked one after another, and let several
writers through when they come at the same time (OpenStack Swift with s3api: 45 of 60 races). So writers race.

Imports the object port.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from basin.errors import AlreadyExists, BasinError, ObjectMissing, StorageError, StorageUnavailable
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.protocol import TEMPORARY_FOLDER

ROUNDS: Final = 5
"""A store that lets several through in three races of four passes all five once in a thousand times."""
RACERS: Final = 8


def probe_create_only(objects: ObjectStore, *, concurrent: bool = True) -> None:
    """Raise `StorageError` if several writers can create one name in `objects`. `ROUNDS` x (`RACERS` + 1) puts.

    Also raises what the puts raise: `ReadOnly` without permission to write. All races run at the same time: some stores
    take seconds to settle one. Without `concurrent` nothing races, and only a store that ignores the condition shows.
    """
    names = [f"{TEMPORARY_FOLDER}/probe-{os.urandom(12).hex()}" for _ in range(ROUNDS)]
    entries = [(name, bytes([racer]) + os.urandom(15)) for name in names for racer in range(RACERS)]
    try:
        if concurrent:
            with ThreadPoolExecutor(len(entries), thread_name_prefix="basin-probe") as pool:
                outcomes = list(pool.map(lambda entry: _attempt(objects, *entry), entries))
        else:
            outcomes = [_attempt(objects, *entry) for entry in entries]
        for number, name in enumerate(names):
            mine = slice(number * RACERS, (number + 1) * RACERS)
            _judge(objects, name, [body for _, body in entries[mine]], outcomes[mine])
    finally:
        with contextlib.suppress(BasinError):
            objects.delete(names)


def _attempt(objects: ObjectStore, name: str, body: bytes) -> BasinError | None:
    try:
        objects.put_new(name, body)
    except BasinError as error:
        return error
    return None


def _judge(objects: ObjectStore, name: str, bodies: Sequence[bytes], outcomes: Sequence[BasinError | None]) -> None:
    """One race: at most one writer may have been told that it won, and its body must be there and stay."""
    for outcome in outcomes:
        if outcome is not None and not isinstance(outcome, (AlreadyExists, StorageUnavailable)):
            raise outcome
    if all(isinstance(outcome, StorageUnavailable) for outcome in outcomes):
        raise outcomes[0] or StorageUnavailable("the store did not answer", object=name, operation="probe")
    winners = [body for body, outcome in zip(bodies, outcomes, strict=True) if outcome is None]
    # A reply that was lost makes a winner look like a loser; two that were told that they won are a lie in any case,
    # and what they wrote over each other may not even be readable.
    several = f"{len(winners)} of {RACERS} writers created one name at the same time"
    if len(winners) > 1:
        raise _refusal(objects, name, several)
    try:
        stored = objects.get(ByteRange(name))
    except ObjectMissing as error:
        raise _refusal(objects, name, "it said that a name was taken under which nothing is stored") from error
    if (winners and stored != winners[0]) or stored not in bodies:
        raise _refusal(objects, name, several)
    late = _attempt(objects, name, b"late")
    if late is None or objects.get(ByteRange(name)) != stored:
        raise _refusal(objects, name, "it overwrote a name that was to be created only if it was free")


def _refusal(objects: ObjectStore, name: str, what: str) -> StorageError:
    return StorageError(
        f"{objects.url}: this store does not keep conditional writes ({what}), so commits could be lost: a basin needs "
        "a store that does; see docs/buckets.md",
        object=name,
        operation="probe",
        reason="unconditional",
    )
