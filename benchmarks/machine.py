"""Where a run happens: the machine, the file system, the versions; and the refusal to measure on memory.

A file system that lives in memory makes every sync free, so ratios from it say nothing about a disk.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MEMORY_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs", "devtmpfs", "zram"})
_LIBRARIES: Final = (
    "blake3",
    "cryptography",
    "zstandard",
    "xxhash",
    "numpy",
    "rocksdict",
    "lmdb",
    "plyvel",
    "diskcache",
)


class NotADisk(Exception):
    """The folder lies in memory."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table."""

    device: str
    point: str
    file_system: str


def read_mounts(table: str) -> list[Mount]:
    """Read the text of `/proc/mounts`, in which blanks and backslashes of names are written as octal numbers."""
    mounts = []
    for line in table.splitlines():
        fields = [re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field) for field in line.split()]
        if len(fields) >= 3:
            mounts.append(Mount(fields[0], fields[1], fields[2]))
    return mounts


def find_mount(folder: Path, mounts: list[Mount]) -> Mount:
    """The mount that `folder` lies on: the longest mount point above it; of equal ones the last, which is on top."""
    resolved = folder.resolve()
    above = [mount for mount in mounts if resolved.is_relative_to(mount.point)]
    if not above:
        return Mount("unknown", "/", "unknown")
    longest = max(len(mount.point) for mount in above)
    return [mount for mount in above if len(mount.point) == longest][-1]


def require_disk(folder: Path) -> Mount:
    """The mount of an existing `folder`; raise `NotADisk` if it is memory."""
    table = Path("/proc/mounts")
    mount = find_mount(folder, read_mounts(table.read_text()) if table.exists() else [])
    if mount.file_system in MEMORY_FILE_SYSTEMS:
        raise NotADisk(f"{folder} lies on {mount.file_system}, which is memory: give a folder on a disk by --folder")
    return mount


def describe(mount: Mount) -> dict[str, str | int]:
    """What somebody needs to know to judge or repeat the numbers."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": mount.file_system,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """The installed version of every library that takes part."""
    found = {"basin": version("basin-store"), "sqlite": sqlite3.sqlite_version}
    found.update({library: version(library) for library in _LIBRARIES})
    return found


def version(distribution: str) -> str:
    """As installed, or that it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    matched = (
        re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE) if information.exists() else None
    )
    return matched[1] if matched else platform.processor() or platform.machine()
