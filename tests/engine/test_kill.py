"""SIGKILL at random moments of several writing processes: what was acknowledged is there, whole, and nothing else."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from blake3 import blake3

import basin
from basin.api import DatabaseView
from basin.errors import ContentNotFound
from tests.engine.kill_worker import NAMES, content, value, work
from tests.source_tree import ROOT

WORKERS = 3
KILLS = 50
"""For each profile."""
LIFE_S = 0.25
"""Workers live for a random time up to this."""


class Journal:
    """What one worker wrote outside of the basin: what it began, and what was acknowledged to it."""

    def __init__(self, path: Path, worker: int) -> None:
        self.path = path
        self.worker = worker
        self._roots: dict[int, bytes] = {}

    def read(self) -> tuple[int, list[int]]:
        """The last step that was acknowledged, and all that were begun."""
        done, begun = 0, []
        if self.path.exists():
            for line in self.path.read_text(encoding="ascii").splitlines(keepends=True):
                word, _, number = line.partition(" ")
                if word == "begin" and line.endswith("\n"):
                    begun.append(int(number))
                elif word == "done" and line.endswith("\n"):
                    done = int(number)
        return done, begun

    def root(self, step: int) -> bytes:
        """The content key of what a step puts."""
        if step not in self._roots:
            self._roots[step] = blake3(content(self.worker, step)).digest()
        return self._roots[step]

    def acknowledged(self) -> set[int]:
        """Every step that was acknowledged."""
        text = self.path.read_text(encoding="ascii") if self.path.exists() else ""
        return {
            int(line.split()[1]) for line in text.splitlines(keepends=True) if line[:5] == "done " and line[-1] == "\n"
        }


class Nursery:
    """Starts, kills and reaps workers, through a process that forks them."""

    def __init__(self, folder: Path, secret_file: Path | None, journals: list[Journal], rng: random.Random) -> None:
        script = [sys.executable, "-m", "tests.engine.kill_worker", str(folder), str(secret_file or "")]
        self._process = subprocess.Popen(script, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._journals = journals
        self._rng = rng
        self.alive: dict[int, int] = {}

    def _ask(self, *words: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, worker: int) -> None:
        """Let a worker go on where it was killed."""
        self.alive[worker] = self._ask("start", self._journals[worker].path, worker, self._rng.randrange(1 << 30))

    def kill(self, workers: list[int]) -> None:
        """Kill several at the same moment; none of them may have ended by itself."""
        for worker in workers:
            os.kill(self.alive[worker], signal.SIGKILL)
        for worker in workers:
            assert self._ask("reap", self.alive.pop(worker)) == -signal.SIGKILL

    def close(self) -> None:
        """Kill what lives."""
        self.kill(list(self.alive))
        self._process.communicate(timeout=30)


def check_worker(view: DatabaseView, journal: Journal, before: int, begun: list[int]) -> int:
    """The names of a worker are those of one step: the last acknowledged or a later one that was begun. Returns it."""
    worker = journal.worker
    names = dict(view.scan(prefix=b"%d/" % worker))
    steps = {int(written.split()[0].split(b"/")[1]) for written in names.values()} or {0}
    assert len(steps) == 1, f"worker {worker}: a batch is there in part: {steps}"
    (step,) = steps
    assert step >= before, f"worker {worker}: step {before} was acknowledged, and {step} is the newest there"
    assert step in (0, *begun)
    if step:
        assert names == {b"%d/%d" % (worker, name): value(worker, step, name) for name in range(NAMES)}
    return step


def check(db: basin.Database, journals: list[Journal], before: list[set[int]], rng: random.Random) -> None:
    """Everything that was acknowledged before is there; what is there was begun; batches are whole."""
    with db.view() as view:
        begun = [journal.read()[1] for journal in journals]
        reached = [
            check_worker(view, journal, max(acknowledged, default=0), steps)
            for journal, acknowledged, steps in zip(journals, before, begun, strict=True)
        ]
        roots = {bytes(key) for key in view.blobs}
        shared = 0
        for journal, acknowledged, steps, last in zip(journals, before, begun, reached, strict=True):
            possible = {journal.root(step): step for step in steps if step <= last}
            found = {possible[root] for root in roots & possible.keys()}
            roots -= possible.keys()
            assert acknowledged <= found, "an acknowledged commit was lost"
            assert last in (0, *found)
            shared += sum(step % 4 == 2 for step in found)
            for step in rng.sample(sorted(found), min(5, len(found))):
                assert view.blobs[basin.ContentKey(journal.root(step))] == content(journal.worker, step)
        assert not roots, "contents that nobody put, or of commits that are not there"
        assert int(view.get(b"shared", b"0")) == shared


@pytest.fixture(params=["open", "encrypted"])
def secret(request: pytest.FixtureRequest) -> basin.Secret | None:
    return basin.Secret.generate() if request.param == "encrypted" else None


@pytest.fixture
def journals(tmp_path: Path) -> list[Journal]:
    return [Journal(tmp_path / f"journal-{worker}", worker) for worker in range(WORKERS)]


@pytest.fixture
def nursery(
    tmp_path: Path, secret: basin.Secret | None, journals: list[Journal], rng: random.Random
) -> Iterator[Nursery]:
    secret_file = None
    if secret is not None:
        secret_file = tmp_path / "secret"
        secret.to_file(secret_file)
    profile: Literal["open", "encrypted"] = "encrypted" if secret is not None else "open"
    basin.open(tmp_path / "basin", "x", secret=secret, profile=profile, part_max=4096, part_size=1024).close()
    nursery = Nursery(tmp_path / "basin", secret_file, journals, rng)
    yield nursery
    nursery.close()


@pytest.mark.slow
def test_no_acknowledged_commit_is_lost_to_a_kill(
    tmp_path: Path,
    secret: basin.Secret | None,
    journals: list[Journal],
    nursery: Nursery,
    rng: random.Random,
    effort: int,
) -> None:
    killed = 0
    while killed < KILLS * effort:
        for worker in range(WORKERS):
            if worker not in nursery.alive:
                nursery.start(worker)
        time.sleep(rng.uniform(0.005, LIFE_S))
        victims = rng.sample(range(WORKERS), rng.choice([1, 1, 1, 2, WORKERS]))
        nursery.kill(victims)
        killed += len(victims)
        acknowledged = [journal.acknowledged() for journal in journals]
        with basin.open(tmp_path / "basin", "r", secret=secret) as db:
            check(db, journals, acknowledged, rng)
    nursery.kill(list(nursery.alive))
    acknowledged = [journal.acknowledged() for journal in journals]
    assert sum(map(len, acknowledged)) > killed
    with basin.open(tmp_path / "basin", "w", secret=secret) as db:
        check(db, journals, acknowledged, rng)
        db.blobs.put(b"the next writer looks after the dead")
        db.blobs.delete(basin.ContentKey(blake3(b"the next writer looks after the dead").digest()))
        db.commit()
        assert [finding for finding in db.check() if finding.severity != "info"] == []
        assert len(db.core.state.sessions) == 1
    print(f"{killed} kills, {sum(map(len, acknowledged))} acknowledged commits")  # for the report


def test_a_loss_would_be_seen(tmp_path: Path, journals: list[Journal], rng: random.Random) -> None:
    """The check itself: every kind of loss raises."""

    def seen(damage: Callable[[basin.Database], object], **journal: str) -> bool:
        folder = tmp_path / f"basin-{rng.randrange(1 << 40)}"
        with basin.open(folder, "x", profile="open", part_max=4096, part_size=1024) as db:
            for step in range(1, 8):
                work(db, 0, step)
            lines = "".join(f"begin {step}\ndone {step}\n" for step in range(1, 8))
            journals[0].path.write_text(journal.get("lines", lines), encoding="ascii")
            damage(db)
            acknowledged = [journal.acknowledged() for journal in journals]
            try:
                check(db, journals, acknowledged, rng)
            except (AssertionError, ContentNotFound):
                return True
            return False

    assert not seen(lambda _: None)
    assert not seen(lambda _: None, lines="".join(f"begin {step}\n" for step in range(1, 8)))  # All unacknowledged.
    assert seen(lambda db: db.delete(b"0/3"))
    assert seen(lambda db: db.put(b"0/3", value(0, 6, 3)))
    assert seen(lambda db: db.delete_range(b"0/", b"00"))
    assert seen(lambda db: db.put(b"shared", b"1"))
    assert seen(lambda db: db.blobs.delete(basin.ContentKey(journals[0].root(3))))
    assert seen(lambda db: db.blobs.put(b"nobody put this"))
    assert seen(lambda _: None, lines="".join(f"begin {step}\ndone {step}\n" for step in range(1, 9)))
    assert seen(lambda _: None, lines="".join(f"begin {step}\ndone {step}\n" for step in range(1, 7)))
