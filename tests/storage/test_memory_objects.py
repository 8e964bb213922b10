"""Objects in memory keep the port's promises, and belong to the URL that they were opened with."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from basin.errors import InvalidArgument, StorageError
from basin.storage.memory_objects import MemoryObjects, memory_objects
from basin.storage.objects import ByteRange, Listing, ObjectInfo, ObjectStore
from basin.testing.object_conformance import ObjectStoreConformance


class TestMemoryObjects(ObjectStoreConformance):
    races = 100

    def make_store(self, place: str) -> ObjectStore:
        return memory_objects(f"memory://{place}")


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(6)}"


def test_objects_outlive_the_stores_of_their_url(url: str) -> None:
    first = memory_objects(url)
    first.put("a", b"kept")
    first.close()
    assert memory_objects(url).get(ByteRange("a")) == b"kept"


def test_places_do_not_see_each_other(url: str) -> None:
    memory_objects(url).put("a", b"x")
    for other in (memory_objects(f"{url}-other"), memory_objects(f"{url}/below"), MemoryObjects(), MemoryObjects(url)):
        assert other.list("") == Listing([], [])


def test_slashes_at_the_end_of_a_url_mean_nothing(url: str) -> None:
    memory_objects(f"{url}/").put("a", b"x")
    assert memory_objects(url).list("") == Listing([ObjectInfo("a", 1)], [])
    assert memory_objects(f"{url}//").url == url
    assert repr(memory_objects(url)) == f"MemoryObjects({url!r})"


@pytest.mark.parametrize("url", ["", "memory://", "memory:///", "memory:name", "s3://bucket", "name"])
def test_another_kind_of_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        memory_objects(url)
    assert caught.value.fields["argument"] == "url"


def test_a_file_that_cannot_be_read_is_an_error(url: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no-such-file"):
        memory_objects(url).put_file("a", tmp_path / "no-such-file")
    assert memory_objects(url).list("") == Listing([], [])
