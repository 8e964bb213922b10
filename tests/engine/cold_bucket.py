"""A bucket in memory whose contents are archived, and contents to put there. Not a test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import basin
from basin.api import Database, open_storage
from basin.storage.memory_objects import MemoryObjects
from basin.storage.remote import RemoteStorage
from basin.storage.requests import RequestPolicy
from basin.testing.watched_objects import Call, WatchedObjects

SECRET = basin.Secret.generate()
POLICY = RequestPolicy(attempts=2, backoff_first_s=0.001, backoff_max_s=0.002)


@dataclass
class ColdBucket:
    """A bucket in memory whose `data/` is of an archive class, and all that is asked of it."""

    watched: WatchedObjects = field(default_factory=lambda: WatchedObjects(MemoryObjects()))
    options: dict[str, Any] = field(default_factory=lambda: {"data_storage_class": "GLACIER"})
    opened: list[Database] = field(default_factory=list)

    def open(self, mode: Any = "w", **options: Any) -> Database:
        storage = RemoteStorage(self.watched, POLICY)
        storage.objects.close = lambda: None  # type: ignore[method-assign]  # it has more than one handle
        database = open_storage(storage, "memory://cold", mode=mode, secret=SECRET, options=options)
        self.opened.append(database)
        return database

    def create(self, **options: Any) -> Database:
        return self.open("x", **{**self.options, **options})

    def touched(self) -> list[Call]:
        """What was asked of objects below `data/`, but for storing them."""
        return [call for call in self.watched.calls if call.name.startswith("data/") and call.kind != "put"]

    def names(self, folder: str) -> list[str]:
        return [info.name for info in self.watched.store.list(folder).objects]


@pytest.fixture
def bucket() -> Iterator[ColdBucket]:
    made = ColdBucket()
    yield made
    for database in made.opened:
        database.core.release("the test is over")


def content(number: int, size: int = 2000) -> bytes:
    return number.to_bytes(4, "big") + os.urandom(size)
