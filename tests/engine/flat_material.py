"""A small basin with a little of everything on the disk, and what is asked of it and of its copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import basin
from basin.api import Database
from basin.errors import BasinError
from tests.engine.small_basin import Question

SECRET: Final = basin.Secret.generate()
QUIET: Final[dict[str, Any]] = {
    "sync_interval_s": 3600.0,
    "refresh_interval_s": 3600.0,
    "reserve_size": 0,
    "threads": 1,
}
SMALL: Final[dict[str, Any]] = {**QUIET, "part_max": 128, "part_size": 64, "inline_max": 32}


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def told(db: Database, questions: Mapping[str, Question]) -> dict[str, Any]:
    """What a handle answers; a refusal is the error itself."""
    answers: dict[str, Any] = {}
    for label, ask in questions.items():
        try:
            answers[label] = ask(db)
        except BasinError as error:
            answers[label] = error
    return answers


def links_of(db: Database, key: basin.ContentKey) -> set[basin.ContentKey]:
    """What a content links to, without its own parts: those are cut as each basin cuts."""
    parts = {part for part, _ in db.blobs.parts(key)}
    return set(db.blobs.links(key)) - parts


def everything(db: Database) -> dict[str, Any]:
    """All names of all keyspaces, and all contents with their links."""
    return {
        "names": dict(db.scan()),
        "keyspaces": {name: dict(db.keyspace(name).scan()) for name in db.keyspaces()},
        "blobs": {key: (db.blobs[key], links_of(db, key)) for key in db.blobs},
    }


def damage(db: Database) -> list[basin.Finding]:
    return [finding for finding in db.check() if finding.severity != "info"]


@contextlib.contextmanager
def little_of_everything(path: Path) -> Iterator[Database]:
    """An encrypted basin, open for writing."""
    with basin.open(path, "x", secret=SECRET, **SMALL) as db:
        db[b"fruit/apple"] = b"red"
        db[b"fruit/pear"] = b"a value above the limit for inline ones"
        db[b"other"] = b"another value above the limit for inline ones"
        db.put(b"expires", b"soon", ttl=1e6)
        db.keyspace("numbers", order="u64", values="json").put_many([(7, {"seven": 7}), (8, "x" * 100)])
        first = db.blobs.put(b"in no other content")
        large = db.blobs.put(b"parts" * 100, links=[first])
        db.blobs.put(b"with links", links=[large, first])
        db.commit()
        yield db
