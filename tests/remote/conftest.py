"""Places for a basin in a bucket: `bucket`, inside this process, and `s3_place`, at the server of the session.

- `Bucket` records every request; faults are planned by a function or by the numbers of requests. It works in no time.
- `S3Place` is reached through the client library of every user, by `basin.open` of a URL.
- Both open encrypted basins with one secret in a key file, which other processes can read as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.api import Database, open_storage
from basin.engine.log import LOG_FOLDER
from basin.errors import BasinError
from basin.storage.disk_cache import DiskCache
from basin.storage.objects import RequestKind
from basin.storage.remote import RemoteStorage
from basin.storage.requests import RequestPolicy
from basin.testing.bucket import SimulatedBucket
from basin.testing.object_faults import ObjectRequest, Plan
from tests.conftest import Spawn
from tests.s3 import ministack, rclone_serve, s3_proxy, s3_server, seaweedfs
from tests.storage.s3_servers import S3Server

__all__ = ["ministack", "rclone_serve", "s3_proxy", "s3_server", "seaweedfs"]

ROOT = Path(__file__).parents[2]
POLICY = RequestPolicy(attempts=4, backoff_first_s=0.001, backoff_max_s=0.01)
IMPATIENT: dict[str, Any] = {"request_attempts": 2, "request_deadline_s": 20.0, "read_timeout_s": 4.0}
"""Options for tests in which a bucket does not answer."""


def record_name(position: int) -> str:
    """Name of a record in the bucket."""
    return f"{LOG_FOLDER}/{position:020d}"


class Requests(list[ObjectRequest]):
    """What was asked of a bucket."""

    @property
    def counts(self) -> Counter[RequestKind]:
        """How often, by kind."""
        return Counter(one.kind for one in self)

    def named(self, start: str, kind: str = "") -> list[str]:
        """The names below `start` that were asked for, by requests of `kind` if one is given."""
        return [one.name for one in self if one.name.startswith(start) and kind in ("", one.kind)]


@dataclass
class Bucket:
    """A bucket in this process with at most one basin, and all that was asked of it."""

    secret: basin.Secret
    simulated: SimulatedBucket = field(default_factory=SimulatedBucket)
    _opened: list[Database] = field(default_factory=list)
    _seen: int = 0

    def open(
        self,
        mode: Any = "c",
        *,
        actor: str = "handle",
        policy: RequestPolicy = POLICY,
        cache_folder: Path | None = None,
        expect_head: Any = None,
        secret: basin.Secret | None = None,
        **options: Any,
    ) -> Database:
        """A handle; closed at the end of the test, if it is not before."""
        cache = DiskCache(cache_folder, 1 << 30) if cache_folder is not None else None
        storage = RemoteStorage(self.simulated.client(actor), policy, cache=cache)
        try:
            opened = open_storage(
                storage,
                "simulated://bucket",
                mode=mode,
                secret=secret or self.secret,
                expect_head=expect_head,
                options=options,
            )
        except BaseException:
            storage.close()
            raise
        self._opened.append(opened)
        return opened

    def asked(self) -> Requests:
        """The requests since the last call."""
        since, self._seen = self._seen, len(self.simulated.requests)
        return Requests(self.simulated.requests[since : self._seen])

    def plan(self, faults: Plan) -> None:
        """From now on this goes wrong."""
        self.simulated.faults = faults

    def names(self, folder: str = "") -> list[str]:
        """What is stored below a folder."""
        return sorted(name for name in self.simulated.bodies if name.startswith(f"{folder}/" if folder else ""))

    def close(self) -> None:
        """Close what is still open; what cannot be closed well is no matter any more."""
        self.plan({})
        close_all(self._opened)


@dataclass
class S3Place:
    """An empty place of the session's server."""

    server: S3Server
    url: str
    secret: basin.Secret
    key_file: Path
    endpoint: str = ""
    _opened: list[Database] = field(default_factory=list)

    def storage_options(self, endpoint: str = "") -> dict[str, Any]:
        """How to reach it, perhaps by another endpoint."""
        return self.server.storage_options(endpoint or self.endpoint or None)

    def open(self, mode: Any = "c", *, endpoint: str = "", **options: Any) -> Database:
        """A handle without a cache on disk, unless `options` say so; closed at the end of the test."""
        given = options if "cache_folder" in options else {"disk_cache_size": 0, **options}
        secret = given.pop("secret", self.secret)
        opened = basin.open(self.url, mode, secret=secret, storage_options=self.storage_options(endpoint), **given)
        self._opened.append(opened)
        return opened

    def names(self, folder: str = "") -> list[str]:
        """What is stored below a folder: the first 1,000 names."""
        place = self.url.removeprefix("s3://")
        return self.server.client().names(f"{place}/{folder}" if folder else place)

    def environment(self, endpoint: str = "") -> dict[str, str]:
        """For a process of the command line or of a test: how to reach the place, and the secret."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BASIN_", "AWS_"))}
        return kept | {
            "BASIN_SECRET_FILE": str(self.key_file),
            "PYTHONPATH": str(ROOT),
            "AWS_ACCESS_KEY_ID": self.server.key,
            "AWS_SECRET_ACCESS_KEY": self.server.secret,
            "AWS_DEFAULT_REGION": self.server.region,
            "AWS_ENDPOINT_URL": endpoint or self.endpoint or self.server.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "XDG_CACHE_HOME": str(self.key_file.parent / "cache"),
            "HOME": str(self.key_file.parent),
        }

    def start(self, spawn: Spawn, program: str, *arguments: str) -> subprocess.Popen[str]:
        """A process that runs the text `program`, in which `opened(**options)` gives a handle on this place."""
        text = PROGRAM_HEAD.format(url=self.url, options=self.storage_options()) + program
        return spawn(
            [sys.executable, "-c", text, *arguments],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )

    def close(self) -> None:
        """Close what is still open."""
        close_all(self._opened)


PROGRAM_HEAD = """
import os, sys, time
import basin

def opened(mode="w", **options):
    return basin.open({url!r}, mode, secret=basin.Secret.from_env(), storage_options={options!r}, disk_cache_size=0,
                      **options)

"""


def close_all(opened: list[Database]) -> None:
    """Close handles, the last first. A handle that a test broke on purpose may fail to: then it is released."""
    for one in reversed(opened):
        try:
            one.close()
        except BasinError:
            one.core.release("the test is over")


def finished(process: subprocess.Popen[str], timeout_s: float = 120) -> str:
    """What a process printed, after it ended well."""
    printed, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, (process.returncode, printed)
    return printed


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    basin.Secret.generate().to_file(path)
    return path


@pytest.fixture
def secret(key_file: Path) -> basin.Secret:
    return basin.Secret.from_file(key_file)


@pytest.fixture
def bucket(secret: basin.Secret) -> Iterator[Bucket]:
    place = Bucket(secret)
    yield place
    place.close()


@pytest.fixture
def s3_place(s3_server: S3Server, secret: basin.Secret, key_file: Path) -> Iterator[S3Place]:
    place = S3Place(s3_server, s3_server.new_url(), secret, key_file)
    yield place
    place.close()
