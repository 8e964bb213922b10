"""`python -m benchmarks`: measure Basin and its peers in one run, print the tables, write JSON, SVG and Markdown."""

from __future__ import annotations

import argparse
import datetime as dt
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks import budgets, chart, machine, report
from benchmarks.entrant import Entrant, all_entrants
from benchmarks.jobs import Data, Job, all_jobs
from benchmarks.profiling import profile_jobs
from benchmarks.results import Results
from benchmarks.runner import run_jobs, run_memory
from benchmarks.workload import FULL, QUICK, Scale

DOCS = Path("docs")
REOPEN_TITLE = "reopen and memory"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small amounts, under a minute; figures are rough")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="only jobs whose title holds TEXT")
    parser.add_argument("--engine", action="append", default=[], metavar="NAME", help="only this engine (repeatable)")
    parser.add_argument("--rounds", type=int, help="how often everything runs")
    parser.add_argument("--seed", type=int, help="of the data and of the order; drawn and printed if absent")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: this folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all samples")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="where to draw the ratios")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="whose generated part to replace by the tables")
    parser.add_argument(
        "--docs", action="store_true", help="write all three to docs/benchmarks.*; the default of a full run"
    )
    parser.add_argument("--list", action="store_true", help="print the titles of the jobs, measure nothing")
    parser.add_argument("--profile", action="store_true", help="run Basin alone, once, and print where the time goes")
    return parser.parse_args(arguments)


def main() -> int:
    """Run what the command line asks for."""
    arguments = parse_arguments(sys.argv[1:])
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    scale = choose_scale(arguments)
    jobs = choose_jobs(all_jobs(Data(scale, seed=seed)), arguments.only)
    if arguments.list:
        print("\n".join([*(job.title for job in jobs), REOPEN_TITLE]))
        return 0
    try:
        mount = machine.require_disk(arguments.folder)
    except machine.NotADisk as error:
        print(error, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark-") as folder:
        if arguments.profile:
            profile_jobs(jobs, Path(folder))
            return 0
        print(f"seed {seed}, {scale.rounds} rounds of {len(jobs)} jobs on {mount.file_system}", flush=True)
        results = measure(arguments, scale, jobs, Path(folder), seed=seed, mount=mount)
    verdicts = budgets.judge(results)
    report.print_report(results, verdicts)
    write_files(arguments, results, verdicts)
    return 0


def choose_scale(arguments: argparse.Namespace) -> Scale:
    """The amounts, with the number of rounds asked for."""
    scale = QUICK if arguments.quick else FULL
    return replace(scale, rounds=arguments.rounds) if arguments.rounds else scale


def choose_jobs(jobs: list[Job], only: list[str]) -> list[Job]:
    """The jobs whose titles hold one of the texts; all without texts."""
    return [job for job in jobs if not only or any(text in job.title for text in only)]


def choose_entrants(engines: list[str]) -> list[Entrant]:
    """The entrants of the engines named; all without names."""
    return [entrant for entrant in all_entrants() if not engines or entrant.engine in engines]


def measure(
    arguments: argparse.Namespace, scale: Scale, jobs: list[Job], workspace: Path, *, seed: int, mount: machine.Mount
) -> Results:
    """Run jobs and reopenings; show on one line what is going on."""
    entrants = choose_entrants(arguments.engine)
    results = Results(
        scale=scale.label,
        seed=seed,
        rounds=scale.rounds,
        started=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.describe(mount),
        versions=machine.versions(),
    )
    with Console(stderr=True).status("starting") as status:
        results.samples = run_jobs(jobs, entrants, workspace, rounds=scale.rounds, seed=seed, on_run=status.update)
        if not arguments.only or any(text in REOPEN_TITLE for text in arguments.only):
            results.memory = run_memory(
                entrants, workspace, grain_counts=scale.grain_counts, seed=seed, on_run=status.update
            )
    return results


def write_files(arguments: argparse.Namespace, results: Results, verdicts: list[budgets.Verdict]) -> None:
    """Write what was asked for; a full run of everything writes the documentation's files unless told otherwise."""
    complete = not (arguments.quick or arguments.only or arguments.engine)
    named = bool(arguments.json or arguments.svg or arguments.markdown)
    docs = arguments.docs or (complete and not named)
    json_path = arguments.json or (DOCS / "benchmarks.json" if docs else None)
    svg_path = arguments.svg or (DOCS / "benchmarks.svg" if docs else None)
    markdown_path = arguments.markdown or (DOCS / "benchmarks.md" if docs else None)
    if json_path:
        report.write(json_path, results.to_text())
    if svg_path:
        report.write(svg_path, chart.draw(results))
    if markdown_path:
        report.write_generated(markdown_path, report.to_markdown(results, verdicts))


if __name__ == "__main__":
    sys.exit(main())
