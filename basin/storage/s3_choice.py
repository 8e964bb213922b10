"""Which client talks to a bucket: obstore where it is installed and can do what is asked, else s3fs.

Invariants:

- Both keep the contract of the object port; which one was taken shows in nothing but speed.
- The storage option `client`, `"obstore"` or `"s3fs"`, decides; neither client ever sees it.

Neither library, nor what goes with it, is loaded before it is taken: most basins lie on a disk. Imports `basin.errors`
and its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from basin.errors import InvalidArgument, MissingDependency
from basin.storage.objects import ObjectStore
from basin.storage.requests import RequestPolicy
from basin.storage.s3_options import Untranslatable


def open_s3(url: str, storage_options: Mapping[str, Any] | None, policy: RequestPolicy) -> ObjectStore:
    """The objects below `url`: `"s3://bucket/prefix"`, or a URL of any other protocol that fsspec knows.

    `storage_options` are those of the file system of fsspec, for S3 those of s3fs, and `client` for S3.

    Raises `InvalidArgument` for a URL or option that cannot be, also where `client` is obstore and it cannot do what
    the other options ask; `MissingDependency` where a package is not installed; `StorageError` where no credentials
    are found.
    """
    options = dict(storage_options or {})
    if url.partition("://")[0] not in ("s3", "s3a"):
        return _open_fsspec(url, options, policy)
    from basin.storage.obstore_objects import is_available, open_obstore

    client = options.pop("client", None)
    if client not in (None, "obstore", "s3fs"):
        raise InvalidArgument("the storage option 'client' is 'obstore' or 's3fs'", argument="storage_options")
    if client == "s3fs" or (client is None and not is_available()):
        return _open_fsspec(url, options, policy)
    try:
        return open_obstore(url, options, policy)
    except Untranslatable as refusal:
        reason = str(refusal)
    if client is not None:
        raise InvalidArgument(f"the client obstore cannot be used: {reason}", argument="storage_options")
    try:
        return _open_fsspec(url, options, policy)
    except MissingDependency as error:
        raise MissingDependency(f"{reason}: another package is needed: pip install s3fs", package="s3fs") from error


def _open_fsspec(url: str, options: Mapping[str, Any], policy: RequestPolicy) -> ObjectStore:
    from basin.storage.fsspec_objects import open_fsspec

    return open_fsspec(url, options, policy)
