"""Fixtures of the command tests: `run` calls commands in this process, `shell` starts the real entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click.testing
import pytest

from basin.cli.main import main

ROOT = Path(__file__).parents[2]
Run = Callable[..., click.testing.Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(folder: Path) -> dict[str, str]:
    """This environment, without any secret, pointing to a basin in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BASIN_")}
    return kept | {"BASIN_URL": str(folder / "b"), "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command with `$BASIN_URL` = `tmp_path/b`; `code` is the exit code expected. Shows no traceback, ever."""
    for name in [name for name in os.environ if name.startswith("BASIN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BASIN_URL", str(tmp_path / "b"))

    def call(*arguments: str, code: int = 0, stdin: bytes = b"", **variables: str) -> click.testing.Result:
        result = click.testing.CliRunner().invoke(main, arguments, input=stdin, env=variables, prog_name="basin")
        assert result.exit_code == code, (arguments, result.output)
        assert "Traceback" not in result.output
        if code in (1, 3, 4, 5):
            assert all(line.startswith("basin: ") for line in result.stderr.splitlines()), result.stderr
        return result

    return call


@pytest.fixture
def opened(run: Run) -> Run:
    """`run`, with an open (not encrypted) basin created."""
    run("init", "--open")
    return run


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Run `basin` as a process of its own with `$BASIN_URL` = `tmp_path/b`, and no terminal anywhere."""

    def call(*arguments: str, code: int = 0, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-m", "basin.cli", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env=environment(tmp_path) | variables,
            timeout=60,
            check=False,
        )
        assert result.returncode == code, (arguments, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        return result

    return call
