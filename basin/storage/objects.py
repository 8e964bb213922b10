"""The object port: what Basin asks of a bucket. Every request that it sends goes through this one class.

Invariants that every implementation keeps (`basin.testing.object_conformance` checks them):

- One call is one attempt of one request (but for lists of many pages, and large bodies that go up in parts): repeating
  is `retrying`'s business, or nobody's. Where a client library repeats by itself, that is switched off as far as it
  can be.
- A body is visible whole or not at all, and durable when the call returns.
- Errors say what the caller may do next: `ObjectMissing`; `AlreadyExists`; `StorageUnavailable` where trying again may
  help and the effect of a write cannot be known; any other `BasinError` where it cannot help. Texts and fields hold no
  credentials.
- Names are those of `naming`; two names never differ by a suffix `/…` only.

It moves named bytes and knows no grain. Imports `basin.errors` only.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from basin.errors import BasinError, InvalidArgument

PUT_SIZE_MAX: Final = 64 << 20
"""Bodies up to this size are one PUT; above it they go up in parts, and never to a name that must be free."""

RequestKind: TypeAlias = Literal["get", "head", "list", "put", "put_new", "part", "delete", "restore"]
"""What is counted, and priced, apart."""


class ByteRange(NamedTuple):
    """Bytes `start` (inclusive) to `stop` (exclusive) of an object. `stop` None: to its end."""

    name: str
    start: int = 0
    stop: int | None = None


class ObjectInfo(NamedTuple):
    """One line of a list."""

    name: str
    size: int


class Listing(NamedTuple):
    """What lies directly in a folder: objects and folders, sorted, by their names without the folder."""

    objects: list[ObjectInfo]
    folders: list[str]


class Readiness(NamedTuple):
    """Whether a body can be read now. A store that knows no storage classes says of each that it can."""

    storage_class: str = ""
    """As the service spells it; `""`: its usual one."""
    state: Literal["readable", "archived", "restoring"] = "readable"


READABLE: Final = Readiness()


class ObjectStore(abc.ABC):
    """Named bodies below one prefix of one bucket. Safe for several threads.

    A refusal that the caller mends (no such bucket, access denied, expired credentials, a clock that is off, a wrong
    endpoint) is a `StorageError`, or `ReadOnly` for a write, whose text says so in one line; field `reason` is the
    service's code.
    """

    url: str
    """For people: without credentials."""
    knows_classes: bool = False
    """Whether bodies have storage classes here: `put_file` takes one, and some must be restored before they are read.

    Reading one that must is `GrainNotReady` (fields `storage_class` and `restore`), which no repetition helps.
    """

    @abc.abstractmethod
    def get(self, wanted: ByteRange) -> bytes:
        """The bytes of a range; fewer where the object ends before. One request. Raises `ObjectMissing`."""

    def get_many(self, wanted: Sequence[ByteRange]) -> list[bytes | BasinError]:
        """`get` for many at once, concurrently where the client can; an error stands in the place of its range."""
        found: list[bytes | BasinError] = []
        for one in wanted:
            try:
                found.append(self.get(one))
            except BasinError as error:
                found.append(error)
        return found

    @abc.abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Store a body of at most `PUT_SIZE_MAX` bytes; what had the name before is replaced. One request."""

    @abc.abstractmethod
    def put_new(self, name: str, data: bytes) -> None:
        """Store a body of at most `PUT_SIZE_MAX` bytes, if the name is free. One request, never in parts.

        Raises `AlreadyExists` if the store answers that the name is taken: perhaps by this very call, whose first reply
        was lost on the way and which a library sent twice. Raises `StorageUnavailable` after a timeout, a broken
        connection, a 5xx, or a 409 (field `reason` is "contended"). Only reading the name back decides.
        """

    @abc.abstractmethod
    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        """Store a file of any size, as `put` does; above `PUT_SIZE_MAX` in parts of bounded number and memory.

        An upload in parts that fails is aborted, as far as the store can be reached. Raises `InvalidArgument` for a
        `storage_class` where bodies have none.
        """

    @abc.abstractmethod
    def size(self, name: str) -> int:
        """Length of a body in bytes. One request. Raises `ObjectMissing`."""

    def readiness(self, name: str) -> Readiness:
        """Whether a body can be read. One request where the store knows classes, none elsewhere."""
        return READABLE

    def restore(self, name: str, *, days: int, tier: str) -> None:
        """Ask that an archived body be made readable for `days`; no error if somebody has asked already. One request.

        `tier`: how fast, "Standard", "Bulk" or "Expedited". `days` 0 where the class takes none ("INTELLIGENT_TIERING",
        which brings the body back for good). It may take hours: `readiness` says when it is done.
        """
        raise InvalidArgument(f"restore {name!r}: nothing has to be restored here", object=name)

    @abc.abstractmethod
    def delete(self, names: Sequence[str]) -> None:
        """Remove names; missing ones are no error."""

    @abc.abstractmethod
    def list(self, folder: str) -> Listing:
        """What lies directly in `folder` (`""`: the root). Never read from a cache. One request for 1,000 names."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release connections."""
