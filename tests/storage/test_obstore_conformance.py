"""`ObstoreObjects` runs the conformance suite of the object port, on real servers."""

from __future__ import annotations

import pytest

from basin.storage.objects import ObjectStore
from basin.storage.obstore_objects import open_obstore
from basin.testing.object_conformance import ObjectStoreConformance
from tests.storage.object_calls import POLICY
from tests.storage.s3_servers import S3Server


class _OnServer(ObjectStoreConformance):
    server: S3Server
    bucket: str

    def make_store(self, place: str) -> ObjectStore:
        return open_obstore(f"s3://{self.bucket}/{place}", self.server.storage_options(), POLICY)


class TestOnMiniStack(_OnServer):
    @pytest.fixture(autouse=True)
    def _server(self, ministack: S3Server) -> None:
        self.server, self.bucket = ministack, ministack.new_bucket()


class TestOnSeaweedFS(_OnServer):
    races = 2  # Each takes two seconds there.
    forgets_empty_folders = False

    @pytest.fixture(autouse=True)
    def _server(self, seaweedfs: S3Server) -> None:
        self.server, self.bucket = seaweedfs, seaweedfs.new_bucket()
