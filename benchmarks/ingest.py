"""`python -m benchmarks.ingest`: one worker process against one a core, on compressible files and on a local disk.

The promise: on two cores at least 1.7 times one process. Both sides do the same work (read, hash, compress, seal,
write, sync) in processes that have started before, each with one thread; the coordinator commits once. Rounds are
interleaved. Prints a table; `--docs` writes it to `docs/benchmarks-ingest.md`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

import basin
from benchmarks import machine

FLOOR: Final = 1.7
FILE_SIZE: Final = 1 << 20
LEVELS: Final = (1, 9)
DOCUMENT: Final = Path("docs/benchmarks-ingest.md")


def make_files(folder: Path, count: int, *, seed: int) -> list[Path]:
    """Files of words: zstd at level 1 makes a third of them."""
    rng = random.Random(seed)
    words = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    paths = [folder / f"{number:04}" for number in range(count)]
    for path in paths:
        path.write_bytes(b" ".join(rng.choices(words, k=FILE_SIZE // 5))[:FILE_SIZE])
    os.sync()
    return paths


def load_basin(_: int) -> int:
    """In a worker: import what it will need, so that the clock does not measure it."""
    import basin.api

    return len(basin.api.__name__)


def seconds(paths: list[Path], workers: int, level: int, folder: Path) -> float:
    """How long an ingest takes with this many processes, its commit included."""
    place = Path(tempfile.mkdtemp(dir=folder))
    key_file = place / "key"
    basin.Secret.generate().to_file(key_file)
    spawn = multiprocessing.get_context("spawn")
    with (
        basin.open(place / "basin", secret=basin.Secret.from_file(key_file), compression_level=level) as db,
        ProcessPoolExecutor(workers, mp_context=spawn) as executor,
    ):
        list(executor.map(load_basin, range(4 * workers)))
        start = time.perf_counter()
        keys = db.ingest(paths, executor=executor)
        taken = time.perf_counter() - start
        if db.blobs.get_many(keys[:2]) != [path.read_bytes() for path in paths[:2]] or len(keys) != len(paths):
            raise SystemExit("an ingest stored less than it was given")
    return taken


def measure(paths: list[Path], rounds: int, folder: Path) -> dict[int, list[tuple[float, float]]]:
    """For each level of compression: seconds with one process, and with one a core, round by round."""
    cores = os.cpu_count() or 1
    return {
        level: [(seconds(paths, 1, level, folder), seconds(paths, cores, level, folder)) for _ in range(rounds)]
        for level in LEVELS
    }


def table(results: dict[int, list[tuple[float, float]]], size: int) -> list[str]:
    """Markdown."""
    lines = [
        "| compression level | 1 process | a process a core | ratio | floor | met |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for level, pairs in results.items():
        ratios = sorted(one / many for one, many in pairs)
        ratio = statistics.median(ratios)
        one, many = (size / statistics.median(column) / 1e6 for column in zip(*pairs, strict=True))
        shown = f"{ratio:.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})"
        met = "yes" if ratio >= FLOOR else "no"
        lines.append(f"| {level} | {one:.0f} MB/s | {many:.0f} MB/s | {shown} | {FLOOR} | {met} |")
    return lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingest", description=__doc__)
    parser.add_argument("--files", type=int, default=256, help="of 1 MiB each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCUMENT}")
    wanted = parser.parse_args(arguments)
    mount = machine.require_disk(wanted.folder)
    with tempfile.TemporaryDirectory(dir=wanted.folder, prefix="ingest-") as folder:
        paths = make_files(Path(folder), wanted.files, seed=5)
        results = measure(paths, wanted.rounds, Path(folder))
    lines = table(results, wanted.files * FILE_SIZE)
    print("\n".join(lines))
    if wanted.docs:
        where = machine.describe(mount)
        day = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
        text = ["# Ingest on several processes", "", *__doc__.partition("\n\n")[2].strip().splitlines(), ""]
        text += [f"{day}, {wanted.files} files of 1 MiB, {wanted.rounds} rounds: {json.dumps(where)}", "", *lines, ""]
        DOCUMENT.write_text("\n".join(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
