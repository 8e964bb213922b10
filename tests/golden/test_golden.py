"""What released versions wrote reads as it was written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from blake3 import blake3

import basin
from tests.golden.build import (
    FOLDER,
    KEY_FILE,
    LARGE,
    LINKED,
    PASSPHRASE,
    SMALL,
    expected_blobs,
    expected_names,
    expected_numbers,
)

BASINS = sorted(path for path in FOLDER.glob("version-*/*") if path.is_dir())


def secrets(golden: Path, tmp_path: Path) -> list[basin.Secret | None]:
    """Every secret that opens the basin. The key file is copied, because a checkout leaves it readable by others."""
    if golden.name == "open":
        return [None]
    key_file = Path(shutil.copy(FOLDER / KEY_FILE, tmp_path))
    key_file.chmod(0o600)
    return [basin.Secret.from_passphrase(PASSPHRASE), basin.Secret.from_file(key_file)]


def test_there_are_golden_basins() -> None:
    assert {path.name for path in BASINS} == {"open", "encrypted"}


@pytest.mark.parametrize("golden", BASINS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_basin_reads_as_it_was_written(golden: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden, tmp_path / "copy"))
    for secret in secrets(golden, tmp_path):
        with basin.open(folder, mode="r", secret=secret) as db:
            assert dict(db.scan()) == expected_names()
            assert dict(db.keyspace("numbers").scan()) == expected_numbers()
            assert {bytes(key): db.blobs[key] for key in db.blobs} == expected_blobs()
            linked, large = basin.ContentKey(blake3(LINKED).digest()), basin.ContentKey(blake3(LARGE).digest())
            assert db.blobs.links(linked) == [basin.ContentKey(blake3(SMALL).digest())]
            assert db.blobs.read(large, 20_000, 20_010) == LARGE[20_000:20_010]
            assert len(db.blobs.parts(large)) == 8
            assert [finding for finding in db.check() if finding.severity != "info"] == []


@pytest.mark.parametrize("golden", BASINS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_basin_goes_on(golden: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden, tmp_path / "copy"))
    with basin.open(folder, mode="w", secret=secrets(golden, tmp_path)[-1]) as db:
        before = db.stats()["written"]["blobs_new"]
        db.blobs.put(SMALL)
        db.blobs.put(LARGE)
        assert db.stats()["written"]["blobs_new"] == before
        db[b"new"] = b"value"
    with basin.open(folder, mode="r", secret=secrets(golden, tmp_path)[0]) as db:
        assert dict(db.scan()) == expected_names() | {b"new": b"value"}
