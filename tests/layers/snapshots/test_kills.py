"""Backups that are killed at random points: the next run ends with the same tree, and reads little again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.layers.snapshots.kills import JOURNAL_SIZE
from tests.layers.snapshots.material import opened, settle
from tests.remote.conftest import S3Place, key_file, ministack, s3_place, s3_server, secret
from tests.source_tree import ROOT

__all__ = ["key_file", "ministack", "s3_place", "s3_server", "secret"]  # fixtures

ROUNDS = 50
ROUNDS_IN_A_BUCKET = 12
REPEATED_SHARE = 0.05
TIMEOUT_S = 240


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files from nothing to 50 kB in ten folders: several intervals of the journal."""
    source = random.Random(3)
    top = tmp_path / "tree"
    for number in range(200):
        folder = top / f"{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}").write_bytes(source.randbytes(source.randrange(50_000)))
    (top / "link").symlink_to("0/0")
    settle()
    return top


def killed(folder: str, tree: Path, rounds: int, seed: int, **process: Any) -> list[dict[str, Any]]:
    """What every round left behind."""
    command = [sys.executable, "-m", "tests.layers.snapshots.kills", folder, str(tree), str(rounds), str(seed)]
    storage_options = process.pop("storage_options", {})
    done = subprocess.run(
        [*command, json.dumps(storage_options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        **process,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def require_resumed(rows: list[dict[str, Any]], rounds: int, wanted: str) -> None:
    assert len(rows) == rounds
    assert sum(row["codes"][1] == -9 for row in rows) > rounds * 0.7
    for row in rows:
        assert (row["codes"][0], row["codes"][2]) == (0, 0)
        assert set(row["trees"]) == {wanted}, "the same tree, and no incomplete snapshot beside it"
        assert row["damage"] == []
        again = row["read"] - row["total"]
        assert 0 <= again <= max(REPEATED_SHARE * row["total"], JOURNAL_SIZE), row
    assert sum(0.2 < row["first"] / row["total"] < 0.9 for row in rows) > rounds * 0.4, "killed in the middle"


@pytest.mark.slow
def test_a_backup_that_is_killed_anywhere_resumes(tree: Path, tmp_path: Path, effort: int) -> None:
    with opened(tmp_path / "whole") as db:
        wanted = db.snapshots.create(tree).document.tree
    rows = killed(str(tmp_path / "basins"), tree, ROUNDS * effort, seed=1)
    require_resumed(rows, ROUNDS * effort, wanted)


@pytest.mark.slow
def test_a_backup_to_a_bucket_that_is_killed_anywhere_resumes(tree: Path, tmp_path: Path, s3_place: S3Place) -> None:
    with opened(tmp_path / "whole") as db:
        wanted = db.snapshots.create(tree).document.tree
    rows = killed(
        s3_place.url,
        tree,
        ROUNDS_IN_A_BUCKET,
        seed=2,
        env=s3_place.environment(),
        storage_options=s3_place.storage_options(),
    )
    require_resumed(rows, ROUNDS_IN_A_BUCKET, wanted)
