"""A file system for fsspec over what a basin holds: `basin://snapshots/latest/home/me/table.parquet::/srv/basin`.

Behind `::` stands the basin, as `basin.open` takes it. The secret comes as `secret` (a `basin.Secret`), as
`secret_file`, or from the environment (`Secret.from_env`); never as text, which fsspec would keep and print.

    pandas.read_parquet("basin://snapshots/latest/data/x.parquet::s3://bucket/b", storage_options={"basin": {…}})

Invariant: it only reads. A path is `snapshots/SNAP/PATH` with SNAP as `db.snapshots.get` takes it.
"""

from __future__ import annotations

import io
import os
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from fsspec.spec import AbstractFileSystem

import basin.api
from basin.engine.secret import Secret
from basin.errors import InvalidArgument, NameNotFound, ReadOnly, SecretRequired
from basin.format.tree import Entry, RowKind
from basin.layers.snapshots.attributes import decode_attributes
from basin.terms import ContentKey

if TYPE_CHECKING:
    from basin.api import Database
    from basin.layers.snapshots import Snapshot

_LAYERS: Final = ("snapshots",)
_TYPES: Final = {RowKind.FILE: "file", RowKind.DIRECTORY: "directory", RowKind.LINK: "link"}


class BasinFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Snapshots as folders and files, to be read."""

    protocol = "basin"
    root_marker = ""

    def __init__(
        self,
        fo: str | None = None,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        *,
        secret: Secret | None = None,
        secret_file: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """`fo` is the basin's URL or path; `target_options` are its `storage_options`."""
        super().__init__(**options)
        if not fo:
            raise InvalidArgument("which basin? its URL stands behind `::`, or is given as `fo`")
        if secret is not None and not isinstance(secret, Secret):
            raise InvalidArgument("secret is a basin.Secret; a passphrase as text would be kept and printed by fsspec")
        self._url = f"{target_protocol}://{fo}" if target_protocol not in (None, "file") and "://" not in fo else fo
        self._target_options = target_options
        self._secret = Secret.from_file(secret_file) if secret_file is not None else secret
        self._opened: Database | None = None
        self._found: dict[str, Snapshot] = {}

    @property
    def database(self) -> Database:
        """The basin, opened to be read with the first need of it."""
        if self._opened is None:
            try:
                self._opened = self._open_basin(self._secret)
            except SecretRequired:
                self._opened = self._open_basin(Secret.from_env())
        return self._opened

    def _open_basin(self, secret: Secret | None) -> Database:
        return basin.api.open(self._url, mode="r", secret=secret, storage_options=self._target_options or None)

    def _snapshot(self, identity: str) -> Snapshot:
        """`latest` stays what it was when it was first asked for."""
        found = self._found.get(identity)
        if found is None:
            try:
                found = self._found[identity] = self.database.snapshots.get(identity)
            except NameNotFound as error:
                raise FileNotFoundError(f"snapshots/{identity}") from error
        return found

    def _located(self, path: str) -> tuple[Snapshot, bytes] | None:
        """The snapshot and the path in it; None for the folders above."""
        layer, _, rest = self._strip_protocol(path).strip("/").partition("/")
        if layer and layer not in _LAYERS:
            raise FileNotFoundError(path)
        identity, _, inside = rest.partition("/")
        return (self._snapshot(identity), os.fsencode(inside)) if identity else None

    def _entry(self, path: str) -> tuple[Snapshot, Entry] | None:
        located = self._located(path)
        if located is None:
            return None
        try:
            return located[0], located[0].entry(located[1])
        except NameNotFound as error:
            raise FileNotFoundError(path) from error

    def _info(self, base: str, entry: Entry) -> dict[str, Any]:
        kind = _TYPES.get(RowKind(entry.kind), "other")
        path = f"{base}/{os.fsdecode(entry.path)}".rstrip("/")
        info: dict[str, Any] = {"name": path, "size": entry.size if kind == "file" else 0, "type": kind}
        if entry.key is not None:
            info["key"] = entry.key.hex()
        if entry.meta:
            found = decode_attributes(entry.meta)
            info |= {
                "mode": found.mode | (stat.S_IFDIR if kind == "directory" else stat.S_IFREG if kind == "file" else 0),
                "uid": found.uid,
                "gid": found.gid,
                "mtime": found.mtime_ns / 1e9,
            }
            if found.target is not None:
                info["destination"] = os.fsdecode(found.target)
        return info

    def info(self, path: str, **_kwargs: Any) -> dict[str, Any]:
        """Name, size and type of a path; raise `FileNotFoundError`."""
        found = self._entry(path)
        clean = self._strip_protocol(path).strip("/")
        if found is None:
            return {"name": clean, "size": 0, "type": "directory"}
        return self._info(self._base(clean), found[1])

    @staticmethod
    def _base(path: str) -> str:
        """`snapshots/SNAP` of a path in a snapshot."""
        return "/".join(path.split("/")[:2])

    def ls(self, path: str, detail: bool = True, **_kwargs: Any) -> list[Any]:  # noqa: FBT001, FBT002  (fsspec)
        """The children of a folder, or the file itself; raise `FileNotFoundError`."""
        clean = self._strip_protocol(path).strip("/")
        located = self._located(clean)
        if located is None:
            names = [f"snapshots/{one.id}" for one in self.database.snapshots.list()] if clean else list(_LAYERS)
            found = [{"name": name, "size": 0, "type": "directory"} for name in names]
        else:
            try:
                found = [self._info(self._base(clean), entry) for entry in located[0].ls(located[1])]
            except NameNotFound as error:
                raise FileNotFoundError(path) from error
        return found if detail else [one["name"] for one in found]

    def modified(self, path: str) -> datetime:
        """When a file was changed last."""
        return datetime.fromtimestamp(self.info(path)["mtime"], UTC)

    def _open(self, path: str, mode: str = "rb", **_kwargs: Any) -> io.BufferedReader:
        """A seekable file, which reads the parts that it is asked for."""
        if mode != "rb":
            raise ReadOnly("snapshots are only read", object=path, operation="open")
        found = self._entry(path)
        if found is None or found[1].kind == RowKind.DIRECTORY:
            raise IsADirectoryError(path)
        return found[0].open_entry(found[1])

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_kwargs: Any) -> bytes:
        """All of a file, or a range of it: without what lies around."""
        found = self._entry(path)
        if found is None or found[1].kind != RowKind.FILE:
            raise IsADirectoryError(path)
        entry = found[1]
        first, stop, _ = slice(start, end).indices(entry.size)
        if entry.key is None or stop <= first:
            return b""
        return self.database.blobs.read(ContentKey(entry.key), first, stop)

    def close(self) -> None:
        """Close the basin."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
