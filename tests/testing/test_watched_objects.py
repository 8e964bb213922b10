"""The watched store keeps the port's promises, writes down what it is asked, and fails as the script says."""

from __future__ import annotations

import pytest

from basin.errors import AlreadyExists, ObjectMissing, StorageUnavailable
from basin.storage.memory_objects import MemoryObjects, memory_objects
from basin.storage.objects import ByteRange, ObjectStore
from basin.testing.object_conformance import ObjectStoreConformance
from basin.testing.watched_objects import Call, Unheard, WatchedObjects

SILENCE = StorageUnavailable("no reply in time", reason="timeout")


class TestWatchedObjects(ObjectStoreConformance):
    def make_store(self, place: str) -> ObjectStore:
        return WatchedObjects(memory_objects(f"memory://{place}"))


def test_requests_are_written_down_in_order() -> None:
    watched = WatchedObjects(MemoryObjects())
    watched.put("a", b"body")
    with pytest.raises(AlreadyExists):
        watched.put_new("a", b"other")
    watched.get_many([ByteRange("a", 1, 2), ByteRange("b")])
    watched.get_many([])
    watched.size("a")
    assert watched.calls == [
        Call("put", "a"),
        Call("put_new", "a"),
        Call("get", "a", 1, 2),
        Call("get", "b"),
        Call("head", "a"),
    ]
    assert (watched.rounds, watched.count("get"), watched.sent) == (4, 2, [b"body", b"other"])
    watched.forget()
    assert (watched.rounds, watched.calls, watched.sent) == (0, [], [])


def test_a_script_fails_before_after_or_not_at_all() -> None:
    watched = WatchedObjects(MemoryObjects())
    watched.script("put", SILENCE, Unheard(SILENCE), None, lambda: watched.store.put("first", b""))
    for name in ("unsent", "unheard"):
        with pytest.raises(StorageUnavailable) as caught:
            watched.put(name, b"")
        assert caught.value is not SILENCE
        assert caught.value.fields == {"reason": "timeout"}
    for name in ("well", "last", "later"):
        watched.put(name, b"")
    assert [found.name for found in watched.list("").objects] == ["first", "last", "later", "unheard", "well"]


def test_ranges_of_one_call_take_a_step_each() -> None:
    watched = WatchedObjects(MemoryObjects())
    watched.store.put("a", b"body")
    watched.script("get", None, SILENCE, Unheard(SILENCE), lambda: watched.store.put("b", b"new"))
    found = watched.get_many([ByteRange("a"), ByteRange("a"), ByteRange("a"), ByteRange("b"), ByteRange("absent")])
    assert [one if isinstance(one, bytes) else type(one) for one in found] == [
        b"body",
        StorageUnavailable,
        StorageUnavailable,
        b"new",
        ObjectMissing,
    ]


def test_while_it_is_down_nothing_arrives() -> None:
    watched = WatchedObjects(MemoryObjects())
    watched.script("put", Unheard(SILENCE))
    watched.down = SILENCE
    with pytest.raises(StorageUnavailable):
        watched.put("a", b"")
    assert [type(one) for one in watched.get_many([ByteRange("a")])] == [StorageUnavailable]
    watched.down = None
    assert watched.list("").objects == []
    with pytest.raises(StorageUnavailable):
        watched.put("a", b"")
    assert len(watched.list("").objects) == 1
