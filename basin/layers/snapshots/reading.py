"""Reading the small files that are backed up, and telling whether one changed meanwhile.

Invariant: a file is read through a descriptor that follows no link, and that waits for nobody.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from basin.layers.snapshots.attributes import attributes_of, decode_attributes
from basin.layers.snapshots.documents import text_of
from basin.layers.snapshots.scan import Found

LARGE_SIZE: Final = 2 << 20
"""Above it a file is streamed, and no business of `read_one`."""
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class Content:
    """What was read of a file, and its metadata at that time."""

    data: bytes
    meta: bytes
    is_changed: bool


def open_file(path: bytes) -> int:
    """A descriptor of a regular file; never of what a link leads to, never waiting for a writer."""
    descriptor = os.open(path, _OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{text_of(path)} is no file any more")
    return descriptor


def read_all(files: Sequence[Found]) -> list[Content | OSError]:
    """The contents of some small files; an error in the place of what cannot be read."""
    contents: list[Content | OSError] = []
    for found in files:
        try:
            contents.append(read_one(found))
        except OSError as error:
            contents.append(error)
    return contents


def read_one(found: Found) -> Content:
    """What a small file holds."""
    descriptor = open_file(found.path)
    try:
        before = os.fstat(descriptor)
        pieces = []
        missing = LARGE_SIZE + 1
        while missing and (piece := os.read(descriptor, min(missing, max(before.st_size, 0) + 1))):
            pieces.append(piece)
            missing -= len(piece)
            if len(piece) == before.st_size:  # One byte more was asked for: this is the end.
                break
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    changed = has_changed(found.stat, before, after, len(data))
    if not changed:
        return Content(data, found.meta, is_changed=False)
    meta = attributes_of(before, xattrs=decode_attributes(found.meta).xattrs, changed=True)
    return Content(data, meta, is_changed=True)


def has_changed(found: os.stat_result, before: os.stat_result, after: os.stat_result, size: int) -> bool:
    """Whether a file was another one when it was found, before it was read or after `size` bytes were read of it."""
    return not (
        found.st_ino == before.st_ino
        and found.st_ctime_ns == before.st_ctime_ns == after.st_ctime_ns
        and found.st_mtime_ns == before.st_mtime_ns == after.st_mtime_ns
        and found.st_size == before.st_size == after.st_size == size
    )
