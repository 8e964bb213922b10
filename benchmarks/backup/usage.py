"""One command, run to its end: what it took of time, processors and memory.

Invariant: the figures are the kernel's account of the child (`wait4`), not samples. Processor time holds that of all
descendants that were waited for; the peak is that of the largest single process among them. `waiter.py` stands between
this process and the command, and says why.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_KIB: Final = 1024
_WAITER: Final = (sys.executable, "-I", "-S", str(Path(__file__).with_name("waiter.py")))
_MESSAGE_SIZE_MAX: Final = 4_000


class CommandFailed(Exception):
    """A command ended with another code than 0; the text has its last words."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds of the clock, seconds of user and system time, and the peak of resident memory in bytes."""

    wall_s: float
    cpu_s: float
    peak: int


def measure(command: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> Usage:
    """Run `command` in `folder`, with nothing but `environment`; raise `CommandFailed` if it fails.

    Its output is thrown away, but for the end of it in the message of a failure.
    """
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            [*_WAITER, *command],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            check=False,
        )
        code, *figures = done.stdout.split() or [b"no code"]
        if code != b"0":
            output.seek(max(0, output.seek(0, os.SEEK_END) - _MESSAGE_SIZE_MAX))
            words = output.read().decode(errors="replace").strip()
            raise CommandFailed(f"{' '.join(command)} ended with {code.decode()}: {words}")
    wall_s, cpu_s, peak = map(float, figures)
    return Usage(round(wall_s, 4), round(cpu_s, 4), int(peak) * _KIB)


def floor(folder: Path) -> int:
    """The peak of a command that does nothing: a smaller one cannot be seen."""
    return measure(["true"], environment={"PATH": os.defpath}, folder=folder).peak


def stored_size(folder: Path) -> int:
    """Bytes that the disk gives to the files below `folder`; a file with several links counts once."""
    blocks: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            found = (Path(parent) / name).lstat()
            blocks[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(blocks.values())
