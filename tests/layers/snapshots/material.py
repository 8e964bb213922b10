"""Real trees for tests of snapshots: made of a description, changed, and compared by all that a snapshot keeps."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Any, NamedTuple

import basin
from basin.api import Database
from basin.layers.snapshots import Snapshot

OPTIONS: dict[str, Any] = {"profile": "open", "refresh_interval_s": 3600.0, "reserve_size": 0}
_SETTLE_S = 0.03
"""Longer than a tick of the kernel: what was written before it is believed to be what was read after it."""


class Seen(NamedTuple):
    """What a snapshot keeps of one path, as the file system has it."""

    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    content: bytes
    xattrs: tuple[tuple[str, bytes], ...]
    device: int
    linked: tuple[bytes, ...]
    """All paths in the tree that are the same file, if there are several."""


def seen(folder: Path) -> dict[bytes, Seen]:
    """All below a folder, by path from it."""
    found: dict[bytes, Seen] = {}
    same: dict[tuple[int, int], list[bytes]] = {}
    root = os.fsencode(folder)
    for top, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = top + b"/" + name
            info = os.lstat(path)
            if not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1:
                same.setdefault((info.st_dev, info.st_ino), []).append(os.path.relpath(path, root))
    for top, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = top + b"/" + name
            info = os.lstat(path)
            relative = os.path.relpath(path, root)
            content = b""
            if stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)  # noqa: PTH115  (of bytes)
            elif stat.S_ISREG(info.st_mode):
                content = Path(os.fsdecode(path)).read_bytes()
            linked = same.get((info.st_dev, info.st_ino), []) if not stat.S_ISDIR(info.st_mode) else []
            found[relative] = Seen(
                stat.S_IFMT(info.st_mode),
                stat.S_IMODE(info.st_mode) if not stat.S_ISLNK(info.st_mode) else 0,
                info.st_uid,
                info.st_gid,
                info.st_mtime_ns,
                content,
                tuple(
                    (one, os.getxattr(path, one, follow_symlinks=False))
                    for one in sorted(os.listxattr(path, follow_symlinks=False))
                ),
                info.st_rdev,
                tuple(sorted(linked)) if len(linked) > 1 else (),
            )
    return found


def settle() -> None:
    """Let the clock tick, so that what was written just now is believed by the next backup."""
    time.sleep(_SETTLE_S)


def inside(snapshot: Snapshot, folder: Path) -> dict[bytes, Any]:
    """The entries below a folder of the snapshot, by path from it."""
    top = os.fsencode(folder).strip(b"/") + b"/"
    return {entry.path[len(top) :]: entry for entry in snapshot.walk(os.fsencode(folder))}


def opened(folder: Path, **options: Any) -> Database:
    return basin.open(folder, **OPTIONS | options)
