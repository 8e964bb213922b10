"""Fuzz every target for its share of the time: `python -m fuzz [--seconds 60] [--workers 2] [name …]`.

Each target runs in a process of its own with bounded memory, from its corpus. What it discovers goes to a temporary
folder: the corpus in the repository grows by hand. A find does not get lost: it is written into the corpus of its
target as `crash-…`, `timeout-…` or `oom-…`, where `tests/test_fuzz.py` replays it from then on. Ends with 1 if there is
one.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from fuzz.driver import FOLDER, corpus_folder, target_names

RESIDENT_MAX_MIB: Final = 1024
ADDRESS_SPACE_MAX: Final = 8 << 30  # Libraries reserve some; a decoder that believes a huge count asks for far more.
INPUT_TIMEOUT_S: Final = 10
STARTING_S: Final = 60  # Instrumenting the imports, on a busy machine.


class Outcome(NamedTuple):
    """How one target ended: `code` is libFuzzer's, 0 for no find."""

    name: str
    code: int
    output: str


def fuzz_target(name: str, seconds: int) -> Outcome:
    """Run one target for `seconds`, starting it not counted."""
    corpus = corpus_folder(name)
    with tempfile.TemporaryDirectory() as discovered:
        command = [
            sys.executable,
            "-m",
            "fuzz.driver",
            name,
            f"-max_total_time={max(1, seconds)}",
            f"-rss_limit_mb={RESIDENT_MAX_MIB}",
            f"-timeout={INPUT_TIMEOUT_S}",
            "-verbosity=0",
            f"-artifact_prefix={corpus}/",
            discovered,
            str(corpus),
        ]
        done = subprocess.run(
            command,
            cwd=FOLDER.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=seconds + STARTING_S + 2 * INPUT_TIMEOUT_S,
            preexec_fn=_limit_memory,
        )
    return Outcome(name, done.returncode, done.stdout)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_MAX, ADDRESS_SPACE_MAX))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzz every decoder.")
    parser.add_argument("--seconds", type=int, default=60, help="all targets together (default 60)")
    parser.add_argument("--workers", type=int, default=2, help="targets at a time (default 2)")
    parser.add_argument("names", nargs="*", metavar="name", help="targets (default: all)")
    arguments = parser.parse_args()
    names = [f"fuzz_{name.removeprefix('fuzz_')}" for name in arguments.names] or target_names()
    share = arguments.seconds * min(arguments.workers, len(names)) // len(names)
    begun, found = time.monotonic(), 0
    with ThreadPoolExecutor(arguments.workers) as workers:
        for outcome in workers.map(lambda name: fuzz_target(name, share), names):
            print(f"{outcome.name.removeprefix('fuzz_')}: {'nothing found' if outcome.code == 0 else 'FOUND'}")
            if outcome.code:
                found += 1
                print(outcome.output)
    print(f"{len(names)} targets, {share} s each, {time.monotonic() - begun:.0f} s: {found} with a find")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
