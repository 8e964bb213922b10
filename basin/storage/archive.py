"""Bodies of S3 that must be restored before they can be read: what the service says of them, and how it is asked.

Invariants:

- What a store answers is read here alone, so that all clients agree on what can be read.
- A restoration that is under way already is no failure.

Pure: sends nothing. Imports its neighbour `objects`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from basin.storage.objects import Readiness

ARCHIVE_CLASSES: Final = frozenset({"GLACIER", "DEEP_ARCHIVE"})
"""Classes whose bodies cannot be read from the moment on when they were stored."""
RESTORE_TIERS: Final = ("Standard", "Bulk", "Expedited")
ALREADY_RESTORING: Final = "RestoreAlreadyInProgress"
"""The service's code for a restoration that somebody has asked for."""


def readiness_of(answer: Mapping[str, Any]) -> Readiness:
    """What the answer to a HEAD says, in botocore's shape.

    `Restore` stands there from the first request for a restoration until what was restored expires; `ArchiveStatus`
    while the body of a class that moves by itself lies in an archive.
    """
    storage_class = str(answer.get("StorageClass") or "")
    restore = str(answer.get("Restore") or "")
    if 'ongoing-request="true"' in restore:
        return Readiness(storage_class, "restoring")
    is_archived = storage_class in ARCHIVE_CLASSES or bool(answer.get("ArchiveStatus"))
    return Readiness(storage_class, "archived" if is_archived and not restore else "readable")


def restore_request(days: int, tier: str) -> dict[str, Any]:
    """The argument `RestoreRequest` of botocore's `restore_object`."""
    request: dict[str, Any] = {"GlacierJobParameters": {"Tier": tier}}
    if days:
        request["Days"] = days
    return request
