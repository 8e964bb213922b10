"""Fixtures for tests that need a bucket; a conftest imports those that its folder uses.

- `s3_server` is what a test of Basin takes: MiniStack, or the endpoint that the variables `BASIN_TEST_S3_URL`
  (`s3://bucket/prefix`), `BASIN_TEST_S3_ENDPOINT`, `BASIN_TEST_S3_KEY` and `BASIN_TEST_S3_SECRET` name.
- `ministack`, `seaweedfs`, `rclone_serve` and `swift` are those servers, for what only one of them shows.
- Each server is started with its first use and lives to the end of the session; with several workers of pytest-xdist,
  each worker has its own. `s3_proxy` stands in front of `s3_server`, fresh and without rules for every test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.s3_proxy import FaultProxy, fault_proxy
from tests.storage import s3_servers, s3_swift
from tests.storage.s3_servers import S3Server

# Read here, at import: the tests' own configuration takes the variables of the user's basin away when it begins.
_GIVEN = {name: os.environ.get(f"BASIN_TEST_S3_{name}", "") for name in ("URL", "ENDPOINT", "KEY", "SECRET")}


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_servers.ministack(tmp_path_factory.mktemp("ministack")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_servers.rclone_serve(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_swift.swift(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """The server that the session tests against."""
    with ExitStack() as given:
        if _GIVEN["URL"]:
            named = {name.lower(): value for name, value in _GIVEN.items() if name != "URL"}
            yield given.enter_context(s3_servers.given_server(_GIVEN["URL"], **named))
        else:
            server: S3Server = request.getfixturevalue("ministack")
            yield server


@pytest.fixture
def s3_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """Faults on the way to `s3_server`: `s3_server.storage_options(s3_proxy.endpoint)` leads through it."""
    with fault_proxy(s3_server.endpoint) as proxy:
        yield proxy
