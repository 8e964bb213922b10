"""The search through the worlds of the collector's model: breadth first, so that the way to a flaw is the shortest."""

from __future__ import annotations

import gc
import itertools

from tests.engine.log_model_collector import Deletion
from tests.engine.log_model_ledger import Broken
from tests.engine.log_model_world import Report, Universe, World


def search(universe: Universe) -> Report:
    """Visit every world that can be reached, and check it. Raises `Broken` at the first that breaks an invariant."""
    gc.disable()  # There are no cycles, and going through half a million worlds for them takes a third of the time.
    try:
        return _search(Deletion(universe))
    finally:
        gc.enable()


def _search(model: Deletion) -> Report:
    seen = {model.key(model.first)}
    came_from: list[tuple[World, int]] = [(model.first, -1)]
    steps = 0
    for number, (world, _) in enumerate(came_from):  # It grows meanwhile.
        try:
            model.check(world)
            for after in model.steps(world):
                steps += 1
                key = model.key(after)
                if key not in seen:
                    seen.add(key)
                    came_from.append((model.shared(after), number))
        except Broken as broken:
            _explain(broken, came_from, number)
            raise
    return Report(len(came_from), steps, len(model.ledger.views), +model.events)


def _explain(broken: Broken, came_from: list[tuple[World, int]], number: int) -> None:
    way = []
    while number >= 0:
        world, number = came_from[number]
        way.append(world)
    for before, after in itertools.pairwise(reversed(way)):
        changed = [f"{new}" for old, new in zip(before.actors, after.actors, strict=True) if old != new]
        broken.add_note(f"node {before.node} -> {after.node}, files {after.files:x}: {'; '.join(changed)}")
