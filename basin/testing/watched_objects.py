"""`WatchedObjects`: an object store that writes down what it is asked, and fails where a script says so.

    watched = WatchedObjects(MemoryObjects())
    watched.script("put_new", Unheard(StorageUnavailable("no reply", reason="timeout")), None)
    ...                                     # the first of them is stored, and its reply lost; the second goes well
    assert watched.calls == [Call("put_new", "log/1"), ...]

- Requests are written down in the order in which they were sent, also those that fail. A range of `get_many` is a
  request of its own; the call is one round.
- Each kind has a script of its own, a step for each of its next requests; behind its end everything goes well.
- While `down` is an error, every request fails with it, takes no step of a script, and is written down all the same.

Wraps any store, also of a real service. Imports the object port. For faults drawn by a seed, and for virtual time, see
`bucket`.
"""

# The methods' contracts are the port's.

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from basin.errors import BasinError
from basin.storage.objects import ByteRange, Listing, ObjectStore, Readiness, RequestKind

_Result = TypeVar("_Result")
_Found: TypeAlias = list[bytes | BasinError]  # In the class below, `list` is a method.


class Call(NamedTuple):
    """One request; `start` and `stop` are those of a range that is read."""

    kind: RequestKind
    name: str
    start: int = 0
    stop: int | None = None


class Unheard(NamedTuple):
    """A step of a script: the request takes effect if it can, and what comes back is `error` all the same."""

    error: BasinError


Step: TypeAlias = BasinError | Unheard | Callable[[], object] | None
"""What becomes of one request: it fails without an effect, or after it; something happens first; or all is well."""


class WatchedObjects(ObjectStore):
    """`store`, under observation. `calls` are the requests so far; `sent` the bodies of puts. Safe for threads."""

    def __init__(self, store: ObjectStore) -> None:
        self.url = store.url
        self.knows_classes = store.knows_classes
        self.store = store
        self.calls: list[Call] = []
        self.rounds = 0
        """Waits for the store: a call of `get_many` is one."""
        self.sent: list[bytes] = []
        self.down: BasinError | None = None
        self._scripts: dict[RequestKind, deque[Step]] = {}
        self._mutex = threading.Lock()

    def __repr__(self) -> str:
        return f"WatchedObjects({self.store!r})"

    def script(self, kind: RequestKind, *steps: Step) -> None:
        """What becomes of the next requests of `kind`, behind the steps that it has already."""
        with self._mutex:
            self._scripts.setdefault(kind, deque()).extend(steps)

    def count(self, kind: RequestKind) -> int:
        """Requests of `kind` so far."""
        return sum(call.kind == kind for call in self.calls)

    def forget(self) -> None:
        """Begin to count anew."""
        with self._mutex:
            self.calls, self.sent, self.rounds = [], [], 0

    def _begin(self, call: Call, body: bytes | None = None) -> Step:
        """Write a request down, and say what becomes of it."""
        with self._mutex:
            self.calls.append(call)
            if body is not None:
                self.sent.append(body)
            if self.down is not None:
                return self.down
            script = self._scripts.get(call.kind)
            return script.popleft() if script else None

    def _do(self, call: Call, act: Callable[[], _Result], body: bytes | None = None) -> _Result:
        step = self._begin(call, body)
        with self._mutex:
            self.rounds += 1
        return _carried_out(step, act)

    def get(self, wanted: ByteRange) -> bytes:
        return self._do(Call("get", *wanted), lambda: self.store.get(wanted))

    def get_many(self, wanted: Sequence[ByteRange]) -> _Found:
        steps = [self._begin(Call("get", *one)) for one in wanted]
        with self._mutex:
            self.rounds += bool(wanted)
        for step in steps:
            if callable(step):
                step()
        sent = [one for one, step in zip(wanted, steps, strict=True) if not isinstance(step, BasinError)]
        bodies = iter(self.store.get_many(sent))
        found: _Found = []
        for step in steps:
            body = _again(step) if isinstance(step, BasinError) else next(bodies)
            found.append(_again(step.error) if isinstance(step, Unheard) else body)
        return found

    def put(self, name: str, data: bytes) -> None:
        self._do(Call("put", name), lambda: self.store.put(name, data), data)

    def put_new(self, name: str, data: bytes) -> None:
        self._do(Call("put_new", name), lambda: self.store.put_new(name, data), data)

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        self._do(Call("put", name), lambda: self.store.put_file(name, path, storage_class))

    def readiness(self, name: str) -> Readiness:
        if not self.knows_classes:
            return self.store.readiness(name)
        return self._do(Call("head", name), lambda: self.store.readiness(name))

    def restore(self, name: str, *, days: int, tier: str) -> None:
        self._do(Call("restore", name), lambda: self.store.restore(name, days=days, tier=tier))

    def size(self, name: str) -> int:
        return self._do(Call("head", name), lambda: self.store.size(name))

    def delete(self, names: Sequence[str]) -> None:
        self._do(Call("delete", " ".join(names)), lambda: self.store.delete(names))

    def list(self, folder: str) -> Listing:
        return self._do(Call("list", folder), lambda: self.store.list(folder))

    def close(self) -> None:
        self.store.close()


def _carried_out(step: Step, act: Callable[[], _Result]) -> _Result:
    if isinstance(step, BasinError):
        raise _again(step)
    if isinstance(step, Unheard):
        with contextlib.suppress(BasinError):
            act()
        raise _again(step.error)
    if step is not None:
        step()
    return act()


def _again(error: BasinError) -> BasinError:
    """A copy: whoever catches an error may write into it."""
    return type(error)(error.message, **error.fields)
