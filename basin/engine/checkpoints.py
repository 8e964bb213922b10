"""Checkpoints, and letting go of the history and the log behind them.

Invariants: a checkpoint is of a position that is settled; the log is removed only up to what the older of the kept
checkpoints needs for its names; the floor never rises above a pin.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Final

from basin.engine.hints import write_hint
from basin.engine.log import CHECKPOINT_FOLDER
from basin.engine.state import state_to_map
from basin.errors import AlreadyExists, CorruptionError, ObjectMissing
from basin.format.checkpoint import encode_checkpoint
from basin.format.record import Record
from basin.terms import Position

if TYPE_CHECKING:
    from basin.engine.core import Core

CHECKPOINTS_KEPT: Final = 2


def checkpoint(core: Core) -> None:
    """Store the folded state, then drop older checkpoints and the log that nobody needs."""
    state = core.state
    with core.log.exclusive():
        core.log.settle()  # A checkpoint of records that a power cut takes back would be of no history.
    frame = encode_checkpoint(
        core.cipher,
        state.position,
        state_to_map(state),
        generation=core.keyring.generation,
        randomness=os.urandom(32),
    )
    with contextlib.suppress(AlreadyExists):
        core.storage.put_if_absent(f"{CHECKPOINT_FOLDER}/{state.position:020d}", frame)
    core.checkpoint_position = state.position
    if core.is_remote:
        positions = write_hint(core, checkpoint=state.position)
    else:
        positions = sorted(int(name) for name in core.storage.list(CHECKPOINT_FOLDER) if name.isdigit())
    for position in positions[:-CHECKPOINTS_KEPT]:
        core.storage.delete(f"{CHECKPOINT_FOLDER}/{position:020d}")
    kept = positions[-CHECKPOINTS_KEPT:]
    if len(kept) == CHECKPOINTS_KEPT:
        with contextlib.suppress(CorruptionError, ObjectMissing):
            older = core.read_checkpoint(f"{kept[0]:020d}")  # Whoever starts there needs its names from the log.
            needed = min(older.position, older.flushed, max(0, state.floor - 1))
            core.log.remove_through(needed, core.cursor, checkpoint=state.position, generation=core.keyring.generation)


def due_floor(core: Core) -> Position:
    """Up to where history is older than `history_s`, or longer than `history_size`, and not pinned."""
    state = core.state
    oldest_ms = time.time_ns() // 1_000_000 - int(core.options.history_s * 1000)
    floor = max([mark.position for mark in state.marks if mark.time_ms <= oldest_ms], default=0)
    if state.time_ms <= oldest_ms:
        floor = state.position  # Marks are some seconds apart.
    floor = max(floor, core.log.position_within(core.options.history_size))
    return max(state.floor, min(floor, state.position, *state.pins.values()))


def raise_floor(core: Core) -> None:
    """Let go of history that is due."""
    state, floor = core.state, due_floor(core)
    if floor > state.floor:
        core.append(lambda now: Record(floor=floor) if floor > now.floor else None)
