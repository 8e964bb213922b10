"""The results for people: tables on the terminal, and the generated part of `docs/benchmarks-bucket.md`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console

from benchmarks.bucket.results import PEER_VARIANT, BucketResults, TrafficSample, variant_of
from benchmarks.budgets import Verdict
from benchmarks.entrant import SUBJECT
from benchmarks.report import END_MARK, START_MARK, Grid, budget_grid, describe_run
from benchmarks.workload import KIB, MIB

INTRODUCTION: Final = """\
# Benchmarks in a bucket

`python -m benchmarks.bucket` runs Basin (encrypted, default options) and its peers against one S3 server on the
loopback, in one run, interleaved, and takes medians of several rounds. Ratios inside one run are what counts: a server
on the loopback answers in a millisecond, a real one in 10 to 100, and there the number of requests decides.
Requests and bytes are counted in a run of their own by a proxy that all sides pass.
"""


def grids(results: BucketResults, verdicts: Sequence[Verdict]) -> list[Grid]:
    """Every table of the report; those without rows are left out."""
    found = [budget_grid(verdicts), ratio_grid(results), time_grid(results), traffic_grid(results)]
    return [grid for grid in found if grid.rows]


def ratio_grid(results: BucketResults) -> Grid:
    """How many times as fast as each peer Basin is: medians, with the extremes where there are several rounds."""
    peers = [engine for engine in results.engines() if engine != SUBJECT]
    rows = [
        [job, *(_ratio_text(results.ratios(job, peer, PEER_VARIANT)) for peer in peers)]
        for job in results.jobs()
        if any(results.ratios(job, peer, PEER_VARIANT) for peer in peers)
    ]
    return Grid("Basin's speed over the peer's (above 1: Basin is faster)", ("Job", *peers), rows)


def time_grid(results: BucketResults) -> Grid:
    """Milliseconds an operation, medians."""
    engines = results.engines()
    rows = [
        [job, *(_milliseconds_text(results.median_seconds(job, one, variant_of(one))) for one in engines)]
        for job in results.jobs()
    ]
    return Grid("Milliseconds an operation", ("Job", *engines), rows)


def traffic_grid(results: BucketResults) -> Grid:
    """Requests and bytes of every job."""
    rows = [
        [f"{sample.job}: {sample.engine}", f"{sample.operations:,}", *_traffic_texts(sample)]
        for sample in results.traffic
    ]
    header = ("Job: side", "operations", "requests", "a 1,000 operations", "sent", "received")
    return Grid("Requests and bytes of one run", header, rows)


def _traffic_texts(sample: TrafficSample) -> list[str]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sample.requests.items())
    each = f"{1_000 * sample.requests_of_operation:,.4g}"
    return [kinds or "none", each, _size_text(sample.bytes_out), _size_text(sample.bytes_in)]


def describe_server(results: BucketResults) -> str:
    return f"{describe_run(results)}\nServer: {results.server}."


def print_report(results: BucketResults, verdicts: Sequence[Verdict]) -> None:
    """All tables to the terminal."""
    console = Console(width=None if Console().is_terminal else 200)
    console.print(describe_server(results), highlight=False)
    for grid in grids(results, verdicts):
        console.print(grid.to_rich())


def to_markdown(results: BucketResults, verdicts: Sequence[Verdict]) -> str:
    """The generated part of the documentation, marks included."""
    notes = "\n".join(f"- **{job}.** {note}" for job, note in results.notes.items() if note)
    parts = [
        START_MARK,
        describe_server(results),
        *(grid.to_markdown() for grid in grids(results, verdicts)),
        f"### What each side does\n\n{notes}",
        END_MARK,
    ]
    return "\n\n".join(parts)


def _ratio_text(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    ordered = sorted(ratios)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return f"{middle:.3g}" if len(ordered) == 1 else f"{middle:.3g} ({ordered[0]:.3g}..{ordered[-1]:.3g})"


def _milliseconds_text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _size_text(size: int) -> str:
    if size >= MIB:
        return f"{size / MIB:,.1f} MiB"
    return f"{size / KIB:,.1f} KiB" if size >= KIB else f"{size} B"
