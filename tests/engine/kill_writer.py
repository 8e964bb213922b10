"""The processes that `test_kill.py` kills: each commits batch after batch and notes every acknowledgement in a file."""

from __future__ import annotations

import os
import random
from typing import Any

import basin
from basin.api import Database

BATCH_NAMES = 12
COUNTER = b"counter"


def value_of(writer: int, number: int, item: int) -> bytes:
    """What writer `writer` gives to name `item` of its batch `number`: some inline, some as contents of their own."""
    return random.Random(f"{writer}.{number}.{item}").randbytes(40 if item % 3 else 1500)


def write_batch(tx: Any, writer: int, number: int) -> None:
    """One batch, and one step of the counter that all writers share."""
    for item in range(BATCH_NAMES):
        tx.put(f"{writer:04}/{number:06}/{item:02}", value_of(writer, number, item))
    tx.put(COUNTER, b"%d" % (int(tx.get(COUNTER, b"0")) + 1))


def write_until_killed(folder: str, notes: str, writer: int) -> None:
    """Commit for ever. After each commit one line `writer number` goes to the file `notes`, outside of the basin."""
    lines = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with basin.open(folder, mode="w", memtable_size=65_536, stratum_size=1 << 20) as db:
        number = 0
        while True:
            commit_one(db, writer, number)
            os.write(lines, b"%d %d\n" % (writer, number))
            number += 1


def commit_one(db: Database, writer: int, number: int) -> None:
    db.run(lambda tx: write_batch(tx, writer, number), retries=10_000)
