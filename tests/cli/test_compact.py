"""`basin compact` and `basin-compact`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
    opened("compact", "--grace", "-1", code=2)
    opened("compact", "--watch", "0", code=2)


def test_it_is_a_program_of_its_own(wasteful: Run, tmp_path: Path) -> None:
    let_go_of_history(tmp_path)
    runner = click.testing.CliRunner()
    result = runner.invoke(main, ["-b", str(tmp_path / "b"), "--prune", "--grace", "0"], prog_name="basin-compact")
    assert result.exit_code == 0, result.output
    assert "files deleted" in result.output
    assert runner.invoke(main, ["-b", str(tmp_path / "absent")], prog_name="basin-compact").exit_code == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_watch_ends_cleanly_when_it_is_told_to(wasteful: Run, tmp_path: Path, number: signal.Signals) -> None:
    command = "from basin.cli.compact import main; main(prog_name='basin-compact')"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "-b", str(tmp_path / "b"), "--watch", "60", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["stopped"] is False
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_damage_that_stands_in_the_way_is_told(wasteful: Run, tmp_path: Path) -> None:
    let_go_of_history(tmp_path)
    for path in (tmp_path / "b" / "data").iterdir():
        data = bytearray(path.read_bytes())
        data[1000:1010] = bytes(10)
        path.write_bytes(data)
    assert "basin check" in wasteful("compact", "--prune", "--grace", "0", code=3).stderr
