"""`stats`: plain numbers about a basin and a handle, for people and for `--json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from basin.engine.state import ACTIVE
from basin.format.layout import STRATUM_FOLDERS, StratumKind

if TYPE_CHECKING:
    from basin.engine.core import Core


def stats(core: Core, path: str) -> dict[str, Any]:
    """Nested dict of numbers and text. Cost: one open for each log segment on a disk, no request in a bucket.

    `requests`: what this handle has asked a bucket for; empty on a disk.
    """
    state, tables = core.current
    strata = [known.added for known in state.strata.values()]
    folders = {
        STRATUM_FOLDERS[kind]: {
            "count": sum(added.kind == kind for added in strata),
            "bytes": sum(added.length for added in strata if added.kind == kind),
            "grains": sum(added.grain_count for added in strata if added.kind == kind),
        }
        for kind in StratumKind
    }
    log = core.log.describe()
    contents = core.contents
    return {
        "path": path,
        "profile": core.keyring.profile,
        "generation": state.generation,
        "position": state.position,
        "floor": state.floor,
        "bytes_stored": sum(added.length for added in strata) + log.get("bytes", 0),
        "strata": {
            "count": len(strata),
            "bytes": sum(added.length for added in strata),
            "active": sum(added.status == ACTIVE for added in strata),
            **folders,
        },
        "names": {
            "runs": len(tables.runs),
            "run_entries": sum(run.run.entries for run in tables.runs),
            "run_bytes": sum(run.run.size for run in tables.runs),
            "memtable_entries": sum(len(table) for table in tables.memtables),
            "memtable_bytes": sum(table.size for table in tables.memtables),
            "flushed": state.flushed,
        },
        "indexes": {"runs": len(state.index_runs), "entries": sum(run.entries for run in state.index_runs)},
        "log": log,
        "sessions": len(state.sessions),
        "slots": len(state.slots),
        "voids": len(state.voids),
        "damaged": len(state.damaged),
        "written": {
            "blobs_new": contents.new_count,
            "blobs_duplicate": contents.found_count,
            "bytes_in": contents.new_size + contents.found_size,
            "bytes_new": contents.new_size,
            "bytes_duplicate": contents.found_size,
            "bytes_stored": contents.stored_size,
            "commits": core.commits,
        },
        "requests": core.storage.requests(),
    }
