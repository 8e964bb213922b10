"""The benchmark of backups: what is saved can be had again, all sides do the same, what they took is the kernel's word,
and whoever gives back something else ends the run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.backup import __main__ as command
from benchmarks.backup import report
from benchmarks.backup.material import (
    MIB,
    FileMaterial,
    SourceMissing,
    TreeMaterial,
    copy_tree,
    differences,
    facts_of,
    walk,
)
from benchmarks.backup.results import BackupResults, Sample
from benchmarks.backup.runner import (
    BACKUPS,
    CHANGED,
    FIRST,
    LIST,
    ONE_FILE,
    RESTORE,
    SYNCED_RESTORE,
    UNCHANGED,
    RestoredDiffers,
    run_rounds,
)
from benchmarks.backup.sides import BasinSide, Place, Side, find_sides, synced
from benchmarks.backup.usage import CommandFailed, floor, measure, stored_size

STEPS = [FIRST, UNCHANGED, CHANGED, RESTORE, SYNCED_RESTORE, ONE_FILE, LIST]
ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath)}
OLD_S = 1_500_000_000


@pytest.fixture(autouse=True)
def settlings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the machine would have been settled: with others at work on the same disk that takes seconds."""
    counted: list[int] = []
    monkeypatch.setattr(os, "sync", lambda: counted.append(1))
    return counted


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 directories with 5 files each, of which some are links, empty, or oddly named."""
    folder = tmp_path / "root"
    for number in range(40):
        inner = folder / f"part-{number % 7}" / f"directory-{number}"
        inner.mkdir(parents=True)
        for name, content in (
            ("text", b"words " * (100 * number + 1)),
            ("empty", b""),
            ("odd * [name] \\ of a file", bytes([number]) * 300),
            ("large", b"%d" % number * 50_000 if number % 8 == 0 else b"small"),
        ):
            (inner / name).write_bytes(content)
            os.utime(inner / name, (OLD_S + number, OLD_S + number))
        (inner / "link").symlink_to("text")
        (inner / "text").chmod(0o640)
    return folder


@pytest.fixture
def tree(root: Path, tmp_path: Path) -> TreeMaterial:
    return TreeMaterial(tmp_path / "material", [root], files_max=200, size_max=8 * MIB)


@pytest.fixture
def few(root: Path, tmp_path: Path) -> TreeMaterial:
    """Enough where it matters who runs, and not on what."""
    return TreeMaterial(tmp_path / "material", [root], files_max=20, size_max=8 * MIB)


class CopySide(Side):
    """`cp`: the whole source, every time."""

    note = "copies"

    def __init__(self, label: str = "copy 1") -> None:
        self.label = label
        self.path = ENVIRONMENT["PATH"]

    def environment(self, place: Place) -> dict[str, str]:
        return {"PATH": self.path}

    def init(self, place: Place) -> list[str]:
        return ["mkdir", str(place.repository)]

    def backup(self, place: Place, source: Path, number: int) -> list[str]:
        return ["cp", "-a", str(source), str(place.repository / str(number))]

    def restore(self, place: Place, source: Path, target: Path, number: int) -> list[str]:
        return ["cp", "-a", f"{place.repository}/{number}/.", str(target)]

    def restore_synced(self, place: Place, source: Path, target: Path, number: int) -> list[str]:
        """It does not sync: that takes seconds where others write to the same disk."""
        return self.restore(place, source, target, number)

    def restore_file(self, place: Place, path: Path, target: Path, number: int) -> list[str]:
        return ["cp", "-a", f"{place.repository}/{number}/{str(path).partition('/material/tree/')[2]}", str(target)]

    def list_snapshots(self, place: Place) -> list[str]:
        return ["ls", str(place.repository)]

    def restored(self, source: Path, target: Path) -> Path:
        return target

    def restored_file(self, path: Path, target: Path) -> Path:
        return target / path.name


class OldSide(CopySide):
    """Gives back what was there before the change."""

    def restore(self, place: Place, source: Path, target: Path, number: int) -> list[str]:
        return super().restore(place, source, target, number - 1)


def ignore(_: str) -> None:
    """Nobody looks on."""


def python(text: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", text]


def test_what_a_command_and_its_children_took_is_measured(tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    both = f"import subprocess, sys\nsubprocess.run([sys.executable, '-I', '-S', '-c', {busy!r}], check=True)\n{busy}"
    usage = measure(python(both), environment=ENVIRONMENT, folder=tmp_path)
    assert usage.cpu_s >= 0.6
    assert usage.wall_s >= 0.6


def test_the_peak_is_the_commands_own_whatever_the_size_of_who_runs_it(tmp_path: Path) -> None:
    ballast = bytearray(os.urandom(MIB) * 150)
    small = floor(tmp_path)
    large = measure(python(f"x = b'x' * {100 * MIB}"), environment=ENVIRONMENT, folder=tmp_path).peak
    assert len(ballast) == 150 * MIB
    assert small < 50 * MIB
    assert 100 * MIB < large < 150 * MIB


def test_a_command_that_fails_says_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"ended with 3: no such thing"):
        measure(["sh", "-c", "echo no such thing; exit 3"], environment=ENVIRONMENT, folder=tmp_path)


def test_a_command_that_does_not_exist_fails(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="no-such-program"):
        measure(["no-such-program"], environment=ENVIRONMENT, folder=tmp_path)


def test_stored_bytes_are_those_of_the_disk_and_links_count_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(os.urandom(MIB))
    os.link(tmp_path / "one", tmp_path / "two")
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(100 * MIB)
    assert MIB <= stored_size(tmp_path) < 2 * MIB


def test_the_same_roots_give_the_same_tree(root: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        copy_tree([root], tmp_path / name, files_max=60, size_max=MIB)
    assert facts_of(tmp_path / "one") == facts_of(tmp_path / "two")


def test_a_tree_is_real_files_within_its_bounds(root: Path, tmp_path: Path) -> None:
    copy_tree([root], tmp_path / "copy", files_max=60, size_max=MIB)
    facts = facts_of(tmp_path / "copy")
    assert 50 <= facts.files + facts.links <= 60
    assert facts.links == facts.files // 4
    assert facts.size <= MIB
    taken = [path for path in walk(tmp_path / "copy") if not path.is_dir()]
    originals = [Path("/", path.relative_to(tmp_path / "copy")) for path in taken]
    assert [
        difference
        for path, original in zip(taken, originals, strict=True)
        if path.is_file()
        for difference in differences(original, path)
    ] == []


def test_a_bound_on_bytes_holds(root: Path, tmp_path: Path) -> None:
    copy_tree([root], tmp_path / "copy", files_max=1_000, size_max=20_000)
    assert 10_000 < facts_of(tmp_path / "copy").size <= 20_000


def test_no_root_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match="absent"):
        copy_tree([tmp_path / "absent"], tmp_path / "copy", files_max=10, size_max=MIB)


@pytest.mark.parametrize("kind", ["tree", "file"])
def test_a_change_is_another_material_and_is_undone(kind: str, root: Path, tmp_path: Path) -> None:
    (material,) = command.make_materials([kind], tmp_path / "here", command.SMALL, roots=[root])
    before = facts_of(material.source)
    digests = {before.digest}
    for _ in range(2):
        material.change()
        digests.add(facts_of(material.source).digest)
        material.undo()
        assert facts_of(material.source) == before
    assert len(digests) > 1


def test_one_file_of_a_hundred_changes_in_each_of_four_ways(tree: TreeMaterial) -> None:
    before = {path: path.read_bytes() for path in walk(tree.source) if path.is_file() and not path.is_symlink()}
    tree.change()
    after = {path: path.read_bytes() for path in walk(tree.source) if path.is_file() and not path.is_symlink()}
    touched = {path for path in before if after.get(path) != before[path]}
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    assert touched == set(tree.changing())
    assert len(touched) == max(4, len(before) // 100)
    assert len(gone) == len(new) == len(touched) // 4


def test_the_file_that_is_restored_alone_does_not_change(root: Path, tmp_path: Path) -> None:
    few = TreeMaterial(tmp_path / "few", [root / "part-1" / "directory-1"], files_max=5, size_max=MIB)
    assert few.facts.files == 4
    assert few.one_file is not None
    assert few.source / few.one_file not in few.changing()
    assert len(few.changing()) == 3


def test_the_large_file_changes_in_one_part_of_a_hundred_and_all_behind_moves(tmp_path: Path) -> None:
    material = FileMaterial(tmp_path, size=300 * MIB // 100)
    path = material.path
    before = path.read_bytes()
    material.change()
    after = path.read_bytes()
    assert len(after) == len(before) + len(material.inserted()) * 12_345
    assert before[:MIB] == after[:MIB]
    assert before[-MIB:] == after[-MIB:]
    assert len(material.overwritten()) == 1


def test_the_large_file_compresses_by_two(tmp_path: Path) -> None:
    import zstandard

    material = FileMaterial(tmp_path, size=4 * MIB)
    assert 0.45 < len(zstandard.compress(material.path.read_bytes(), 1)) / (4 * MIB) < 0.6


def test_the_large_file_is_never_the_youngest(tmp_path: Path) -> None:
    material = FileMaterial(tmp_path, size=3 * MIB)
    for act in (ignore, lambda _: material.change(), lambda _: material.undo()):
        act("")
        (other,) = (path for path in material.source.iterdir() if path != material.path)
        assert other.stat().st_ctime_ns > material.path.stat().st_ctime_ns


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "content": (lambda folder: _overwrite(folder / "part-1/directory-1/text"), "another content"),
    "longer": (lambda folder: _overwrite(folder / "part-1/directory-1/text", at=606), "another content"),
    "mode": (lambda folder: (folder / "part-1/directory-1/text").chmod(0o600), "mode"),
    "mode of a directory": (lambda folder: (folder / "part-1").chmod(0o700), "mode"),
    "time": (lambda folder: os.utime(folder / "part-1/directory-1/text"), "time"),
    "time of a directory": (lambda folder: os.utime(folder / "part-1"), "time"),
    "missing": (lambda folder: shutil.rmtree(folder / "part-1/directory-1"), "missing"),
    "more": (lambda folder: (folder / "more").touch(), "not in the source"),
    "target": (lambda folder: _point_elsewhere(folder / "part-1/directory-1/link"), "another target"),
}


def _overwrite(path: Path, *, at: int = 0) -> None:
    """One byte, without a trace in the times; at its end the file grows."""
    info = path.stat()
    with path.open("r+b") as file:
        assert at in (0, file.seek(0, os.SEEK_END))
        file.seek(at)
        file.write(b"!")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def _point_elsewhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_difference_is_found(damage: str, root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, symlinks=True)
    assert differences(root, copy) == []
    spoil, reason = DAMAGES[damage]
    spoil(copy)
    assert any(reason in found for found in differences(root, copy))


def test_one_byte_more_behind_a_whole_piece_is_a_difference(tmp_path: Path) -> None:
    for name, size in (("one", MIB), ("two", MIB + 1)):
        (tmp_path / name).write_bytes(bytes(size))
        os.utime(tmp_path / name, (OLD_S, OLD_S))
    assert differences(tmp_path / "one", tmp_path / "two") == [".: another content"]


def test_every_round_has_every_step_of_every_side(few: TreeMaterial, tmp_path: Path, settlings: list[int]) -> None:
    seen: list[str] = []
    sides = [CopySide("copy 1"), CopySide("copy 2")]
    place = tmp_path / "sides"
    samples = run_rounds([few], sides, place, rounds=2, seed=5, on_run=seen.append)
    expected = [(number, step, side.label) for number in range(2) for step in STEPS for side in sides]
    assert [(sample.round, sample.step, sample.side) for sample in samples] == expected
    assert [text.rpartition(": ")[0].rpartition(", ")[2] for text in seen[::2]] == [
        step.rpartition(", ")[2] for step in STEPS * 2
    ]
    assert list(place.iterdir()) == []
    assert len(settlings) == 2 * len(samples) + 1  # one more between the rounds
    for sample in samples:
        assert sample.wall_s > 0
        assert (sample.grown > 0) == (sample.step in BACKUPS)
        assert sample.grown < 2 * few.facts.size + MIB


def test_the_order_of_the_sides_is_drawn(few: TreeMaterial, tmp_path: Path) -> None:
    sides = [CopySide("copy 1"), CopySide("copy 2")]
    seen: list[str] = []
    run_rounds([few], sides, tmp_path / "sides", rounds=1, seed=1, on_run=seen.append)
    assert {text[-1] for text in seen[::2]} == {"1", "2"}


def test_who_restores_something_else_ends_the_run(few: TreeMaterial, tmp_path: Path) -> None:
    with pytest.raises(RestoredDiffers, match="copy 1 restored something else"):
        run_rounds([few], [OldSide()], tmp_path / "sides", rounds=1, seed=1, on_run=ignore)
    assert facts_of(few.source) == few.facts


@pytest.mark.parametrize("kind", command.KINDS)
def test_a_side_that_is_here_gives_back_what_it_took(kind: str, tree: TreeMaterial, tmp_path: Path) -> None:
    sides, absent = find_sides([kind], restic=["restic"], borg=["borg"])
    assert len(sides) + len(absent) == 1
    samples = run_rounds([tree], sides, tmp_path / "sides", rounds=1, seed=1, on_run=ignore)
    assert [sample.step for sample in samples] == STEPS * len(sides)
    first = [sample for sample in samples if sample.step == FIRST]
    assert all(0 < sample.grown < tree.facts.size for sample in first)


def test_a_program_that_is_not_what_its_name_says_is_absent(tmp_path: Path) -> None:
    program = tmp_path / "restic"
    program.write_text("#!/bin/sh\necho something else 1.0\n")
    program.chmod(0o755)
    sides, absent = find_sides(["restic"], restic=[str(program)], borg=[])
    assert sides == []
    assert len(absent) == 1


@pytest.mark.parametrize(
    ("levels", "chosen"), [("(auto|off|max)", "auto"), ("(auto|off|fastest|better|max)", "fastest")]
)
def test_restic_is_asked_for_the_fastest_compression_that_it_has(levels: str, chosen: str, tmp_path: Path) -> None:
    program = tmp_path / "restic"
    program.write_text(
        f"#!/bin/sh\n[ $1 = version ] && echo restic 9.8.7 compiled || echo '  --compression mode  one of {levels}'\n"
    )
    program.chmod(0o755)
    (side,), _ = find_sides(["restic"], restic=[str(program)], borg=[])
    place = Place(tmp_path / "repository", tmp_path / "home")
    assert side.label == "restic 9.8.7"
    assert side.backup(place, tmp_path, 1)[-3:] == ["--compression", chosen, str(tmp_path)]


def sample(side: str, number: int, *, wall_s: float, step: str = FIRST, grown: int = 0) -> Sample:
    return Sample("tree", step, side, number, wall_s, cpu_s=2 * wall_s, peak=50 * MIB, grown=grown)


def results_of(*samples: Sample) -> BackupResults:
    return BackupResults(
        scale="small",
        rounds=3,
        seed=1,
        started="today",
        machine={"cpu": "c", "cores": 2, "memory_mib": 3, "kernel": "k", "file_system": "f", "python": "p"},
        versions={"basin-store": "1"},
        floor=9 * MIB,
        materials={"tree": "a tree"},
        sides={"basin": "ours", "borg 1": "theirs"},
        absent=["restic: no program"],
        samples=list(samples),
    )


def test_a_ratio_is_the_peers_figure_over_basins_in_the_same_round() -> None:
    results = results_of(
        *(sample("basin", number, wall_s=wall_s) for number, wall_s in enumerate([1.0, 2.0, 4.0])),
        *(sample("borg 1", number, wall_s=wall_s) for number, wall_s in enumerate([3.0, 2.0, 8.0])),
    )
    assert results.ratios("tree", FIRST, "borg 1", "wall_s") == [3.0, 1.0, 2.0]
    text = report.to_markdown(results)
    assert f"| {FIRST} | 2.00 | 3.00: 2.00 (1.00..3.00) |" in text


def test_what_only_reads_has_no_growth_and_what_is_missing_has_a_dash() -> None:
    results = results_of(
        sample("basin", 0, wall_s=1.0, grown=2 * MIB),
        sample("borg 1", 0, wall_s=1.0, grown=3 * MIB),
        sample("borg 1", 0, wall_s=1.0, step=LIST),
    )
    growth = next(grid for grid in report.grids(results) if "growth" in grid.title)
    assert growth.rows == [[FIRST, "2.0", "3.0: 1.50"]]
    wall = next(grid for grid in report.grids(results) if grid.title == "Tree: seconds")
    assert wall.rows[1] == [LIST, "-", "1.00"]


def test_results_survive_json() -> None:
    results = results_of(sample("basin", 0, wall_s=1.0))
    assert BackupResults.from_json(json.loads(results.to_text())) == results
    with pytest.raises(ValueError, match="another version"):
        BackupResults.from_json({"schema": 0})


def test_the_small_mode_writes_a_report_without_columns_for_whoever_is_absent(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "require_disk", lambda _: machine.Mount("device", "/", "ext4"))
    monkeypatch.setattr(command, "find_sides", _copies_and_absent)
    files = {name: tmp_path / f"report.{name}" for name in ("json", "markdown")}
    written = [f"--{name}={path}" for name, path in files.items()]
    assert command.main(["--small", f"--folder={tmp_path}", f"--root={root}", "--seed=3", *written]) == 0
    results = BackupResults.from_json(json.loads(files["json"].read_text()))
    assert list(results.sides) == ["copy 1"]
    assert set(results.materials) == {"tree", "large file"}
    assert results.steps("large file") == [step for step in STEPS if step != ONE_FILE]
    text = files["markdown"].read_text()
    assert "| Command | copy 1 |" in text
    assert "**Absent.** restic: no program `no-such-program`" in text
    assert results.materials["tree"] in capsys.readouterr().out
    assert not list(tmp_path.glob("backup-*"))


def _copies_and_absent(*_: object, **__: object) -> tuple[list[Side], list[str]]:
    return [CopySide()], find_sides(["restic"], restic=["no-such-program"], borg=[])[1]


def test_nobody_to_measure_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--side=restic", "--restic=no-such-program", f"--folder={tmp_path}"]) == 1
    assert "no-such-program" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "calls"), [(0, ["-f {}"]), (7, [])])
def test_a_sync_follows_a_restore_that_succeeds(code: int, calls: list[str], tmp_path: Path) -> None:
    (tmp_path / "sync").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tmp_path / "sync").chmod(0o755)
    (tmp_path / "calls").touch()
    environment = {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"}
    command = synced(["sh", "-c", f"exit {code}"], tmp_path / "a folder")
    if code:
        with pytest.raises(CommandFailed, match="ended with 7"):
            measure(command, environment=environment, folder=tmp_path)
    else:
        measure(command, environment=environment, folder=tmp_path)
    assert (tmp_path / "calls").read_text().splitlines() == [call.format(tmp_path / "a folder") for call in calls]


def test_a_restore_syncs_once_and_only_where_that_is_measured(few: TreeMaterial, tmp_path: Path) -> None:
    class SyncedSide(CopySide):
        restore_synced = Side.restore_synced

    (tmp_path / "sync").write_text(f"#!/bin/sh\necho >> {tmp_path}/calls\n")
    (tmp_path / "sync").chmod(0o755)
    side = SyncedSide()
    side.path = f"{tmp_path}:{side.path}"
    run_rounds([few], [side], tmp_path / "sides", rounds=1, seed=1, on_run=ignore)
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    place = Place(tmp_path / "repository", tmp_path / "home")
    given = (place, tmp_path, tmp_path / "target", 1)
    assert "--no-sync" in BasinSide().restore(*given)
    assert "--no-sync" not in BasinSide().restore_synced(*given)


def test_nothing_is_deleted_before_a_round_is_over(few: TreeMaterial, tmp_path: Path) -> None:
    """Files that are made just after others were deleted may take many times as long."""

    class KeptSide(CopySide):
        def list_snapshots(self, place: Place) -> list[str]:
            return ["sh", "-c", f"ls -d {place.home.parent}/restored-* > {tmp_path}/there"]

    run_rounds([few], [KeptSide()], tmp_path / "sides", rounds=1, seed=1, on_run=ignore)
    assert len((tmp_path / "there").read_text().splitlines()) == len([RESTORE, SYNCED_RESTORE, ONE_FILE])
    assert not list((tmp_path / "sides").glob("*/*"))


def test_secrets_and_caches_lie_in_the_home_that_is_given(tmp_path: Path) -> None:
    place = Place(tmp_path / "repository", tmp_path / "home")
    environment = BasinSide().environment(place)
    assert environment["HOME"] == str(place.home)
    assert Path(environment["BASIN_SECRET_FILE"]).is_relative_to(place.home)
