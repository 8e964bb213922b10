"""The benchmark itself: every engine does the same work, ratios point the right way, memory is no disk."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks import budgets, chart, ingest, machine, report
from benchmarks.contestant import Contestant
from benchmarks.entrant import BASIN, Entrant, all_entrants
from benchmarks.jobs import Data, GetContents, Job, PutContents, WorkDiffers, all_jobs, size_text
from benchmarks.memory import fill, measure_fill, measure_reopen, reopen
from benchmarks.results import MemorySample, Results, Sample
from benchmarks.runner import run_jobs
from benchmarks.sealing import Sealer
from benchmarks.workload import KIB, QUICK, VALUE_SIZES, make_contents, make_named_values

TINY = replace(
    QUICK,
    label="tiny",
    value_counts=dict.fromkeys(VALUE_SIZES, 3) | {100: 40, KIB: 40},
    reads_max=20,
    names=60,
    commits=16,
    grain_counts=(50,),
    rounds=1,
)
ENTRANTS = all_entrants()
JOBS = all_jobs(Data(TINY, seed=7))


@pytest.fixture(params=ENTRANTS, ids=str)
def entrant(request: pytest.FixtureRequest) -> Entrant:
    found: Entrant = request.param
    return found


@pytest.fixture
def contestant(entrant: Entrant, tmp_path: Path) -> Iterator[Contestant]:
    opened = entrant.open(tmp_path / "store", value_size=100)
    yield opened
    opened.close()


def make_results(samples: list[Sample]) -> Results:
    mount = machine.Mount("/dev/vda", "/", "ext4")
    return Results("tiny", 7, 1, "2026-01-01 00:00 UTC", machine.describe(mount), machine.versions(), samples)


def make_sample(job: str, engine: str, variant: str, seconds: float, *, round_number: int = 0) -> Sample:
    return Sample(job, engine, variant, round_number, operations=10, value_size=100, wall_s=seconds, cpu_s=seconds)


def test_every_job_runs_by_every_engine_and_verifies_what_it_stored(entrant: Entrant, tmp_path: Path) -> None:
    samples = run_jobs(JOBS, [entrant], tmp_path, rounds=1, seed=7, on_run=lambda _: None)
    assert [sample.job for sample in samples] == [job.title for job in JOBS]
    assert all(sample.wall_s > 0 for sample in samples)
    assert not list(tmp_path.glob("run-*")), "a job that writes leaves nothing"


@pytest.mark.parametrize("value_size", [100, 128, 4 * KIB], ids=size_text)
@pytest.mark.parametrize("method", ["put_each", "put_batch"])
def test_every_engine_holds_the_same_content_after_a_reopening(
    entrant: Entrant, tmp_path: Path, method: str, value_size: int
) -> None:
    contents = make_contents(value_size, 30, seed=1)
    writer = entrant.open(tmp_path, value_size=value_size)
    for batch in contents.batches(11):
        getattr(writer, method)(batch)
    writer.close()
    reader = entrant.open(tmp_path, value_size=value_size)
    assert list(reader.walk_digests()) == sorted(contents.digests)
    assert [reader.read_content(digest) for digest in contents.digests] == list(contents.values)
    addresses = reader.addresses(contents.digests)
    reader.get_each(addresses)
    reader.get_batch(addresses)
    reader.close()


def test_every_engine_holds_the_same_names_after_a_reopening(entrant: Entrant, tmp_path: Path) -> None:
    pairs = make_named_values(50, seed=1)
    writer = entrant.open(tmp_path, value_size=100)
    writer.put_names(pairs[:40])
    threads = [threading.Thread(target=writer.commit_name, args=pair, daemon=True) for pair in pairs[40:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    reader = entrant.open(tmp_path, value_size=100)
    assert list(reader.walk_names()) == sorted(pairs)
    assert reader.scan_names() == 50
    assert [reader.read_name(name) for name, _ in pairs] == [value for _, value in pairs]
    reader.get_names_each([name for name, _ in pairs])
    reader.get_names_batch([name for name, _ in pairs])
    reader.close()


def test_an_engine_that_loses_a_value_ends_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_sqlite = Entrant("sqlite", "raw")
    job = PutContents(Data(TINY, seed=7), 100, batched=True)
    monkeypatch.setattr("benchmarks.contestant.RawPeer.read_content", lambda _self, _digest: b"something else")
    with pytest.raises(WorkDiffers):
        job.run(raw_sqlite, tmp_path)


@pytest.mark.parametrize("value_size", [100, 4 * KIB], ids=size_text)
def test_the_work_on_top_of_a_peer_hides_and_shrinks_values(value_size: int) -> None:
    contents = make_contents(value_size, 5, seed=1)
    sealed = list(Sealer(bytes(32), value_size).seal_contents(contents.values))
    assert [digest for digest, _ in sealed] == list(contents.digests)
    for (_, data), value in zip(sealed, contents.values, strict=True):
        assert value[: value_size // 2] not in data
        assert len(data) == 116 if value_size == 100 else len(data) < 0.8 * value_size


@pytest.mark.parametrize("value_size", VALUE_SIZES, ids=size_text)
def test_values_are_unique_of_their_size_and_the_same_for_the_same_seed(value_size: int) -> None:
    values = make_contents(value_size, 50, seed=3).values
    assert {len(value) for value in values} == {value_size}
    assert len(set(values)) == 50
    assert values == make_contents(value_size, 50, seed=3).values
    assert values != make_contents(value_size, 50, seed=4).values


def test_repeating_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.workload.make_value", lambda size, _number, **_: bytes(size))
    with pytest.raises(WorkDiffers):
        Data(TINY, seed=7).contents(100)


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    raw_sqlite = Entrant("sqlite", "raw")
    filled = measure_fill(raw_sqlite, tmp_path, grains=50, seed=1)
    reopened = measure_reopen(raw_sqlite, tmp_path, grains=50, seed=1)
    assert filled.resident_peak > 1 << 20
    assert reopened.resident_peak >= reopened.resident > reopened.anonymous > 1 << 20
    assert reopened.first_read_s > reopened.open_s > 0


def test_a_reopened_store_holds_every_grain_that_was_filled_in(tmp_path: Path) -> None:
    fill(BASIN, tmp_path, grains=50, seed=1)
    assert reopen(BASIN, tmp_path, grains=50, seed=1).first_read_s > 0
    with pytest.raises((SystemExit, KeyError)):
        reopen(BASIN, tmp_path, grains=51, seed=1)


MOUNTS = machine.read_mounts(
    "/dev/vda / ext4 rw 0 0\n"
    "tmpfs /dev/shm tmpfs rw 0 0\n"
    "ramfs /mnt/with\\040blank ramfs rw 0 0\n"
    "/dev/vdb /dev/shm/disk xfs rw 0 0\n"
    "tmpfs /over tmpfs rw 0 0\n"
    "/dev/vdc /over ext4 rw 0 0\n"
)


@pytest.mark.parametrize(
    ("folder", "file_system"),
    [
        ("/home/somebody", "ext4"),
        ("/dev/shm", "tmpfs"),
        ("/dev/shm/deep/down", "tmpfs"),
        ("/dev/shmother", "ext4"),
        ("/mnt/with blank/x", "ramfs"),
        ("/dev/shm/disk/x", "xfs"),
        ("/over/x", "ext4"),
    ],
)
def test_the_file_system_of_a_folder_is_that_of_the_innermost_mount(folder: str, file_system: str) -> None:
    assert machine.find_mount(Path(folder), MOUNTS).file_system == file_system


@pytest.mark.parametrize("file_system", ["tmpfs", "ramfs"])
def test_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str) -> None:
    in_memory = machine.Mount("none", str(tmp_path.resolve()), file_system)
    monkeypatch.setattr(machine, "read_mounts", lambda _table: [*MOUNTS, in_memory])
    with pytest.raises(machine.NotADisk, match=file_system):
        machine.require_disk(tmp_path)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this machine has no /dev/shm")
def test_the_command_refuses_memory_before_it_measures(tmp_path: Path) -> None:
    mounts = machine.read_mounts(Path("/proc/mounts").read_text())
    if machine.find_mount(Path("/dev/shm"), mounts).file_system != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--folder", "/dev/shm", "--json", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "tmpfs" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_ratio_above_one_says_that_basin_is_faster_and_is_taken_within_rounds() -> None:
    results = make_results(
        [
            make_sample("put 100 B", "basin", "encrypted", 1.0, round_number=0),
            make_sample("put 100 B", "lmdb", "work", 2.0, round_number=0),
            make_sample("put 100 B", "basin", "encrypted", 10.0, round_number=1),
            make_sample("put 100 B", "lmdb", "work", 30.0, round_number=1),
            make_sample("put 100 B", "lmdb", "work", 99.0, round_number=2),
        ]
    )
    assert results.ratios("put 100 B", "lmdb", "work") == [2.0, 3.0]
    assert results.ratio("put 100 B", "lmdb", "work") == 2.5
    assert results.ratio("put 100 B", "lmdb", "raw") is None


@pytest.mark.parametrize(("seconds", "met"), [(1.5, "goal"), (1.3, "floor"), (1.1, "no")])
def test_a_budget_is_met_by_reaching_its_floor_or_its_goal(seconds: float, met: str) -> None:
    job = "durable commit, 1 thread"
    results = make_results([make_sample(job, "basin", "encrypted", 1.0), make_sample(job, "sqlite", "raw", seconds)])
    assert {verdict.met for verdict in budgets.judge(results) if verdict.text.startswith(job)} == {met}


@pytest.mark.parametrize(("peak_mib", "met"), [(100, "goal"), (161, "floor"), (162, "no")])
def test_the_memory_budget_grows_with_the_grains(peak_mib: int, met: str) -> None:
    sample = MemorySample("basin", "encrypted", 1_000_000, 1.0, peak_mib << 20, 0.1, 0.2, 1, 1, 1)
    results = make_results([])
    results.memory.append(sample)
    verdicts = {verdict.text: verdict.met for verdict in budgets.judge(results)}
    assert verdicts["resident memory writing, 1,000,000 grains"] == met


def test_every_budget_names_jobs_that_exist() -> None:
    titles = {job.title for job in JOBS}
    named = {ratio.job for ratio in budgets.RATIOS} | {ratio.peer_job or ratio.job for ratio in budgets.RATIOS}
    assert named <= titles


def test_results_survive_json_and_make_tables_and_a_picture() -> None:
    samples = [
        make_sample("put 100 B", "basin", "encrypted", 1.0),
        make_sample("put 100 B", "lmdb", "work", 1000.0),
        make_sample("put 100 B", "sqlite", "raw", 0.5),
    ]
    results = make_results(samples)
    assert Results.from_json(json.loads(results.to_text())) == results
    generated = report.to_markdown(results, budgets.judge(results))
    assert "| put 100 B | 1000.00 |" in generated
    assert report.replace_generated(f"before\n{generated}\nafter", "NEW") == "before\nNEW\nafter"
    assert report.replace_generated("only prose\n", generated) == f"only prose\n\n{generated}\n"
    drawing = ET.fromstring(chart.draw(results))
    right_edges = [
        float(box.get("x", 0)) + float(box.get("width", 0)) for box in drawing.iter("{http://www.w3.org/2000/svg}rect")
    ]
    assert max(right_edges) <= chart.WIDTH


def test_a_shared_store_is_built_once(tmp_path: Path) -> None:
    raw_sqlite = Entrant("sqlite", "raw")
    jobs: list[Job] = [GetContents(Data(TINY, seed=7), 100, batched=batched) for batched in (False, True)]
    for job in jobs:
        job.prepare(raw_sqlite, tmp_path)
    assert len(list(tmp_path.glob("shared-*"))) == 1


def test_the_ingest_benchmark_does_the_same_work_on_both_sides(tmp_path: Path) -> None:
    files = ingest.make_files(tmp_path, 3, seed=1)
    assert ingest.seconds(files, 1, 1, tmp_path) > 0
    assert ingest.seconds(files, 2, 1, tmp_path) > 0
    lines = ingest.table({1: [(2.0, 1.0), (1.5, 1.0), (1.6, 1.0)]}, 3 << 20)
    assert lines[-1].endswith("| 1.60 (1.50..2.00) | 1.7 | no |")
