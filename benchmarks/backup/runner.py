"""The order of a benchmark of backups: rounds; in a round the steps; in a step all sides, one directly after the other.

Invariants:
- Every round begins with fresh repositories and the unchanged material, and ends without either's traces.
- Only the command itself is timed. In front of each the machine is settled (what others left dirty is written back);
  its growth is measured after another settling; comparing and cleaning come later.
- Nothing is deleted before the round is over: a file system without a journal takes long to make files while it avoids
  the inodes of those that were just deleted (ext4, for a minute). Between rounds that minute is waited for.
- What is restored is compared with the source, every time. A difference ends the run: no figure is worth having then.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.backup.material import Material, differences, facts_of
from benchmarks.backup.results import Sample
from benchmarks.backup.sides import Place, Side
from benchmarks.backup.usage import Usage, measure, stored_size

FIRST: Final = "first backup"
UNCHANGED: Final = "backup, nothing changed"
CHANGED: Final = "backup, 1 % changed"
RESTORE: Final = "full restore"
SYNCED_RESTORE: Final = "full restore, synced"
"""For who does not sync by itself, a sync is added."""
ONE_FILE: Final = "restore of one file"
LIST: Final = "list of snapshots"
BACKUPS: Final = (FIRST, UNCHANGED, CHANGED)


class RestoredDiffers(Exception):
    """A side gave back something else than it took."""


@dataclass(slots=True)
class Round:
    """One round over one material."""

    material: Material
    folder: Path
    number: int
    order: random.Random
    on_run: Callable[[str], None]
    samples: list[Sample] = field(default_factory=list)

    def run(self, sides: Sequence[Side]) -> list[Sample]:
        """All steps. Samples are in the order of the steps, then of the sides."""
        for side in sides:
            self._begin(side)
        facts_of(self.material.source)  # into the memory of the system, or the first side would read it for the others
        self._each(sides, FIRST, lambda side: self._backup(side, 1))
        self._each(sides, UNCHANGED, lambda side: self._backup(side, 2))
        with changed(self.material):
            self._each(sides, CHANGED, lambda side: self._backup(side, 3))
            self._each(sides, RESTORE, self._restore)
            self._each(sides, SYNCED_RESTORE, self._restore_synced)
            if self.material.one_file:
                self._each(sides, ONE_FILE, self._restore_file)
            self._each(sides, LIST, self._list)
        for side in sides:
            shutil.rmtree(self._place(side).home.parent)
        places = {side.label: place for place, side in enumerate(sides)}
        steps = {step: place for place, step in enumerate(dict.fromkeys(sample.step for sample in self.samples))}
        return sorted(self.samples, key=lambda sample: (steps[sample.step], places[sample.side]))

    def _each(self, sides: Sequence[Side], step: str, work: Callable[[Side], Usage]) -> None:
        for side in self.order.sample(sides, len(sides)):
            self.on_run(f"round {self.number + 1}, {self.material.title}, {step}: {side.label}")
            before = stored_size(self._place(side).repository)
            os.sync()
            usage = work(side)
            os.sync()
            grown = stored_size(self._place(side).repository) - before if step in BACKUPS else 0
            self.samples.append(
                Sample(
                    material=self.material.title,
                    step=step,
                    side=side.label,
                    round=self.number,
                    wall_s=usage.wall_s,
                    cpu_s=usage.cpu_s,
                    peak=usage.peak,
                    grown=grown,
                )
            )

    def _begin(self, side: Side) -> None:
        place = self._place(side)
        place.home.mkdir(parents=True)
        self._measure(side, side.init(place))

    def _backup(self, side: Side, number: int) -> Usage:
        return self._measure(side, side.backup(self._place(side), self.material.source, number))

    def _restore(self, side: Side) -> Usage:
        return self._restore_all(side, side.restore)

    def _restore_synced(self, side: Side) -> Usage:
        return self._restore_all(side, side.restore_synced)

    def _restore_all(self, side: Side, command: Callable[[Place, Path, Path, int], list[str]]) -> Usage:
        source, place, target = self.material.source, self._place(side), self._target(side)
        usage = self._measure(side, command(place, source, target, len(BACKUPS)))
        require_equal(side, source, side.restored(source, target))
        return usage

    def _restore_file(self, side: Side) -> Usage:
        path, place = self.material.source / str(self.material.one_file), self._place(side)
        target = self._target(side)
        usage = self._measure(side, side.restore_file(place, path, target, len(BACKUPS)))
        require_equal(side, path, side.restored_file(path, target))
        return usage

    def _list(self, side: Side) -> Usage:
        return self._measure(side, side.list_snapshots(self._place(side)))

    def _measure(self, side: Side, command: list[str]) -> Usage:
        place = self._place(side)
        return measure(command, environment=side.environment(place), folder=place.home)

    def _place(self, side: Side) -> Place:
        own = self.folder / side.label.replace(" ", "-")
        return Place(own / "repository", own / "home")

    def _target(self, side: Side) -> Path:
        """A new folder, which goes with the round."""
        own = self._place(side).home.parent
        target = own / f"restored-{len(list(own.glob('restored-*')))}"
        target.mkdir()
        return target


@contextmanager
def changed(material: Material) -> Iterator[None]:
    """The material as it is after its change."""
    material.change()
    try:
        yield
    finally:
        material.undo()


def require_equal(side: Side, source: Path, restored: Path) -> None:
    """Raise `RestoredDiffers` unless all is there again, and nothing else."""
    found = differences(source, restored)
    if found:
        raise RestoredDiffers(f"{side.label} restored something else: {'; '.join(found)}")


def run_rounds(
    materials: Sequence[Material],
    sides: Sequence[Side],
    folder: Path,
    *,
    rounds: int,
    seed: int,
    on_run: Callable[[str], None],
    rest_s: float = 0,
) -> list[Sample]:
    """Everything `rounds` times; `folder` is empty before and after. Raises `CommandFailed`, `RestoredDiffers`.

    `rest_s` is waited for between two rounds.
    """
    order = random.Random(seed)
    samples: list[Sample] = []
    for number in range(rounds):
        for material in materials:
            if samples:
                os.sync()
                time.sleep(rest_s)
            samples += Round(material, folder, number, order, on_run).run(sides)
    return samples
