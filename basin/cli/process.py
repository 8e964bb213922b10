"""A process that runs one command: how it takes memory, and how seldom it looks for garbage.

Invariant: nothing here changes what a command does, and nothing is called by the library: the settings of a process
are its owner's, and here that is the command.

Imported by `common`.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from typing import Final

_ARENA_MAX: Final = -8
"""glibc's parameter `M_ARENA_MAX` of `mallopt`."""
_GARBAGE_THRESHOLD: Final = 50_000
"""New objects between two searches for cycles; Python's own 700 cost a rescan of 50,000 files a tenth of its time."""


def settle() -> None:
    """Set up the process, once, before the basin is opened.

    One heap for all threads: with one for each, which is glibc's way, what a thread has freed is of no use to another,
    and the peak of a backup was 137 MiB instead of 109. Threads of Python seldom allocate at the same time.
    """
    with suppress(AttributeError, OSError):  # Another C library than glibc.
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    gc.set_threshold(_GARBAGE_THRESHOLD, *gc.get_threshold()[1:])
