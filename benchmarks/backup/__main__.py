"""`python -m benchmarks.backup`: measure backups by Basin, restic and borg, print tables, write JSON and Markdown."""

from __future__ import annotations

import argparse
import datetime as dt
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks import machine
from benchmarks.backup import report
from benchmarks.backup.material import MIB, ROOTS, FileMaterial, Material, SourceMissing, TreeMaterial
from benchmarks.backup.results import BackupResults
from benchmarks.backup.runner import RestoredDiffers, run_rounds
from benchmarks.backup.sides import Side, find_sides
from benchmarks.backup.usage import CommandFailed, floor
from benchmarks.report import write, write_generated

DOCS: Final = Path("docs")
KINDS: Final = ("basin", "restic", "borg")
MATERIALS: Final = ("tree", "file")
_LIBRARIES: Final = ("basin-store", "blake3", "cryptography", "zstandard")


@dataclass(frozen=True, slots=True)
class BackupScale:
    """How much is backed up; sizes in bytes."""

    label: str
    files: int
    tree_size: int
    file_size: int
    rounds: int
    rest_s: float


FULL: Final = BackupScale("full", files=50_000, tree_size=1_000_000_000, file_size=2048 * MIB, rounds=3, rest_s=65)
SMALL: Final = BackupScale("small", files=200, tree_size=8 * MIB, file_size=8 * MIB, rounds=1, rest_s=0)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backup", description=__doc__)
    parser.add_argument("--small", action="store_true", help="200 files and 8 MiB, one round; figures say nothing")
    parser.add_argument("--rounds", type=int, help="how often everything is timed")
    parser.add_argument("--seed", type=int, help="of the order; drawn and printed if absent")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure; some 30 GB are needed")
    parser.add_argument(
        "--root", type=Path, action="append", help=f"take the tree from here [{' '.join(map(str, ROOTS))}]"
    )
    parser.add_argument("--material", choices=MATERIALS, action="append", help="only this one")
    parser.add_argument("--side", choices=KINDS, action="append", help="only this one")
    parser.add_argument(
        "--restic", action="append", metavar="PROGRAM", help="repeatable, for several versions [restic]"
    )
    parser.add_argument("--borg", action="append", metavar="PROGRAM", help="repeatable, for several versions [borg]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all samples")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="whose generated part to replace")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks-backup.{json,md}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    wanted = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    scale = SMALL if wanted.small else FULL
    sides, absent = find_sides(wanted.side or KINDS, restic=wanted.restic or ["restic"], borg=wanted.borg or ["borg"])
    if not sides:
        print("\n".join(["nobody can run here", *absent]), file=sys.stderr)
        return 1
    try:
        mount = machine.require_disk(wanted.folder)
        with tempfile.TemporaryDirectory(dir=wanted.folder, prefix="backup-") as name:
            folder = Path(name).resolve()
            materials = make_materials(wanted.material or MATERIALS, folder, scale, roots=wanted.root or ROOTS)
            results = new_results(scale, wanted, mount, sides, absent)
            results.floor = floor(folder)
            run(results, materials, sides, folder, rest_s=scale.rest_s)
    except (machine.NotADisk, SourceMissing, CommandFailed, RestoredDiffers) as error:
        print(error, file=sys.stderr)
        return 1
    report.print_report(results)
    write_files(wanted, results)
    return 0


def make_materials(titles: Sequence[str], folder: Path, scale: BackupScale, *, roots: Sequence[Path]) -> list[Material]:
    """What is backed up, below `folder`. Raises `SourceMissing`."""
    own = folder / "material"
    found: list[Material] = []
    if "tree" in titles:
        found.append(TreeMaterial(own, roots, files_max=scale.files, size_max=scale.tree_size))
    if "file" in titles:
        found.append(FileMaterial(own, size=scale.file_size))
    for material in found:
        print(f"{material.title}: {material.description}", flush=True)
    return found


def new_results(
    scale: BackupScale, wanted: argparse.Namespace, mount: machine.Mount, sides: Sequence[Side], absent: list[str]
) -> BackupResults:
    """Without samples."""
    return BackupResults(
        scale=scale.label,
        rounds=wanted.rounds or scale.rounds,
        seed=random.SystemRandom().getrandbits(32) if wanted.seed is None else wanted.seed,
        started=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.describe(mount),
        versions={library: machine.version(library) for library in _LIBRARIES},
        floor=0,
        sides={side.label: side.note for side in sides},
        absent=absent,
    )


def run(
    results: BackupResults, materials: Sequence[Material], sides: Sequence[Side], folder: Path, *, rest_s: float
) -> None:
    """Fill in the samples; show on one line what is going on."""
    results.materials = {material.title: material.description for material in materials}
    print(f"seed {results.seed}, {results.rounds} rounds of {', '.join(results.sides)}", flush=True)
    console = Console(stderr=True)
    with console.status("starting") as status:
        on_run = status.update if console.is_terminal else console.print
        results.samples = run_rounds(
            materials,
            sides,
            folder / "sides",
            rounds=results.rounds,
            seed=results.seed,
            on_run=on_run,
            rest_s=rest_s,
        )


def write_files(wanted: argparse.Namespace, results: BackupResults) -> None:
    """Write what was asked for."""
    json_path = wanted.json or (DOCS / "benchmarks-backup.json" if wanted.docs else None)
    markdown_path = wanted.markdown or (DOCS / "benchmarks-backup.md" if wanted.docs else None)
    if json_path:
        write(json_path, results.to_text())
    if markdown_path:
        write_generated(markdown_path, report.to_markdown(results), report.INTRODUCTION)


if __name__ == "__main__":
    sys.exit(main())
