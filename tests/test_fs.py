"""`basin://`: fsspec, and what is built on it, reads snapshots."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest

import basin
from basin.errors import InvalidArgument, ReadOnly, SecretRequired
from basin.fs import BasinFileSystem

FOLDER = "data"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    basin.Secret.generate().to_file(path)
    return path


@pytest.fixture
def saved(tmp_path: Path, key_file: Path) -> str:
    """The path of a small tree in the latest snapshot of an encrypted basin."""
    top = tmp_path / FOLDER
    (top / "sub").mkdir(parents=True)
    (top / "large").write_bytes(os.urandom(6 << 20))
    (top / "empty").write_bytes(b"")
    (top / "sub" / "link").symlink_to("../large")
    pd.DataFrame({"x": range(1000), "y": ["text"] * 1000}).to_parquet(top / "sub" / "table.parquet")
    with basin.open(tmp_path / "basin", secret=basin.Secret.from_file(key_file)) as db:
        db.snapshots.create(top)
    return f"snapshots/latest{top}"


@pytest.fixture
def system(tmp_path: Path, saved: str, key_file: Path) -> Iterator[BasinFileSystem]:
    opened = BasinFileSystem(str(tmp_path / "basin"), secret_file=key_file, skip_instance_cache=True)
    yield opened
    opened.close()


def test_a_table_is_read_where_it_lies(tmp_path: Path, saved: str, key_file: Path) -> None:
    url = f"basin://{saved}/sub/table.parquet::{tmp_path}/basin"
    table = pd.read_parquet(url, storage_options={"basin": {"secret_file": str(key_file)}})
    assert list(table["x"]) == list(range(1000))


def test_the_protocol_is_known_once_it_is_installed() -> None:
    assert fsspec.get_filesystem_class("basin") is BasinFileSystem


def test_folders_are_listed(system: BasinFileSystem, saved: str) -> None:
    assert system.ls("", detail=False) == ["snapshots"]
    (identity,) = system.ls("snapshots", detail=False)
    assert identity.startswith("snapshots/")
    assert system.ls(saved, detail=False) == [f"{saved}/{name}" for name in ("empty", "large", "sub")]
    assert {one["name"]: one["type"] for one in system.ls(f"{saved}/sub")} == {
        f"{saved}/sub/link": "link",
        f"{saved}/sub/table.parquet": "file",
    }
    assert sorted(system.find(saved)) == sorted(
        f"{saved}/{name}" for name in ("empty", "large", "sub/link", "sub/table.parquet")
    )
    assert system.glob(f"{saved}/*/*.parquet") == [f"{saved}/sub/table.parquet"]


def test_what_is_kept_of_a_file_is_told(system: BasinFileSystem, saved: str, tmp_path: Path) -> None:
    info = system.info(f"{saved}/large")
    real = (tmp_path / FOLDER / "large").stat()
    assert (info["size"], info["mode"], info["uid"]) == (6 << 20, real.st_mode, real.st_uid)
    assert info["mtime"] == pytest.approx(real.st_mtime)
    assert system.modified(f"{saved}/large").timestamp() == pytest.approx(real.st_mtime)
    assert system.info(f"{saved}/sub/link")["destination"] == "../large"
    assert system.isdir(saved)
    assert not system.exists(f"{saved}/absent")
    for path in (f"{saved}/absent", "snapshots/ffffffff", "nothing", "snapshots/latest/absent/x"):
        with pytest.raises(FileNotFoundError):
            system.info(path)
        with pytest.raises(FileNotFoundError):
            system.ls(path)


def test_ranges_and_files_are_what_was_saved(system: BasinFileSystem, saved: str, tmp_path: Path) -> None:
    content = (tmp_path / FOLDER / "large").read_bytes()
    assert system.cat_file(f"{saved}/large") == content
    assert system.cat_file(f"{saved}/large", 5, 100) == content[5:100]
    assert system.cat_file(f"{saved}/large", -7) == content[-7:]
    assert system.cat_file(f"{saved}/empty") == b""
    with system.open(f"{saved}/large") as file:
        file.seek(1 << 20)
        assert file.read(10) == content[1 << 20 : (1 << 20) + 10]
    with fsspec.open(f"basin://{saved}/large::{tmp_path}/basin", basin={"secret": system._secret}) as file:
        assert file.read() == content


def test_it_only_reads(system: BasinFileSystem, saved: str) -> None:
    with pytest.raises(ReadOnly):
        system.open(f"{saved}/new", "wb")
    with pytest.raises(IsADirectoryError):
        system.open(saved)
    with pytest.raises(IsADirectoryError):
        system.cat_file(saved)


def test_secrets_are_never_text(tmp_path: Path, saved: str, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text: Any = "passphrase"
    with pytest.raises(InvalidArgument):
        BasinFileSystem(str(tmp_path / "basin"), secret=text)
    with pytest.raises(InvalidArgument):
        BasinFileSystem()
    without = BasinFileSystem(str(tmp_path / "basin"), skip_instance_cache=True)
    monkeypatch.delenv("BASIN_SECRET_FILE", raising=False)
    monkeypatch.delenv("BASIN_PASSPHRASE", raising=False)
    with pytest.raises(SecretRequired):
        without.ls(saved)
    monkeypatch.setenv("BASIN_SECRET_FILE", str(key_file))
    assert len(without.ls(saved)) == 3
    without.close()
    kept = BasinFileSystem(str(tmp_path / "basin"), secret=basin.Secret.from_file(key_file), skip_instance_cache=True)
    with pytest.raises(Exception, match="secret"):
        pickle.dumps(kept)
