"""Walking folders: order, rules, and what goes wrong under way."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basin.errors import InvalidArgument
from basin.format.tree import RowKind, order_of
from basin.layers.snapshots.attributes import Attributes, attributes_of, attributes_of_way, decode_attributes
from basin.layers.snapshots.patterns import CACHE_TAG_SIGNATURE, Rules
from basin.layers.snapshots.scan import LIST_MAX, Found, ScanProblem, scan


class Walk:
    """A finished scan: its rows below `top`, by path relative to it, and its problems likewise."""

    def __init__(
        self, top: Path, paths: Sequence[str | bytes] = ("",), rules: Rules | None = None, **options: Any
    ) -> None:
        self.top = os.fsencode(top)
        self.problems: list[ScanProblem] = []
        self.lists = list(self.start(paths, rules or Rules(), **options))
        self.rows = {row.path: row for rows in self.lists for row in rows}

    def start(self, paths: Sequence[str | bytes], rules: Rules, **options: Any) -> Iterator[list[Found]]:
        real = [self.top + b"/" + os.fsencode(path) for path in paths]
        return scan(real, rules, on_problem=self.problems.append, **options)

    def names(self) -> list[str]:
        """All paths in the order of the walk."""
        return self.below([row.path for rows in self.lists for row in rows])

    def below(self, paths: Sequence[bytes]) -> list[str]:
        return [os.fsdecode(path[len(self.top) + 1 :]) for path in paths if path.startswith(self.top + b"/")]

    def attributes(self, name: str) -> Attributes:
        return decode_attributes(self.rows[self.top + b"/" + os.fsencode(name)].meta)

    def kind(self, name: str) -> int:
        return self.rows[self.top + b"/" + os.fsencode(name)].kind

    def failed(self) -> list[tuple[str, int | None]]:
        return [(self.below([one.path])[0], one.error.errno) for one in self.problems]


def make(top: Path, *names: str, content: bytes = b"x") -> None:
    """Files, and directories where a name ends with `/`."""
    for name in names:
        path = top / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


# --- order and content ------------------------------------------------------------------------------------------------


def test_rows_come_directory_by_directory(tmp_path: Path) -> None:
    make(tmp_path, "b/x", "b/a/1", "b/a/2", "a", "b-", "c/y", "b0/z", "empty/")
    walk = Walk(tmp_path)
    assert walk.names() == ["a", "b", "b-", "b0", "c", "empty", "b/a", "b/x", "b/a/1", "b/a/2", "b0/z", "c/y"]
    assert walk.problems == []
    assert all(len({row.parent for row in rows}) == 1 for rows in walk.lists)


def test_the_directories_above_are_rows_that_say_little(tmp_path: Path) -> None:
    make(tmp_path, "a/b/c", "a/other", "d")
    walk = Walk(tmp_path, ["a/b"])
    above = [rows for rows in walk.lists if len(rows[0].path) <= len(walk.top)]
    assert [row.path for rows in above for row in rows] == [
        b"/" + b"/".join(walk.top[1:].split(b"/")[: count + 1]) for count in range(len(above))
    ]
    assert walk.names() == ["a", "a/b", "a/b/c"]
    stat = (tmp_path / "a").stat()
    assert walk.rows[walk.top + b"/a"].meta == attributes_of_way(stat)
    assert walk.attributes("a/b").inode == (tmp_path / "a/b").stat().st_ino


def test_a_row_says_what_the_file_system_says(tmp_path: Path) -> None:
    make(tmp_path, "file")
    (tmp_path / "file").chmod(0o640)
    walk = Walk(tmp_path)
    row = walk.rows[walk.top + b"/file"]
    assert row.stat == (tmp_path / "file").stat()
    assert row.meta == attributes_of(row.stat, xattrs=xattrs_of(tmp_path / "file"))
    assert (row.parent, row.name) == (walk.top[1:], b"file")


def xattrs_of(path: Path) -> dict[bytes, bytes]:
    try:
        return {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}
    except OSError:
        return {}


def test_all_kinds_are_rows_and_links_are_not_followed(tmp_path: Path) -> None:
    make(tmp_path, "file", "directory/inner")
    (tmp_path / "link").symlink_to("directory")
    (tmp_path / "dangling").symlink_to(b"no\xff where".decode("utf-8", "surrogateescape"))
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "socket", 0o140600)
    walk = Walk(tmp_path)
    kinds = {name: walk.kind(name) for name in walk.names()}
    assert kinds == {
        "dangling": RowKind.LINK,
        "directory": RowKind.DIRECTORY,
        "directory/inner": RowKind.FILE,
        "fifo": RowKind.FIFO,
        "file": RowKind.FILE,
        "link": RowKind.LINK,
        "socket": RowKind.SOCKET,
    }
    assert walk.attributes("link").target == b"directory"
    assert walk.attributes("dangling").target == b"no\xff where"


def test_a_device_is_a_row_with_its_numbers() -> None:
    problems: list[ScanProblem] = []
    (row,) = [row for rows in scan([b"/dev/null"], Rules(), on_problem=problems.append) for row in rows][-1:]
    assert (row.path, row.kind, problems) == (b"/dev/null", RowKind.CHARACTER_DEVICE, [])
    assert decode_attributes(row.meta).device == (1, 3)


def test_hard_links_are_known_by_device_and_inode(tmp_path: Path) -> None:
    make(tmp_path, "a", "c")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    walk = Walk(tmp_path)
    stat = (tmp_path / "a").stat()
    assert walk.attributes("a").linked == walk.attributes("b").linked == (stat.st_dev, 2)
    assert walk.attributes("a").inode == walk.attributes("b").inode == stat.st_ino
    assert walk.attributes("c").linked is None


def test_a_large_directory_comes_in_several_lists(tmp_path: Path) -> None:
    for number in range(LIST_MAX + 2):
        (tmp_path / f"{number:06}").touch()
    make(tmp_path, "~/inner")
    walk = Walk(tmp_path)
    assert [len(rows) for rows in walk.lists[-3:]] == [LIST_MAX, 3, 1]
    assert walk.names() == [*(f"{number:06}" for number in range(LIST_MAX + 2)), "~", "~/inner"]


folders: st.SearchStrategy[Any] = st.recursive(
    st.none(),
    lambda inner: st.dictionaries(
        st.binary(min_size=1, max_size=12).filter(
            lambda name: not {b"/"[0], 0} & set(name) and name not in (b".", b"..")
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)


def build(path: bytes, folder: Any) -> Iterator[tuple[bytes, bytes]]:
    """Make a folder; gives its rows as (parent, name), relative and in no order."""
    os.mkdir(path)  # noqa: PTH102  # of bytes
    for name, inner in folder.items():
        yield b"", name
        below = path + b"/" + name
        if inner is None:
            os.close(os.open(below, os.O_CREAT | os.O_EXCL))
        else:
            for parent, child in build(below, inner):
                yield (name + b"/" + parent if parent else name), child


@settings(max_examples=60)
@given(st.dictionaries(st.binary(min_size=1, max_size=8).map(bytes.hex).map(os.fsencode), folders, max_size=4))
def test_any_folder_is_walked_in_the_order_of_a_tree(folder: Any) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        top = os.fsencode(scratch) + b"/\xfftop\n"
        expected = sorted(build(top, folder), key=lambda row: (order_of(row[0]), row[1]))
        problems: list[ScanProblem] = []
        rows = [row for rows in scan([top], Rules(excludes=["/no*such"]), on_problem=problems.append) for row in rows]
        below = [(row.parent[len(top) :], row.name) for row in rows if row.parent.startswith(top[1:])]
        assert below == expected
        assert problems == []
        assert all(row.path == b"/" + row.parent + b"/" * bool(row.parent) + row.name for row in rows)
        every = [(order_of(row.parent), row.name) for row in rows]
        assert every == sorted(set(every))


def test_a_path_too_long_for_the_system_is_a_problem(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    name = "n" * 200
    for _ in range(25):
        os.mkdir(name, dir_fd=descriptor)
        below = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    try:
        walk = Walk(tmp_path)
        depths = [path.count("/") + 1 for path in walk.names()]
        assert depths == list(range(1, len(depths) + 1))
        assert len(walk.names()[-1]) + len(walk.top) > 3800
        assert {one.error.errno for one in walk.problems} == {errno.ENAMETOOLONG}
    finally:
        remove_deep(tmp_path, name)


def test_directories_below_many_others_are_reached_without_recursion(tmp_path: Path) -> None:
    depth = sys.getrecursionlimit() + 10
    path = os.fsencode(tmp_path)
    for _ in range(depth):
        path += b"/d"
        os.mkdir(path)  # noqa: PTH102  # pathlib is recursive itself
    walk = Walk(tmp_path)
    assert len(walk.names()) == depth
    assert walk.problems == []
    remove_deep(tmp_path, "d")


def remove_deep(top: Path, name: str) -> None:
    """Take away directories in one another that only hold one another, from the top: nothing here recurses."""
    aside = top / "aside"
    while (top / name).exists():
        below = next((top / name).iterdir(), None)
        if below is not None:
            below.rename(aside)
        (top / name).rmdir()
        if below is not None:
            aside.rename(top / name)


# --- given paths ------------------------------------------------------------------------------------------------------


def test_paths_in_one_another_and_twice_are_merged(tmp_path: Path) -> None:
    make(tmp_path, "a/b/c", "a/d", "e/f", "g")
    walk = Walk(tmp_path, ["a/b", "e", "a", "a/", "./a//b"])
    assert walk.names() == ["a", "e", "a/b", "a/d", "a/b/c", "e/f"]
    assert walk.attributes("a").inode
    assert Walk(tmp_path, ["g", "e", "a/b"]).names() == ["a", "e", "g", "a/b", "a/b/c", "e/f"]


def test_a_given_path_is_kept_whatever_the_rules_say(tmp_path: Path) -> None:
    make(tmp_path, "a/cache/keep/x", "a/cache/other", "a/cache/y.o", "a/z.o", "a/big", content=bytes(100))
    rules = Rules(excludes=["cache/", "*.o"], exclude_larger_than=99)
    assert Walk(tmp_path, ["a"], rules).names() == ["a"]
    walk = Walk(tmp_path, ["a", "a/cache/keep", "a/z.o", "a/big"], rules)
    assert walk.names() == ["a", "a/big", "a/cache", "a/z.o", "a/cache/keep"]
    assert walk.attributes("a/cache").inode == 0
    assert Walk(tmp_path, ["a/cache"], Rules(excludes=["cache"])).names() == [
        "a",
        "a/cache",
        "a/cache/keep",
        "a/cache/other",
        "a/cache/y.o",
        "a/cache/keep/x",
    ]


def test_a_given_link_is_stored_as_a_link_and_one_above_is_followed(tmp_path: Path) -> None:
    make(tmp_path, "real/file")
    (tmp_path / "link").symlink_to("real")
    walk = Walk(tmp_path, ["link"])
    assert walk.names() == ["link"]
    assert walk.kind("link") == RowKind.LINK
    walk = Walk(tmp_path, ["link/file"])
    assert walk.names() == ["link", "link/file"]
    assert walk.kind("link") == RowKind.DIRECTORY
    assert walk.problems == []


def test_what_cannot_lie_below_a_kept_link_or_file_is_told(tmp_path: Path) -> None:
    make(tmp_path, "real/file", "plain")
    (tmp_path / "link").symlink_to("real")
    for paths in (["", "link/file", "plain/x"], ["link", "link/file", "plain", "plain/x"]):
        walk = Walk(tmp_path, paths)
        assert walk.failed() == [("link/file", errno.ENOTDIR), ("plain/x", errno.ENOTDIR)]
        assert walk.kind("link") == RowKind.LINK
    walk = Walk(tmp_path, ["plain/x"])
    assert walk.names() == []
    assert walk.failed() == [("plain/x", errno.ENOTDIR)]


def test_a_path_that_is_not_there_is_told(tmp_path: Path) -> None:
    make(tmp_path, "a/b")
    walk = Walk(tmp_path, ["no", "a", "a/none", "a/b"])
    assert walk.names() == ["a", "a/b"]
    assert walk.failed() == [("no", errno.ENOENT), ("a/none", errno.ENOENT)]


@pytest.mark.parametrize("path", [b"relative", b"", b"/a/../b", b"/a\0"])
def test_a_path_that_is_not_absolute_is_refused(path: bytes) -> None:
    with pytest.raises(InvalidArgument, match="not an absolute path"):
        scan([path], Rules(), on_problem=lambda _: None)


def test_all_of_the_system_can_be_given() -> None:
    problems: list[ScanProblem] = []
    rows = next(scan([b"/"], Rules(), on_problem=problems.append))
    assert [row.name for row in rows] == sorted(os.listdir(b"/"))  # noqa: PTH208  # of bytes
    assert {(row.parent, row.path) for row in rows} == {(b"", b"/" + row.name) for row in rows}


# --- rules ------------------------------------------------------------------------------------------------------------


def test_excludes_are_relative_to_each_given_path(tmp_path: Path) -> None:
    make(tmp_path, "a/tmp/x", "a/b/tmp/x", "c/tmp/x", "c/x.o", "a/b/x.o", "a/keep.o")
    rules = Rules(excludes=["/tmp", "*.o"], includes=["keep.o"])
    assert Walk(tmp_path, ["a", "c"], rules).names() == ["a", "c", "a/b", "a/keep.o", "a/b/tmp", "a/b/tmp/x"]
    assert Walk(tmp_path, ["a", "a/b"], rules).names() == ["a", "a/b", "a/keep.o"]


def test_ignore_files_hold_for_their_directory_and_nest(tmp_path: Path) -> None:
    make(tmp_path, "a.log", "b/a.log", "b/c/a.log", "b/c/x", "b/build/y", "build/z", "b/c/build/w")
    (tmp_path / ".ignore").write_text("*.log\n/build\n")
    (tmp_path / "b/.ignore").write_text("!*.log\nc/x\n[broken\n")
    (tmp_path / "b/c/.ignore").write_text("*.log\n")
    names = Walk(tmp_path, rules=Rules(ignore_files=[".ignore"])).names()
    left_out = {"a.log", "build", "build/z", "b/c/a.log", "b/c/x"}
    assert names == [name for name in Walk(tmp_path).names() if name not in left_out]
    assert {"b/a.log", "b/build/y", "b/c/build/w"} <= set(names)


def test_an_ignore_file_that_is_no_file_or_cannot_be_read_ignores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/.ignore/x", "b/x", "c/x")
    (tmp_path / "b/.ignore").symlink_to("../list")
    os.mkfifo(tmp_path / "c/.ignore")
    make(tmp_path, "list", "d/.ignore", "d/x", content=b"x")
    refuse(monkeypatch, "open", (tmp_path / "d/.ignore").stat().st_ino)
    walk = Walk(tmp_path, rules=Rules(ignore_files=[".ignore"]))
    assert {"a/.ignore/x", "b/x", "c/x", "d/x"} <= set(walk.names())
    assert walk.failed() == [("d/.ignore", errno.EACCES)]


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, inode: int) -> None:
    """Let an `os` function fail for what has this inode, whether it is named by path or by descriptor."""
    real: Callable[..., Any] = getattr(os, function)
    stat = os.stat

    def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
        where: int | None = options.get("dir_fd")
        found = stat(path) if isinstance(path, int) else stat(path, dir_fd=where, follow_symlinks=False)
        if found.st_ino == inode:
            raise PermissionError(errno.EACCES, "refused", path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, function, refusing)


def test_of_a_tagged_cache_only_the_tag_is_kept(tmp_path: Path) -> None:
    make(tmp_path, "cache/x", "cache/deep/y", "cache/deep/z", "fake/x", "linked/x")
    (tmp_path / "cache/CACHEDIR.TAG").write_bytes(CACHE_TAG_SIGNATURE + b"\n# more")
    (tmp_path / "fake/CACHEDIR.TAG").write_bytes(CACHE_TAG_SIGNATURE[:-1])
    (tmp_path / "linked/CACHEDIR.TAG").symlink_to("../cache/CACHEDIR.TAG")
    plain = Walk(tmp_path).names()
    names = Walk(tmp_path, exclude_caches=True).names()
    assert set(plain) - set(names) == {"cache/x", "cache/deep", "cache/deep/y", "cache/deep/z"}
    walk = Walk(tmp_path, ["", "cache/deep/y"], exclude_caches=True)
    assert [name for name in walk.names() if "cache" in name] == [
        "cache",
        "cache/CACHEDIR.TAG",
        "cache/deep",
        "cache/deep/y",
    ]


def test_a_marked_directory_is_kept_with_its_mark_alone(tmp_path: Path) -> None:
    make(tmp_path, "a/.nobackup", "a/x", "a/b/y", "c/z")
    names = Walk(tmp_path, rules=Rules(exclude_if_present=[".nobackup"])).names()
    assert names == ["a", "c", "a/.nobackup", "c/z"]


def test_files_that_are_too_large_are_left_out(tmp_path: Path) -> None:
    make(tmp_path, "small", content=bytes(10))
    make(tmp_path, "large/large", content=bytes(11))
    assert Walk(tmp_path, rules=Rules(exclude_larger_than=10)).names() == ["large", "small"]


def test_another_file_system_is_entered_only_if_asked_for() -> None:
    rules = Rules(excludes=["/*", "/proc/*"], includes=["/proc", "/proc/version"])
    both = [Walk(Path("/"), rules=rules, one_file_system=one).rows for one in (False, True)]
    assert [[row.path for row in rows.values()] for rows in both] == [[b"//proc"[1:], b"/proc/version"], [b"/proc"]]
    walk = Walk(Path("/"), ["", "proc/version"], Rules(excludes=["/*"]), one_file_system=True)
    assert list(walk.rows) == [b"/proc", b"/proc/version"]
    walk = Walk(Path("/"), ["", "proc/version"], Rules(excludes=["/*"], includes=["/proc"]), one_file_system=True)
    assert list(walk.rows) == [b"/proc", b"/proc/version"]
    process = str(os.getpid())
    walk = Walk(Path("/"), ["", "proc"], Rules(excludes=["*"], includes=[process, "comm"]), one_file_system=True)
    assert list(walk.rows) == [b"/proc", *(os.fsencode(f"/proc/{process}{name}") for name in ("", "/comm"))]


# --- extended attributes ----------------------------------------------------------------------------------------------


def test_extended_attributes_are_kept_with_what_can_be_read_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a", "b")
    values = {"user.one": b"1", "user.\udcff": b"\0"}
    errors = {"user.gone": errno.ENODATA, "user.secret": errno.EACCES}

    def getxattr(path: bytes, name: str, *, follow_symlinks: bool) -> bytes:
        assert not follow_symlinks
        if name in errors:
            raise OSError(errors[name], "refused", path)
        return values[name]

    monkeypatch.setattr(os, "listxattr", lambda path, **_: [*errors, *values] if path.endswith(b"/a") else [])
    monkeypatch.setattr(os, "getxattr", getxattr)
    walk = Walk(tmp_path)
    assert walk.attributes("a").xattrs == {b"user.one": b"1", b"user.\xff": b"\0"}
    assert walk.attributes("b").xattrs == {}
    assert walk.failed() == [("a", errno.EACCES)]


def test_too_many_extended_attributes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a")
    monkeypatch.setattr(os, "listxattr", lambda path, **_: ["1", "2", "3", "4", "5"] if path.endswith(b"/a") else [])
    monkeypatch.setattr(os, "getxattr", lambda *_, **__: bytes(1 << 20))
    walk = Walk(tmp_path)
    assert list(walk.attributes("a").xattrs) == [b"1", b"2"]
    assert walk.failed() == [("a", errno.E2BIG)]


def test_a_file_system_without_extended_attributes_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, *(f"d/{number}" for number in range(20)))
    asked = []

    def listxattr(path: bytes, **_: Any) -> list[str]:
        asked.append(path)
        raise OSError(errno.ENOTSUP, "not here", path)

    monkeypatch.setattr(os, "listxattr", listxattr)
    walk = Walk(tmp_path)
    assert len(walk.names()) == 21
    assert walk.problems == []
    assert len(asked) == 1


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_directory_that_vanishes_keeps_its_row(tmp_path: Path) -> None:
    make(tmp_path, "a/x", "b/y")
    walk = Walk(tmp_path)
    seen = []
    for rows in walk.start([""], Rules()):
        seen += walk.below([row.path for row in rows])
        if "a" in seen:
            shutil.rmtree(tmp_path / "a", ignore_errors=True)
    assert seen == ["a", "b", "b/y"]
    assert walk.failed() == [("a", errno.ENOENT)]


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_a_directory_that_is_swapped_for_another_is_not_entered(tmp_path: Path, kind: str) -> None:
    make(tmp_path, "top/a/x", "top/b/y", "secret/z")
    walk = Walk(tmp_path)
    seen = []
    for rows in walk.start(["top"], Rules()):
        seen += walk.below([row.path for row in rows])
        if "top/a" in seen and (tmp_path / "secret").exists() and not (tmp_path / "top/a").is_symlink():
            (tmp_path / "top/a").rename(tmp_path / "old")
            if kind == "link":
                (tmp_path / "top/a").symlink_to("../secret")
            else:
                (tmp_path / "secret").rename(tmp_path / "top/a")
    assert seen == ["top", "top/a", "top/b", "top/b/y"]
    assert [name for name, _ in walk.failed()] == ["top/a"]


def test_a_directory_above_that_is_swapped_for_a_link_leads_nowhere(tmp_path: Path) -> None:
    make(tmp_path, "top/a/b/x", "secret/b/z")
    before = descriptors()
    walk = Walk(tmp_path)
    seen = []
    for rows in walk.start(["top"], Rules()):
        seen += walk.below([row.path for row in rows])
        if seen[-1:] == ["top/a/b"]:
            (tmp_path / "top/a").rename(tmp_path / "old")
            (tmp_path / "top/a").symlink_to("../secret")
    assert seen == ["top", "top/a", "top/a/b"]
    assert walk.failed() == [("top/a/b", errno.ESTALE)]
    assert descriptors() == before


@pytest.mark.parametrize("function", ["open", "listdir", "stat", "readlink"])
def test_what_cannot_be_looked_at_is_told_and_the_walk_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    make(tmp_path, "a/x", "b/y")
    (tmp_path / "a-link").symlink_to("x")
    refuse(monkeypatch, function, (tmp_path / ("a-link" if function == "readlink" else "a")).lstat().st_ino)
    walk = Walk(tmp_path)
    left_out = {"open": {"a/x"}, "listdir": {"a/x"}, "stat": {"a", "a/x"}, "readlink": {"a-link"}}[function]
    assert set(walk.names()) == {"a", "a-link", "a/x", "b", "b/y"} - left_out
    assert walk.failed() == [("a-link" if function == "readlink" else "a", errno.EACCES)]


def test_an_entry_of_no_known_kind_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a", "b")
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        found = real(path, **options)
        return os.stat_result((0o160000, *found[1:])) if path == b"a" else found

    monkeypatch.setattr(os, "stat", stat)
    walk = Walk(tmp_path)
    assert walk.names() == ["b"]
    assert walk.failed() == [("a", errno.EINVAL)]


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    make(tmp_path, "a/x", "b/y", ".ignore")
    before = descriptors()
    walk = Walk(tmp_path, rules=Rules(ignore_files=[".ignore"]), exclude_caches=True)
    started = walk.start([""], Rules())
    next(started)
    next(started)
    started.close()  # type: ignore[attr-defined]  # it is a generator, which may be left at any point
    assert descriptors() == before


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))
