"""`basin log`, `stats`, `check` and `repair` on basins that are well and on basins that are not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run


def records(run: Run, *arguments: str, code: int = 0) -> list[Any]:
    return [json.loads(line) for line in run(*arguments, "--json", code=code).stdout.splitlines()]


def positions(entries: list[Any]) -> list[int]:
    return [entry["position"] for entry in entries]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.fixture
def stored(opened: Run) -> Run:
    """A basin with a name and one content of its own stratum."""
    opened("kv", "put", "name", "value")
    opened("blob", "put", "-", stdin=random.Random(1).randbytes(16_384))
    return opened


def test_log_lists_what_changed_in_order(opened: Run) -> None:
    (before,) = records(opened, "kv", "put", "name", "value")
    entries = records(opened, "log")
    assert positions(entries) == sorted(positions(entries))
    (entry,) = [entry for entry in entries if entry["position"] == before["position"]]
    assert set(entry) == {"position", "time", "time_ms", "session", "sequence", "size", "changes"}
    assert entry["time"].endswith("+00:00")
    assert entry["changes"]


def test_log_in_text_is_one_line_a_record(stored: Run) -> None:
    lines = [line.split("\t") for line in stored("log").stdout.splitlines()]
    assert all(len(cells) == 4 for cells in lines)
    assert [int(cells[0]) for cells in lines] == positions(records(stored, "log"))


def test_log_since_and_limit(stored: Run) -> None:
    everything = positions(records(stored, "log"))
    assert positions(records(stored, "log", "--since", str(everything[1]))) == everything[2:]
    assert positions(records(stored, "log", "--limit", "2")) == everything[-2:]
    assert records(stored, "log", "--limit", "0") == []


def test_stats_are_one_object_of_plain_values(stored: Run) -> None:
    (numbers,) = records(stored, "stats")
    assert numbers["profile"] == "open"
    assert numbers["position"] == records(stored, "log")[-1]["position"]
    text = stored("stats").stdout
    assert f"position\t{numbers['position']:,}\n" in text
    assert all(line.count("\t") == 1 for line in text.splitlines())


def test_check_of_a_sound_basin_ends_with_0(stored: Run) -> None:
    assert stored("check").stdout.splitlines()[-1].startswith("no damage found")
    stored("check", "--no-data")
    assert [finding for finding in records(stored, "check") if finding["severity"] == "damage"] == []


def test_check_of_a_flipped_bit_ends_with_3_and_names_the_file(stored: Run, tmp_path: Path) -> None:
    stratum = max((tmp_path / "b" / "data").iterdir(), key=lambda path: path.stat().st_size)
    flip(stratum, stratum.stat().st_size // 2)
    findings = records(stored, "check", code=3)
    assert any(stratum.name in finding["object"] for finding in findings if finding["severity"] == "damage")
    assert set(findings[0]) == {"offset", "content_keys", "kind", "severity", "object", "detail", "names", "readable"}
    result = stored("check", code=3)
    assert stratum.name in result.stdout
    assert result.stdout.splitlines()[-1].startswith("damage found: ")


def test_reading_damaged_content_ends_with_3(stored: Run, tmp_path: Path) -> None:
    key = stored("blob", "ls").stdout.strip()
    stratum = max((tmp_path / "b" / "data").iterdir(), key=lambda path: path.stat().st_size)
    flip(stratum, 5000)
    result = stored("blob", "get", key, code=3)
    assert "basin check" in result.stderr
    assert stored("kv", "get", "name").stdout == "value"


def test_repair_of_a_sound_basin_has_nothing_to_do(stored: Run) -> None:
    assert stored("repair").stdout == "nothing to repair\n"
    assert records(stored, "repair") == []


def test_repair_shows_first_and_acts_when_told(stored: Run, tmp_path: Path) -> None:
    stratum = max((tmp_path / "b" / "data").iterdir(), key=lambda path: path.stat().st_size)
    flip(stratum, 5000)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*")}
    shown = records(stored, "repair", code=3)
    assert set(shown[0]) == {"kind", "object", "detail", "done", "possible", "names", "content_keys"}
    assert "basin repair --yes" in stored("repair", code=3).stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*")} == before
    (key,) = shown[0]["content_keys"]
    assert key in stored("repair", "--yes", code=3).stdout
    lost = stored("repair", code=3).stdout
    assert "lost" in lost
    assert key in lost
    assert "basin repair --yes" not in lost
    assert stored("kv", "get", "name").stdout == "value"


def test_a_log_that_rots_is_named_and_repaired(stored: Run, tmp_path: Path) -> None:
    (segment,) = (tmp_path / "b" / "log").glob("*.log")
    flip(segment, segment.stat().st_size - 20)
    assert stored("kv", "get", "name", code=3).stdout == ""
    assert "log" in {finding["kind"] for finding in records(stored, "check", code=3)}
    stored("repair", code=3)
    stored("repair", "--yes")
    assert stored("kv", "get", "name").stdout == "value"
    stored("check")


def test_repair_that_loses_nothing_ends_with_0(stored: Run, tmp_path: Path) -> None:
    stratum = max((tmp_path / "b" / "data").iterdir(), key=lambda path: path.stat().st_size)
    flip(stratum, stratum.stat().st_size - 30)
    stored("check", code=3)
    assert stored("repair", "--yes").stdout.splitlines()[-1] == "done: 1"
    assert stored("repair").stdout == "nothing to repair\n"
    stored("check")
