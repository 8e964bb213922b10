"""Basin: an embedded, append-only key/value store that is a content-addressed store at the same time.

    db = basin.open("folder", secret=basin.Secret.from_passphrase("…"))
    db["name"] = b"value"
    key = db.blobs.put(b"content")
    db.commit()

Start with `basin.open`; `docs/glossary.md` has the words.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from basin import errors

if TYPE_CHECKING:
    from basin.api import Database, ingest, open  # noqa: A004  # `basin.open`, as in `gzip.open`
    from basin.engine.basin import Change, LogEntry
    from basin.engine.compaction import CompactionReport
    from basin.engine.copying import CopyReport
    from basin.engine.export import ExportReport
    from basin.engine.ingest import Report, Ticket
    from basin.engine.options import Options
    from basin.engine.plan import CompactionStep
    from basin.engine.repair import RepairAction
    from basin.engine.secret import Secret
    from basin.engine.secrets import SlotInfo
    from basin.engine.space import Space
    from basin.engine.thawing import ThawReport
    from basin.engine.verify import Finding
    from basin.errors import BasinError, Conflict
    from basin.terms import ContentKey, Head, PartAddress, Position, Ref

# Loaded with their first use: `basin --help`, and whoever needs the errors alone, does not wait for the engine.
_MODULES: Final = {
    "BasinError": "basin.errors",
    "Change": "basin.engine.basin",
    "CompactionReport": "basin.engine.compaction",
    "CompactionStep": "basin.engine.plan",
    "Conflict": "basin.errors",
    "ContentKey": "basin.terms",
    "CopyReport": "basin.engine.copying",
    "Database": "basin.api",
    "ExportReport": "basin.engine.export",
    "Finding": "basin.engine.verify",
    "Head": "basin.terms",
    "LogEntry": "basin.engine.basin",
    "Options": "basin.engine.options",
    "PartAddress": "basin.terms",
    "Position": "basin.terms",
    "Ref": "basin.terms",
    "RepairAction": "basin.engine.repair",
    "Report": "basin.engine.ingest",
    "Secret": "basin.engine.secret",
    "SlotInfo": "basin.engine.secrets",
    "Space": "basin.engine.space",
    "ThawReport": "basin.engine.thawing",
    "Ticket": "basin.engine.ingest",
    "ingest": "basin.api",
    "open": "basin.api",
}

__all__ = [
    "BasinError",
    "Change",
    "CompactionReport",
    "CompactionStep",
    "Conflict",
    "ContentKey",
    "CopyReport",
    "Database",
    "ExportReport",
    "Finding",
    "Head",
    "LogEntry",
    "Options",
    "PartAddress",
    "Position",
    "Ref",
    "RepairAction",
    "Report",
    "Secret",
    "SlotInfo",
    "Space",
    "ThawReport",
    "Ticket",
    "errors",
    "ingest",
    "open",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'basin' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
