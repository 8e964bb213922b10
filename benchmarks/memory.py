"""Reopening and resident memory, each measured in a process of its own: `python -m benchmarks.memory ROLE …`.

`fill` stores so many grains of 100 bytes and reports the writer's peak. `open` starts afresh, opens the store,
reads one value, then 10,000 at random, and reports times and memory. Figures are those of the whole process,
interpreter and libraries included, from `/proc/self/status`; LMDB's resident pages are those of its mapped file,
which the kernel can drop. The page cache is warm: nothing is dropped between the two. Peers run raw here: what they
would do to values costs no memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.entrant import BASIN, Entrant
from benchmarks.workload import choose, make_contents

GRAIN_SIZE: Final = 100
_RANDOM_READS: Final = 10_000
_GRAINS_IN_A_COMMIT: Final = 10_000
_FILL_LIMIT_S: Final = 3_600


@dataclass(frozen=True, slots=True)
class Filled:
    """What the filling process reports."""

    fill_s: float
    resident_peak: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Reopened:
    """What the opening process reports. Times are in seconds from before the call of open; sizes in bytes."""

    open_s: float
    first_read_s: float
    resident: int
    """After the random reads."""
    resident_peak: int
    anonymous: int
    """The part of `resident` that is no file's."""


def measure_fill(entrant: Entrant, folder: Path, *, grains: int, seed: int) -> Filled:
    """Fill an empty store in a fresh process."""
    return Filled(**_run("fill", entrant, folder, grains=grains, seed=seed))


def measure_reopen(entrant: Entrant, folder: Path, *, grains: int, seed: int) -> Reopened:
    """Open a filled store in a fresh process, and read."""
    return Reopened(**_run("open", entrant, folder, grains=grains, seed=seed))


def fill(entrant: Entrant, folder: Path, *, grains: int, seed: int) -> Filled:
    """Store `grains` values, a durable commit every 10,000."""
    contestant = entrant.open(folder, value_size=GRAIN_SIZE)
    seconds = 0.0
    for start in range(0, grains, _GRAINS_IN_A_COMMIT):
        batch = make_contents(GRAIN_SIZE, min(_GRAINS_IN_A_COMMIT, grains - start), seed=seed, start=start)
        started = time.perf_counter()
        contestant.put_batch(batch)
        seconds += time.perf_counter() - started
    contestant.close()
    return Filled(seconds, read_status("VmHWM"))


def reopen(entrant: Entrant, folder: Path, *, grains: int, seed: int) -> Reopened:
    """Open, read the last value stored, read at random; every value is compared."""
    numbers = choose(min(_RANDOM_READS, grains), grains, seed=seed)
    last = make_contents(GRAIN_SIZE, 1, seed=seed, start=grains - 1)
    started = time.perf_counter()
    contestant = entrant.open(folder, value_size=GRAIN_SIZE)
    opened = time.perf_counter()
    found = contestant.read_content(last.digests[0])
    read = time.perf_counter()
    if found != last.values[0]:
        raise SystemExit("the last value reads back as something else")
    for number in numbers:
        wanted = make_contents(GRAIN_SIZE, 1, seed=seed, start=number)
        if contestant.read_content(wanted.digests[0]) != wanted.values[0]:
            raise SystemExit(f"value {number} reads back as something else")
    resident = read_status("VmRSS")
    report = Reopened(opened - started, read - started, resident, read_status("VmHWM"), read_status("RssAnon"))
    contestant.close()
    return report


def read_status(field: str) -> int:
    """A memory field of this process in bytes: VmRSS, VmHWM (peak), RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: resident memory is measured on Linux only")


def _run(role: str, entrant: Entrant, folder: Path, *, grains: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", role, entrant.engine, str(folder), str(grains), str(seed)]
    project = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=project, stdout=subprocess.PIPE, text=True, timeout=_FILL_LIMIT_S, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Play one role and print what it reports as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("fill", "open"))
    parser.add_argument("engine")
    parser.add_argument("folder", type=Path)
    parser.add_argument("grains", type=int)
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    entrant = BASIN if arguments.engine == BASIN.engine else Entrant(arguments.engine, "raw")
    role = fill if arguments.role == "fill" else reopen
    print(json.dumps(asdict(role(entrant, arguments.folder, grains=arguments.grains, seed=arguments.seed))))


if __name__ == "__main__":
    main()
