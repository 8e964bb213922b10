"""The results for people: tables on the terminal, and the generated part of a document. Formats and prints only."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Final

from rich.console import Console

from benchmarks.backup.results import BackupResults
from benchmarks.backup.runner import BACKUPS, FIRST
from benchmarks.backup.sides import SUBJECT
from benchmarks.report import END_MARK, START_MARK, Grid

INTRODUCTION: Final = """\
# Benchmarks of backups

`python -m benchmarks.backup` saves the same files with Basin, restic and borg, whichever of them are installed: command
lines, side by side in one run, interleaved, and takes medians of several rounds. A figure is followed by its ratio to
Basin's, and by the extremes of that ratio: above 1, Basin is better. All of it is on one machine, so only ratios say
something about another one.
"""
_MIB: Final = 1 << 20
_READING: Final = """\
- Time is of the whole command, from its start to its end. Between two commands the disk is settled, so none pays for
  what another one left to be written; what a command leaves behind itself it does not pay for either.
- CPU is user and system time of the command and its descendants, as the kernel counts it; so is the peak of memory.
- Repositories, homes with the caches, and sources lie on the same disk. The sources are in the memory of the system
  before the first backup, and what was just written still is when it is restored: these are not times of a cold disk.
- Sizes are what the disk gives to the files of a repository, and for later backups by how much that grew; a negative
  one means that a command tidied up.
- A list of snapshots is the least that a command can do. It shows what starting and opening cost, which is a part of
  every other figure.
- A synced restore survives a power cut once it has ended. Basin does that by itself, unless it is told not to; for the
  others `sync -f` is added. In the other restores nobody syncs.
- Nothing is deleted before a round is over: for a minute after files were deleted, an ext4 without a journal takes
  several times as long to make others.
- What is restored was compared with the source every time: contents, modes, times, links, and nothing besides."""


def grids(results: BackupResults) -> list[Grid]:
    """Every table of the report; those without rows are left out."""
    shapes: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("seconds", "wall_s", _seconds_text),
        ("seconds of CPU", "cpu_s", _seconds_text),
        ("peak of memory, MiB", "peak", _mib_text),
        ("growth of the repository, MiB", "grown", _mib_text),
    )
    found = [
        _grid(results, material, title, metric, text)
        for material in results.materials
        for title, metric, text in shapes
    ]
    return [grid for grid in found if grid.rows]


def _grid(results: BackupResults, material: str, title: str, metric: str, text: Callable[[float], str]) -> Grid:
    steps = [step for step in results.steps(material) if metric != "grown" or step in BACKUPS]
    rows = [[step, *(_cell(results, material, step, side, metric, text) for side in results.sides)] for step in steps]
    return Grid(f"{material[:1].upper()}{material[1:]}: {title}", ("Command", *results.sides), rows)


def _cell(
    results: BackupResults, material: str, step: str, side: str, metric: str, text: Callable[[float], str]
) -> str:
    """The median and, of a peer, the ratio. Growth has ratios for the first backup only: others may tidy up instead."""
    figure = results.median(material, step, side, metric)
    if figure is None:
        return "-"
    ratios = results.ratios(material, step, side, metric) if metric != "grown" or step == FIRST else []
    return text(figure) if side == SUBJECT or not ratios else f"{text(figure)}: {_ratio_text(ratios)}"


def _ratio_text(ratios: list[float]) -> str:
    middle = f"{statistics.median(ratios):.2f}"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f}..{max(ratios):.2f})"


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def _mib_text(size: float) -> str:
    return f"{size / _MIB:.1f}" if abs(size) < 100 * _MIB else f"{size / _MIB:,.0f}"


def describe_run(results: BackupResults) -> str:
    """Machine, versions and seed in a few sentences."""
    machine = results.machine
    versions = ", ".join(f"{library} {version}" for library, version in results.versions.items())
    peers = ", ".join(side for side in results.sides if side != SUBJECT) or "none"
    return (
        f"{results.started}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_mib']} MiB of memory, "
        f"{machine['kernel']}, {machine['file_system']}, Python {machine['python']}. "
        f"Scale {results.scale}, {results.rounds} rounds, seed {results.seed}.\n"
        f"Peers: {peers}. Basin and its libraries: {versions}."
    )


def notes(results: BackupResults) -> str:
    """What was backed up, by whom, who is missing, and how to read the tables."""
    lines = [f"- **{title}.** {text}" for title, text in results.materials.items()]
    lines += [f"- **{label}.** {note}" for label, note in results.sides.items()]
    lines += [f"- **Absent.** {reason}." for reason in results.absent]
    lines += [_READING, f"- A peak below {results.floor / _MIB:.0f} MiB could not be seen."]
    return "\n".join(lines)


def print_report(results: BackupResults) -> None:
    """All tables to the terminal."""
    console = Console(width=None if Console().is_terminal else 200)
    console.print(describe_run(results), highlight=False)
    for grid in grids(results):
        console.print(grid.to_rich())
    console.print(notes(results), highlight=False, markup=False)


def to_markdown(results: BackupResults) -> str:
    """The generated part of the documentation, marks included."""
    parts = [
        START_MARK,
        describe_run(results),
        *(grid.to_markdown() for grid in grids(results)),
        f"### What was done\n\n{notes(results)}",
        END_MARK,
    ]
    return "\n\n".join(parts)
