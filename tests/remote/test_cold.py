"""Contents in an archive class of a real service: stored as such, unreadable until they are restored, then read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.api import Database
from basin.errors import GrainNotReady, ObjectMissing, StorageError
from basin.storage.archive import readiness_of, restore_request
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, ObjectStore
from basin.storage.s3_choice import open_s3
from tests.remote.conftest import S3Place
from tests.storage.object_calls import POLICY, large_file

CLIENTS = ("obstore", "s3fs")


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(s3_place: S3Place, client: str) -> Iterator[ObjectStore]:
    made = open_s3(s3_place.url, {**s3_place.storage_options(), "client": client}, POLICY)
    yield made
    made.close()


def opened(place: S3Place, client: str, mode: Any = "w", **options: Any) -> Database:
    return basin.open(
        place.url,
        mode,
        secret=place.secret,
        storage_options={**place.storage_options(), "client": client},
        disk_cache_size=0,
        **options,
    )


class TestTheObjectPort:
    def test_a_file_has_its_class(self, store: ObjectStore, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"body")
        for name, storage_class in (("data/a", "GLACIER"), ("data/b", "STANDARD_IA"), ("data/c", "")):
            store.put_file(name, path, storage_class)
        archived, cool, usual = (store.readiness(f"data/{name}") for name in "abc")
        assert archived == ("GLACIER", "archived")
        assert cool == ("STANDARD_IA", "readable")
        assert usual.state == "readable"
        assert usual.storage_class in ("", "STANDARD")
        assert store.get(ByteRange("data/b")) == b"body"
        assert store.size("data/a") == 4

    def test_a_file_in_parts_has_its_class(self, store: ObjectStore, tmp_path: Path) -> None:
        store.put_file("data/a", large_file(tmp_path, PUT_SIZE_MAX + 1), "DEEP_ARCHIVE")
        assert store.readiness("data/a") == ("DEEP_ARCHIVE", "archived")
        assert store.size("data/a") == PUT_SIZE_MAX + 1

    def test_an_archived_one_is_not_read(self, store: ObjectStore, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"body")
        store.put_file("data/a", path, "GLACIER")
        with pytest.raises(GrainNotReady) as found:
            store.get(ByteRange("data/a", 0, 2))
        assert found.value.fields["object"] == "data/a"
        assert found.value.fields["storage_class"] == "GLACIER"
        assert found.value.fields["restore"] == "basin thaw data/a"
        (other,) = store.get_many([ByteRange("data/a")])
        assert isinstance(other, GrainNotReady)

    def test_restoring_twice_is_restoring(self, store: ObjectStore, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"body")
        store.put_file("data/a", path, "GLACIER")
        store.restore("data/a", days=1, tier="Bulk")
        assert store.readiness("data/a") == ("GLACIER", "restoring")
        store.restore("data/a", days=1, tier="Bulk")
        with pytest.raises(GrainNotReady):
            store.get(ByteRange("data/a"))

    def test_what_is_missing_is_said_to_be(self, store: ObjectStore, tmp_path: Path) -> None:
        with pytest.raises(ObjectMissing):
            store.readiness("data/a")
        with pytest.raises((ObjectMissing, StorageError)):
            store.restore("data/a", days=1, tier="Standard")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({}, ("", "readable")),
        ({"StorageClass": "GLACIER_IR"}, ("GLACIER_IR", "readable")),
        ({"StorageClass": "GLACIER"}, ("GLACIER", "archived")),
        ({"StorageClass": "GLACIER", "Restore": 'ongoing-request="true"'}, ("GLACIER", "restoring")),
        (
            {"StorageClass": "GLACIER", "Restore": 'ongoing-request="false", expiry-date="Fri, 21 Dec 2029"'},
            ("GLACIER", "readable"),
        ),
        (
            {"StorageClass": "INTELLIGENT_TIERING", "ArchiveStatus": "DEEP_ARCHIVE_ACCESS"},
            ("INTELLIGENT_TIERING", "archived"),
        ),
        ({"StorageClass": "INTELLIGENT_TIERING"}, ("INTELLIGENT_TIERING", "readable")),
    ],
)
def test_what_a_head_says(answer: dict[str, str], expected: tuple[str, str]) -> None:
    assert readiness_of(answer) == expected


def test_a_class_that_takes_no_days_is_given_none() -> None:
    assert restore_request(0, "Bulk") == {"GlacierJobParameters": {"Tier": "Bulk"}}
    assert restore_request(3, "Bulk") == {"Days": 3, "GlacierJobParameters": {"Tier": "Bulk"}}


class TestABasin:
    def test_write_read_thaw_read(self, s3_place: S3Place, client: str) -> None:
        body = os.urandom(3000)
        with opened(s3_place, client, "x", data_storage_class="GLACIER") as database:
            key = database.blobs.put(body)
            database["name"] = body + b"value"
        with opened(s3_place, client) as database:
            assert database.blobs.put(body) == key
            assert key in database.blobs
            database.commit()
            with pytest.raises(GrainNotReady) as found:
                database.blobs[key]
            (name,) = s3_place.names("data")
            assert found.value.fields["restore"] == f"basin thaw data/{name.rpartition('/')[2]}"
            first = database.thaw([key], wait=False)
            assert (first.strata, first.requested, first.waiting) == (1, 1, 1)
            report = database.thaw([key])
            assert (report.requested, report.waiting) == (0, 0)
            assert database.blobs[key] == body
            assert database["name"] == body + b"value"

    def test_two_roots(self, s3_place: S3Place, client: str) -> None:
        body = os.urandom(3000)
        cold = s3_place.server.new_url()
        reached = {**s3_place.storage_options(), "client": client}
        options: dict[str, Any] = {"data_url": cold, "data_storage_class": "DEEP_ARCHIVE"}
        with opened(s3_place, client, "x", data_storage_options=reached, **options) as database:
            key = database.blobs.put(body)
        assert s3_place.names("data") == []
        assert len(s3_place.server.client().names(f"{cold.removeprefix('s3://')}/data")) == 1
        with opened(s3_place, client, "r") as database:
            with pytest.raises(GrainNotReady):
                database.blobs[key]
            database.thaw()
            assert database.blobs[key] == body

    def test_the_command(self, s3_place: S3Place) -> None:
        def run(*arguments: str, code: int = 0, stdin: bytes = b"") -> str:
            done = subprocess.run(
                [sys.executable, "-m", "basin.cli", "-b", s3_place.url, *arguments],
                input=stdin,
                capture_output=True,
                env=s3_place.environment(),
                timeout=60,
                check=False,
            )
            assert done.returncode == code, (arguments, done.stdout, done.stderr)
            return (done.stdout + done.stderr).decode()

        run("init", "--secret-file", str(s3_place.key_file), "--data-storage-class", "GLACIER")
        body = os.urandom(3000)
        key = run("blob", "put", "-", stdin=body).strip()
        refused = run("blob", "get", key, code=1)
        assert "basin thaw data/" in refused
        assert run("check").splitlines()[-1] == "no damage found"
        assert "not readable yet: 1" in run("thaw", key, "--no-wait")
        assert run("thaw", "--all", "--days", "1", "--tier", "Bulk").endswith(": readable\n")
        run("blob", "get", key, "-o", str(s3_place.key_file.parent / "out"))
        assert (s3_place.key_file.parent / "out").read_bytes() == body
