"""Any tree that is backed up is restored as an equal tree: odd names, deep paths, links, holes, times, attributes."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import basin
from basin.api import Database
from tests.layers.snapshots.material import OPTIONS, seen, settle
from tests.layers.tree_material import names

TIMES = st.integers(min_value=-(1 << 31), max_value=1 << 33).map(lambda second: second * 1_000_000_007)
SIZES = st.sampled_from([0, 1, 100, 4096, 70_000, (2 << 20) + 5, (5 << 20) + 1])


@st.composite
def nodes(draw: st.DrawFn, depth: int = 0) -> Any:
    """A file, link, fifo or directory, as a tuple that begins with its kind."""
    mode = draw(st.integers(min_value=0, max_value=0o7777))
    kinds = ["file", "file", "file", "holes", "link", "fifo"] + (["folder", "folder", "folder"] if depth < 5 else [])
    kind = draw(st.sampled_from(kinds if depth else ["folder"]))
    if kind == "folder":
        children = draw(st.dictionaries(names, nodes(depth=depth + 1), max_size=5 if depth < 3 else 2))
        return kind, mode | 0o700, draw(TIMES), children
    if kind == "link":
        return kind, 0, draw(TIMES), draw(names)
    size = draw(SIZES)
    return kind, mode, draw(TIMES), (size, draw(st.integers(min_value=0, max_value=3)))


def build(path: bytes, node: Any) -> None:
    """Make what a node describes; times last."""
    kind, mode, time_ns, what = node
    if kind == "folder":
        os.mkdir(path)  # noqa: PTH102  # of bytes
        for name, child in what.items():
            build(path + b"/" + name, child)
    elif kind == "link":
        os.symlink(what, path)  # noqa: PTH211  # of bytes
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        size, seed = what
        with open(path, "wb") as file:  # noqa: PTH123  # of bytes
            if kind == "holes":
                file.truncate(size + (3 << 20))
                file.seek(1 << 20)
                file.write(b"island")
            else:
                file.write(blake3(bytes([seed])).digest(size))
    if kind != "link":
        os.chmod(path, mode)  # noqa: PTH101  # of bytes
    os.utime(path, ns=(0, time_ns), follow_symlinks=False)


def allocated(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("round-trip")


@pytest.fixture(scope="module", params=["disk", "bucket"])
def db(request: pytest.FixtureRequest, place: Path) -> Iterator[Database]:
    url = str(place / "basin") if request.param == "disk" else f"memory://{uuid.uuid4().hex}"
    with basin.open(url, secret=basin.Secret.generate(), **{**OPTIONS, "profile": "encrypted"}) as opened:
        yield opened


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(nodes())
def test_any_tree_comes_back(db: Database, place: Path, node: Any) -> None:
    tree, target = place / "tree", place / "target"
    for left in (tree, target):
        shutil.rmtree(left, ignore_errors=True)
    build(os.fsencode(tree), node)
    expected = seen(tree)
    snapshot = db.snapshots.create(tree)
    assert not snapshot.problems
    report = snapshot.restore(target, tree)
    assert not report.problems
    assert seen(target) == expected
    assert allocated(target) <= allocated(tree) + 8192 * len(expected)
    again = snapshot.restore(target, tree)
    assert (again.files, again.problem_count) == (0, 0)
    assert again.unchanged == report.files + report.hard_links - again.hard_links
    assert snapshot.restore(target, tree).files == 0


def test_links_attributes_and_holes_come_back(db: Database, tmp_path: Path) -> None:
    tree, target = tmp_path / "special", tmp_path / "target"
    (tree / "sub").mkdir(parents=True)
    (tree / "one").write_bytes(b"one")
    os.link(tree / "one", tree / "sub" / "same")
    os.link(tree / "one", tree / "third")
    (tree / "sub" / "away").symlink_to("/nowhere/at/all")
    with (tree / "holes").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(os.urandom(1 << 20))
    os.setxattr(tree / "one", b"user.note", b"kept\0")
    os.setxattr(tree / "sub", b"user.note", b"too")
    settle()
    snapshot = db.snapshots.create(tree)
    assert not snapshot.restore(target, tree).problems
    assert seen(target) == seen(tree)
    assert (target / "one").stat().st_nlink == 3
    assert allocated(target) < 4 << 20
    assert list(snapshot.diff(snapshot)) == []
