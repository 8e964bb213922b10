"""The crash explorer: runs a script once, then visits every state in which a crash could have left the disk.

`explore` records the effects of a script on a simulated disk, applies them again one by one, and after each asks
`basin.testing.crash` for what a power cut would leave, and what a killed process would leave (everything written, with
the last write cut short). Each state that was not seen before is mounted on a fresh disk and given to the check, with
the number of acknowledgements made until then. Recoveries are scripts too: some are recorded and explored likewise.

Bounds: `Bounds` within a moment; `recoveries` and `recovery_bounds` for the second level. The report states them and
counts what was left out. Equal (bytes, boot, acknowledgements) are checked once. What is drawn depends on the seed
alone; a script that draws random bytes itself is as repeatable as those are.
"""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from basin.testing.crash import DEFAULT_BOUNDS, Bounds, CrashStates
from basin.testing.disk import SECTOR_SIZE, DiskImage, Effect, FileImage, SimulatedDisk
from basin.testing.simulated import SimulatedStorage

Script: TypeAlias = Callable[[SimulatedStorage, Callable[[], None]], None]
"""Called with a storage and `acknowledge`, to be called whenever the script's caller was told "this is durable".

For a second writer: `SimulatedStorage(storage.disk)`.
"""

Check: TypeAlias = Callable[[SimulatedStorage, int], None]
"""Called with a storage as a crash left it, and the number of acknowledgements before; raises if a promise broke."""

RECOVERY_BOUNDS: Final = Bounds(sectors=4, positions=4, versions=1, sizes=6, file_states=64, entries=4, states=64)

_BAD_MAX: Final = 10
_SHARE_MIN: Final = 16
"""States of each moment, however few of the aim are left: every moment is looked at."""
_EMPTY: Final = DiskImage({}, frozenset())


@dataclass(frozen=True, slots=True)
class BadState:
    """A state in which the check failed: where the crash was, what it left, and how the check failed."""

    effect: str
    acknowledged: int
    boot: int
    level: int
    error: str
    image: DiskImage

    def mount(self) -> SimulatedStorage:
        """The state on a fresh disk, to look at the failure again."""
        return SimulatedStorage(SimulatedDisk.from_image(self.image, boot=self.boot))


@dataclass(slots=True)
class ExplorationReport:
    """What was visited.

    `distinct` counts different byte images of a disk, `checked` calls of the check (one for each image, boot and number
    of acknowledgements), `states` all combinations enumerated, `omitted` those left out by `Bounds.states`.
    """

    bounds: Bounds
    recovery_bounds: Bounds
    seed: int
    effects: int = 0
    acknowledged: int = 0
    moments: int = 0
    states: int = 0
    distinct: int = 0
    checked: int = 0
    killed: int = 0
    recovered: int = 0
    recoveries: int = 0
    sampled_moments: int = 0
    omitted: int = 0
    elapsed_s: float = 0.0
    bad: list[BadState] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.distinct:,} distinct images, {self.checked:,} checks ({self.killed:,} after a kill, "
            f"{self.recovered:,} after a crash in {self.recoveries:,} recoveries), {len(self.bad)} bad; "
            f"{self.states:,} combinations at {self.moments:,} moments of {self.effects:,} effects, "
            f"{self.sampled_moments:,} moments sampled ({self.omitted:,} combinations left out); "
            f"seed {self.seed}, {self.bounds}, {self.elapsed_s:.1f} s"
        )

    def require_good(self) -> None:
        """Raise `AssertionError` with the first failures, if any check failed."""
        if self.bad:
            shown = "\n\n".join(
                f"after effect {bad.effect}, {bad.acknowledged} acknowledged, level {bad.level}:\n{bad.error}"
                for bad in self.bad[:3]
            )
            raise AssertionError(f"{len(self.bad)} bad states (at most {_BAD_MAX} are kept); {self}\n{shown}")


def explore(
    script: Script,
    check: Check,
    *,
    start: DiskImage = _EMPTY,
    recover: Check | None = None,
    recoveries: int = 0,
    each_effect: bool = True,
    kills: bool = True,
    bounds: Bounds = DEFAULT_BOUNDS,
    recovery_bounds: Bounds = RECOVERY_BOUNDS,
    aim: int | None = None,
    remounts: bool = False,
    seed: int = 0,
) -> ExplorationReport:
    """Run `script` once on a disk that holds `start`, and `check` every state a crash may leave; stop at 10 bad ones.

    `each_effect=False` looks only before each sync and acknowledgement and at the end: what a power cut may leave grows
    until then, so that only the bounds make a difference. `kills` adds the states after a killed process. `recoveries`
    states, drawn at random, are recovered on a recorded disk by `recover` (by default `check`) and explored again.
    `aim` shares about so many images among the script's moments, within `Bounds.states` for each: what a short moment
    does not need is left to the later ones. With `remounts` every other state is found by a machine that did not boot:
    a disk that was pulled out, and plugged in again.
    """
    report = ExplorationReport(bounds, recovery_bounds, seed)
    return _Exploration(report, check, recover or check, recoveries, aim, remounts=remounts).run(
        script, start, each_effect=each_effect, kills=kills
    )


@dataclass(frozen=True, slots=True)
class _Left:
    """A state left by a crash, kept for its recovery."""

    image: DiskImage
    boot: int
    acknowledged: int


class _Exploration:
    def __init__(
        self,
        report: ExplorationReport,
        check: Check,
        recover: Check,
        recoveries: int,
        aim: int | None,
        *,
        remounts: bool,
    ) -> None:
        self.report = report
        self._check = check
        self._recover = recover
        self._recoveries = recoveries
        self._aim = aim
        self._remounts = remounts
        self._moments_left = 0
        self._random = random.Random(report.seed)
        self._seen: set[tuple[int, int, int]] = set()
        self._images: set[int] = set()
        self._kept: list[_Left] = []
        self._offered = 0

    def run(self, script: Script, start: DiskImage, *, each_effect: bool, kills: bool) -> ExplorationReport:
        report = self.report
        begin = time.perf_counter()
        effects = _recorded(start, 1, script)
        report.effects = len(effects)
        report.acknowledged = sum(effect.kind == "acknowledge" for effect in effects)
        self._replay(start, effects, each_effect=each_effect, kills=kills)
        for left in self._kept:
            if len(report.bad) >= _BAD_MAX:
                break
            self._explore_recovery(left)
        report.distinct = len(self._images)
        report.elapsed_s = time.perf_counter() - begin
        return report

    def _replay(self, start: DiskImage, effects: list[Effect], *, each_effect: bool, kills: bool) -> None:
        """Apply `effects` to a disk with `start` and visit the moments between them."""
        disk = SimulatedDisk.from_image(start, boot=1)
        self._moments_left = 1 + len(effects)
        self._visit_power_cut(disk, "none", level=1)
        for number, effect in enumerate(effects):
            where = f"{number}: {effect}"
            if kills and effect.kind == "write":
                for image in _torn_writes(disk, effect):
                    self._visit_kill(disk, image, where)
            if not each_effect and effect.kind in ("sync", "sync_folder", "acknowledge"):
                self._visit_power_cut(disk, where, level=1)
            disk.apply(effect)
            if each_effect or effect.kind == "acknowledge" or number == len(effects) - 1:
                self._visit_power_cut(disk, where, level=1)
            if kills:
                self._visit_kill(disk, disk.kill_image(), where)
            if len(self.report.bad) >= _BAD_MAX:
                return

    def _visit_power_cut(self, disk: SimulatedDisk, where: str, *, level: int) -> None:
        report = self.report
        bounds = self._bounds_now() if level == 1 else report.recovery_bounds
        moment = CrashStates(disk, bounds, seed=report.seed + report.moments)
        report.moments += 1
        report.omitted += moment.omitted
        report.sampled_moments += moment.omitted > 0
        acknowledged, seen = disk.acknowledged, self._seen
        for state in moment.states():
            report.states += 1
            boot = disk.boot if self._remounts and state[0] & 1 else disk.boot + 1
            key = (state[0], boot, acknowledged)
            if key not in seen:
                seen.add(key)
                report.recovered += level == 2
                self._visit(_Left(moment.image(state), boot, acknowledged), where, level)
                if len(report.bad) >= _BAD_MAX:
                    return

    def _bounds_now(self) -> Bounds:
        """The bounds of the next moment of the script."""
        bounds = self.report.bounds
        if self._aim is None:
            return bounds
        share = (self._aim - len(self._images)) // max(1, self._moments_left)
        self._moments_left -= 1
        return replace(bounds, states=min(bounds.states, max(_SHARE_MIN, 2 * share)))

    def _visit_kill(self, disk: SimulatedDisk, image: DiskImage, where: str) -> None:
        key = (image.digest, disk.boot, disk.acknowledged)
        self.report.states += 1
        if key not in self._seen:
            self._seen.add(key)
            self.report.killed += 1
            self._visit(_Left(image, disk.boot, disk.acknowledged), where, 1)

    def _visit(self, left: _Left, where: str, level: int) -> None:
        self._images.add(left.image.digest)
        self.report.checked += 1
        error = _outcome(self._check, left)
        if error:
            self.report.bad.append(BadState(where, left.acknowledged, left.boot, level, error, left.image))
        elif level == 1 and self._recoveries:
            self._keep(left)

    def _keep(self, left: _Left) -> None:
        """Draw a fair sample of all states, whose number is not known yet (Vitter's algorithm R)."""
        self._offered += 1
        if len(self._kept) < self._recoveries:
            self._kept.append(left)
        else:
            place = self._random.randrange(self._offered)
            if place < self._recoveries:
                self._kept[place] = left

    def _explore_recovery(self, left: _Left) -> None:
        self.report.recoveries += 1
        effects = _recorded(left.image, left.boot, lambda storage, _: self._recover(storage, left.acknowledged))
        disk = SimulatedDisk.from_image(left.image, boot=left.boot)
        disk.acknowledged = left.acknowledged
        for number, effect in enumerate(effects):
            disk.apply(effect)
            self._visit_power_cut(disk, f"{number} of a recovery: {effect}", level=2)
            if len(self.report.bad) >= _BAD_MAX:
                return


def _recorded(start: DiskImage, boot: int, script: Script) -> list[Effect]:
    """Run `script` on a disk that holds `start`; return the effects."""
    disk = SimulatedDisk.from_image(start, boot=boot)
    disk.record()
    storage = SimulatedStorage(disk)
    script(storage, disk.acknowledge)
    effects = list(disk.effects)  # What is written while the handles are being closed comes after the last crash.
    storage.close()
    return effects


def _outcome(check: Check, left: _Left) -> str:
    """Run the check on a fresh disk; return the failure as text, or `""`."""
    storage = SimulatedStorage(SimulatedDisk.from_image(left.image, boot=left.boot))
    try:
        check(storage, left.acknowledged)
    except Exception:  # noqa: BLE001 (whatever a check raises is its verdict)
        return traceback.format_exc()
    finally:
        storage.close()
    return ""


def _torn_writes(disk: SimulatedDisk, effect: Effect) -> Iterator[DiskImage]:
    """What a process killed inside this write leaves: everything before, and a part of the write."""
    before = disk.kill_image()
    inode = disk.inode(effect.number)
    names = [name for name, named in disk.names.items() if named is inode]
    if not names:
        return
    content = inode.read(0, inode.size)
    count = len(effect.data)
    boundary = SECTOR_SIZE - effect.offset % SECTOR_SIZE
    for cut in sorted({1, boundary, count // 2, count - 1} & set(range(1, count))):
        end = effect.offset + cut
        torn = FileImage.of(content[: effect.offset] + effect.data[:cut] + content[end:])
        yield DiskImage(before.files | dict.fromkeys(names, torn), before.folders)
