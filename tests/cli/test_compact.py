"""`basin compact` and `basin-compact`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click.testing
import pytest

import basin
from basin.cli.compact import main
from tests.cli.conftest import ROOT, Run


@pytest.fixture
def wasteful(opened: Run, tmp_path: Path) -> Run:
    """A basin of which three quarters are needed by nobody."""
    with basin.open(tmp_path / "b", history_s=0.0) as db:
        keys = [db.blobs.put(os.urandom(20_000)) for _ in range(40)]
        db.commit()
        for key in keys[10:]:
            db.blobs.delete(key)
        db[b"kept"] = b"value"
    return opened


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "b" / "data").iterdir())


def let_go_of_history(folder: Path) -> None:
    """As if the hour of history that is kept were over."""
    with basin.open(folder / "b", history_s=0.0) as db:
        db.compact(prune=False)


def test_a_prune_without_grace_frees_what_nothing_needs(wasteful: Run, tmp_path: Path) -> None:
    let_go_of_history(tmp_path)
    before = stored(tmp_path)
    found = json.loads(wasteful("compact", "--prune", "--grace", "0", "--json").stdout)
    assert found["bytes_freed"] > 500_000
    assert found["problems"] == []
    assert stored(tmp_path) < before * 0.3
    assert wasteful("kv", "get", "kept").stdout == "value"
    assert wasteful("check").stdout == "no damage found\n"


def test_history_is_let_go_of_as_it_is_told(wasteful: Run, tmp_path: Path) -> None:
    before = stored(tmp_path)
    wasteful("compact", "--prune", "--grace", "0")
    assert stored(tmp_path) > before * 0.9
    for _ in range(2):  # History goes at the end of a run: the next one finds what only it needed.
        wasteful("compact", "--prune", "--grace", "0", "--history", "0")
    assert stored(tmp_path) < before * 0.3


def test_with_a_grace_it_is_condemned_and_stays(wasteful: Run, tmp_path: Path) -> None:
    let_go_of_history(tmp_path)
    before = stored(tmp_path)
    assert "condemned" in wasteful("compact", "--prune").stdout
    assert stored(tmp_path) >= before
    wasteful("compact", "--prune", "--grace", "0")
    assert stored(tmp_path) < before * 0.3


def test_without_prune_nothing_is_dropped(wasteful: Run, tmp_path: Path) -> None:
    let_go_of_history(tmp_path)
    before = stored(tmp_path)
    assert json.loads(wasteful("compact", "--json").stdout)["bytes_condemned"] == 0
    assert stored(tmp_path) >= before * 0.99


def test_a_dry_run_says_what_would_go_and_changes_nothing(wasteful: Run, tmp_path: Path) -> None:
    let_go_of_history(tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    rows = [json.loads(line) for line in wasteful("compact", "--prune", "--dry-run", "--json").stdout.splitlines()]
    assert sum(row["bytes_freed"] for row in rows) > 500_000
    assert all(row["reason"] for row in rows)
    assert "rewrite" in wasteful("compact", "--prune", "--dry-run").stdout
    assert {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()} == files


def test_options_that_make_no_sense_are_a_usage_error(opened: Run) -> None:
    opened("compact", "--once", "--watch", "5", code=2)
    opened("compact", "--dry-run", "--watch", "5", code=2)
    for option in ("--grace", "--watch", "--rate", "--history"):
        for value in ("-1", "nan", "inf", "soon"):
            opened("compact", option, value, code=2)
    opened("compact", "--watch", "0", code=2)
    opened("compact", "--watch", "1e10", code=2)
    opened("compact", "--rate", "0", code=2)
    opened("stats", "--strata", code=2)


def test_it_is_a_program_of_its_own(wasteful: Run, tmp_path: Path) -> None:
    let_go_of_history(tmp_path)
    runner = click.testing.CliRunner()
    result = runner.invoke(main, ["-b", str(tmp_path / "b"), "--prune", "--grace", "0"], prog_name="basin-compact")
    assert result.exit_code == 0, result.output
    assert "files deleted" in result.output
    assert runner.invoke(main, ["-b", str(tmp_path / "absent")], prog_name="basin-compact").exit_code == 1


def test_in_a_bucket_it_does_the_same(run: Run) -> None:
    url = "memory://compact-prunes"
    run("-b", url, "init", "--open")
    with basin.open(url, mode="w", history_s=0.0) as db:
        keys = [db.blobs.put(os.urandom(20_000)) for _ in range(10)]
        db.commit()
        for key in keys[1:]:
            db.blobs.delete(key)
        db.commit()
        db.compact(prune=False)
    rows = [
        json.loads(line) for line in run("-b", url, "compact", "--prune", "--dry-run", "--json").stdout.splitlines()
    ]
    assert rows
    assert all(row["requests"] > 0 for row in rows)
    assert json.loads(run("-b", url, "compact", "--prune", "--json").stdout)["bytes_condemned"] > 180_000
    run("-b", url, "compact", "--prune", "--grace", "0")
    with basin.open(url, mode="r") as db:
        assert db.stats()["strata"]["data"]["bytes"] < 30_000
        assert len(db.blobs[keys[0]]) == 20_000


@pytest.mark.parametrize("job", ["basin-compact", "another"])
def test_the_next_of_a_job_takes_over_from_one_that_died(run: Run, job: str) -> None:
    url = f"memory://compact-takes-over-{job}"
    run("-b", url, "init", "--open")
    with basin.open(url, mode="w", job=job) as dead:
        dead[b"name"] = b"value"
        dead.commit()
        run("-b", url, "compact", "--job", "a third")
        assert sessions(url) == 1
        run("-b", url, "compact", *(() if job == "basin-compact" else ("--job", job)))
        assert sessions(url) == 0


def sessions(url: str) -> int:
    with basin.open(url, mode="r") as db:
        return int(db.stats()["sessions"])


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start it as a process of its own; none outlives its test."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        command = "from basin.cli.compact import main; main(prog_name='basin-compact')"
        process = subprocess.Popen(
            [sys.executable, "-c", command, "-b", str(tmp_path / "b"), "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("wasteful")
def test_a_watch_ends_cleanly_when_it_is_told_to(
    program: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = program("--watch", "60")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["stopped"] is False
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_it_stops_in_the_middle_and_the_next_one_finishes(
    wasteful: Run, tmp_path: Path, program: Callable[..., subprocess.Popen[str]]
) -> None:
    let_go_of_history(tmp_path)
    before = stored(tmp_path)
    process = program("--prune", "--grace", "0", "--rate", "0.01")
    with basin.open(tmp_path / "b", mode="r") as db:
        deadline = time.monotonic() + 30
        while not db.stats()["sessions"]:  # Its session begins after the signals are its own.
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
            db.refresh()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert json.loads(output)["stopped"] is True
    assert stored(tmp_path) > before * 0.9
    assert json.loads(wasteful("compact", "--prune", "--grace", "0", "--json").stdout)["stopped"] is False
    assert stored(tmp_path) < before * 0.3
    assert wasteful("check").stdout == "no damage found\n"


def test_space_is_explained_at_every_turn(wasteful: Run, tmp_path: Path) -> None:
    def explained() -> tuple[dict[str, int], str]:
        found = json.loads(wasteful("stats", "--explain-space", "--json").stdout)
        return found, " ".join(found["advice"])

    found, advice = explained()
    assert 600_000 < found["past"] < found["needed"]
    assert "history is kept for 3600 s" in advice

    let_go_of_history(tmp_path)
    found, advice = explained()
    assert (found["past"], found["dead"] > 600_000) == (0, True)
    assert "dead: a prune" in advice
    assert "history" not in advice

    wasteful("compact", "--prune")
    found, advice = explained()
    assert found["condemned"] > 600_000
    assert "condemned until 2" in advice

    wasteful("compact", "--prune", "--grace", "0")
    found, advice = explained()
    assert (found["condemned"], found["dead"], advice) == (0, 0, "")


def test_a_pin_is_named_as_what_keeps_space(wasteful: Run, tmp_path: Path) -> None:
    with basin.open(tmp_path / "b", history_s=0.0) as db:
        key = db.blobs.put(os.urandom(20_000))
        db.pin("weekly")
        db.blobs.delete(key)
    let_go_of_history(tmp_path)
    shown = wasteful("stats", "--explain-space", "--strata").stdout
    assert "the pin weekly keeps" in shown
    assert "data/" in shown
    assert "data/" not in wasteful("stats", "--explain-space").stdout


def test_damage_that_stands_in_the_way_is_told(wasteful: Run, tmp_path: Path) -> None:
    let_go_of_history(tmp_path)
    for path in (tmp_path / "b" / "data").iterdir():
        data = bytearray(path.read_bytes())
        data[1000:1010] = bytes(10)
        path.write_bytes(data)
    assert "basin check" in wasteful("compact", "--prune", "--grace", "0", code=3).stderr
