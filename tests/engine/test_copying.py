"""Copies: a selection in a flat file shares no key with its source; an import brings everything, and only once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.api import Database
from basin.engine import copying
from basin.engine.core import Core
from basin.engine.scopes import BatchScope
from basin.errors import (
    BasinError,
    ContentNotFound,
    CorruptionError,
    InvalidArgument,
    NameNotFound,
    ObjectMissing,
    WrongSecret,
)
from tests.engine.flat_material import QUIET, SECRET, SMALL, damage, everything, little_of_everything, names_in


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return tmp_path / "FILE.basin"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Database]:
    """An encrypted basin on the disk, for writing, with a little of everything."""
    with little_of_everything(tmp_path / "source") as db:
        yield db


# --- a selection ----------------------------------------------------------------------------------------------------


def test_a_selection_has_its_names_and_what_they_reach(source: Database, flat: Path) -> None:
    base = source.blobs.put(b"linked by what is linked", root=False)
    linked = source.blobs.put(b"linked by the value", links=[base], root=False)
    value = source.blobs.put(b"a value that links", links=[linked], root=False)
    source[b"fruit/linked"] = basin.Ref(value)
    source[b"fruit/large"] = b"many parts" * 100
    stranger = source.blobs.put(b"reached by nothing that is selected", root=False)
    source[b"stranger"] = basin.Ref(stranger)
    report = source.export(flat, prefix=b"fruit/", profile="open")
    assert report.names == 4
    assert report.contents == 5
    with basin.open(flat, "r") as db:
        assert dict(db.scan()) == dict(source.scan(prefix=b"fruit/"))
        assert db.ref(b"fruit/linked") == value
        assert db.blobs.links(value) == [linked]
        assert db.blobs[base] == b"linked by what is linked"
        assert list(db.blobs) == db.keyspaces() == []
        assert stranger not in db.blobs
        assert source.ref(b"other") not in db.blobs
        assert damage(db) == []
    assert b"reached by nothing" not in flat.read_bytes()
    assert names_in(flat.parent) == ["FILE.basin", "source"]


def test_a_selection_of_a_keyspace(source: Database, flat: Path) -> None:
    source.keyspace("texts").put_many([(b"a/1", b"one"), (b"a/2", b"two"), (b"b/1", b"x" * 50)])
    source.export(flat, keyspace="numbers", profile="open")
    with basin.open(flat, "r") as db:
        assert db.keyspaces() == ["numbers"]
        assert dict(db.keyspace("numbers", order="u64", values="json").scan()) == {7: {"seven": 7}, 8: "x" * 100}
        assert len(db) == 0
    flat.unlink()
    source.export(flat, keyspace="texts", prefix=b"a/", profile="open")
    with basin.open(flat, "r") as db:
        assert dict(db.keyspace("texts").scan()) == {b"a/1": b"one", b"a/2": b"two"}


def keys_of(path: Path, db: Database) -> list[bytes]:
    """What is the source's alone: its id, its slots, and the ids and keys of its grains; as bytes and as hex digits."""
    core = db.core
    found = [core.keyring.basin_id, core.keyring.descriptor_hash]
    found += [bytes.fromhex(slot) for slot in core.state.slots] + list(core.state.slots.values())
    found += list(core.state.strata)
    found += [known.added.key_material for known in core.state.strata.values()]
    for index in core.locator.indexes:
        for number in range(index.directory.page_count):
            found += [row.key for row in index.rows(number)]
    return [*found, *(one.hex().encode() for one in found)]


def test_a_selection_shares_no_key_with_its_source(source: Database, tmp_path: Path, flat: Path) -> None:
    source.export(tmp_path / "whole.basin")
    second = basin.Secret.generate()
    source.export(flat, prefix=b"", secret=second)
    data = flat.read_bytes()
    with basin.open(tmp_path / "whole.basin", "r", secret=SECRET) as db:
        foreign = keys_of(tmp_path / "source", db)
    assert len(foreign) > 20
    assert all(one in (tmp_path / "whole.basin").read_bytes() for one in foreign[:1])
    assert [one for one in foreign if one in data] == []
    with pytest.raises(WrongSecret):
        basin.open(flat, "r", secret=SECRET)
    with basin.open(flat, "r", secret=second) as db:
        assert dict(db.scan()) == dict(source.scan())
        assert damage(db) == []


@pytest.mark.parametrize(
    ("selection", "error"),
    [
        ({"prefix": b"vegetable/", "profile": "open"}, NameNotFound),
        ({"keyspace": "none", "profile": "open"}, NameNotFound),
        ({"keyspace": "", "profile": "open"}, NameNotFound),
        ({"keyspace": "numbers", "prefix": b"bytes", "profile": "open"}, InvalidArgument),
        ({"prefix": b"fruit/"}, InvalidArgument),
        ({"prefix": b"fruit/", "secret": "one", "profile": "open"}, InvalidArgument),
    ],
    ids=str,
)
def test_a_selection_that_cannot_be_leaves_nothing(
    source: Database, flat: Path, selection: dict[str, Any], error: type[BasinError]
) -> None:
    with pytest.raises(error):
        source.export(flat, **selection)
    assert names_in(flat.parent) == ["source"]


def test_a_selection_whose_content_is_lost_is_not_made(source: Database, tmp_path: Path, flat: Path) -> None:
    source.close()
    for victim in (tmp_path / "source" / "data").iterdir():
        data = bytearray(victim.read_bytes())
        data[128 + 44 : 1000] = bytes(len(data[128 + 44 : 1000]))
        victim.write_bytes(data)
    with basin.open(tmp_path / "source", "r", secret=SECRET) as db, pytest.raises(CorruptionError):
        db.export(flat, prefix=b"fruit/", profile="open")
    assert names_in(tmp_path) == ["source"]


# --- import ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Database]:
    with basin.open(tmp_path / "target", "x", profile="open", **QUIET) as db:
        yield db


def test_an_import_brings_everything(source: Database, target: Database, flat: Path) -> None:
    source.export(flat)
    with basin.open(flat, "r", secret=SECRET) as other:
        report = target.import_from(other)
        assert everything(target) == everything(other)
    assert report.names == 4 + 2 + 3
    assert report.names_same == report.contents_same == 0
    assert report.contents == 3 + 3
    rows = [db.scope.find(b"\0\0\0\0expires") for db in (source, target)]
    expiries = {0 if row is None else row[3] for row in rows}
    assert len(expiries) == 1
    assert 0 not in expiries
    assert damage(target) == []


def test_importing_twice_changes_nothing(source: Database, target: Database) -> None:
    first = target.import_from(source)
    head, written = target.head, target.stats()["written"]["bytes_stored"]
    second = target.import_from(source)
    assert (second.names, second.contents, second.size) == (0, 0, 0)
    assert (second.names_same, second.contents_same) == (first.names, first.contents)
    assert target.stats()["written"]["bytes_stored"] == written
    assert target.head == head


def test_what_is_there_is_not_read_again(source: Database, target: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    present = target.blobs.put(b"in no other content")
    read: list[list[bytes]] = []
    get_many = source.core.contents.get_many

    def watched(keys: list[bytes]) -> list[bytes]:
        read.append(keys)
        return get_many(keys)

    monkeypatch.setattr(source.core.contents, "get_many", watched)
    report = target.import_from(source)
    assert report.contents_same == 1
    assert read
    assert present.digest not in [key for keys in read for key in keys]


def test_an_import_replaces_values_and_keeps_other_names(source: Database, target: Database) -> None:
    target[b"mine"] = b"stays"
    target[b"fruit/apple"] = b"green"
    target.keyspace("mine")[b"name"] = b"value"
    target.keyspace("numbers", order="u64", values="json")[9] = "nine"
    target.import_from(source)
    assert target[b"mine"] == b"stays"
    assert target[b"fruit/apple"] == b"red"
    assert target.keyspace("mine")[b"name"] == b"value"
    assert dict(target.keyspace("numbers").scan()) == {7: {"seven": 7}, 8: "x" * 100, 9: "nine"}


def test_a_keyspace_of_another_kind_is_refused(source: Database, target: Database) -> None:
    target.keyspace("numbers", order="bytes")
    with pytest.raises(InvalidArgument):
        target.import_from(source)


def test_links_are_added_to_a_content_that_had_none(source: Database, target: Database) -> None:
    target.blobs.put(b"with links")
    target.import_from(source)
    assert everything(target)["blobs"] == everything(source)["blobs"]
    assert damage(target) == []


def test_a_long_chain_of_links(source: Database, target: Database) -> None:
    key = source.blobs.put(b"the first", root=False)
    for number in range(3000):
        key = source.blobs.put(b"link %d" % number, links=[key], root=False)
    source[b"last"] = basin.Ref(key)
    target.import_from(source)
    for _ in range(3000):
        (key,) = target.blobs.links(key)
    assert target.blobs[key] == b"the first"


def test_large_contents_are_cut_as_the_target_cuts(tmp_path: Path, source: Database, rng: random.Random) -> None:
    whole = rng.randbytes(1000)
    key = source.blobs.put(whole)
    with basin.open(tmp_path / "other", "x", profile="open", **{**SMALL, "part_max": 300, "part_size": 200}) as target:
        target.import_from(source)
        assert target.blobs[key] == whole
        assert [size for _, size in target.blobs.parts(key)] == [200] * 5
        assert damage(target) == []


def test_values_inline_in_the_source_only(tmp_path: Path, source: Database) -> None:
    with basin.open(tmp_path / "other", "x", profile="open", **{**QUIET, "inline_max": 2}) as target:
        target.import_from(source)
        assert target[b"fruit/apple"] == b"red"
        assert target.ref(b"fruit/apple") is not None
        assert target.import_from(source).names == 0


def test_an_import_is_committed_in_batches(source: Database, target: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_BATCH_NAMES_MAX", 2000)
    source.put_many((b"many %d" % number, b"value %d" % number) for number in range(1000))
    commits: list[int] = []
    commit = Core.commit

    def watched(self: Core, pending: Any) -> int:
        commits.append(pending.names.size)
        return commit(self, pending)

    monkeypatch.setattr(Core, "commit", watched)
    assert target.import_from(source).names == 1009
    assert len(commits) > 5
    assert everything(target) == everything(source)


def test_an_import_that_fails_is_gone_on_with(
    source: Database, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_BATCH_NAMES_MAX", 10)
    find = BatchScope.find
    calls: list[bytes] = []

    def failing(self: Any, name: bytes) -> Any:
        calls.append(name)
        if len(calls) == 5:
            raise ObjectMissing("gone", object="data/gone")
        return find(self, name)

    monkeypatch.setattr(BatchScope, "find", failing)
    with pytest.raises(ObjectMissing):
        target.import_from(source)
    assert 0 < len(everything(target)["names"]) < 5
    assert damage(target) == []
    target.import_from(source)
    assert everything(target) == everything(source)


def test_a_content_that_is_lost_in_the_source_stops_the_import(
    source: Database, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = source.ref(b"other")
    assert lost is not None
    find_all = source.core.locator.find_all
    grain_key = source.core.keyring.grain_keys.grain_key(lost.digest)
    monkeypatch.setattr(source.core.locator, "find_all", lambda key: iter(()) if key == grain_key else find_all(key))
    monkeypatch.setattr(source.core.contents, "clast", lambda key: raise_missing())
    with pytest.raises(ContentNotFound):
        target.import_from(source)


def raise_missing() -> Any:
    raise ContentNotFound("no such content")
