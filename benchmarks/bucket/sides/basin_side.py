"""Basin: encrypted, with default options, by its public names only; but for a client below it that is not its choice.

`commit_each` is that many threads on one handle, which share records; `Racers` are that many handles, which do not know
of each other and race for positions of the log.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import basin
from basin.api import Mode, open_storage
from basin.storage.disk_cache import DiskCache
from basin.storage.remote import RemoteStorage
from basin.storage.s3_choice import open_s3
from basin.terms import ContentKey
from benchmarks.bucket.contestant import Blobs, Names, Side, Streams
from benchmarks.bucket.place import Place
from benchmarks.bucket.workload import Pairs

_COPY_SIZE: Final = 1 << 20
_OPENERS: Final = 16


def open_database(place: Place, *, reading: bool = False) -> basin.Database:
    """A handle with a cache folder of its own below the place; the secret is a key file, which costs no argon2id."""
    place.folder.mkdir(parents=True, exist_ok=True)
    secret_file = place.folder / "secret"
    if not secret_file.exists():
        basin.Secret.generate().to_file(secret_file)
    mode: Mode = "r" if reading else "c"
    secret = basin.Secret.from_file(secret_file)
    if place.client:
        return open_storage(storage_with(place), place.url, mode=mode, secret=secret, profile="encrypted")
    return basin.open(
        place.url,
        mode=mode,
        secret=secret,
        profile="encrypted",
        storage_options=place.s3fs_options(),
        cache_folder=str(place.cache),
    )


def storage_with(place: Place) -> RemoteStorage:
    """What `basin.open` makes, with the client that the place names."""
    options = basin.Options()
    policy = options.request_policy()
    store = open_s3(place.url, {**place.s3fs_options(), "client": place.client}, policy)
    cache = DiskCache(place.cache, options.disk_cache_size)
    return RemoteStorage(store, policy, cache=cache, uploads=options.upload_count)


def open_side(place: Place, *, reading: bool) -> BasinSide:
    return BasinSide(open_database(place, reading=reading))


class BasinSide(Names, Blobs, Streams):
    """One handle."""

    def __init__(self, database: basin.Database) -> None:
        self._database = database

    def put_batch(self, pairs: Pairs) -> None:
        self._database.put_many(pairs)
        self._database.commit()

    def load(self, batches: Iterable[Pairs]) -> None:
        for batch in batches:
            self._database.put_many(batch)
        self._database.commit()

    def commit_each(self, shares: Sequence[Pairs]) -> None:
        commit_concurrently([self._database] * len(shares), shares)

    def get_each(self, names: Sequence[bytes]) -> list[bytes]:
        database = self._database
        return [database[name] for name in names]

    def scan(self) -> int:
        count = 0
        for _name, _value in self._database.scan():
            count += 1
        return count

    def put_values(self, values: Sequence[bytes]) -> Sequence[ContentKey]:
        keys = self._database.blobs.put_many(values)
        self._database.commit()
        return keys

    def get_values(self, addresses: Sequence[ContentKey], size: int) -> Sequence[bytes]:
        return self._database.blobs.get_many(addresses)

    def put_file(self, path: Path) -> ContentKey:
        key = self._database.blobs.put(path)
        self._database.commit()
        return key

    def get_whole(self, address: ContentKey, size: int) -> bytes:
        return self._database.blobs[address]

    def get_file(self, address: ContentKey, path: Path) -> None:
        with self._database.blobs.open(address) as body, path.open("wb") as file:
            shutil.copyfileobj(body, file, _COPY_SIZE)

    def close(self) -> None:
        self._database.close()


class Racers(Side):
    """Handles with sessions of their own, each in a thread of its own, on one basin."""

    def __init__(self, place: Place, count: int) -> None:
        """Open `count` handles, and let each commit once: with its first commit a handle tries out what the store does
        with writes at the same time, which takes some dozen requests.
        """
        open_database(place).close()  # One creates it; the others find it.
        with ThreadPoolExecutor(_OPENERS) as pool:
            self._databases = list(pool.map(lambda number: _racer(place, number), range(count)))

    def commit_each(self, shares: Sequence[Pairs]) -> None:
        """As `Names.commit_each`, a handle for each share."""
        commit_concurrently(self._databases, shares)

    def get_each(self, names: Sequence[bytes]) -> list[bytes]:
        """As the first handle sees it, after it caught up with the others."""
        self._databases[0].refresh()
        return [self._databases[0][name] for name in names]

    def close(self) -> None:
        for database in self._databases:
            database.close()


def _racer(place: Place, number: int) -> basin.Database:
    database = open_database(place)
    database.put(b"racer %d" % number, b"ready")
    database.commit()
    return database


def commit_concurrently(databases: Sequence[basin.Database], shares: Sequence[Pairs]) -> None:
    """A thread for each share, which puts and commits pair by pair."""

    def commit_share(database: basin.Database, share: Pairs) -> None:
        for name, value in share:
            database.put(name, value)
            database.commit()

    with ThreadPoolExecutor(len(shares)) as pool:
        for done in [pool.submit(commit_share, *work) for work in zip(databases, shares, strict=True)]:
            done.result()
