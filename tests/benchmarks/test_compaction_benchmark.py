"""The benchmark of compactions: all names are there afterwards, and churn ends small."""

from __future__ import annotations

from pathlib import Path

from benchmarks import compaction


def test_a_compaction_that_is_timed_keeps_all_names(tmp_path: Path) -> None:
    assert compaction.basin_seconds(tmp_path, 2_000) > 0


def test_churn_ends_within_the_bound_on_space(tmp_path: Path) -> None:
    space, reads = compaction.churn(tmp_path, 300)
    assert float(space[2]) <= compaction.SPACE_MAX
    assert float(reads[2].split()[0]) > 0


def test_memory_is_measured_in_a_process_that_only_prunes(tmp_path: Path) -> None:
    small, large = compaction.memory(tmp_path, [10_000, 40_000])
    assert int(large[2].split()[0]) <= int(large[3].split()[0])
    assert int(large[2].split()[0]) <= int(small[2].split()[0]) + 14  # 8, of which most is a stratum's index
    assert small[3] == ""


def test_commits_beside_a_compaction_are_measured(tmp_path: Path) -> None:
    alone, beside = compaction.others(tmp_path, 2_000)
    assert "alone" in alone[1]
    assert "beside" in beside[1]
