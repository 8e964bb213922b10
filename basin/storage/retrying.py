"""`RetryingObjects`: an object store whose calls are made again when the store does not answer.

Invariants:

- Only `StorageUnavailable` is a reason to call again: every other error would come again.
- `put_new` is never repeated: after a lost reply a second try would be told that the name is taken, by itself. Whoever
  calls it reads the name back and decides.
- What is repeated may have happened already, and happening twice must do no harm: `put` and `put_file` give a name the
  same body again, `delete` does not mind missing names, the rest reads.
- Of `get_many`, only the ranges that failed are asked for again.
- A call ends after `policy.attempts` attempts. No attempt begins later than `policy.deadline_s` after the first one; an
  attempt that has begun is not cut short here.

Imports `basin.errors` and its own package.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from basin.errors import BasinError, StorageUnavailable
from basin.storage.objects import ByteRange, Listing, ObjectStore, Readiness
from basin.storage.requests import RequestPolicy, backoffs

_Result = TypeVar("_Result")
_Found: TypeAlias = list[bytes | BasinError]  # In the class below, `list` is a method.


class RetryingObjects(ObjectStore):
    """`store` with patience. The error of the last attempt is raised, with the field `attempts`. Safe for threads."""

    def __init__(self, store: ObjectStore, policy: RequestPolicy) -> None:
        self.url = store.url
        self.knows_classes = store.knows_classes
        self._store = store
        self._policy = policy
        self._random = random.Random().random

    def __repr__(self) -> str:
        return f"RetryingObjects({self._store!r})"

    def get(self, wanted: ByteRange) -> bytes:
        return self._repeated(lambda: self._store.get(wanted))

    def get_many(self, wanted: Sequence[ByteRange]) -> _Found:
        found: dict[int, bytes | BasinError] = {}

        def ask_for_the_rest() -> None:
            asked = [index for index in range(len(wanted)) if isinstance(found.get(index), StorageUnavailable | None)]
            answers = self._store.get_many([wanted[index] for index in asked]) if asked else []
            found.update(zip(asked, answers, strict=True))
            for answer in answers:
                if isinstance(answer, StorageUnavailable):
                    raise answer

        try:
            self._repeated(ask_for_the_rest)
        except StorageUnavailable as error:
            if len(found) < len(wanted):
                raise  # The call as a whole failed: nothing stands in any place.
            for answer in found.values():
                if isinstance(answer, StorageUnavailable):
                    answer.fields["attempts"] = error.fields["attempts"]
        return [found[index] for index in range(len(wanted))]

    def put(self, name: str, data: bytes) -> None:
        self._repeated(lambda: self._store.put(name, data))

    def put_new(self, name: str, data: bytes) -> None:
        self._store.put_new(name, data)

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        self._repeated(lambda: self._store.put_file(name, path, storage_class))

    def readiness(self, name: str) -> Readiness:
        return self._repeated(lambda: self._store.readiness(name))

    def restore(self, name: str, *, days: int, tier: str) -> None:
        self._repeated(lambda: self._store.restore(name, days=days, tier=tier))

    def size(self, name: str) -> int:
        return self._repeated(lambda: self._store.size(name))

    def delete(self, names: Sequence[str]) -> None:
        self._repeated(lambda: self._store.delete(names))

    def list(self, folder: str) -> Listing:
        return self._repeated(lambda: self._store.list(folder))

    def close(self) -> None:
        self._store.close()

    def _repeated(self, call: Callable[[], _Result]) -> _Result:
        """The result of `call`, which is made until it is answered, or the policy's patience ends."""
        until = time.monotonic() + self._policy.deadline_s
        waits = backoffs(self._policy, self._random)
        attempts = 0
        while True:
            attempts += 1
            try:
                return call()
            except StorageUnavailable as error:
                wait = next(waits, None)
                if wait is None or time.monotonic() + wait > until:
                    error.fields["attempts"] = attempts
                    raise
            time.sleep(wait)
