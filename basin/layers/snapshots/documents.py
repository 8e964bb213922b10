"""What a snapshot says of itself, and under which names snapshots and journals stand.

A snapshot is a name in a keyspace of its own, `s` and its id, which refers to a JSON document; the document's grain
links to the highest node of the tree. A journal entry is `j`, the id and a number; with `k` in the place of `j` it
keeps a part of the tree until the snapshot is complete, and with `l` parts of a large file that is not finished.

Invariant: a document that is not understood is `CorruptionError`, or `UnsupportedVersion` if it is of a later format.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from basin.errors import CorruptionError, UnsupportedVersion

DOCUMENT_VERSION: Final = 1
ID_SIZE: Final = 8
PROBLEMS_MAX: Final = 1000
"""More are counted, not listed."""
_ID: Final = re.compile(rb"s([0-9a-f]{16})")
_HEX_KEY: Final = re.compile(r"[0-9a-f]{64}|")


@dataclass(frozen=True)
class Statistics:
    """What a backup met and did. Sizes in bytes."""

    files: int = 0
    directories: int = 0
    others: int = 0
    """Links, devices, fifos, sockets."""
    size: int = 0
    """Of all files."""
    new_files: int = 0
    changed_files: int = 0
    unchanged_files: int = 0
    read_files: int = 0
    read_size: int = 0
    new_size: int = 0
    """Of contents that were not in the basin."""
    stored_size: int = 0
    """What those take, compressed and encrypted."""
    problems: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Problem:
    """A path that could not be saved, or changed while it was read. `path` and `error` are for people."""

    path: str
    error: str


@dataclass(frozen=True)
class Document:
    """What a snapshot says of itself. Times in nanoseconds since 1970; `tree` is empty until the backup is complete."""

    id: str
    start_ns: int
    host: str
    user: str
    paths: Sequence[str]
    tags: Sequence[str] = ()
    rules: Sequence[str] = ()
    """Excludes and the like, as they were given."""
    parent: str = ""
    program: str = ""
    end_ns: int = 0
    tree: str = ""
    owners: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=Statistics)
    problems: Sequence[Problem] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the backup came to its end."""
        return self.tree != ""


def encode_document(document: Document) -> bytes:
    """Canonical JSON."""
    text = json.dumps({"version": DOCUMENT_VERSION, **asdict(document)}, sort_keys=True, separators=(",", ":"))
    return text.encode()


def decode_document(data: bytes, identity: str) -> Document:
    """Undo `encode_document`."""
    what = f"the document of snapshot {identity}"
    try:
        values = json.loads(data)
    except ValueError as error:
        raise CorruptionError(f"{what} is no JSON") from error
    if not isinstance(values, dict) or not isinstance(values.get("version"), int):
        raise CorruptionError(f"{what} has no version")
    if values["version"] > DOCUMENT_VERSION:
        raise UnsupportedVersion(f"{what} needs a newer Basin", version=values["version"])
    try:
        document = Document(**_typed(Document, values, what))
        statistics = Statistics(**_typed(Statistics, values.get("statistics"), what))
        problems = [Problem(**_typed(Problem, one, what)) for one in document.problems]
    except TypeError as error:
        raise CorruptionError(f"{what} lacks something") from error
    if document.id != identity or not _HEX_KEY.fullmatch(document.tree):
        raise CorruptionError(f"{what} is of another snapshot")
    return Document(**{**document.__dict__, "statistics": statistics, "problems": problems})


def _typed(kind: type, values: Any, what: str) -> dict[str, Any]:
    """The fields of `kind` among `values`, each of its declared JSON type. Others are of later writers."""
    if not isinstance(values, dict):
        raise CorruptionError(f"{what} holds no fields")
    known = {}
    for one in fields(kind):
        if one.name not in values:
            continue
        value = values[one.name]
        expected = _JSON_TYPES[str(one.type).partition("[")[0]]
        if not isinstance(value, expected) or isinstance(value, bool):
            raise CorruptionError(f"{what} holds an impossible {one.name}")
        if expected is list and one.name != "problems" and not all(isinstance(item, str) for item in value):
            raise CorruptionError(f"{what} holds an impossible {one.name}")
        known[one.name] = value
    return known


_JSON_TYPES: Final[dict[str, Any]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "Sequence": list,
    "Mapping": dict,
    "Statistics": dict,
}


def new_id() -> str:
    """A snapshot's id: 16 random hexadecimal digits."""
    return os.urandom(ID_SIZE).hex()


def snapshot_name(identity: str) -> bytes:
    """The name that refers to a snapshot's document."""
    return b"s" + identity.encode()


def id_of(name: bytes) -> str | None:
    """Undo `snapshot_name`."""
    found = _ID.fullmatch(name)
    return found[1].decode() if found else None


def journal_prefixes(identity: str) -> tuple[bytes, bytes, bytes]:
    """What the names of a snapshot's journal begin with: rows, what is kept of the tree, parts of a large file."""
    return b"j" + identity.encode(), b"k" + identity.encode(), b"l" + identity.encode()


def journal_name(identity: str, number: int) -> bytes:
    """The name of a journal entry; they sort by number."""
    return journal_prefixes(identity)[0] + number.to_bytes(8, "big")


def kept_name(identity: str, number: int) -> bytes:
    """The name of what keeps a part of the tree."""
    return journal_prefixes(identity)[1] + number.to_bytes(8, "big")


def parts_name(identity: str, number: int) -> bytes:
    """The name of some parts of a file that is not complete."""
    return journal_prefixes(identity)[2] + number.to_bytes(8, "big")


def text_of(path: bytes) -> str:
    """A path for people and JSON; `bytes_of` gives it back."""
    return path.decode("utf-8", "surrogateescape")


def bytes_of(path: str | bytes | os.PathLike[Any]) -> bytes:
    """A path as the file system has it."""
    return os.fspath(path) if isinstance(path, bytes) else os.fsencode(path)
