"""`basin check --read-data`: a share of the data, and how far its round is."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Run

TOLD = re.compile(
    r"read (\d+\.\d) % \(([\d,]+) of ([\d,]+) bytes\); "
    r"the round began on (\d{4}-\d\d-\d\dT\S+) and (is complete|is at (\d+\.\d) %)"
)


@pytest.fixture
def filled(opened: Run, tmp_path: Path) -> Run:
    for number in range(10):
        file = tmp_path / f"file{number}"
        file.write_bytes(os.urandom(20_000))
        opened("blob", "put", str(file))
    return opened


def told(output: str) -> re.Match[str]:
    verdict, line = output.splitlines()
    assert verdict == "no damage found"
    found = TOLD.fullmatch(line)
    assert found is not None, line
    return found


def test_it_says_how_much_was_read_and_how_far_the_round_is(filled: Run) -> None:
    first = told(filled("check", "--read-data", "40%").stdout)
    second = told(filled("check", "--read-data", "40%").stdout)
    third = told(filled("check", "--read-data", "100%").stdout)
    assert 40 <= float(first[1]) < 60
    assert int(first[2].replace(",", "")) >= 80_000
    assert float(first[6]) == float(first[1])
    assert float(second[6]) > float(first[6])
    assert second[4] == first[4] < third[4]


def test_the_same_in_json(filled: Run) -> None:
    (line,) = filled("check", "--read-data", "100%", "--json").stdout.splitlines()
    found = json.loads(line)
    assert found["kind"] == "coverage"
    assert found["read"] == found["total"] == found["round_passed"] == found["round_total"] > 200_000
    assert found["complete"] is True
    assert found["began"].startswith("20")


def test_bytes_in_place_of_a_share(filled: Run) -> None:
    found = json.loads(filled("check", "--read-data", "50k", "--json").stdout)
    assert 50 << 10 <= found["read"] <= (50 << 10) + 21_000


@pytest.mark.parametrize("arguments", [(), ("--read-data",)])
def test_without_a_share_everything_is_read_and_nothing_written(
    filled: Run, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert filled("check", *arguments).stdout == "no damage found\n"
    assert {path: path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()} == before


def test_an_option_may_follow_it(filled: Run) -> None:
    assert filled("check", "--read-data", "--json").stdout == ""


def flip(path: Path, offset: int) -> None:
    body = bytearray(path.read_bytes())
    body[offset] ^= 4
    path.chmod(0o600)
    path.write_bytes(body)


def test_damage_ends_with_3_and_the_round_goes_on(filled: Run, tmp_path: Path) -> None:
    damaged = max((tmp_path / "b" / "data").iterdir(), key=lambda path: path.stat().st_size)
    flip(damaged, 1000)
    *findings, verdict, coverage = filled("check", "--read-data", "100%", code=3).stdout.splitlines()
    assert findings
    assert all(f"data/{damaged.name}" in finding for finding in findings)
    assert verdict.startswith(f"damage found: {len(findings)}")
    assert TOLD.fullmatch(coverage)


def test_of_a_damaged_log_the_damage_is_told(filled: Run, tmp_path: Path) -> None:
    """No cursor can be kept before the log is repaired: the run says so, and ends as one that found damage."""
    segment = max((tmp_path / "b" / "log").glob("*.log"), key=lambda path: path.stat().st_size)
    flip(segment, segment.stat().st_size // 2)
    result = filled("check", "--read-data", "10%", code=3)
    assert result.stdout.splitlines()[-1].startswith("damage found: ")
    assert "basin repair" in result.stderr


@pytest.mark.parametrize("amount", ["0%", "0.0%", "101%", "-1%", "nan%", "1e1%", "%", "0", "-5", "lots", "5 %", "500X"])
def test_what_is_no_amount_is_wrong_usage(filled: Run, amount: str) -> None:
    assert "Error: " in filled("check", f"--read-data={amount}", code=2).stderr


def test_no_data_and_some_data_contradict_each_other(filled: Run) -> None:
    filled("check", "--no-data", "--read-data", "5%", code=2)


def test_a_basin_that_is_only_read_has_no_rounds(filled: Run, tmp_path: Path) -> None:
    flat = str(tmp_path / "flat.basin")
    filled("export", flat)
    filled("-b", flat, "check")
    assert "only read" in filled("-b", flat, "check", "--read-data", "5%", code=1).stderr
