"""Run one fuzz target under atheris: `python -m fuzz.driver fuzz_<name> [libFuzzer's arguments]`.

`python -m fuzz.driver --write-seeds` writes the seeds of all targets into the corpus; cases that were found by fuzzing
and added by hand have other names and stay.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def target_names() -> list[str]:
    """The modules of all targets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("fuzz_*.py"))


def load_target(name: str) -> Any:
    """The module of one target."""
    return importlib.import_module(f"fuzz.{name}")


def corpus_folder(name: str) -> Path:
    """Where the corpus of a target lies."""
    return FOLDER / "corpus" / name.removeprefix("fuzz_")


def write_seeds() -> None:
    for name in target_names():
        folder = corpus_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(load_target(name).seeds()):
            (folder / f"seed-{number}").write_bytes(seed)


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz until `arguments` say stop; the process ends with code 0 if nothing was found."""
    import atheris

    with atheris.instrument_imports(include=["basin.format", "basin.engine.state"]):
        from basin.errors import BasinError

        one_input = load_target(name).one_input

    def guarded(data: bytes) -> None:
        """A `BasinError` is the right answer to hostile bytes. All else is a find: a hang and too much memory too."""
        try:
            one_input(data)
        except BasinError:
            return

    atheris.Setup([name, *arguments], guarded)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "--write-seeds":
        write_seeds()
    else:
        fuzz(sys.argv[1], sys.argv[2:])
