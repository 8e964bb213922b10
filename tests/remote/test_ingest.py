"""Workers on several processes fill one basin: in a bucket and in a folder, by a pool, by threads, and by Dask."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import basin
from basin.engine.ingest import BATCH_COUNT
from basin.terms import ContentKey
from tests.remote.conftest import S3Place

COUNT = 2 * BATCH_COUNT + 100
SIZE = 2000


def contents(count: int = COUNT) -> list[bytes]:
    generator = random.Random(7)
    return [generator.randbytes(SIZE) for _ in range(count)]


def keys_of(values: list[bytes]) -> list[ContentKey]:
    return [ContentKey(blake3(value).digest()) for value in values]


class DyingOnce(Executor):
    """An executor whose first task to be finished takes its process with it, before anybody hears of it."""

    def __init__(self, inner: Executor, flag: Path) -> None:
        self._inner = inner
        self._flag = flag

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        return self._inner.submit(die_once, str(self._flag), os.getpid(), work, *arguments, **named)


def die_once(flag: str, parent: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """In a worker: the result of `work`; the first one of all dies with it."""
    report = work(*arguments)
    try:
        Path(flag).touch(exist_ok=False)
    except FileExistsError:
        return report
    assert os.getpid() != parent
    os._exit(3)


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Any]:
    """A client of a cluster of two processes on this machine."""
    distributed = importlib.import_module("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            host="127.0.0.1",
            local_directory=str(tmp_path / "dask"),
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def assert_filled(db: Any, reader: Any, found: list[ContentKey], *, leftovers: bool = False) -> None:
    """Everything was stored, once, in one record, and is read back by `db` and another handle."""
    values = contents()
    assert found == keys_of(values)
    assert db.blobs.get_many(found) == values
    assert reader.blobs.get_many(found) == values
    assert sorted(reader.blobs) == sorted(found)
    assert {finding.kind for finding in reader.check()} <= ({"leftover"} if leftovers else set())


# --- a bucket -------------------------------------------------------------------------------------------------------


def test_the_default_pool_fills_a_bucket(s3_place: S3Place) -> None:
    db = s3_place.open()
    before = db.commit()
    done: list[int] = []
    found = db.ingest(contents(), progress=done.append)
    assert sum(done) == COUNT * SIZE
    assert len(done) == 3
    assert [entry.summary["names"] for entry in db.log(before + 1) if "names" in entry.summary] == [COUNT]
    assert_filled(db, s3_place.open("r"), found)


def test_threads_fill_a_bucket_with_names_and_files(s3_place: S3Place, tmp_path: Path) -> None:
    db = s3_place.open(part_max=1 << 20, part_size=1 << 20)
    large = os.urandom(3 << 20)
    (tmp_path / "large").write_bytes(large)
    rows = [(f"name {number:04d}", value) for number, value in enumerate(contents())]
    with ThreadPoolExecutor(2) as executor:
        found = db.ingest([*rows, ("large", tmp_path / "large")], executor)
    assert found == [*keys_of([value for _, value in rows]), ContentKey(blake3(large).digest())]
    db.close()
    reader = s3_place.open("r")
    assert {name: value for name, value in reader.items() if name != b"large"} == {
        name.encode(): value for name, value in rows
    }
    assert reader[b"large"] == large
    assert not list(reader.blobs)
    assert not list(reader.check())


def test_what_is_there_already_is_not_sent_again_by_workers(s3_place: S3Place) -> None:
    db = s3_place.open()
    with ThreadPoolExecutor(2) as executor:
        first = db.ingest(contents(), executor)
        strata = set(s3_place.names("data"))
        assert db.ingest(contents(), executor) == first
    assert set(s3_place.names("data")) == strata


def test_a_worker_of_the_pool_that_is_lost_loses_nothing(s3_place: S3Place, tmp_path: Path) -> None:
    db = s3_place.open()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as inner:
        found = db.ingest(contents(), DyingOnce(inner, tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert_filled(db, s3_place.open("r"), found, leftovers=True)


def test_dask_fills_a_bucket(s3_place: S3Place, dask: Any) -> None:
    db = s3_place.open()
    found = db.ingest(contents(), dask.get_executor())
    assert_filled(db, s3_place.open("r"), found)


def test_a_worker_of_dask_that_is_lost_loses_nothing(s3_place: S3Place, dask: Any, tmp_path: Path) -> None:
    db = s3_place.open()
    found = db.ingest(contents(), DyingOnce(dask.get_executor(), tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert_filled(db, s3_place.open("r"), found, leftovers=True)


def test_what_a_lost_worker_wrote_is_swept_by_a_later_session(s3_place: S3Place, tmp_path: Path) -> None:
    db = s3_place.open(job="load")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as inner:
        found = db.ingest(contents(), DyingOnce(inner, tmp_path / "died"))
    known = {str(identity) for identity in db.core.state.strata}
    assert set(s3_place.names("data")) - known
    db.core.release("it died")
    following = s3_place.open("w", job="load")
    following.blobs.put(b"more" * 1000)
    following.commit()
    known = {str(identity) for identity in (*following.core.state.strata, *following.core.state.retired)}
    assert set(s3_place.names("data")) <= known
    assert following.blobs.get_many(found) == contents()


# --- a folder -------------------------------------------------------------------------------------------------------


def test_dask_fills_a_folder(secret: basin.Secret, dask: Any, tmp_path: Path) -> None:
    with basin.open(tmp_path / "basin", "x", secret=secret) as db:
        found = db.ingest(contents(), dask.get_executor())
        with basin.open(tmp_path / "basin", "r", secret=secret) as reader:
            assert_filled(db, reader, found)


def test_a_worker_of_dask_that_is_lost_loses_nothing_in_a_folder(
    secret: basin.Secret, dask: Any, tmp_path: Path
) -> None:
    with basin.open(tmp_path / "basin", "x", secret=secret) as db:
        found = db.ingest(contents(), DyingOnce(dask.get_executor(), tmp_path / "died"))
        assert (tmp_path / "died").exists()
        with basin.open(tmp_path / "basin", "r", secret=secret) as reader:
            assert_filled(db, reader, found, leftovers=True)
