"""`claim`: take a name that must be free, and know who has it afterwards.

A conditional put whose reply is lost has happened or not, and client libraries repeat it on their own, so that a store
answers "taken" about its own caller. Only what is stored under the name decides (ClickHouse#112096 and
SlateDB#766 tell what believing the reply costs).

Invariants: `CREATED` and `TAKEN` are certain; what is sent again are the same bytes, so a late arrival changes nothing;
bytes that are claimed differ from whatever anybody else claims (they hold fresh random bytes).
"""

from __future__ import annotations

import enum
import random
import time
from typing import NamedTuple

from basin.errors import AlreadyExists, BasinError, ObjectMissing, StorageUnavailable
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.requests import RequestPolicy, backoffs


class Outcome(enum.Enum):
    """Whose the name is."""

    CREATED = "created"
    TAKEN = "taken"
    UNKNOWN = "unknown"


class Claim(NamedTuple):
    """The outcome; what is stored if it was taken; the last error if it is unknown."""

    outcome: Outcome
    stored: bytes = b""
    error: BasinError | None = None


def claim(objects: ObjectStore, name: str, data: bytes, policy: RequestPolicy) -> Claim:
    """Store `data` under `name` unless that is taken. One conditional put, and more only until the outcome is known.

    A name that is taken is read twice, because one reading may have been damaged on its way. Raises what the first put
    raises if that says that nothing was stored (no permission, no such bucket). `UNKNOWN` after the attempts or the
    deadline of `policy`.
    """
    deadline_s = time.monotonic() + policy.deadline_s
    doubtful: BasinError | None = None
    delays = backoffs(policy, random.random)
    while True:
        try:
            objects.put_new(name, data)
            return Claim(Outcome.CREATED)
        except AlreadyExists:
            pass
        except StorageUnavailable as error:
            doubtful = error
        except BasinError as error:
            if doubtful is None:
                raise
            doubtful = error
        try:
            stored = _stored(objects, name, data)
        except ObjectMissing:
            pass  # Nothing yet: what was sent before may still arrive, and so the same bytes are sent again.
        except BasinError as error:
            doubtful = error
        else:
            if stored is not None:
                return Claim(Outcome.CREATED) if stored == data else Claim(Outcome.TAKEN, stored)
        delay_s = next(delays, None)
        if delay_s is None or time.monotonic() + delay_s > deadline_s:
            return Claim(Outcome.UNKNOWN, error=doubtful)
        time.sleep(delay_s)


def _stored(objects: ObjectStore, name: str, data: bytes) -> bytes | None:
    """What is stored under `name`: `data`, or what two readings in a row agree on; None if they do not."""
    first = objects.get(ByteRange(name))
    if first == data:
        return first
    second = objects.get(ByteRange(name))
    return second if second in (first, data) else None
