"""Repairs that the table of `test_repair` does not show: what heals later, what is left alone, what lies elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import basin
from basin.api import Database, open_storage
from basin.engine.repair_names import ReadableRun
from basin.engine.verify import FindingKind
from basin.errors import StorageUnavailable
from basin.format.layout import GRAIN_HEADER_SIZE, STRATUM_HEADER_SIZE
from basin.format.scan import GrainFound, scan_grains
from basin.storage.memory_objects import MemoryObjects, _Place
from basin.storage.objects import ByteRange
from basin.storage.remote import RemoteStorage
from tests.engine.damaged_basin import (
    PLACES,
    POLICY,
    DiskPlace,
    build,
    content,
    findings,
    readable,
    repaired,
)
from tests.engine.test_repair import (
    ANYWHERE,
    a_directory_of_names_is_damaged,
    a_grain_is_damaged,
    digest,
    stratum,
)


def test_a_name_that_was_deleted_does_not_come_back_without_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of the run is lost, and the log does not reach back: the ranges stand in a grain of their own."""
    built = build(PLACES["disk"]("encrypted"))
    a_directory_of_names_is_damaged(built)
    monkeypatch.setattr(ReadableRun, "_look_into_log", lambda *_: None)
    repaired(built.place)
    with built.place.open() as database:
        assert b"gone/05" not in database
        assert database[b"small/0001"] == b"inline 1"


@pytest.mark.parametrize("where", ANYWHERE)
def test_putting_a_lost_content_again_heals_it(where: str) -> None:
    built = build(PLACES[where]("encrypted"))
    lost = list(a_grain_is_damaged(built))
    assert lost
    (action,) = repaired(built.place)
    assert list(action.names) == lost
    assert action.content_keys == tuple(digest(built.names[name]).hex() for name in lost)
    with built.place.open("w") as database:
        assert database.core.state.damaged == {digest(built.names[name]) for name in lost}
        for name in lost:
            database[name] = built.names[name]
    assert findings(built.place) == []
    assert repaired(built.place) == []


def test_a_secret_whose_keys_were_sealed_again_opens() -> None:
    built = build(PLACES["disk"]("encrypted"))
    second = basin.Secret.generate()
    with built.place.open("w") as database:
        slot = database.secrets.add(second)
    built.place.put(f"keys/{slot}/0000000000", None)
    repaired(built.place)
    storage = built.place.storage()
    with open_storage(storage, "place:", mode="r", secret=second) as database:
        assert database[b"small/0001"] == b"inline 1"


def test_a_damaged_stratum_of_a_session_that_died_is_written_anew() -> None:
    """It was never finished. Its session cannot be revoked before the repair, and is afterwards."""
    place = DiskPlace("encrypted")
    build(place)
    database = place.open("w")
    keys = [database.blobs.put(content(number)) for number in range(200, 210)]
    database.commit()
    session = database.core.session
    place.restart(place.disk.kill_image(), boot=1)
    database.core.release("killed")
    with place.open() as reader:
        (name,) = [
            f"data/{identity}" for identity, known in reader.core.state.strata.items() if known.added.session == session
        ]
    data = memoryview(place.files()[name])
    second = [one for one in scan_grains(data, STRATUM_HEADER_SIZE, len(data)) if isinstance(one, GrainFound)][1]
    place.change(name, second.offset + GRAIN_HEADER_SIZE + 5)
    before = readable(place)
    assert sum(key in before for key in keys) == 9
    assert any(action.done for action in repaired(place))
    assert readable(place).items() >= before.items()
    with place.open() as reader:
        assert session not in reader.core.state.sessions
    assert {found.kind for found in findings(place)} == {FindingKind.MISSING}


def test_a_stratum_that_somebody_is_writing_is_left_alone() -> None:
    place = DiskPlace("open")
    build(place)
    with place.open("w") as writer:
        writer.blobs.put(content(200))
        writer.commit()
        (name,) = [
            f"data/{identity}"
            for identity, known in writer.core.state.strata.items()
            if known.added.session == writer.core.session
        ]
        place.overwrite(name, STRATUM_HEADER_SIZE + GRAIN_HEADER_SIZE + 5, b"rot")
        (action,) = [one for one in repaired(place) if one.object == name]
        assert not action.possible


def test_what_does_not_answer_is_no_loss() -> None:
    """A bucket that refuses to give one object: nothing is let go of."""
    built = build(PLACES["bucket"]("open"))
    name = stratum(built)
    get = MemoryObjects.get

    def refuse(self: MemoryObjects, wanted: ByteRange) -> bytes:
        if wanted.name == name:
            raise StorageUnavailable("not now", object=name, operation="get")
        return get(self, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryObjects, "get", refuse)
        with pytest.raises(StorageUnavailable):
            repaired(built.place)
    assert readable(built.place).items() >= built.names.items()


def test_an_index_over_cold_contents_is_written_anew() -> None:
    """Contents are archived, so that only the merged index says where they lie; one page of it is damaged."""
    objects, secret = _Place(), basin.Secret.generate()

    def opened(mode: Any, **options: Any) -> Database:
        storage = RemoteStorage(MemoryObjects("memory://cold", objects), POLICY, uploads=0)
        return open_storage(storage, "memory://cold", mode=mode, secret=secret, options=options)

    with opened("x", data_storage_class="GLACIER") as database:
        keys = [database.blobs.put(content(number)) for number in range(300)]
    (name,) = [one for one in objects.bodies if one.startswith("index/")]
    body = bytearray(objects.bodies[name])
    body[STRATUM_HEADER_SIZE + GRAIN_HEADER_SIZE + 50] ^= 1
    objects.bodies[name] = bytes(body)
    with opened("w") as database:
        (action,) = database.repair(dry_run=False)
        assert action.done
        assert "thaw" in action.detail
    with opened("r") as database:
        found = sum(
            database.core.locator.find(database.core.keyring.grain_keys.grain_key(key.digest)) is not None
            for key in keys
        )
        assert 100 < found < 300


@pytest.mark.parametrize("whose", ["copy", "own"])
def test_a_descriptor_is_restored_from_its_copy(tmp_path: Path, whose: str) -> None:
    """Contents have a root of their own, with a copy of the descriptor."""
    hot, cold = tmp_path / "hot", tmp_path / "cold"
    with basin.open(hot, "x", profile="open", data_url=str(cold), reserve_size=0) as database:
        database[b"name"] = content(1)
    whole = (hot / "basin.json").read_bytes()
    with basin.open(hot, "w", reserve_size=0) as database:
        damaged = (cold if whose == "copy" else hot) / "basin.json"
        damaged.chmod(0o600)
        damaged.write_bytes(whole[:-20])
        assert [found.kind for found in database.check()] == [FindingKind.DESCRIPTOR]
        (action,) = database.repair(dry_run=False)
        assert action.done
        assert list(database.check()) == []
    assert damaged.read_bytes() == whole
