"""Basin as a contestant: an encrypted basin with default options, by the names of its public surface only.

Content jobs use `db.blobs`, which deduplicates every value; jobs on names use the database as a mapping. The secret
is a 32-byte key file beside the basin, because a passphrase would add a quarter of a second of argon2id to every
open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import basin
from basin.terms import ContentKey
from benchmarks.contestant import Contestant
from benchmarks.workload import Contents, Pair

_BASIN_FOLDER: Final = "store"
_SECRET_FILE: Final = "secret"


class Subject(Contestant):
    """One open database."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        secret_file = folder / _SECRET_FILE
        if not secret_file.exists():
            basin.Secret.generate().to_file(secret_file)
        self._db = basin.open(folder / _BASIN_FOLDER, secret=basin.Secret.from_file(secret_file))

    def put_each(self, batch: Contents) -> None:
        put = self._db.blobs.put
        for value in batch.values:
            put(value)
        self._db.commit()

    def put_batch(self, batch: Contents) -> None:
        self._db.blobs.put_many(batch.values)
        self._db.commit()

    def addresses(self, digests: Sequence[bytes]) -> Sequence[ContentKey]:
        return [ContentKey(digest) for digest in digests]

    def get_each(self, addresses: Sequence[ContentKey]) -> None:
        get = self._db.blobs.get
        for address in addresses:
            get(address)

    def get_batch(self, addresses: Sequence[ContentKey]) -> None:
        list(self._db.blobs.get_many(addresses))

    def put_names(self, pairs: Sequence[Pair]) -> None:
        self._db.put_many(pairs)
        self._db.commit()

    def get_names_each(self, names: Sequence[bytes]) -> None:
        get = self._db.get
        for name in names:
            get(name)

    def get_names_batch(self, names: Sequence[bytes]) -> None:
        list(self._db.get_many(names))

    def commit_name(self, name: bytes, value: bytes) -> None:
        self._db.put(name, value)
        self._db.commit()

    def scan_names(self) -> int:
        count = 0
        for _name, _value in self._db.scan():
            count += 1
        return count

    def read_content(self, digest: bytes) -> bytes:
        return self._db.blobs[ContentKey(digest)]

    def read_name(self, name: bytes) -> bytes:
        return self._db[name]

    def walk_digests(self) -> Iterator[bytes]:
        return (bytes(content_key) for content_key in self._db.blobs)

    def walk_names(self) -> Iterator[Pair]:
        return iter(self._db.scan())

    def close(self) -> None:
        self._db.close()
