"""`python -m benchmarks.compaction`: what a compaction costs, what it does to others, and what it leaves behind.

Four parts. *Speed*: the same names and values, half of them written twice, then a full compaction by each engine; both
have to read everything and write what is left. Basin's is sealed, hashed and durable, RocksDB's is neither sealed nor
hashed. *Others*: durable commits of one small name, alone, and while another process compacts. *Memory*: the peak of a
process that does nothing but a prune, as the basin grows tenfold and a hundredfold. *Churn*: puts, overwrites, deletes,
pins and crashed writers, with a compaction after each round; then bytes stored against bytes needed, and random reads
against those of a fresh basin with the same contents. Prints a table; `--docs` writes `docs/benchmarks-compaction.md`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import basin
from basin.api import Database
from benchmarks import machine

DOCUMENT: Final = Path("docs/benchmarks-compaction.md")
SPACE_MAX: Final = 1.25
MEMORY_GROWTH_MAX: Final = 32
VALUE_SIZE: Final = 1024
BATCH: Final = 1000
ROUNDS_OF_CHURN: Final = 24
_ALONE_S: Final = 3.0
PARTS: Final = ("speed", "others", "churn", "memory")

Rows = list[tuple[str, str, str, str]]
"""Part, what was measured, the figure, what was promised."""


def pairs_of(count: int, seed: int) -> Iterator[tuple[bytes, bytes]]:
    rng = random.Random(seed)
    for number in range(count):
        yield b"name-%09d" % number, rng.randbytes(VALUE_SIZE)


def fill_twice(put: Callable[[list[tuple[bytes, bytes]]], object], count: int) -> None:
    """All names, then every second one again with another value."""
    batch: list[tuple[bytes, bytes]] = []
    for seed, step in ((1, 1), (2, 2)):
        for number, pair in enumerate(pairs_of(count, seed)):
            if number % step == 0:
                batch.append(pair)
            if len(batch) == BATCH:
                put(batch)
                batch = []
    if batch:
        put(batch)


def put_durably(db: Database, pairs: list[tuple[bytes, bytes]]) -> None:
    db.put_many(pairs)
    db.commit()


def basin_seconds(folder: Path, count: int) -> float:
    """How long a prune without grace takes."""
    with basin.open(folder / "basin", secret=basin.Secret.generate(), history_s=0.0) as db:
        fill_twice(lambda pairs: put_durably(db, pairs), count)
        start = time.perf_counter()
        report = db.compact(grace_s=0)
        taken = time.perf_counter() - start
        if report.problems or sum(1 for _ in db) != count:
            raise SystemExit(f"a compaction lost something: {report.problems}")
    return taken


def rocksdb_seconds(folder: Path, count: int) -> float:
    """How long `compact_range` over everything takes, to the same end."""
    from rocksdict import AccessType, Options, Rdict

    options = Options(raw_mode=True)
    options.set_disable_auto_compactions(True)
    options.set_write_buffer_size(16 << 20)
    db = Rdict(str(folder / "rocksdb"), options, access_type=AccessType.read_write())

    def put(pairs: list[tuple[bytes, bytes]]) -> None:
        for name, value in pairs:
            db[name] = value

    fill_twice(put, count)
    db.flush()
    start = time.perf_counter()
    db.compact_range(None, None)
    taken = time.perf_counter() - start
    db.close()
    return taken


def speed(folder: Path, count: int, rounds: int) -> Rows:
    """Bytes of values that are left, for each second of the compaction."""
    ours, theirs = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            ours.append(basin_seconds(Path(place), count))
            theirs.append(rocksdb_seconds(Path(place), count))
    size = count * VALUE_SIZE / 1e6
    ratio = statistics.median(their / our for our, their in zip(ours, theirs, strict=True))
    figures = f"{size / statistics.median(ours):.0f} MB/s, RocksDB {size / statistics.median(theirs):.0f} MB/s"
    return [("speed", f"{count:,} values of 1 KiB, half of them twice", f"{figures}: {ratio:.2f} of that", "")]


def commit_times(db: Database, seconds: float) -> list[float]:
    taken: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        with db.batch() as batch:
            batch[b"small"] = b"%d" % len(taken)
        taken.append(1000 * (time.perf_counter() - start))
    return sorted(taken)


_COMPACT: Final = (
    "import basin, sys\nwith basin.open(sys.argv[1], 'w', history_s=0.0) as db:\n    db.compact(grace_s=0)"
)


def others(folder: Path, count: int) -> Rows:
    """Milliseconds of durable commits in this process, without and with a compaction in another."""
    place = folder / "others"
    with basin.open(place, profile="open", history_s=0.0) as db:
        fill_twice(lambda pairs: put_durably(db, pairs), count)
    with basin.open(place, "w") as db:
        alone = commit_times(db, _ALONE_S)
        process = subprocess.Popen([sys.executable, "-c", _COMPACT, str(place)])
        beside: list[float] = []
        while process.poll() is None:
            beside += commit_times(db, 0.1)
        if process.returncode:
            raise SystemExit("the compaction beside failed")
    rows: Rows = []
    for label, times in (("alone", alone), ("beside a compaction", sorted(beside))):
        half, most = times[len(times) // 2], times[len(times) * 99 // 100]
        rows.append(("others", f"durable commits, {label}", f"median {half:.2f} ms, 99 % below {most:.2f} ms", ""))
    return rows


_FILL: Final = """
import basin, os, sys
path, count = sys.argv[1], int(sys.argv[2])
secret = basin.Secret.generate()
secret.to_file(path + ".secret")
with basin.open(path, secret=secret, history_s=0.0) as db:
    for at in range(0, count, 10_000):
        with db.batch() as batch:
            keys = batch.blobs.put_many([os.urandom(100) for _ in range(10_000)])
        with db.batch() as batch:
            for key in keys[::3]:
                batch.blobs.delete(key)
"""
_PRUNE: Final = """
import basin, sys
secret = basin.Secret.from_file(sys.argv[1] + ".secret")
with basin.open(sys.argv[1], "w", secret=secret, history_s=0.0) as db:
    report = db.compact(grace_s=0)
    assert not report.problems, report.problems
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def memory(folder: Path, counts: list[int]) -> Rows:
    """Peak resident MiB of a process that prunes an encrypted basin, a third of all grains being dead."""
    rows: Rows = []
    lowest = 0
    for count in counts:
        place = str(folder / f"memory-{count}")
        subprocess.run([sys.executable, "-c", _FILL, place, str(count)], check=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _PRUNE, place], check=True, capture_output=True, text=True)
        taken = time.perf_counter() - start
        peak = int(done.stdout) // 1024
        lowest = lowest or peak
        promise = f"{lowest + MEMORY_GROWTH_MAX} MiB" if count > counts[0] else ""
        rows.append(("memory", f"prune of {count:,} grains of 100 bytes", f"{peak} MiB, {taken:.0f} s", promise))
    return rows


def crash(db: Database) -> None:
    """What a killed process leaves: nothing is finished, no session ended."""
    db.core.release("crashed")


def churn(folder: Path, count: int) -> Rows:
    """A day of a busy basin: what it takes afterwards, and how fast it is read."""
    rng = random.Random(3)
    place = folder / "churn"
    model: dict[bytes, bytes] = {}
    for number in range(ROUNDS_OF_CHURN):
        db = basin.open(place, profile="open", history_s=0.0)
        for _ in range(4):
            with db.batch() as batch:
                for _ in range(count // 20):
                    name = b"name-%06d" % rng.randrange(count)
                    if name in model and rng.random() < 0.3:
                        del batch[name], model[name]
                    else:
                        batch[name] = model[name] = rng.randbytes(rng.choice([40, 1000, 4000, 20_000]))
        if number % 3 == 0:
            db.pin("an hour ago")
        if number % 4 == 1:
            crash(db)
            db = basin.open(place, profile="open", history_s=0.0)
        if number == ROUNDS_OF_CHURN - 1:
            db.unpin("an hour ago")
        report = db.compact(grace_s=0)
        if report.problems:
            raise SystemExit(f"a compaction had problems: {report.problems}")
        db.close()
    with basin.open(folder / "fresh", profile="open", checkpoint_every=1) as fresh:
        fresh.put_many(model.items())
    with basin.open(place, "r") as db, basin.open(folder / "fresh", "r") as fresh:
        if dict(db.items()) != model:
            raise SystemExit("churn lost something")
        stored, needed = _bytes_of(db), _bytes_of(fresh)
        names = rng.choices(list(model), k=20_000)
        worn, new = [], []
        for _ in range(5):
            worn.append(_read_seconds(db, names))
            new.append(_read_seconds(fresh, names))
        ratio = statistics.median(b / a for a, b in zip(worn, new, strict=True))
    return [
        ("churn", f"stored over needed, {len(model):,} names", f"{stored / needed:.3f}", f"{SPACE_MAX}"),
        ("churn", "random reads, against a fresh basin", f"{ratio:.2f} of its speed", ""),
    ]


def _bytes_of(db: Database) -> int:
    strata = db.stats()["strata"]
    return int(strata["data"]["bytes"] + strata["meta"]["bytes"])


def _read_seconds(db: Database, names: list[bytes]) -> float:
    start = time.perf_counter()
    for name in names:
        db[name]
    return time.perf_counter() - start


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compaction", description=__doc__)
    parser.add_argument("--names", type=int, default=200_000, help="names of the speed part")
    parser.add_argument("--churn", type=int, default=5_000, help="names of the churn part")
    parser.add_argument("--grains", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--docs", action="store_true", help=f"write {DOCUMENT}: all parts")
    wanted = parser.parse_args(arguments)
    if wanted.docs and set(wanted.parts) != set(PARTS):
        parser.error("the document has all parts")
    mount = machine.require_disk(wanted.folder)
    rows: Rows = []
    with tempfile.TemporaryDirectory(dir=wanted.folder, prefix="compaction-") as name:
        folder = Path(name)
        if "speed" in wanted.parts:
            rows += speed(folder, wanted.names, wanted.rounds)
        if "others" in wanted.parts:
            rows += others(folder, wanted.names)
        if "churn" in wanted.parts:
            rows += churn(folder, wanted.churn)
        if "memory" in wanted.parts:
            rows += memory(folder, wanted.grains)
    lines = [
        "| part | what | figure | promised |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    print("\n".join(lines))
    if wanted.docs:
        day = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
        text = ["# What a compaction costs", "", *__doc__.partition("\n\n")[2].strip().splitlines(), ""]
        text += [f"{day}, {wanted.rounds} rounds: {json.dumps(machine.describe(mount))}", "", *lines, ""]
        DOCUMENT.write_text("\n".join(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
