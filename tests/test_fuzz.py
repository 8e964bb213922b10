"""Every corpus is replayed, and holds the seeds as the code encodes them now. Fuzzing itself is `nox -s fuzz`."""

from __future__ import annotations

from pathlib import Path

import pytest

from basin.errors import BasinError
from fuzz.driver import corpus_folder, load_target, target_names

CASES = [(name, path) for name in target_names() for path in sorted(corpus_folder(name).glob("*"))]


@pytest.mark.parametrize(("target", "path"), CASES, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_a_case_of_the_corpus_is_answered(target: str, path: Path) -> None:
    try:
        load_target(target).one_input(path.read_bytes())
    except BasinError:
        assert not path.name.startswith("seed-")


@pytest.mark.parametrize("target", target_names())
def test_the_corpus_holds_the_seeds(target: str) -> None:
    stored = [path.read_bytes() for path in sorted(corpus_folder(target).glob("seed-*"))]
    assert stored == list(load_target(target).seeds())
    assert stored


@pytest.mark.parametrize("target", target_names())
def test_damaged_seeds_are_answered(target: str) -> None:
    """Each seed with each byte changed in turn: an error of ours or a harmless value, and nothing else."""
    module = load_target(target)
    for seed in module.seeds():
        for at in range(0, len(seed), max(1, len(seed) // 200)):
            try:
                module.one_input(seed[:at] + bytes((seed[at] ^ 0x81,)) + seed[at + 1 :])
            except BasinError:
                continue
