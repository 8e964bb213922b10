"""The sides of the contests: one module each, imported when it is used. A side whose library is absent is left out."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from typing import Final, cast

from benchmarks.bucket.contestant import Blobs, Names, Side, Streams
from benchmarks.bucket.place import Place

LIBRARIES: Final = {
    "basin": "s3fs",
    "basin-s3fs": "s3fs",
    "basin-obstore": "obstore",
    "slatedb": "slatedb",
    "s3fs": "s3fs",
    "obstore": "obstore",
}
"""Sides in the order of the report, with the library that each needs. A name behind a dash is the client below."""


def available() -> tuple[str, ...]:
    """The sides whose libraries are installed here."""
    return tuple(side for side, library in LIBRARIES.items() if importlib.util.find_spec(library))


def open_side(name: str, place: Place, *, reading: bool = False) -> Side:
    """Open a side at a place: to write, creating its store if there is none, or in the way that writes nothing."""
    engine, _, client = name.partition("-")
    module = importlib.import_module(f"benchmarks.bucket.sides.{engine}_side")
    return cast(Side, module.open_side(replace(place, client=client), reading=reading))


def open_names(name: str, place: Place, *, reading: bool = False) -> Names:
    """A side of the contest on names; raise `TypeError` if it takes no part."""
    opened = open_side(name, place, reading=reading)
    if not isinstance(opened, Names):
        raise TypeError(f"{name} stores no names")
    return opened


def open_blobs(name: str, place: Place, *, reading: bool = False) -> Blobs:
    """A side of the contest on small values; raise `TypeError` if it takes no part."""
    opened = open_side(name, place, reading=reading)
    if not isinstance(opened, Blobs):
        raise TypeError(f"{name} stores no values without names")
    return opened


def open_streams(name: str, place: Place, *, reading: bool = False) -> Streams:
    """A side of the contest on large bodies; raise `TypeError` if it takes no part."""
    opened = open_side(name, place, reading=reading)
    if not isinstance(opened, Streams):
        raise TypeError(f"{name} stores no streams")
    return opened
