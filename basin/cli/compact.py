"""`basin-compact`, and the same as `basin compact`: keep a basin small and fast. Uses the public names of `basin` only.

Invariants:

- SIGTERM and SIGINT end it at a safe point, with what was done so far kept and told.
- A dry run opens the basin to read.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from basin.cli.common import Command, Target, pass_target
from basin.cli.failures import EXIT_DAMAGE, Failure, translated, warn
from basin.cli.output import flush, print_json, print_line, print_table, wants_json
from basin.cli.progress import Progress

if TYPE_CHECKING:
    from basin import CompactionReport, CompactionStep
    from basin.api import Database

JOB: Final = "basin-compact"
"""Of its sessions, if none is given: one that died in a bucket is taken over by the next."""
_MIB: Final = 1 << 20
_WATCH_MAX_S: Final = 31_622_400
"""A leap year: what waits for longer than the system can count would fail."""
_HISTORY_MAX_S: Final = 3_153_600_000
"""A hundred years, as the option of a basin."""
_RATE_MIN: Final = 0.01
"""MiB a second. Below it a basin of 100 GB takes months, and pauses grow too long to be waited for."""


class _Number(click.FloatRange):
    """A range of floats that has neither infinity nor what is no number at all, which every comparison lets pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Click's contract."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


_OPTIONS: Final = (
    click.option("--prune", is_flag=True, help="Also let go of what no name needs."),
    click.option(
        "--grace",
        type=_Number(min=0),
        metavar="SECONDS",
        help="How long that stays. [3600; a day in a bucket]",
    ),
    click.option(
        "--history",
        type=_Number(min=0, max=_HISTORY_MAX_S),
        metavar="SECONDS",
        help="Let go of old versions that are older. [3600]",
    ),
    click.option("--dry-run", is_flag=True, help="Only say what would be done first, and why."),
    click.option("--once", is_flag=True, help="Run once. [the default]"),
    click.option(
        "--watch",
        type=_Number(min=0.1, max=_WATCH_MAX_S),
        metavar="SECONDS",
        help="Run again and again, so far apart.",
    ),
    click.option("--rate", type=_Number(min=_RATE_MIN), metavar="MIB", help="Read and write MIB a second at most."),
    click.option(
        "--job",
        default=JOB,
        metavar="NAME",
        help=f"In a bucket, take over at once from one of this name that died. [{JOB}]",
    ),
    click.option("--rewrite-cold", is_flag=True, help="Also write cold strata anew, which costs money."),
)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command(cls=Command)
@_with_options
@pass_target
def compact(target: Target, /, **wanted: Any) -> None:
    """Merge and rewrite what lies scattered, while others write and read; with --prune, delete what nothing needs."""
    _compact(target, **wanted)


class _Alone(Command):
    """A command that is a program of its own."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it (click's contract); exceptions become one line and an exit code."""
        with translated():
            return super().invoke(ctx)


@click.command(
    cls=_Alone, name="basin-compact", help=compact.help, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("-b", "--basin", "url", envvar="BASIN_URL", metavar="URL", help="A folder or URL. [$BASIN_URL]")
@_with_options
def main(url: str | None, **wanted: Any) -> None:
    """The program."""
    _compact(Target(url), **wanted)


def _compact(
    target: Target,
    *,
    prune: bool,
    grace: float | None,
    history: float | None,
    dry_run: bool,
    once: bool,
    watch: float | None,
    rate: float | None,
    job: str,
    rewrite_cold: bool,
) -> None:
    if watch is not None and (once or dry_run):
        raise click.UsageError(f"--{'once' if once else 'dry-run'} and --watch exclude each other")
    options: dict[str, Any] = {} if history is None else {"history_s": history}
    if dry_run:
        with target.open("r", **options) as db:
            _show_plan(db.plan_compaction(prune=prune, grace_s=grace))
        return
    problems = False
    with _stopped_by_signals() as stop:
        while True:
            with target.open("w", job=job, **options) as db, Progress("compacting") as progress:
                report = _run(
                    db, progress, stop, prune=prune, grace_s=grace, rate=(rate or 0) * _MIB, rewrite_cold=rewrite_cold
                )
            _show(report)
            problems |= bool(report.problems)
            if watch is None or stop.wait(watch):
                break
    if problems:
        raise Failure("some of it is damaged: run `basin check`", EXIT_DAMAGE)


def _run(db: Database, progress: Progress, stop: threading.Event, **wanted: Any) -> CompactionReport:
    return db.compact(stop=stop, progress=lambda done: progress.show(done.bytes_done, None), **wanted)


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, for the time of the block."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_plan(steps: Sequence[CompactionStep]) -> None:
    rows = [
        dataclasses.asdict(step) | {"strata": [str(identity) for identity in step.strata], "requests": step.requests}
        for step in steps
    ]
    if wants_json():
        for row in rows:
            print_json(row)
        return
    print_table(
        ("step", "strata", "reads", "writes", "frees", "requests", "why"),
        (
            (
                step.kind,
                str(len(step.strata)),
                f"{step.bytes_read:,}",
                f"{step.bytes_written:,}",
                f"{step.bytes_freed:,}",
                str(step.requests),
                step.reason,
            )
            for step in steps
        ),
    )


def _show(report: CompactionReport) -> None:
    for problem in report.problems:
        warn(problem)
    if wants_json():
        print_json(
            {
                "steps": [{"kind": step.kind, "strata": len(step.strata)} for step in report.steps],
                "bytes_processed": report.bytes_processed,
                "bytes_freed": report.bytes_freed,
                "bytes_condemned": report.bytes_condemned,
                "files_deleted": report.files_deleted,
                "stopped": report.stopped,
                "problems": report.problems,
                "seconds": round(report.seconds, 3),
            }
        )
    else:
        ended = "stopped early: " if report.stopped else ""
        print_line(
            f"{ended}{len(report.steps)} steps, {report.bytes_freed:,} bytes freed, {report.bytes_condemned:,} "
            f"condemned, {report.files_deleted} files deleted, {report.seconds:.1f} s"
        )
    flush()
