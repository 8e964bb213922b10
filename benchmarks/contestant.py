"""What a job asks of an engine, and how a peer answers: as it is (`raw`), or with Basin's work on top (`work`).

A contestant is open in one folder. Every method that ends a write is durable on return; everything in `put_…`,
`get_…`, `commit_…` and `scan_…` is inside the clock, `addresses`, `read_…` and `walk_…` are outside.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.peers.protocol import Store
from benchmarks.workload import Contents, Pair

if TYPE_CHECKING:  # its libraries would weigh on the memory measured for a raw peer
    from benchmarks.sealing import Sealer


class Contestant(abc.ABC):
    """One engine in one variant, open in one folder."""

    @abc.abstractmethod
    def put_each(self, batch: Contents) -> None:
        """Store content by one call a value; then one commit."""

    @abc.abstractmethod
    def put_batch(self, batch: Contents) -> None:
        """Store content by the batch call, as one commit."""

    @abc.abstractmethod
    def addresses(self, digests: Sequence[bytes]) -> Sequence[Any]:
        """Digests in the form in which this engine's get takes them."""

    @abc.abstractmethod
    def get_each(self, addresses: Sequence[Any]) -> None:
        """Read content by one call an address."""

    @abc.abstractmethod
    def get_batch(self, addresses: Sequence[Any]) -> None:
        """Read content by the batch call."""

    @abc.abstractmethod
    def put_names(self, pairs: Sequence[Pair]) -> None:
        """Store names by the batch call, as one commit."""

    @abc.abstractmethod
    def get_names_each(self, names: Sequence[bytes]) -> None:
        """Read the values of names by one call a name."""

    @abc.abstractmethod
    def get_names_batch(self, names: Sequence[bytes]) -> None:
        """Read the values of names by the batch call."""

    @abc.abstractmethod
    def commit_name(self, name: bytes, value: bytes) -> None:
        """Store one name as a commit of its own. Called from several threads at once."""

    @abc.abstractmethod
    def scan_names(self) -> int:
        """Visit every (name, value) in order of the names; return how many."""

    @abc.abstractmethod
    def read_content(self, digest: bytes) -> bytes:
        """The value as it was given, for the check outside the clock."""

    @abc.abstractmethod
    def read_name(self, name: bytes) -> bytes:
        """The value as it was given, for the check outside the clock."""

    @abc.abstractmethod
    def walk_digests(self) -> Iterator[bytes]:
        """The digests of all content, sorted, for the check outside the clock."""

    @abc.abstractmethod
    def walk_names(self) -> Iterator[Pair]:
        """All names and values as they were given, sorted, for the check outside the clock."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything."""


class RawPeer(Contestant):
    """A plain store: keys are the digests, made before the clock starts; values go in as they are."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put_each(self, batch: Contents) -> None:
        self._store.put_each(zip(batch.digests, batch.values, strict=True))

    def put_batch(self, batch: Contents) -> None:
        self._store.put_batch(zip(batch.digests, batch.values, strict=True))

    def addresses(self, digests: Sequence[bytes]) -> Sequence[bytes]:
        return digests

    def get_each(self, addresses: Sequence[bytes]) -> None:
        get = self._store.getter()
        for address in addresses:
            get(address)

    def get_batch(self, addresses: Sequence[bytes]) -> None:
        self._store.get_many(addresses)

    def put_names(self, pairs: Sequence[Pair]) -> None:
        self._store.put_batch(pairs)

    def get_names_each(self, names: Sequence[bytes]) -> None:
        self.get_each(names)

    def get_names_batch(self, names: Sequence[bytes]) -> None:
        self.get_batch(names)

    def commit_name(self, name: bytes, value: bytes) -> None:
        self._store.commit_one(name, value)

    def scan_names(self) -> int:
        count = 0
        for _name, _value in self._store.scan():
            count += 1
        return count

    def read_content(self, digest: bytes) -> bytes:
        return self._store.getter()(digest)

    def read_name(self, name: bytes) -> bytes:
        return self._store.getter()(name)

    def walk_digests(self) -> Iterator[bytes]:
        return (key for key, _ in self._store.scan())

    def walk_names(self) -> Iterator[Pair]:
        return self._store.scan()

    def close(self) -> None:
        self._store.close()


class WorkingPeer(Contestant):
    """A store with Basin's work on top: hash for the key, compress, encrypt; and back."""

    def __init__(self, store: Store, sealer: Sealer) -> None:
        self._store = store
        self._sealer = sealer

    def put_each(self, batch: Contents) -> None:
        self._store.put_each(self._sealer.seal_contents(batch.values))

    def put_batch(self, batch: Contents) -> None:
        self._store.put_batch(self._sealer.seal_contents(batch.values))

    def addresses(self, digests: Sequence[bytes]) -> Sequence[bytes]:
        return digests

    def get_each(self, addresses: Sequence[bytes]) -> None:
        get = self._store.getter()
        for _ in self._sealer.open_contents(addresses, map(get, addresses)):
            pass

    def get_batch(self, addresses: Sequence[bytes]) -> None:
        list(self._sealer.open_contents(addresses, self._store.get_many(addresses)))

    def put_names(self, pairs: Sequence[Pair]) -> None:
        self._store.put_batch(self._sealer.seal_names(pairs))

    def get_names_each(self, names: Sequence[bytes]) -> None:
        get = self._store.getter()
        for _ in self._sealer.open_names(zip(names, map(get, names), strict=True)):
            pass

    def get_names_batch(self, names: Sequence[bytes]) -> None:
        list(self._sealer.open_names(zip(names, self._store.get_many(names), strict=True)))

    def commit_name(self, name: bytes, value: bytes) -> None:
        self._store.commit_one(name, self._sealer.seal_name(name, value))

    def scan_names(self) -> int:
        count = 0
        for _name, _value in self._sealer.open_names(self._store.scan()):
            count += 1
        return count

    def read_content(self, digest: bytes) -> bytes:
        return next(self._sealer.open_contents([digest], [self._store.getter()(digest)]))

    def read_name(self, name: bytes) -> bytes:
        return next(self._sealer.open_names([(name, self._store.getter()(name))]))[1]

    def walk_digests(self) -> Iterator[bytes]:
        return (key for key, _ in self._store.scan())

    def walk_names(self) -> Iterator[Pair]:
        return self._sealer.open_names(self._store.scan())

    def close(self) -> None:
        self._store.close()
