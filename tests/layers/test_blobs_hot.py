"""Contents that are put as hot lie where metadata lies; links by thousands; a content together with its links."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import basin
from basin.api import Database
from basin.engine.contents import Contents
from basin.errors import ContentNotFound, GrainNotReady, ReadOnly
from basin.format.layout import StratumKind
from tests.engine.cold_bucket import ColdBucket, bucket
from tests.engine.damaged_basin import PLACES, repaired

__all__ = ["bucket"]

SECRET = basin.Secret.generate()
OPTIONS: dict[str, Any] = {"stratum_size": 64 << 10, "history_s": 0.0, "history_size": 0}
CHUNKER: dict[str, Any] = {"part_max": 8192, "part_size": 2048}
Open = Callable[..., Database]


@pytest.fixture(params=["disk", "disk, encrypted", "bucket, encrypted"])
def reopened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens handles on one basin, which are closed in the end."""
    where, _, encrypted = request.param.partition(", ")
    url = str(tmp_path / "basin") if where == "disk" else f"memory://{uuid.uuid4().hex}"
    handles: list[Database] = []

    def call(mode: Any = "c", **options: Any) -> Database:
        kind: dict[str, Any] = {"secret": SECRET} if encrypted else {"profile": "open" if mode == "c" else None}
        creating = CHUNKER if mode == "c" else {}
        db = basin.open(url, mode, **kind, **{**OPTIONS, **creating, "refresh_interval_s": 0.0, **options})
        handles.append(db)
        return db

    yield call
    for db in handles:
        db.close()


@pytest.fixture
def db(reopened: Open) -> Database:
    return reopened()


def kinds(db: Database, key: basin.ContentKey) -> list[int]:
    """The kinds of the strata that hold grains of a content."""
    core = db.core
    return [
        core.locator.kind_of(one.stratum)
        for one in core.locator.find_all(core.keyring.grain_keys.grain_key(key.digest))
    ]


def numbered(count: int, size: int = 2000) -> list[bytes]:
    rng = random.Random(count)
    return [rng.randbytes(size) for _ in range(count)]


def damage(db: Database) -> list[basin.Finding]:
    return [finding for finding in db.check() if finding.severity != "info"]


def finish_strata(db: Database) -> None:
    """What is put from now on lies in other strata."""
    db.commit()
    with db.core.contents.mutex:
        db.core.own_strata.finish_all()


class TestWhere:
    @pytest.mark.parametrize("size", [0, 10, 8192])
    def test_a_hot_content_lies_with_the_metadata(self, db: Database, size: int) -> None:
        content = os.urandom(size)
        key = db.blobs.put(content, hot=True)
        assert kinds(db, key) == [StratumKind.META]
        db.commit()
        assert db.blobs[key] == content
        assert db.blobs.links(key) == []

    def test_many_do(self, db: Database) -> None:
        contents = numbered(200, 700)
        keys = db.blobs.put_many([*contents, contents[3]], hot=True, root=False)
        assert [bytes(key) for key in keys[:-1]] == [blake3(content).digest() for content in contents]
        assert {tuple(kinds(db, key)) for key in keys} == {(StratumKind.META,)}
        assert db.blobs.get_many(keys[:-1]) == contents

    def test_all_parts_of_a_large_one_do(self, db: Database) -> None:
        content = os.urandom(50_000)
        (key,) = db.blobs.put_many([content], hot=True)
        parts = [part for part, _ in db.blobs.parts(key)]
        assert len(parts) > 5
        assert {tuple(kinds(db, one)) for one in [key, *parts]} == {(StratumKind.META,)}
        assert db.blobs[key] == content

    def test_others_do_not(self, db: Database) -> None:
        first, second = db.blobs.put(b"one" * 100), db.blobs.put_many([b"two" * 100])[0]
        assert kinds(db, first) == kinds(db, second) == [StratumKind.DATA]

    def test_what_lies_with_the_data_is_stored_a_second_time_and_no_third(self, db: Database) -> None:
        contents = numbered(3)
        for content in contents:
            db.blobs.put(content)
        db.commit()
        for _ in range(2):
            assert db.blobs.put_many(contents[1:], hot=True) == [
                basin.ContentKey(blake3(content).digest()) for content in contents[1:]
            ]
            db.blobs.put(contents[0], hot=True)
            db.commit()
            for content in contents:
                assert sorted(kinds(db, basin.ContentKey(blake3(content).digest()))) == [1, 2]

    def test_what_is_hot_is_not_stored_with_the_data_too(self, db: Database) -> None:
        contents = numbered(3)
        keys = db.blobs.put_many(contents, hot=True)
        db.commit()
        db.blobs.put(contents[0])
        db.blobs.put_many(contents)
        assert {tuple(kinds(db, key)) for key in keys} == {(StratumKind.META,)}

    def test_a_root_is_as_with_any_content(self, db: Database, reopened: Open) -> None:
        first = db.blobs.put(b"first", hot=True)
        db.blobs.put(b"second", hot=True, root=False)
        assert list(db.blobs) == [first]
        db.commit()
        with pytest.raises(ReadOnly):
            reopened("r").blobs.put(b"x", hot=True)


class TestCold:
    def test_hot_contents_are_read_while_the_others_are_archived(self, bucket: ColdBucket) -> None:
        contents = numbered(20)
        with bucket.create() as database:
            keys = database.blobs.put_many(contents, hot=True)
            parent = database.blobs.put(b"parent", links=keys)
            cold = database.blobs.put(b"cold" * 1000)
        database = bucket.open("r")
        assert database.blobs.get_many(keys) == contents
        assert database.blobs[keys[0]] == contents[0]
        assert database.blobs.get_linked(parent) == (b"parent", keys)
        assert database.blobs.size(keys[1]) == 2000
        with pytest.raises(GrainNotReady):
            database.blobs[cold]

    @pytest.mark.parametrize("hot_first", [True, False])
    def test_a_content_that_is_cold_too_is_read_where_it_is_hot(self, bucket: ColdBucket, hot_first: bool) -> None:
        contents = numbered(4)
        with bucket.create() as database:
            keys = database.blobs.put_many(contents, hot=hot_first)
            database.blobs.put_many(numbered(50))  # The largest index is searched first.
            database.commit()
            database.blobs.put_many(contents, hot=not hot_first)
            linked = database.blobs.put(contents[0], links=keys[1:])
            assert database.blobs.put(contents[0], links=keys[1:]) == linked  # Found, and nothing cold was looked at.
        database = bucket.open("r")
        assert [database.blobs[key] for key in keys] == contents
        assert database.blobs.get_many(keys) == contents
        assert database.blobs.get_linked(keys[0]) == (contents[0], keys[1:])
        assert database.blobs.get_linked(keys[1]) == (contents[1], [])
        assert database.blobs.links(keys[0]) == keys[1:]

    def test_links_of_what_is_archived_are_known(self, bucket: ColdBucket) -> None:
        with bucket.create() as database:
            key = database.blobs.put(b"cold" * 1000)
        database = bucket.open("r")
        assert database.blobs.links(key) == []
        assert bucket.touched() == []


class TestManyLinks:
    def test_they_are_looked_for_together(self, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = db.blobs.put_many(numbered(3000, 20))
        db.commit()
        with monkeypatch.context() as patched:
            patched.setattr(Contents, "rely_on", None)
            key = db.blobs.put(b"parent", links=[*keys, keys[7], str(keys[8])], root=False)
        assert db.blobs.get_linked(key) == (b"parent", [*keys, keys[7], keys[8]])

    def test_the_commit_relies_on_all_of_them(self, db: Database) -> None:
        keys = [db.blobs.put(content) for content in numbered(50)]
        with db.batch() as batch:
            batch.blobs.put(b"parent", links=keys)
            assert set(batch.scope.pending.relied) >= {bytes(key) for key in keys}  # type: ignore[attr-defined]  # a scope of a batch

    def test_one_that_is_nowhere_is_named(self, db: Database) -> None:
        keys = db.blobs.put_many(numbered(10))
        absent = basin.ContentKey(os.urandom(32))
        with pytest.raises(ContentNotFound) as caught:
            db.blobs.put(b"parent", links=[*keys, absent])
        assert caught.value.content_key == absent
        assert basin.ContentKey(blake3(b"parent").digest()) not in db.blobs

    def test_what_another_has_just_committed_is_found(self, db: Database, reopened: Open) -> None:
        db.commit()
        other = reopened("w", refresh_interval_s=3600.0)
        (key,) = db.blobs.put_many([b"child" * 200])
        db.commit()
        assert other.blobs.put(b"parent", links=[key]) in other.blobs


class TestLinked:
    def test_links_come_in_their_order_with_repetitions(self, db: Database, reopened: Open) -> None:
        a, b = db.blobs.put(b"a"), db.blobs.put(b"b" * 3000)
        key = db.blobs.put(b"parent" * 500, links=[b, a, b, b])
        plain = db.blobs.put(b"plain" * 500)
        empty = db.blobs.put(b"", links=[a], hot=True)
        large = db.blobs.put(b"".join(numbered(10)), links=[b, a, b])
        wanted = [
            (b"parent" * 500, [b, a, b, b]),
            (b"plain" * 500, []),
            (b"", [a]),
            (b"".join(numbered(10)), [b, a, b]),
            (b"parent" * 500, [b, a, b, b]),
        ]
        keys = [key, plain, empty, large, key]
        assert db.blobs.get_linked_many(keys) == wanted
        db.commit()
        reader = reopened("r")
        assert reader.blobs.get_linked_many(iter(keys)) == wanted
        assert [reader.blobs.get_linked(str(one)) for one in keys] == wanted
        assert reader.blobs.get_linked_many([]) == []
        for absent in ("0" * 64, f"{plain}-1"):
            with pytest.raises(ContentNotFound):
                reader.blobs.get_linked_many([key, absent])

    def test_many_large_ones_are_read_on_all_cores(self, db: Database, reopened: Open) -> None:
        child = db.blobs.put(b"child")
        contents = numbered(100, 8000)
        keys = [db.blobs.put(content, links=[child]) for content in contents]
        db.commit()
        reader = reopened("r", threads=2)
        assert reader.blobs.get_linked_many(keys) == [(content, [child]) for content in contents]

    def test_a_grain_with_links_is_preferred(self, db: Database) -> None:
        child, content = db.blobs.put(b"child"), b"content" * 100
        key = db.blobs.put(content)
        db.blobs.put(content, hot=True)
        db.blobs.put(content, links=[child])
        db.commit()
        assert len(kinds(db, key)) == 3
        assert db.blobs.get_linked(key) == (content, [child])

    def test_what_was_merged_meanwhile_is_found(self, db: Database, reopened: Open) -> None:
        child = db.blobs.put(b"child")
        keys = []
        for number in range(20):
            keys.append(db.blobs.put(b"parent %d" % number, links=[child]))
            db.commit()
        reader = reopened("r", refresh_interval_s=3600.0)
        db.compact(grace_s=0)
        wanted = [(b"parent %d" % number, [child]) for number in range(20)]
        assert reader.blobs.get_linked_many(keys) == wanted


class TestCompaction:
    def test_what_is_linked_to_stays_and_the_rest_goes(self, db: Database) -> None:
        kept, dead = numbered(30), numbered(31)
        keys = db.blobs.put_many(kept, hot=True, root=False)
        parent = db.blobs.put(b"parent", links=keys)
        finish_strata(db)  # Where nearly all is needed, nothing is written anew.
        gone = db.blobs.put_many(dead, hot=True, root=False)
        passing = db.blobs.put(b"passing", links=gone)
        db.commit()
        db.blobs.delete(passing)
        db.commit()
        for _ in range(2):
            assert db.compact(grace_s=0).problems == []
        assert db.blobs.get_many(keys) == kept
        assert db.blobs.get_linked(parent) == (b"parent", keys)
        assert {tuple(kinds(db, key)) for key in keys} == {(StratumKind.META,)}
        assert [key for key in gone if key in db.blobs] == []
        assert passing not in db.blobs
        assert damage(db) == []
        db.blobs.delete(parent)
        db.commit()
        for _ in range(2):
            db.compact(grace_s=0)
        assert [key for key in [*keys, parent] if key in db.blobs] == []

    def test_a_root_keeps_one_without_links(self, db: Database) -> None:
        keys = db.blobs.put_many(numbered(20), hot=True)
        db.commit()
        for key in keys[::2]:
            db.blobs.delete(key)
        db.commit()
        db.compact(grace_s=0)
        assert db.blobs.get_many(keys[1::2]) == numbered(20)[1::2]
        assert damage(db) == []

    def test_what_a_dead_parent_links_to_stays_as_long_as_the_parent(self, db: Database) -> None:
        hot = db.blobs.put_many(numbered(40, 100), hot=True, root=False)
        finish_strata(db)
        kept = [db.blobs.put(random.Random(number).randbytes(20_000)) for number in range(60)]
        for number in range(0, 60, 2):
            db.blobs.put(b"parent %d" % number * 50, links=kept[number : number + 2])
        parent = db.blobs.put(b"dead parent", links=hot)
        db.commit()
        db.blobs.delete(parent)
        db.commit()
        db.compact(grace_s=0)
        assert parent in db.blobs  # Too little to write its stratum anew.
        db[b"found"] = basin.Ref(parent)
        db.commit()
        db.compact(grace_s=0)
        assert db.blobs.get_many(hot) == numbered(40, 100)
        assert damage(db) == []

    def test_merged_strata_keep_them_where_they_are(self, db: Database) -> None:
        keys = []
        for content in numbered(40):
            keys.append(db.blobs.put(content, hot=True))
            db.commit()
        db.compact(grace_s=0)
        assert db.blobs.get_many(keys) == numbered(40)
        assert {tuple(kinds(db, key)) for key in keys} == {(StratumKind.META,)}
        assert damage(db) == []


def test_an_export_has_them(reopened: Open, tmp_path: Path) -> None:
    db = reopened()
    keys = db.blobs.put_many(numbered(10), hot=True, root=False)
    db[b"tree"] = basin.Ref(db.blobs.put(b"parent" * 200, links=[*keys, keys[0]], root=False))
    db[b"other"] = b"value"
    db.export(tmp_path / "whole.basin")
    db.export(tmp_path / "part.basin", prefix=b"t", profile="open")
    encrypted = db.core.keyring.profile == "encrypted"
    for name, secret in (("whole", SECRET if encrypted else None), ("part", None)):
        with basin.open(tmp_path / f"{name}.basin", "r", secret=secret) as flat:
            assert flat.blobs.get_many(keys) == numbered(10)
            parent = flat.ref(b"tree")
            assert parent is not None
            content, links = flat.blobs.get_linked(parent)
            assert content == b"parent" * 200
            assert set(links) == set(keys)
            assert damage(flat) == []


@pytest.mark.parametrize("profile", ["open", "encrypted"])
@pytest.mark.parametrize("kind", PLACES)
def test_a_repair_brings_back_all_but_the_damaged_one(kind: str, profile: str) -> None:
    place = PLACES[kind](profile)
    contents = numbered(30, 3000)
    with place.open("x") as database:
        keys = database.blobs.put_many(contents, hot=True)
        database.blobs.put(b"parent" * 100, links=keys)
        core = database.core
        found = core.locator.find(core.keyring.grain_keys.grain_key(keys[7].digest))
        assert found is not None
    place.change(f"meta/{found.stratum}", found.offset + found.length // 2)
    repaired(place)
    with place.open("w") as database:
        for number, key in enumerate(keys):
            if number != 7:
                assert database.blobs[key] == contents[number]
        assert database.blobs.put(contents[7], hot=True) == keys[7]  # Recorded as damaged: put again.
        database.commit()
        assert kinds(database, keys[7]) == [StratumKind.META]
    with place.open() as database:
        assert database.blobs.get_many(keys) == contents


def test_of_a_hot_copy_and_a_newer_cold_one_a_prune_keeps_the_hot_one(reopened: Open) -> None:
    contents = [os.urandom(900) for _ in range(20)]
    with reopened() as one, reopened("w") as two, one.batch() as first, two.batch() as second:
        keys = first.blobs.put_many(contents, hot=True)
        second.blobs.put_many(contents)
    with reopened("w") as db:
        assert {tuple(sorted(kinds(db, key))) for key in keys} == {(StratumKind.DATA, StratumKind.META)}
        for _ in range(3):
            db.compact(grace_s=0, prune=True)
        assert {tuple(kinds(db, key)) for key in keys} == {(StratumKind.META,)}
        assert db.blobs.get_many(keys) == contents


def test_contents_know_whether_they_come_over_a_network(db: Database) -> None:
    assert db.blobs.are_remote == db.url.startswith("memory://")


def test_what_is_missing_is_told_without_reading_it(reopened: Open) -> None:
    with reopened() as db:
        keys = db.blobs.put_many([os.urandom(700) for _ in range(5)] + [os.urandom(20_000)])
        absent = [basin.ContentKey(os.urandom(32)) for _ in range(3)]
        assert db.blobs.missing([keys[0], absent[0], *keys[1:], *absent[1:]]) == absent
        assert db.blobs.missing([]) == []
        db.commit()
    with reopened("r") as db:
        assert db.blobs.missing([*keys, *absent]) == absent


def test_a_batch_holds_on_to_what_it_was_told_is_there(reopened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the batch needs the content: a prune by somebody else spares it, and a link to it takes no search."""
    with reopened() as db:
        key = db.blobs.put(os.urandom(700), root=False)
        db.commit()
        with reopened() as other, db.batch() as batch:
            assert batch.blobs.missing([key]) == []
            other.compact(prune=True)  # It condemns; what is relied on is revived.
            with monkeypatch.context() as patched:
                patched.setattr(db.core.locator, "find_many", None)
                batch["parent"] = basin.Ref(batch.blobs.put(b"it links", [key], root=False))
        other_one = db.blobs.put(os.urandom(700), root=False)
        db.commit()
    with reopened() as db:
        assert len(db.blobs[key]) == 700
        db.compact(grace_s=0, prune=True)
        assert len(db.blobs[key]) == 700
        assert db.blobs.missing([key, other_one]) == [other_one]


def test_what_is_hot_is_hot_in_a_copy(reopened: Open, tmp_path: Path) -> None:
    with reopened() as db:
        hot = db.blobs.put_many([os.urandom(700) for _ in range(3)], hot=True)
        cold = db.blobs.put_many([os.urandom(700) for _ in range(3)])
        db.commit()
        with basin.open(tmp_path / "copy", "x", profile="open") as copy:
            copy.import_from(db)
            assert {tuple(kinds(copy, key)) for key in hot} == {(StratumKind.META,)}
            assert {tuple(kinds(copy, key)) for key in cold} == {(StratumKind.DATA,)}
