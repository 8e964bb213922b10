"""Basin: an embedded, append-only key/value store that is a content-addressed store at the same time.

    db = basin.open("folder", secret=basin.Secret.from_passphrase("…"))
    db["name"] = b"value"
    key = db.blobs.put(b"content")
    db.commit()

Start with `basin.open`; `docs/glossary.md` has the words.
"""

from __future__ import annotations

from basin import errors
from basin.api import Database, ingest, open  # noqa: A004  # `basin.open`, as in `gzip.open`
from basin.engine.basin import Change, LogEntry
from basin.engine.ingest import Report, Ticket
from basin.engine.options import Options
from basin.engine.repair import RepairAction
from basin.engine.secret import Secret
from basin.engine.secrets import SlotInfo
from basin.engine.verify import Finding
from basin.errors import BasinError, Conflict
from basin.terms import ContentKey, Head, PartAddress, Position, Ref

__all__ = [
    "BasinError",
    "Change",
    "Conflict",
    "ContentKey",
    "Database",
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
    "Ticket",
    "errors",
    "ingest",
    "open",
]
__version__ = "0.1.0"
