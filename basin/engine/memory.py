"""Giving memory back to the system between two pieces of work that each take much of it.

Invariant: whoever calls this is as right without it. Imported by `compaction` and `runs`.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_memory_back() -> None:
    """Let the C library return to the system what is free: glibc keeps what lies in holes, and much at the end.

    What is freed often leaves a hole that does not fit what is needed next, so that the peak has both. Costs some
    milliseconds.
    """
    with suppress(AttributeError, OSError):  # Another C library.
        ctypes.CDLL(None).malloc_trim(0)
