"""Contents that names refer to and no stratum holds: brought back where a file that does not count still has them.

Such a file is one that a record removed and that is kept for earlier readers, or one that no record names. What lies
nowhere is lost: that is said, by name and content key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from basin.engine.cache import Cache
from basin.engine.index import IndexReader
from basin.engine.reader import StratumReader
from basin.engine.recovery import stored_strata
from basin.engine.repair_reading import ReadableGrain
from basin.engine.repair_strata import Copier
from basin.engine.repair_tasks import RepairAction, Task, counted, impossible
from basin.engine.verify import Finding
from basin.engine.writer import stratum_name
from basin.errors import BasinError
from basin.format.grain import decode_header
from basin.format.layout import StratumKind
from basin.format.record import Record
from basin.terms import StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

_HELD_MAX: Final = 64 << 20
"""Bytes of grains that wait in memory for the record that brings them back: the rest comes with the next repair."""


def plan_missing(core: Core, findings: Sequence[Finding]) -> Iterator[Task]:
    """What becomes of contents that are referred to and not there. Looks into every file that does not count."""
    wanted = {bytes.fromhex(key) for found in findings for key in found.content_keys}
    if not wanted:
        return
    grain_keys = {core.keyring.grain_keys.grain_key(key): key for key in wanted}
    back: set[bytes] = set()
    held = 0
    for kind, identity, header in stored_strata(core):
        if header is None or kind == StratumKind.INDEX or identity in core.state.strata:
            continue
        grains = []
        for grain in _grains_in(core, kind, identity, [one for one, key in grain_keys.items() if key not in back]):
            if held < _HELD_MAX:
                held += len(grain.data)
                grains.append(grain)
                back.add(grain_keys[grain.key])
        if grains:
            detail = f"bring back {counted(len(grains), 'content')} that names refer to"
            action = RepairAction("missing", stratum_name(kind, identity), detail)
            yield Task(action, partial(_bring_back, core, kind, grains))
    for found in findings:
        keys = [key for key in found.content_keys if bytes.fromhex(key) not in back]
        if keys:
            detail = f"{found.detail}: put it again, or delete the name"
            yield impossible("missing", found.object, detail, names=found.names, content_keys=keys)


def _grains_in(
    core: Core, kind: StratumKind, identity: StratumId, grain_keys: Sequence[bytes]
) -> Iterator[ReadableGrain]:
    """Grains of these keys in a stratum that does not count."""
    with contextlib.suppress(BasinError, IndexError):
        reader = StratumReader(core.storage, core.keyring, kind, identity)
        try:
            index = IndexReader(reader, reader.directory(), Cache(0))
            for key in grain_keys:
                for _, offset, length in index.find(key):
                    grain = reader.read_raw(offset, length)
                    found, payload = reader.decode_grain(grain, offset, key)
                    header, data = decode_header(grain), reader.unseal(grain, offset)
                    yield ReadableGrain(offset, length, found, header.codec, header.flags, key, data, payload)
                    break
        finally:
            reader.close()


def _bring_back(core: Core, kind: StratumKind, grains: Sequence[ReadableGrain]) -> bool:
    copier = Copier(core, kind)
    try:
        for grain in grains:
            copier.add(grain)
        strata, runs = copier.finish()
    except BaseException:
        copier.discard()
        raise
    if core.append(lambda _: Record(strata_added=strata, index_runs_added=runs)):
        return True
    copier.discard()
    return False
