"""`check` names what is damaged, what it touches and what stays readable; `repair` mends it, and only when asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.api import Database
from basin.engine.verify import Finding
from basin.errors import CorruptionError, ReadOnly
from basin.format.layout import STRATUM_FOOTER_SIZE, STRATUM_HEADER_SIZE

VALUES = {b"name/%02d" % number: b"a value of its own grain %02d " % number * 60 for number in range(20)}
SMALL = {b"small/%04d" % number: b"inline %d" % number for number in range(2000)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One stratum of contents, one run of names, one checkpoint."""
    path = tmp_path / "basin"
    with basin.open(path, mode="x", profile="open", reserve_size=0) as db:
        db.put_many(VALUES.items())
        db.commit()
    with basin.open(path, mode="w", memtable_size=65_536, reserve_size=0) as db:
        db.put_many(SMALL.items())
    return path


def findings(folder: Path, *, read_data: bool = True) -> list[Finding]:
    with basin.open(folder, mode="r") as db:
        return [finding for finding in db.check(read_data=read_data) if finding.severity != "info"]


def repair(folder: Path) -> list[Any]:
    with basin.open(folder, mode="w", reserve_size=0) as db:
        return db.repair(dry_run=False)


def only_file(folder: Path, kind: str) -> Path:
    return max((folder / kind).iterdir(), key=lambda path: path.stat().st_size)


def change(path: Path, offset: int) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.chmod(0o600)
    path.write_bytes(data)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require_all_names(db: Database, but: frozenset[bytes] = frozenset()) -> None:
    for name, value in (VALUES | SMALL).items():
        if name not in but:
            assert db[name] == value


def test_a_whole_basin_has_no_findings(folder: Path) -> None:
    assert findings(folder) == []
    assert findings(folder, read_data=False) == []
    with basin.open(folder, mode="r") as db:
        assert db.repair() == []


def test_one_entry_that_is_missing_from_an_index_is_found_and_put_back(tmp_path: Path) -> None:
    """The index is intact in itself: every checksum and tag is right, and one grain is not in it."""
    folder = tmp_path / "basin"
    with basin.open(folder, mode="x", profile="open", reserve_size=0) as db:
        keys = db.blobs.put_many([b"content %d " % number * 20 for number in range(200)])
        db.commit()
        for writer in db.core.own_strata._writers.values():
            writer.locations.pop(keys[77].digest, None)
    (found,) = [finding for finding in findings(folder) if finding.kind == "index"]
    assert found.severity == "damage"
    assert found.object.startswith("data/")
    assert repair(folder)
    assert findings(folder) == []
    with basin.open(folder, mode="r") as db:
        assert db.blobs[keys[77]] == b"content 77 " * 20
        assert len(db.blobs.get_many(keys)) == 200


def _cut_footer(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-STRATUM_FOOTER_SIZE])


def _damage_footer(path: Path) -> None:
    change(path, path.stat().st_size - 30)


def _damage_directory(path: Path) -> None:
    change(path, path.stat().st_size - STRATUM_FOOTER_SIZE - 20)


@pytest.mark.parametrize("damage", [_cut_footer, _damage_footer, _damage_directory])
def test_a_lost_index_is_built_again_from_the_stratum(folder: Path, damage: Callable[[Path], None]) -> None:
    stratum = only_file(folder, "data")
    damage(stratum)
    assert f"data/{stratum.name}" in {finding.object for finding in findings(folder)}
    with basin.open(folder, mode="r") as db:
        require_all_names(db)
    (action,) = repair(folder)
    assert action.done
    assert findings(folder) == []
    with basin.open(folder, mode="r") as db:
        assert not db.core.locator.broken
        require_all_names(db)
    assert repair(folder) == []


def test_a_damaged_grain_touches_its_own_names_only(folder: Path) -> None:
    stratum = only_file(folder, "data")
    change(stratum, STRATUM_HEADER_SIZE + 60)
    (name,) = {name for finding in findings(folder) for name in finding.names}
    with basin.open(folder, mode="r") as db:
        require_all_names(db, but=frozenset([name]))
        with pytest.raises(CorruptionError) as error:
            db[name]
        assert error.value.fields["object"].endswith(stratum.name)


def test_putting_a_damaged_content_again_heals_it(folder: Path) -> None:
    change(only_file(folder, "data"), STRATUM_HEADER_SIZE + 60)
    (name,) = {name for finding in findings(folder) for name in finding.names}
    repair(folder)
    with basin.open(folder, mode="w", reserve_size=0) as db:
        db[name] = VALUES[name]
    with basin.open(folder, mode="r") as db:
        require_all_names(db)


def test_a_missing_stratum_is_named_with_what_it_held(folder: Path) -> None:
    stratum = only_file(folder, "data")
    stratum.unlink()
    found = findings(folder)
    assert f"data/{stratum.name}" in {finding.object for finding in found}
    assert {name for finding in found for name in finding.names} == set(VALUES)
    with basin.open(folder, mode="r") as db:
        assert all(db[name] == value for name, value in SMALL.items())


def test_a_damaged_checkpoint_costs_nothing_but_time(folder: Path) -> None:
    checkpoints = sorted((folder / "checkpoint").iterdir())
    change(checkpoints[-1], 100)
    assert f"checkpoint/{checkpoints[-1].name}" in {finding.object for finding in findings(folder)}
    with basin.open(folder, mode="r") as db:
        require_all_names(db)
    repair(folder)
    assert findings(folder) == []


def test_a_dry_run_changes_nothing(folder: Path) -> None:
    _cut_footer(only_file(folder, "data"))
    before = files(folder)
    with basin.open(folder, mode="r") as db:
        planned = db.repair()
        assert planned
        assert not any(action.done for action in planned)
        with pytest.raises(ReadOnly):
            db.repair(dry_run=False)
    assert files(folder) == before


def test_what_was_planned_is_what_is_done(folder: Path) -> None:
    _cut_footer(only_file(folder, "data"))
    with basin.open(folder, mode="r") as db:
        planned = [(action.kind, action.object) for action in db.repair()]
    assert [(action.kind, action.object) for action in repair(folder)] == planned


def test_nothing_that_is_readable_is_dropped(folder: Path) -> None:
    """Damage in every stratum at once."""
    for kind in ("data", "meta"):
        for path in (folder / kind).iterdir():
            change(path, path.stat().st_size // 2)
    with basin.open(folder, mode="r") as db:
        readable = {}
        for name in VALUES | SMALL:
            try:
                readable[name] = db[name]
            except basin.BasinError:
                continue
    repair(folder)
    with basin.open(folder, mode="r") as db:
        for name, value in readable.items():
            assert db[name] == value
