"""`basin thaw`, and a basin whose contents lie elsewhere. In a bucket see `tests/remote/test_cold.py`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_contents_lie_in_another_folder(run: Run, tmp_path: Path) -> None:
    cold = tmp_path / "cold"
    run("init", "--open", "--data-url", str(cold))
    key = run("blob", "put", "-", stdin=b"content" * 1000).stdout.strip()
    assert list((cold / "data").iterdir())
    assert not (tmp_path / "b" / "data").exists()
    assert run("blob", "get", key).stdout_bytes == b"content" * 1000
    assert run("check").stdout == "no damage found\n"


def test_what_is_hot_is_readable(run: Run) -> None:
    run("init", "--open")
    key = run("blob", "put", "-", stdin=b"content" * 1000).stdout.strip()
    assert run("thaw", key).stdout.startswith("1 file, ")
    assert run("thaw", "--all").stdout.endswith(": readable\n")
    found = json.loads(run("thaw", "--all", "--no-wait", "--json").stdout)
    assert (found["strata"], found["requested"], found["waiting"]) == (1, 0, 0)


def test_one_says_what_to_thaw(opened: Run) -> None:
    assert "--all" in opened("thaw", code=2).stderr
    opened("thaw", "--all", "0" * 64, code=2)
    opened("thaw", "--all", "--days", "0", code=2)
    opened("thaw", "--all", "--tier", "Fast", code=2)
    opened("thaw", "0" * 64, code=1)
    opened("thaw", "data/" + "0" * 32, code=2)


def test_a_storage_class_needs_a_bucket(run: Run) -> None:
    assert "storage classes" in run("init", "--open", "--data-storage-class", "GLACIER", code=2).stderr
    assert "STANDARD_IA" in run("init", "--open", "--data-storage-class", "COLD", code=2).stderr
