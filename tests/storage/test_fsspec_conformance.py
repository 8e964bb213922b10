"""`FsspecObjects` runs the conformance suite of the object port, on real servers and on a dummy."""

from __future__ import annotations

import pytest

from basin.storage.fsspec_objects import FsspecObjects, open_fsspec
from basin.storage.objects import Listing, ObjectStore
from basin.testing.object_conformance import ObjectStoreConformance
from tests.storage.object_calls import POLICY
from tests.storage.s3_servers import S3Server


class _OnServer(ObjectStoreConformance):
    server: S3Server
    bucket: str

    def make_store(self, place: str) -> ObjectStore:
        return open_fsspec(f"s3://{self.bucket}/{place}", self.server.storage_options(), POLICY)


class TestOnMiniStack(_OnServer):
    @pytest.fixture(autouse=True)
    def _server(self, ministack: S3Server) -> None:
        self.server, self.bucket = ministack, ministack.new_bucket()


class _WithoutEmptyFolders(FsspecObjects):
    """SeaweedFS goes on listing a folder for a while when its last object is gone."""

    def list(self, folder: str) -> Listing:
        objects, folders = super().list(folder)
        return Listing(objects, [name for name in folders if any(self.list(f"{folder}/{name}".strip("/")))])


class TestOnSeaweedFS(_OnServer):
    races = 2  # Each takes two seconds there.

    def make_store(self, place: str) -> ObjectStore:
        store = super().make_store(place)
        store.__class__ = _WithoutEmptyFolders
        return store

    @pytest.fixture(autouse=True)
    def _server(self, seaweedfs: S3Server) -> None:
        self.server, self.bucket = seaweedfs, seaweedfs.new_bucket()


class TestOnMemory(ObjectStoreConformance):
    """A file system without coroutines. It may have several winners of a race, which is tested on servers only."""

    races = 0

    def make_store(self, place: str) -> ObjectStore:
        return open_fsspec(f"memory://{place}", None, POLICY)
