"""Run one fuzz target under atheris: `python -m fuzz.driver fuzz_<name> [libFuzzer's arguments]`.

Replaying a corpus needs no atheris: `tests/test_fuzz.py` calls the targets directly.
"""

from __future__ import annotations

import importlib
import sys

import atheris

if __name__ == "__main__":
    with atheris.instrument_imports(include=["basin"]):
        from basin.errors import BasinError

        one_input = importlib.import_module(f"fuzz.{sys.argv.pop(1)}").one_input

    def guarded(data: bytes) -> None:
        """A `BasinError` is the right answer to hostile bytes. All else is a find: a hang and too much memory too."""
        try:
            one_input(data)
        except BasinError:
            return

    atheris.Setup(sys.argv, guarded)
    atheris.Fuzz()
