"""What a pattern matches, which of several decides, and what no pattern can be."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import InvalidArgument
from basin.layers.snapshots.patterns import Patterns, Rules, Scope, pattern_lines, read_patterns

MATCHES = [
    # pattern, paths that it matches, paths that it does not; a path that ends with "/" is a directory
    ("a", ["a", "a/", "x/a", "x/y/a/"], ["b", "ab", "a\n", "x/ab"]),
    ("a/", ["a/", "x/a/"], ["a", "x/a"]),
    ("/a", ["a", "a/"], ["x/a"]),
    ("a/b", ["a/b", "a/b/"], ["x/a/b", "b"]),
    ("*.o", ["x.o", ".o", "d/x.o", "a\nb.o"], ["x.oo", "x.o\n"]),
    ("*", ["a", "\n", "a/b"], []),
    ("*/", ["a/", "a/b/"], ["a", "a/b"]),
    ("/*", ["a", "b/"], ["a/b"]),
    ("**", ["a", "a/b", "a/b/"], []),
    ("/**", ["a", "a/b", "a/b/"], []),
    ("**/", ["a/", "a/b/"], ["a"]),
    ("**/a", ["a", "x/a", "x/y/a"], ["x/b"]),
    ("**/a/b", ["a/b", "x/a/b"], ["xa/b", "b"]),
    ("a/**", ["a/b", "a/b/c", "a/\n/c"], ["a", "a/", "x/a/b"]),
    ("a/**/", ["a/b/", "a/b/c/"], ["a/", "a/b"]),
    ("a/**/b", ["a/b", "a/x/b", "a/x/y/b", "a/x\ny/b"], ["a/xb", "ab"]),
    ("*/**", ["a/b", "a/b/c"], ["a", "a/"]),
    ("a?c", ["abc", "aéc", "a\nc", "a\udcffc"], ["ac", "abbc"]),
    ("[a-c]x", ["ax", "cx"], ["dx"]),
    ("[!a-c]x", ["dx"], ["ax", "x"]),
    ("[^a]x", ["bx"], ["ax"]),
    ("[]a]x", ["]x", "ax"], ["bx"]),
    ("a[^b]", ["ac"], ["a/", "ab"]),
    ("[[:digit:]]x", ["1x"], ["ax", ":x"]),
    ("[[ab]x", ["[x", "ax"], ["cx"]),
    ("a[b-]&&c", ["a-&&c"], ["ac"]),
    ("[&&x]y", ["&y", "xy"], ["ay"]),
    ("(a|b)+.$^", ["(a|b)+.$^"], ["a", "b"]),
    ("(?P<name>x)", ["(aP<name>x)"], ["x"]),
    ("\\*x", ["*x"], ["ax"]),
    ("\\!x", ["!x"], ["x"]),
    ("\\#x", ["#x"], ["x"]),
    ("#x", ["#x"], ["x"]),
    ("a b ", ["a b"], ["a b "]),
    ("a\\ ", ["a "], ["a"]),
    (" a", [" a"], ["a"]),
    ("a\t", ["a\t"], ["a"]),
    ("a\u00a0", ["a\u00a0"], ["a"]),
    ("é", ["é", "x/é"], ["e"]),
    ("a\udcff", ["a\udcff"], ["a", "aÿ"]),
]


def match(patterns: Patterns, path: str) -> bool | None:
    prefix, slash, name = path.removesuffix("/").rpartition("/")
    return patterns.decide(prefix + slash, name, is_directory=path.endswith("/"))


@pytest.mark.parametrize(("pattern", "matching", "others"), MATCHES, ids=[repr(one[0]) for one in MATCHES])
def test_a_pattern_matches_what_git_says(pattern: str, matching: list[str], others: list[str]) -> None:
    patterns = Patterns([pattern])
    assert [path for path in matching if match(patterns, path) is not True] == []
    assert [path for path in others if match(patterns, path) is not None] == []
    negated = Patterns(["!" + pattern])
    assert [path for path in matching if match(negated, path) is not False] == []


@pytest.mark.parametrize("line", ["", " ", "/", "//", "!", "!/", "\n"])
def test_an_empty_line_matches_nothing(line: str) -> None:
    assert not Patterns([line])
    assert match(Patterns([line]), "a") is None


@pytest.mark.parametrize("line", ["[a", "a\\", "[b-a]", "a/[/b"])
def test_what_is_no_pattern_is_refused_or_matches_nothing(line: str) -> None:
    with pytest.raises(InvalidArgument, match="not a pattern"):
        Patterns([line])
    with pytest.raises(InvalidArgument, match="not a pattern"):
        Rules(includes=[line])
    lenient = Patterns(["x", line], lenient=True)
    assert match(lenient, "x") is True
    assert match(lenient, "a") is None


def test_the_last_pattern_that_matches_decides_names_and_paths_alike() -> None:
    patterns = Patterns(["*.o", "!/lib/keep.o", "keep.o/", "!/lib", "b", "!a/b", "a/b"])
    assert match(patterns, "x.o") is True
    assert match(patterns, "lib/x.o") is True
    assert match(patterns, "lib/keep.o") is False
    assert match(patterns, "lib/keep.o/") is True
    assert match(patterns, "lib") is False
    assert match(patterns, "a/b") is True
    assert match(Patterns(["a/b", "!b"]), "a/b") is False
    assert match(Patterns(["!b", "a/b"]), "a/b") is True


def test_a_path_is_covered_by_what_it_lies_in() -> None:
    patterns = Patterns(["cache/", "*.o", "!keep.o", "/top"])
    assert patterns.covers(b"a/cache/x", is_directory=False)
    assert patterns.covers(b"a/cache/keep.o", is_directory=False)
    assert patterns.covers(b"a/x.o", is_directory=False)
    assert patterns.covers(b"top/a/b", is_directory=False)
    assert not patterns.covers(b"a/top/b", is_directory=False)
    assert not patterns.covers(b"a/keep.o", is_directory=False)
    assert not patterns.covers(b"a/cache", is_directory=False)


words = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=8)
names = words | st.binary(min_size=1, max_size=8).map(lambda name: name.decode("utf-8", "surrogateescape")).filter(
    lambda name: "/" not in name and "\0" not in name
)


def escaped(name: str) -> str:
    return "".join("\\" + one if one in "\\*?[]!# " else one for one in name)


@given(st.lists(names, min_size=1, max_size=6))
def test_an_escaped_path_matches_itself_alone(parts: list[str]) -> None:
    if parts[-1].endswith(("\n", "\r")):
        return  # Such a name cannot stand at the end of a line.
    path = "/".join(parts)
    patterns = Patterns(["/" + "/".join(map(escaped, parts))])
    assert match(patterns, path) is True
    assert match(patterns, path + "/") is True
    assert match(patterns, path + "x") is None
    assert match(patterns, "x/" + path) is None
    assert match(Patterns([escaped(parts[-1])]), path) is True


@given(st.lists(st.text(st.sampled_from("ab*?[]!^-/\\# .(|:&"), max_size=8), max_size=5), st.lists(words, max_size=5))
def test_no_line_of_an_ignore_file_stops_a_backup(lines: list[str], parts: list[str]) -> None:
    patterns = Patterns(lines, lenient=True)
    for name in parts:
        assert match(patterns, name) in (True, False, None)


@given(st.lists(st.sampled_from(["a", "!a", "b/", "a*", "!*b", "/a", "!/b", "a/b", "!a/b/"]), max_size=8))
def test_a_list_decides_as_its_patterns_one_by_one(lines: list[str]) -> None:
    together = Patterns(lines)
    for path in ("a", "b", "ab", "a/", "b/", "a/b", "a/b/", "b/a"):
        verdicts = [match(Patterns([line]), path) for line in lines]
        expected = next((one for one in reversed(verdicts) if one is not None), None)
        assert match(together, path) is expected


def test_a_file_of_patterns_has_comments_empty_lines_and_any_ends_of_lines(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf# comment\n\n*.o\r\n \n\\#x\na\\ \n\xff"
    assert pattern_lines(data) == ["*.o", "\\#x", "a\\ ", "\udcff"]
    path = tmp_path / "patterns"
    path.write_bytes(data)
    assert read_patterns(path) == pattern_lines(data)
    path.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(InvalidArgument, match="too large"):
        read_patterns(path)


def test_includes_make_exceptions_of_all_excludes() -> None:
    rules = Rules(excludes=["*.o", "!b.o"], includes=["/keep/*", "!/keep/c.o"])
    assert match(rules.patterns, "a.o") is True
    assert match(rules.patterns, "b.o") is False
    assert match(rules.patterns, "keep/a.o") is False
    assert match(rules.patterns, "keep/c.o") is True


def test_rules_say_what_they_are() -> None:
    rules = Rules(["*.o"], ["a"], [".gitignore"], 100, [".nobackup"])
    assert rules.describe() == [
        "--exclude=*.o",
        "--include=a",
        "--ignore-file=.gitignore",
        "--exclude-larger-than=100",
        "--exclude-if-present=.nobackup",
    ]
    assert Rules().describe() == []
    assert rules == Rules(("*.o",), ("a",), (".gitignore",), 100, (".nobackup",))


@pytest.mark.parametrize(
    "fields",
    [
        {"excludes": "*.o"},
        {"excludes": [""]},
        {"includes": [b"a"]},
        {"ignore_files": ["a/b"]},
        {"ignore_files": [".."]},
        {"exclude_if_present": ["a\0"]},
        {"exclude_larger_than": -1},
    ],
    ids=repr,
)
def test_impossible_rules_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        Rules(**fields)  # type: ignore[arg-type]  # wrong on purpose


def test_the_nearest_list_decides_and_the_caller_before_the_files() -> None:
    outer = Scope().with_given(Patterns(["*.a", "/d/x"])).with_lying(Patterns(["*.b", "/d/y", "*.a"]))
    inner = outer.within(b"d").with_lying(Patterns(["!*.b", "!*.a", "z"]))
    assert outer.excludes(b"1.a", is_directory=False)
    assert outer.excludes(b"1.b", is_directory=False)
    assert not outer.excludes(b"x", is_directory=False)
    assert inner.excludes(b"1.a", is_directory=False)
    assert not inner.excludes(b"1.b", is_directory=False)
    assert inner.excludes(b"x", is_directory=False)
    assert inner.excludes(b"y", is_directory=False)
    assert inner.excludes(b"z", is_directory=False)
    assert not inner.within(b"e").excludes(b"y", is_directory=False)
    near = outer.within(b"d").with_given(Patterns(["!*.a"]))
    assert not near.excludes(b"1.a", is_directory=False)
