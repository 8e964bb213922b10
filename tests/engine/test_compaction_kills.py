"""SIGKILL of compactors beside writers and a reader, and of writers as well: nothing is lost, and nothing leaks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import basin
from basin.api import Database
from basin.engine import compaction
from basin.engine.core import Core
from basin.engine.state import State
from basin.errors import BasinError
from basin.format.layout import STRATUM_FOLDERS, StratumKind
from tests.engine.compaction_kills import (
    MOMENTS,
    WRITERS,
    Holdings,
    Journal,
    Moment,
    World,
    expected_in,
    last_name,
    needed_size,
    pool_key,
    pooled,
    require_all,
    slot_name,
    write,
)
from tests.source_tree import ROOT
from tests.storage.s3_servers import S3Server

RANDOM_KILLS = 25
BUCKET_KILLS = 5
LIFE_S = 1.0
"""Time between two kills, at most."""
REACHED_WITHIN_S = 4.0
ATTEMPTS = 6
STORED_MAX = 1.25
"""Stored bytes for each that is needed, when all is over."""
NEEDED_MIN = 100_000
"""Where less is needed, headers and indexes are a good part of what is stored."""
BUCKET_MOMENTS = (
    "before rewrite",
    "after rewrite",
    "after condemn",
    "before kill",
    "after kill",
    "delete in delete-files",
    "before delete-files",
    "after merge-names",
    "after merge-indexes",
    "delete in checkpoint",
)
OPENING = {"before session", "after session", "before revocation", "after revocation", "delete in opening"}
REPEATED = {moment for moment in MOMENTS if moment.startswith(("during ", "delete "))} - OPENING
"""These come several times in a compaction."""
Actor: TypeAlias = tuple[str, int]


class Play:
    """Processes on one basin: starts, kills and replaces them, through a process that forks them."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        script = [sys.executable, "-m", "tests.engine.compaction_kills", json.dumps(asdict(world))]
        self._process = subprocess.Popen(script, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.alive: dict[Actor, int] = {}
        self.kills: Counter[str] = Counter()

    def _ask(self, *words: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, actor: Actor, doom: Moment = "", count: int = 0) -> int:
        """Let an actor go on where it was killed; `doom` at the `count`-th time kills a compactor."""
        self.alive[actor] = self._ask("start", *actor, self.rng.randrange(1 << 30), doom, count)
        return self.alive[actor]

    def start_missing(self, compactors: int) -> None:
        """Both writers, the reader and `compactors` compactors live after this."""
        wanted = [("reader", 0), *(("writer", worker) for worker in range(WRITERS))]
        wanted += [("compactor", number) for number in range(1, compactors + 1)]
        for actor in wanted:
            if actor not in self.alive:
                self.start(actor)

    def ended(self, actor: Actor) -> int | None:
        """How an actor has ended, if it has."""
        code: int | None = self._ask("look", self.alive[actor])
        if code is not None:
            del self.alive[actor]
        return code

    def require_well(self) -> None:
        """Nobody has ended by itself."""
        codes = {actor: self.ended(actor) for actor in list(self.alive)}
        failed = {actor: code for actor, code in codes.items() if code is not None}
        assert not failed, f"{failed}: {self.failures()}"

    def failures(self) -> str:
        path = self.world.path / "failures"
        return path.read_text() if path.exists() else ""

    def wait_for(self, actor: Actor, timeout_s: float) -> int | None:
        """How an actor ends within a time; all others go on."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            code = self.ended(actor)
            if code is not None:
                return code
            time.sleep(0.005)
        return None

    def kill(self, actors: Sequence[Actor]) -> None:
        """Kill several at the same moment; none of them may have ended by itself."""
        self.require_well()
        for actor in actors:
            os.kill(self.alive[actor], signal.SIGKILL)
        for actor in actors:
            code = self.wait_for(actor, 60)
            assert code == -signal.SIGKILL, f"{actor} ended with {code}: {self.failures()}"
            self.kills[actor[0]] += 1

    def kill_at(self, moment: Moment, count: int) -> bool:
        """Let a compactor kill itself; False if the moment did not come in time."""
        self.require_well()
        actor = ("compactor", 1)
        pid = self.start(actor, moment, count)
        code = self.wait_for(actor, REACHED_WITHIN_S)
        if code is None:
            self.kill([actor])
            return False
        assert code == -signal.SIGKILL, f"{moment}: {self.failures()}"
        assert f"{pid} killed {moment}" in self.moments()
        self.kills[moment] += 1
        return True

    def moments(self) -> list[str]:
        """What the compactors wrote."""
        path = self.world.path / "moments"
        return path.read_text().splitlines() if path.exists() else []

    def end(self) -> None:
        """All who live end by themselves, and well; a compactor after what it is just doing."""
        self.require_well()
        (self.world.path / "over").touch()
        for actor in list(self.alive):
            assert self.wait_for(actor, 60) == 0, f"{actor}: {self.failures()}"

    def close(self) -> None:
        """Kill what lives."""
        self._process.communicate(timeout=30)


Begin = Callable[..., Play]


@pytest.fixture
def begin(tmp_path: Path, rng: random.Random) -> Iterator[Begin]:
    """Found a basin, and a play on it."""
    plays = []

    def founded(url: str = "", *, encrypted: bool, **options: Any) -> Play:
        secret_file = tmp_path / "secret"
        if encrypted:
            basin.Secret.generate().to_file(secret_file)
        (tmp_path / "play").mkdir()
        world = World(
            url or str(tmp_path / "basin"), str(tmp_path / "play"), str(secret_file) if encrypted else "", **options
        )
        world.open("x").close()
        plays.append(Play(world, rng))
        return plays[-1]

    yield founded
    for play in plays:
        play.close()


def end_well(play: Play) -> None:
    """Let those who live end, and judge what is left."""
    play.end()
    require_all_seen(play)
    bury(play.world)
    print(f"{judge(play.world)} acknowledged steps")


# --- the end --------------------------------------------------------------------------------------------------------


def judge(world: World) -> int:
    """All that was acknowledged is there and equal, nothing is back; after two prunes nothing is left over. Returns
    how many steps of writers were acknowledged. No session lives, or may still be taken for alive.
    """
    journals = [Journal(world.path, worker) for worker in range(WRITERS)]
    for journal in journals:
        journal.read()
    with world.open("w", job="cleaner") as database:
        with database.view() as view:
            expected = expected_in(view, journals, [journal.done for journal in journals])
            require_all(view, expected)
        require_sound(database, allowed=["leftover"])  # Files that were killed before their header was written.
        for _ in range(2):
            assert database.compact(prune=True, grace_s=0).problems == []
        require_all(database, expected)
        require_sound(database)
        require_nothing_left(database, expected)
    with world.open("r") as database:
        require_all(database, expected)
    return sum(journal.done - len(journal.lost) for journal in journals)


def bury(world: World) -> None:
    """End the sessions of all who died: on a disk anybody may, in a bucket the next one of their job."""
    for job in ("writer-0", "writer-1", "reader", "compactor-1", "compactor-2"):
        with world.open("w", job=job) as database:
            database[b"buried"] = job.encode()


def require_sound(database: Database, *, allowed: Sequence[str] = ()) -> None:
    """Every byte is read, and there is nothing for `check` to find but kinds that are allowed."""
    found = [finding for finding in database.check(read_data=True) if finding.severity != "info"]
    findings = [finding for finding in found if finding.kind not in allowed]
    assert not findings, "\n".join(f"{one.kind} in {one.object}: {one.detail}" for one in findings)


def require_nothing_left(database: Database, expected: Sequence[Holdings]) -> None:
    """No file that no record names, nothing condemned or waiting, and little more stored than what is needed."""
    state = database.core.state
    folders = STRATUM_FOLDERS.values()
    stored = {f"{folder}/{name}" for folder in folders for name in database.core.storage.list(folder)}
    named = {
        f"{STRATUM_FOLDERS[StratumKind(known.added.kind)]}/{one}": known.added.length
        for one, known in state.strata.items()
    }
    assert stored == set(named)
    assert (dict(state.retired), dict(state.condemns), list(state.sessions)) == ({}, {}, [database.core.session])
    assert database.pins() == {}
    names = {f"{STRATUM_FOLDERS[StratumKind.META]}/{run.id}" for run in state.name_runs}
    size = sum(length for name, length in named.items() if name not in names)
    needed = needed_size(expected)
    assert needed >= NEEDED_MIN
    assert size <= STORED_MAX * needed, (size, needed)
    print(f"{size} bytes are stored, {needed} are needed")


def require_all_seen(play: Play) -> None:
    """The reader has read what it held, pinned and not; of the steps of a compaction all were known here."""
    read = Counter((play.world.path / "reader").read_text().split())
    assert read["pinned"] >= 2
    assert read["held"] + read["gone"] >= 1
    seen = {line.partition(" ")[2] for line in play.moments()}
    assert {moment for moment in seen if moment.startswith(("begin ", "did "))} <= set(MOMENTS)
    again = sum((play.world.path / f"writer-{worker}").read_text().count("again") for worker in range(WRITERS))
    print(f"{dict(play.kills)}, {dict(read)}, {again} times contents had to be put again")


# --- the tests ------------------------------------------------------------------------------------------------------


def replace_a_writer(play: Play, worker: int) -> None:
    """Kill one, and start the next."""
    actor = ("writer", worker)
    play.kill([actor])
    play.start(actor)


def reach(play: Play, moment: Moment, count: int) -> None:
    """Let a compactor be killed at a moment, again until that has come."""
    for _ in range(ATTEMPTS):
        if play.kill_at(moment, count):
            return
        if moment not in OPENING:  # What killed writers leave behind is merged. But they would look after the dead.
            for worker in range(WRITERS):
                replace_a_writer(play, worker)
    raise AssertionError(f"{moment!r} never came")


@pytest.mark.slow
def test_a_compactor_killed_at_any_of_its_steps_loses_and_leaks_nothing(begin: Begin, effort: int) -> None:
    play = begin(encrypted=True)
    play.start_missing(compactors=0)
    for number, moment in enumerate(play.rng.sample(MOMENTS, len(MOMENTS)) * effort):
        count = play.rng.choice((1, 1, 2, 3)) if moment in REPEATED else 1
        reach(play, moment, count)
        if number % 6 == 0:
            replace_a_writer(play, play.rng.randrange(WRITERS))
    assert set(MOMENTS) <= set(play.kills)
    end_well(play)


@pytest.mark.slow
def test_two_compactors_killed_at_random_lose_and_leak_nothing(begin: Begin, effort: int) -> None:
    play = begin(encrypted=False)
    kill_at_random(play, RANDOM_KILLS * effort)
    end_well(play)


@pytest.mark.slow
def test_in_a_bucket_a_killed_compactor_loses_and_leaks_nothing(begin: Begin, s3_server: S3Server, effort: int) -> None:
    play = begin(s3_server.new_url(), encrypted=True, storage_options=s3_server.storage_options())
    play.start_missing(compactors=0)
    for moment in play.rng.sample(BUCKET_MOMENTS, len(BUCKET_MOMENTS)) * effort:
        reach(play, moment, 1)
    replace_a_writer(play, 0)
    kill_at_random(play, BUCKET_KILLS * effort)
    end_well(play)


def kill_at_random(play: Play, count: int) -> None:
    """Kill one of two compactors, or both, or a writer with them, at random moments."""
    while sum(play.kills[role] for role in ("compactor", "writer")) < count:
        play.start_missing(compactors=2)
        time.sleep(play.rng.uniform(0.01, LIFE_S))
        compactors = [("compactor", 1), ("compactor", 2)]
        victims = play.rng.sample(compactors, play.rng.choice((1, 1, 2)))
        if play.rng.random() < 0.25:
            victims.append(("writer", play.rng.randrange(WRITERS)))
        play.kill(victims)


# --- the judge ------------------------------------------------------------------------------------------------------


def test_a_loss_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: whatever is missing, wrong, back or left over raises."""
    steps = 40
    lived = World(str(tmp_path / "lived" / "basin"), str(tmp_path / "lived"))
    lived.path.mkdir()
    with lived.open("x") as database:
        for worker in range(WRITERS):
            for step in range(1, steps + 1):
                with database.batch() as batch:
                    write(batch, worker, step)
            text = "".join(f"begin {step}\ndone {step}\n" for step in range(1, steps + 1))
            (lived.path / f"writer-{worker}").write_text(text)

    def seen(damage: Callable[[Database], object], lines: str = "") -> bool:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(lived.folder, folder)
        world = World(str(folder / "basin"), str(folder))
        with (folder / "writer-0").open("a") as file:
            file.write(lines)
        with world.open("w") as database:
            damage(database)
        try:
            judge(world)
        except (AssertionError, BasinError):
            return True
        return False

    held = Holdings()
    for step in range(1, steps + 1):
        held.follow(0, step)
    slot = next(name for name, value in held.names.items() if len(value) > 512 and b"/slot/" in name)
    assert not seen(lambda _: None)
    assert not seen(lambda _: None, lines=f"begin {steps + 1}\n")
    assert seen(lambda _: None, lines=f"begin {steps + 1}\ndone {steps + 1}\n")
    assert seen(lambda db: db.delete(slot))
    assert seen(lambda db: db.put(slot, pooled(0) + b"changed"))
    assert seen(lambda db: db.put(slot_name(0, 99), b"back again"))
    assert seen(lambda db: db.put(last_name(1), b"%d" % (steps - 1)))
    assert seen(lambda db: db.blobs.delete(pool_key(min(held.roots))))
    assert seen(lambda db: db.blobs.put(b"nobody put this"))
    assert seen(lambda db: db.pin("forgotten"))
    assert seen(lambda db: max((Path(db.url) / "data").iterdir(), key=lambda path: path.stat().st_size).unlink())
    assert not seen(lambda db: (Path(db.url) / "data" / ("0" * 32)).write_bytes(b"swept"))
    monkeypatch.setattr(compaction, "sweep", lambda _: 0)
    assert seen(lambda db: (Path(db.url) / "data" / ("0" * 32)).write_bytes(b"left over"))


# --- what the kills have found --------------------------------------------------------------------------------------


def test_who_opens_while_others_let_go_of_the_log_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints are stored between the moment when an opener reads its own and the moment when it reads on."""
    secret = tmp_path / "secret"
    basin.Secret.generate().to_file(secret)
    world = World(str(tmp_path / "basin"), str(tmp_path), str(secret))
    newest = Core._newest_checkpoint
    overtaken: list[int] = []
    with world.open("x") as other:
        other[b"name"] = b"before"
        other.compact()

        def then_overtaken(core: Core) -> State:
            found = newest(core)
            if core is not other.core and not overtaken:
                overtaken.append(found.position)
                for _ in range(2):
                    other.secrets.rotate()  # A segment of the log ends.
                    other[b"name"] = b"after"
                    other.compact(grace_s=0)
            return found

        monkeypatch.setattr(Core, "_newest_checkpoint", then_overtaken)
        with world.open("r") as database:
            assert database[b"name"] == b"after"
            assert overtaken < [database.core.checkpoint_position]
