"""What a power cut may leave of a `SimulatedDisk`: enumerated, without building the states that nobody asks for.

- Each directory entry that is not durable takes any value it had since its folder was synced, each by itself.
- Each file that is not durable takes any combination of sector versions and lengths, each file by itself.
- All combinations of those are states. `Bounds` says where the enumeration stops being complete; `CrashStates.omitted`
  says how many combinations were left out because of it. What is drawn instead depends on the seed alone.

States are told apart by digests that are sums, so that a combination costs additions and no hashing.
Imports `basin.testing.disk`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from basin.storage.naming import folders_above
from basin.testing.disk import (
    FOLDER,
    SECTOR_SIZE,
    DiskImage,
    Entry,
    FileImage,
    Inode,
    SimulatedDisk,
    folder_digest,
    sector_digest,
    size_digest,
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where enumeration ends and a chosen part begins.

    Up to `sectors` unsynced sectors of a file are combined in full; longer runs come as none, all, each prefix, each
    suffix and each single hole (at most `positions` of each, evenly spaced). Of a sector's versions count the durable
    one and the newest `versions`; of a file's lengths `sizes`, evenly spaced; of the combinations within one file
    `file_states`. The newest `entries` unsynced directory entries are combined in full, older ones are all there or
    all not. Of the combinations of everything, `states` a moment.
    """

    sectors: int = 6
    positions: int = 16
    versions: int = 3
    sizes: int = 16
    file_states: int = 512
    entries: int = 6
    states: int = 4096


DEFAULT_BOUNDS: Final = Bounds()

_Option: TypeAlias = tuple[int, bytes]
"""A version of a sector: what it changes in the file's digest, and its bytes."""

_Choice: TypeAlias = list[tuple[int, FileImage]]
"""The states of one file: what each adds to the disk's digest."""


def file_variants(inode: Inode, bounds: Bounds = DEFAULT_BOUNDS) -> list[FileImage]:
    """Every content the file may have after a power cut, each once; the newest first, the durable one second."""
    if inode.variants is None:
        inode.variants = _file_variants(inode, bounds) if inode.dirty else [inode.image()]
    return inode.variants


def _file_variants(inode: Inode, bounds: Bounds) -> list[FileImage]:
    newest = inode.read(0, inode.size)
    digests = [
        sector_digest(at // SECTOR_SIZE, newest[at : at + SECTOR_SIZE]) for at in range(0, len(newest), SECTOR_SIZE)
    ]
    found: dict[int, FileImage] = {}
    durable: FileImage | None = None
    for size in _sizes(inode, bounds):
        full, rest = divmod(size, SECTOR_SIZE)
        base = sum(digests[:full]) + size_digest(size)
        if rest:
            base += sector_digest(full, newest[full * SECTOR_SIZE : size])
        sectors = _sector_options(inode, newest, size, bounds)
        for patches in _selections([options for _, options in sectors], bounds):
            digest = base + sum(option[0] for option in patches if option)
            if digest not in found:
                laid = zip(sectors, patches, strict=True)
                parts = tuple((sector * SECTOR_SIZE, option[1]) for (sector, _), option in laid if option)
                found[digest] = FileImage(size, digest, newest, parts)
        if size == inode.sizes[0]:
            durable = found.get(base + sum(_change_to_durable(inode, sector, options) for sector, options in sectors))
    variants = list(found.values())
    if durable is not None and durable is not variants[0]:
        variants.remove(durable)
        variants.insert(1, durable)
    return variants


def _change_to_durable(inode: Inode, sector: int, options: list[_Option]) -> int:
    """What going back to the durable version of a sector changes in the digest; 0 if that is the newest one."""
    change, data = options[0]
    return change if inode.pending[sector][0][: len(data)].ljust(len(data), b"\0") == data else 0


def _sizes(inode: Inode, bounds: Bounds) -> list[int]:
    """The lengths the file may have, the newest first: those it went through, and the ends of sectors in between."""
    durable, newest = inode.sizes[0], inode.size
    between = range(-(-(durable + 1) // SECTOR_SIZE) * SECTOR_SIZE, newest, SECTOR_SIZE)
    sizes = sorted({*inode.sizes, *(between if inode.pending else ())})
    return _spread(sizes, bounds.sizes)[::-1]


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of `items`, evenly spaced, the first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _sector_options(inode: Inode, newest: bytes, size: int, bounds: Bounds) -> list[tuple[int, list[_Option]]]:
    """What each sector below `size` may be other than in `newest`, if anything; the durable version first."""
    found = []
    for sector in sorted(inode.pending):
        begin = sector * SECTOR_SIZE
        length = min(SECTOR_SIZE, size - begin)
        if length <= 0:
            break
        current = newest[begin : begin + length]
        versions = inode.pending[sector]
        others = dict.fromkeys(
            version[:length].ljust(length, b"\0") for version in (versions[0], *versions[1:][-bounds.versions :])
        )
        others.pop(current, None)
        if others:
            digest = sector_digest(sector, current)
            found.append((sector, [(sector_digest(sector, other) - digest, other) for other in others]))
    return found


def _selections(sectors: list[list[_Option]], bounds: Bounds) -> Iterator[tuple[_Option | None, ...]]:
    """For each selection, one option for each sector, or `None` for the newest bytes. The newest of all comes first."""
    if len(sectors) > bounds.sectors:
        yield from _long_run([options[0] for options in sectors], bounds)
    elif math.prod(len(options) + 1 for options in sectors) <= bounds.file_states:
        yield from itertools.product(*((None, *options) for options in sectors))
    else:
        yield from itertools.product(*((None, options[0]) for options in sectors))
        for index, options in enumerate(sectors):
            for option in options[1:]:
                yield (*(None,) * index, option, *(None,) * (len(sectors) - index - 1))


def _long_run(old: list[_Option], bounds: Bounds) -> Iterator[tuple[_Option | None, ...]]:
    count = len(old)
    yield (None,) * count
    yield tuple(old)
    for at in _spread(range(count), bounds.positions):
        yield (*(None,) * at, *old[at:])  # a prefix was written
        yield (*old[:at], *(None,) * (count - at))  # a suffix was written
        yield (*(None,) * at, old[at], *(None,) * (count - at - 1))  # all but one


@dataclass(slots=True)
class Combination:
    """One selection of directory entries: what it settles, and for each file that is still open its choices."""

    digest: int
    settled: dict[str, FileImage]
    folders: frozenset[str]
    files: list[Sequence[str]] = field(default_factory=list)
    choices: list[_Choice] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many states this selection of entries has."""
        return math.prod(map(len, self.choices))


State: TypeAlias = tuple[int, Combination, tuple[tuple[int, FileImage], ...]]
"""A state not built yet: its digest, and the selections that lead to it."""


class CrashStates:
    """Every state that a power cut at this moment may leave. The disk must not change meanwhile."""

    def __init__(self, disk: SimulatedDisk, bounds: Bounds = DEFAULT_BOUNDS, seed: int = 0) -> None:
        self._disk = disk
        self._bounds = bounds
        self._random = random.Random(seed)
        self._clean: dict[str, FileImage] = {}
        self._dirty: dict[str, Inode] = {}
        self._split_settled()
        self._clean_digest = sum(file.entry_digest(name) for name, file in self._clean.items())
        self._folders = frozenset(name for name in disk.folders if name not in disk.pending_entries)
        self._clean_digest += sum(map(folder_digest, self._folders))
        self._choices: dict[tuple[int, tuple[str, ...]], _Choice] = {}
        self._combinations = [self._combination(entries) for entries in self._entry_selections()]
        self.total = sum(combination.count for combination in self._combinations)

    @property
    def omitted(self) -> int:
        """How many combinations `states()` leaves out because of `Bounds.states`."""
        return max(0, self.total - self._bounds.states)

    def states(self) -> Iterator[State]:
        """The states, some of them more than once; the newest of everything comes first."""
        return self._drawn() if self.omitted else self._all()

    def image(self, state: State) -> DiskImage:
        """Build a state."""
        digest, combination, picks = state
        files = self._clean | combination.settled
        for names, (_, file) in zip(combination.files, picks, strict=True):
            for name in names:
                files[name] = file
        return DiskImage(files, combination.folders, digest)

    def _split_settled(self) -> None:
        """Tell the names that have one state from those of files with several."""
        for name, inode in self._disk.names.items():
            if name not in self._disk.pending_entries:
                if inode.dirty:
                    self._dirty[name] = inode
                else:
                    self._clean[name] = inode.image()

    def _entry_selections(self) -> list[dict[str, Entry]]:
        """Every selection of values for the entries that are not durable, the newest first."""
        pending = list(self._disk.pending_entries.items())
        split = max(0, len(pending) - self._bounds.entries)
        older = [{name: history[-1] for name, history in pending[:split]}]
        if split:
            older.append({name: history[0] for name, history in pending[:split]})
        recent = pending[split:]
        values = [list(dict.fromkeys(reversed(history))) for _, history in recent]
        selections: dict[tuple[tuple[str, int], ...], dict[str, Entry]] = {}
        for begin in older:
            for picked in itertools.product(*values):
                chosen = begin | {name: value for (name, _), value in zip(recent, picked, strict=True)}
                visible = _visible(chosen)
                selections.setdefault(tuple((name, id(value)) for name, value in sorted_items(visible)), visible)
        return list(selections.values())

    def _combination(self, entries: dict[str, Entry]) -> Combination:
        folders = self._folders.union(name for name, value in entries.items() if value is FOLDER)
        digest = self._clean_digest + sum(folder_digest(name) for name in folders - self._folders)
        combination = Combination(digest, {}, folders)
        dirty: dict[Inode, list[str]] = {}
        for name, inode in self._dirty.items():
            dirty.setdefault(inode, []).append(name)
        for name, value in entries.items():
            if not isinstance(value, Inode):
                continue
            if value.dirty:
                dirty.setdefault(value, []).append(name)
            else:
                file = combination.settled[name] = value.image()
                combination.digest += file.entry_digest(name)
        for inode, names in dirty.items():
            combination.files.append(names)
            combination.choices.append(self._choice(inode, names))
        return combination

    def _choice(self, inode: Inode, names: list[str]) -> _Choice:
        key = (inode.number, tuple(names))
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = [
                (sum(file.entry_digest(name) for name in names), file) for file in file_variants(inode, self._bounds)
            ]
        return choice

    def _all(self) -> Iterator[State]:
        for combination in self._combinations:
            base = combination.digest
            for picks in itertools.product(*combination.choices):
                yield base + sum(pick[0] for pick in picks), combination, picks

    def _drawn(self) -> Iterator[State]:
        """As many as the bound allows: for each selection of entries the newest and the durable files; then, drawn, as
        many with one file unlike the others as with every file by itself.
        """
        budget = self._bounds.states
        combinations = self._combinations[: max(1, budget // 4)]
        for combination in combinations:
            yield _state(combination, [choice[0] for choice in combination.choices])
            yield _state(combination, [choice[min(1, len(choice) - 1)] for choice in combination.choices])
        weights = list(itertools.accumulate(combination.count for combination in self._combinations))
        draw = self._random
        for number in range(budget - 2 * len(combinations)):
            combination = draw.choices(self._combinations, cum_weights=weights)[0]
            if number % 2:
                picks = [draw.choice(choice) for choice in combination.choices]
            else:
                side = draw.randrange(2)
                picks = [choice[min(side, len(choice) - 1)] for choice in combination.choices]
                odd = draw.randrange(len(picks)) if picks else 0
                picks[odd : odd + 1] = [draw.choice(choice) for choice in combination.choices[odd : odd + 1]]
            yield _state(combination, picks)


def sorted_items(entries: dict[str, Entry]) -> list[tuple[str, Entry]]:
    """The entries by name."""
    return [(name, entries[name]) for name in sorted(entries)]


def _visible(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Without what is absent, or lies in a folder that is."""
    return {
        name: value
        for name, value in entries.items()
        if value is not None and all(entries.get(folder, FOLDER) is FOLDER for folder in folders_above(name))
    }


def _state(combination: Combination, picks: list[tuple[int, FileImage]]) -> State:
    return combination.digest + sum(pick[0] for pick in picks), combination, tuple(picks)


def crash_states(
    disk: SimulatedDisk, *, bounds: Bounds = DEFAULT_BOUNDS, seed: int = 0, limit: int | None = None
) -> Iterator[DiskImage]:
    """The distinct states that a power cut at this moment may leave of `disk`, at most `limit`."""
    states = CrashStates(disk, bounds, seed)
    seen: set[int] = set()
    for state in states.states():
        if state[0] not in seen:
            seen.add(state[0])
            yield states.image(state)
            if limit is not None and len(seen) >= limit:
                return
