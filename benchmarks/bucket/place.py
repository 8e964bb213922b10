"""Where a contestant stores: a prefix of a bucket behind an endpoint, and a local folder for its cache.

A place is a plain value: the same prefix is reached directly when times are taken, and through the counting proxy when
requests are counted.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

REQUESTS_AT_ONCE: Final = 32
"""Requests that every side may have on their way: Basin's default."""


@dataclass(frozen=True, slots=True)
class Place:
    """`folder` holds what stays on this machine: a cache below `cache`, and the file of Basin's secret."""

    endpoint: str
    bucket: str
    prefix: str
    key: str
    secret: str
    region: str
    folder: Path
    client: str = ""
    """Of Basin: the client that it is told to use, instead of the one that it chooses."""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    @property
    def cache(self) -> Path:
        """Belongs to one prefix: contestants with different stores share nothing."""
        return self.folder / "cache" / self.prefix

    def at(self, prefix: str) -> Place:
        """Another prefix of the same bucket."""
        return replace(self, prefix=prefix)

    def through(self, endpoint: str) -> Place:
        """The same objects by another way."""
        return replace(self, endpoint=endpoint)

    def forget_cache(self) -> None:
        """Delete the cache folder: the next to open here is cold."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def s3fs_options(self) -> dict[str, Any]:
        """Storage options of s3fs, for Basin and for s3fs itself; bodies are not signed, as over https."""
        return {
            "key": self.key,
            "secret": self.secret,
            "client_kwargs": {"endpoint_url": self.endpoint, "region_name": self.region},
            "config_kwargs": {"s3": {"payload_signing_enabled": False}, "max_pool_connections": REQUESTS_AT_ONCE},
        }

    def object_store_options(self) -> dict[str, str]:
        """Options of the Rust library below obstore and SlateDB, by its names; bodies are not signed."""
        return {
            "access_key_id": self.key,
            "secret_access_key": self.secret,
            "region": self.region,
            "endpoint": self.endpoint,
            "allow_http": "true",
            "unsigned_payload": "true",
            "virtual_hosted_style_request": "false",
        }
