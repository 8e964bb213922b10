"""Run one fuzz target under atheris. Used by the targets' `__main__` only; replaying a corpus needs no atheris."""

from __future__ import annotations

import sys
from collections.abc import Callable

from basin.errors import BasinError


def run(one_input: Callable[[bytes], None]) -> None:
    """Fuzz until libFuzzer's own arguments (`sys.argv`) say stop; exit code 0 means that nothing was found.

    A `BasinError` is the right answer to hostile bytes. Everything else is a find: a hang and too much memory too.
    """
    import atheris

    def guarded(data: bytes) -> None:
        try:
            one_input(data)
        except BasinError:
            return

    atheris.instrument_all()
    atheris.Setup(sys.argv, guarded)
    atheris.Fuzz()
