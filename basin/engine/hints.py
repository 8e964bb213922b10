"""The hint of a bucket: read by whoever opens, written with each checkpoint and each change of the key slots.

Believed by nobody: whatever it says is checked where it is used, and who finds nothing there looks for itself.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from basin.engine.log import LOG_FOLDER
from basin.errors import BasinError, CorruptionError, ObjectMissing
from basin.format.hint import Hint, decode_hint, encode_hint
from basin.format.layout import HINT_SIZE_MAX
from basin.format.slots import KEYS_FOLDER
from basin.storage.objects import ByteRange
from basin.storage.protocol import Storage

if TYPE_CHECKING:
    from basin.engine.core import Core

HINT_NAME: Final = f"{LOG_FOLDER}/hint"


def hint_of(body: bytes | BasinError) -> Hint | None:
    """The hint in what was read under its name; None if there is none, or none that is whole."""
    if isinstance(body, bytes):
        with contextlib.suppress(CorruptionError):
            return decode_hint(body)
        return None
    if isinstance(body, ObjectMissing):
        return None
    raise body


def read_hint(storage: Storage) -> Hint | None:
    """One request."""
    return hint_of(storage.read_ranges([ByteRange(HINT_NAME, 0, HINT_SIZE_MAX)])[0])


def collect_keys(storage: Storage) -> dict[str, bytes]:
    """All files below `keys/`. One list, and one more and some reads for each slot."""
    names = [
        f"{KEYS_FOLDER}/{slot}/{name}"
        for slot in storage.list_folders(KEYS_FOLDER)
        for name in storage.list(f"{KEYS_FOLDER}/{slot}")
    ]
    bodies = storage.read_ranges([ByteRange(name, 0, HINT_SIZE_MAX) for name in names])
    return {name: body for name, body in zip(names, bodies, strict=True) if isinstance(body, bytes)}


def write_hint(core: Core, *, checkpoint: int = 0, keys_changed: bool = False) -> list[int]:
    """Store where an opener should look: a newer checkpoint, or other key files. Two or three requests.

    Returns the positions of the checkpoints that were known, the last two of which the hint names. Its failure is
    nobody's: an opener without a hint is only slower.
    """
    objects = core.storage.objects
    if objects is None:
        return []
    try:
        before = read_hint(core.storage)
        known = before if before is not None else Hint()
        keys = collect_keys(core.storage) if keys_changed or before is None else known.keys
        positions = sorted({known.older_checkpoint, known.checkpoint, checkpoint} - {0})
        older, newest = [0, 0, *positions][-2:]
        hint = Hint(newest, older, keys)
        body = encode_hint(hint)
        if hint != before and len(body) <= HINT_SIZE_MAX:
            objects.put(HINT_NAME, body)
    except BasinError:
        return []
    return positions
