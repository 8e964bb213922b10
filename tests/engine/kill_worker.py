"""A writer that `test_kill` kills: it keeps a journal outside of the basin of what it began and what was acknowledged.

A line of the journal is written with one `write` before and after each commit: `begin N` and `done N`. Step N sets the
worker's names to `value(worker, N, name)` and puts `content(worker, N)`, in a batch or in a transaction. A step that
was begun and not acknowledged is never begun again: its commit may have happened.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from typing import Any

import basin
from basin.api import DatabaseTransaction

NAMES = 5
CONTENT_SIZES = (20, 400, 3000, 30_000)


def value(worker: int, step: int, name: int) -> bytes:
    """What step `step` writes under a name: inline, or larger than what is kept inline."""
    return b"%d/%d/%d " % (worker, step, name) * (1 if name else 100)


def content(worker: int, step: int) -> bytes:
    """The content that step `step` puts; the larger ones are cut into parts."""
    size = CONTENT_SIZES[(worker + step) % len(CONTENT_SIZES)]
    return (b"content %d/%d " % (worker, step) * size)[:size]


def work(database: basin.Database, worker: int, step: int) -> None:
    """One step: every way to commit in turn."""
    pairs = [(b"%d/%d" % (worker, name), value(worker, step, name)) for name in range(NAMES)]
    match step % 4:
        case 0 | 1:
            with database.batch() as batch:
                batch.put_many(pairs)
                batch.blobs.put(content(worker, step))
                batch.delete(b"%d/gone" % worker)
        case 2:

            def change(tx: DatabaseTransaction) -> None:
                tx.put_many(pairs)
                tx.blobs.put(content(worker, step))
                tx[b"shared"] = b"%d" % (int(tx.get(b"shared", b"0")) + 1)

            database.run(change, retries=1000)
        case _:
            with database.batch() as batch:
                batch.delete_range(b"%d/" % worker, b"%d0" % worker)
                for name, written in pairs:
                    batch[name] = written
                batch.blobs.put(content(worker, step))


def run(folder: str, secret: basin.Secret | None, journal: str, worker: int, seed: int) -> None:
    """Work until killed; now and then close the basin and open it again."""
    rng = random.Random(seed)
    lines = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(lines, b"\n")  # Behind a line that a kill has cut short.
    with open(journal, encoding="ascii") as file:  # noqa: PTH123  # a worker is as small as can be
        step = max((int(line.split()[1]) for line in file if line.startswith("begin ")), default=0)
    while True:
        options: dict[str, Any] = {
            "memtable_size": rng.choice([2000, 50_000]),
            "stratum_size": rng.choice([8192, 1 << 20]),
        }
        history_s = rng.choice([0.0, 3600.0])
        with basin.open(folder, "w", secret=secret, history_s=history_s, **options) as database:
            for _ in range(rng.randrange(1, 60)):
                step += 1
                os.write(lines, b"begin %d\n" % step)
                work(database, worker, step)
                os.write(lines, b"done %d\n" % step)


def main(folder: str, secret_file: str) -> None:
    """Start and reap workers as told on standard input: processes that are forked have everything imported."""
    secret = basin.Secret.from_file(secret_file) if secret_file else None
    alive: set[int] = set()
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "reap":
            reply = os.waitstatus_to_exitcode(os.waitpid(int(arguments[0]), 0)[1])
            alive.discard(int(arguments[0]))
        else:
            reply = os.fork()
            if reply == 0:
                try:
                    run(folder, secret, arguments[0], int(arguments[1]), int(arguments[2]))
                finally:
                    traceback.print_exc()
                    os._exit(1)
            alive.add(reply)
        print(reply, flush=True)  # the answer to whoever holds the other end of the pipe
    for worker in alive:  # Nobody is there any more to do it.
        os.kill(worker, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
