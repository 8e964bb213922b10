"""The engines Basin is compared with: one module each, imported only when it is used.

Each is opened with its default options; the exceptions, which its module states, make durability equal: a commit has
reached the disk when the call returns. A peer whose library is not installed is left out of the report.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Final, cast

from benchmarks.peers.protocol import Store, StoreFactory

LIBRARIES: Final = {
    "rocksdict": "rocksdict",
    "lmdb": "lmdb",
    "plyvel": "plyvel",
    "sqlite": "sqlite3",
    "diskcache": "diskcache",
}
"""Peers in the order of the report, with the library that each needs."""


def available() -> tuple[str, ...]:
    """The peers whose libraries are installed here."""
    return tuple(peer for peer, library in LIBRARIES.items() if importlib.util.find_spec(library))


def open_store(peer: str, folder: Path, *, value_size: int) -> Store:
    """Open (creating it if absent) the store of `peer` in `folder`; `value_size` chooses SQLite's table layout."""
    module = importlib.import_module(f"benchmarks.peers.{peer}_store")
    folder.mkdir(parents=True, exist_ok=True)
    return cast(StoreFactory, module.open_store)(folder, value_size=value_size)
