"""Which entries a backup leaves out: patterns as in `.gitignore`, given by the caller or lying in the folders.

How it is decided whether an entry stays, in this order:

1. The caller's patterns: the last one that matches decides; `includes` stand behind all `excludes`. They are relative
   to each of the paths that are backed up; where one of these lies in another, the nearer one is asked first.
2. The ignore files in the entry's directory and those above it, up to the path that is backed up, the nearest first.
3. Otherwise it stays.

Invariants:

- As in git, nothing below an excluded directory is looked at, so nothing below it can be included again: write
  `cache/*` and `!cache/keep`, not `cache/`.
- A pattern is asked about the entry itself, never about the directories above it: those have been decided.
- Names that are not UTF-8 are matched with each wrong byte as one character, which no pattern but a wild card matches.

The library `pathspec` translates the parts of a path to regular expressions. All patterns of a list become one regular
expression for names and one for paths, the last pattern first, so that an entry costs a search or two however many
patterns there are. Imported by `scan`, and by whatever else selects paths of a tree.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from basin.errors import InvalidArgument

CACHE_TAG_NAME: Final = b"CACHEDIR.TAG"
CACHE_TAG_SIGNATURE: Final = b"Signature: 8a477f597d28d172789f06886806bc55"
"""What a tag begins with that marks a directory as a cache: the Cache Directory Tagging Specification of bford.info."""
PATTERN_FILE_SIZE_MAX: Final = 1 << 20

_NAMED_GROUP: Final = re.compile(r"\(\?P<\w+>")
_CLASSES: Final = {
    "[:alnum:]": "a-zA-Z0-9",
    "[:alpha:]": "a-zA-Z",
    "[:blank:]": " \t",
    "[:digit:]": "0-9",
    "[:lower:]": "a-z",
    "[:space:]": " \t\n\r\f\v",
    "[:upper:]": "A-Z",
    "[:xdigit:]": "0-9a-fA-F",
}


class _Pattern(NamedTuple):
    """One pattern. `regex` fits all of a name, or of a path relative to where the pattern stands."""

    regex: str
    excludes: bool
    of_directories: bool
    of_path: bool


class _Alternatives:
    """Several patterns as one regular expression; tells the last of them that fits."""

    __slots__ = ("_search", "_verdicts")

    def __init__(self, numbered: Iterable[tuple[int, _Pattern]]) -> None:
        last_first = sorted(numbered, reverse=True)
        self._search = _compiled("|".join(f"({one.regex})" for _, one in last_first)).fullmatch
        self._verdicts = [(number, one.excludes) for number, one in last_first]

    def last(self, text: str) -> tuple[int, bool]:
        """The number of the last pattern that fits, and whether it excludes; the number is -1 if none does."""
        found = self._search(text)
        return (-1, False) if found is None or not found.lastindex else self._verdicts[found.lastindex - 1]


class Patterns:
    """An ordered list of patterns, all relative to one directory."""

    __slots__ = ("_names", "_paths")

    def __init__(self, lines: Iterable[str], *, lenient: bool = False) -> None:
        """Raises `InvalidArgument` for a line that is no pattern; if `lenient`, such a line matches nothing."""
        numbered = list(enumerate(_parsed(lines, lenient=lenient)))
        self._names = _for_both_kinds([(number, one) for number, one in numbered if not one.of_path])
        self._paths = _for_both_kinds([(number, one) for number, one in numbered if one.of_path])

    def __bool__(self) -> bool:
        return any(self._names) or any(self._paths)

    def decide(self, prefix: str, name: str, *, is_directory: bool) -> bool | None:
        """Whether the entry is excluded; `None` if no pattern matches it. `prefix` is empty, or ends with `/`."""
        by_name, by_path = self._names[is_directory], self._paths[is_directory]
        number, excludes = (-1, False) if by_name is None else by_name.last(name)
        if by_path is not None:
            number, excludes = max((number, excludes), by_path.last(prefix + name))
        return None if number < 0 else excludes

    def covers(self, path: bytes, *, is_directory: bool) -> bool:
        """Whether a path, or a directory that it lies in, is matched and not excepted again. Costs a search a part."""
        prefix = ""
        *parents, name = text_of_path(path).split("/")
        for parent in parents:
            if self.decide(prefix, parent, is_directory=True):
                return True
            prefix += parent + "/"
        return bool(self.decide(prefix, name, is_directory=is_directory))


def _for_both_kinds(numbered: Sequence[tuple[int, _Pattern]]) -> tuple[_Alternatives | None, _Alternatives | None]:
    """For what is no directory, and for directories."""
    of_all = [(number, one) for number, one in numbered if not one.of_directories]
    return _Alternatives(of_all) if of_all else None, _Alternatives(numbered) if numbered else None


def _parsed(lines: Iterable[str], *, lenient: bool) -> Iterator[_Pattern]:
    for line in lines:
        try:
            pattern = _parse(line)
        except (ValueError, re.error) as error:
            if not lenient:
                raise InvalidArgument(f"not a pattern: {line!r}", pattern=line) from error
            continue
        if pattern is not None:
            yield pattern


def _parse(line: str) -> _Pattern | None:
    """A line as a pattern; `None` if it is empty. Raises `ValueError`, `re.error` (which is none) for a wrong one."""
    body = _trimmed(line)
    excludes = not body.startswith("!")
    body = body if excludes else body[1:]
    of_directories = body.endswith("/")
    body = body.rstrip("/") if of_directories else body
    *above, name = body.split("/")
    if "**" in (*above, name) and set(above) <= {"", "**"}:  # A name at any depth is what a plain name is anyway.
        body = name
    if not body:
        return None
    if body.endswith("/**"):  # All that is below; spelled so that the whole path must fit.
        body += "/*"
    of_path = "/" in body
    anchored = body if body.startswith("/") else "/" + body
    return _Pattern(".+" if body in ("*", "**") else _translated(anchored), excludes, of_directories, of_path)


def _trimmed(line: str) -> str:
    """Without the end of the line and the spaces before it, unless a backslash keeps the last of them."""
    line = line.rstrip("\r\n")
    body = line.rstrip(" ")
    backslashes = len(body) - len(body.rstrip("\\"))
    return body + " " if body != line and backslashes % 2 else body


def _translated(anchored: str) -> str:
    for name, members in _CLASSES.items():
        anchored = anchored.replace(name, members)
    if anchored[-1].isspace():  # The translator trims white space; between brackets it does not look like any.
        anchored = f"{anchored[:-1].removesuffix(chr(92))}[{anchored[-1]}]"
    from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

    text, _ = GitIgnoreSpecPattern.pattern_to_regex(anchored)
    if text is None:
        raise ValueError("a bracket is not closed")
    text = _NAMED_GROUP.sub("(?:", text)  # Our groups are counted.
    _compiled(text)
    return text


def _compiled(text: str) -> re.Pattern[str]:
    """Compile; what may come to mean a set in a set means one character here, and is no reason to warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return re.compile(text, re.DOTALL)


def text_of_path(path: bytes) -> str:
    """A name or path as patterns see it."""
    return path.decode("utf-8", "surrogateescape")


def pattern_lines(data: bytes) -> list[str]:
    """The patterns of a file's content: without comments, empty lines, and a byte order mark."""
    lines = text_of_path(data.removeprefix(b"\xef\xbb\xbf")).split("\n")
    return [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#")]


def read_patterns(path: Path) -> list[str]:
    """The patterns of the user's file. Raises `InvalidArgument` if it is too large, `OSError` if it cannot be read."""
    with path.open("rb") as file:
        data = file.read(PATTERN_FILE_SIZE_MAX + 1)
    if len(data) > PATTERN_FILE_SIZE_MAX:
        raise InvalidArgument(f"{path} is too large for a file of patterns")
    return pattern_lines(data)


@dataclass(frozen=True)
class Rules:
    """What a backup leaves out. Patterns are as in `.gitignore`, but that `#` begins no comment.

    `excludes`: patterns of what to leave out; one that begins with `!` makes an exception. `includes`: patterns of what
    stays nevertheless. `ignore_files`: names of files, like `.gitignore`, whose patterns hold for their directory.
    `exclude_larger_than`: files of more bytes are left out. `exclude_if_present`: a directory with an entry of such a
    name is kept with that entry alone. Raises `InvalidArgument` for what is no pattern or no name.
    """

    excludes: Sequence[str] = ()
    includes: Sequence[str] = ()
    ignore_files: Sequence[str] = ()
    exclude_larger_than: int | None = None
    exclude_if_present: Sequence[str] = ()
    patterns: Patterns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("excludes", "includes", "ignore_files", "exclude_if_present"):
            values = getattr(self, name)
            if isinstance(values, (str, bytes)) or not all(isinstance(one, str) and one for one in values):
                raise InvalidArgument(f"{name} is a list of texts, none of them empty")
            object.__setattr__(self, name, tuple(values))
        for name in (*self.ignore_files, *self.exclude_if_present):
            if "/" in name or "\0" in name or name in (".", ".."):
                raise InvalidArgument(f"not a name of a file: {name!r}")
        if self.exclude_larger_than is not None and self.exclude_larger_than < 0:
            raise InvalidArgument("exclude_larger_than is a number of bytes")
        exceptions = [one[1:] if one.startswith("!") else "!" + one for one in self.includes]
        object.__setattr__(self, "patterns", Patterns([*self.excludes, *exceptions]))

    def describe(self) -> list[str]:
        """The rules as options of the command line, for people."""
        described = [f"--exclude={one}" for one in self.excludes]
        described += [f"--include={one}" for one in self.includes]
        described += [f"--ignore-file={one}" for one in self.ignore_files]
        if self.exclude_larger_than is not None:
            described.append(f"--exclude-larger-than={self.exclude_larger_than}")
        return described + [f"--exclude-if-present={one}" for one in self.exclude_if_present]


def selection(includes: Sequence[str], excludes: Sequence[str]) -> Callable[[bytes, bool], bool]:
    """Which paths are chosen: those that `includes` cover, all if there are none, but for those that `excludes` cover.

    The patterns are relative to where the paths are. What the result is called with: a path, and whether it is a
    directory. Raises `InvalidArgument` for what is no pattern.
    """
    wanted, unwanted = Patterns(includes), Patterns(excludes)

    def is_chosen(path: bytes, is_directory: bool, /) -> bool:  # noqa: FBT001  # as a restore calls it
        if unwanted and unwanted.covers(path, is_directory=is_directory):
            return False
        return not includes or wanted.covers(path, is_directory=is_directory)

    return is_chosen


class Scope:
    """The patterns that hold in a directory, each list with the directory's path from where the list stands."""

    __slots__ = ("_given", "_levels", "_lying")

    def __init__(self, given: tuple[tuple[Patterns, str], ...] = (), lying: tuple[tuple[Patterns, str], ...] = ()):
        """`given` by the caller, `lying` in the folders; the nearest first."""
        self._given = given
        self._lying = lying
        self._levels = given + lying

    def __bool__(self) -> bool:
        return bool(self._levels)

    def excludes(self, name: bytes, *, is_directory: bool) -> bool:
        """Whether an entry of the directory is left out."""
        text = text_of_path(name)
        for patterns, prefix in self._levels:
            verdict = patterns.decide(prefix, text, is_directory=is_directory)
            if verdict is not None:
                return verdict
        return False

    def within(self, name: bytes) -> Scope:
        """The scope of a sub-directory."""
        if not self:
            return self
        step = text_of_path(name) + "/"
        return Scope(
            tuple((patterns, prefix + step) for patterns, prefix in self._given),
            tuple((patterns, prefix + step) for patterns, prefix in self._lying),
        )

    def with_given(self, patterns: Patterns) -> Scope:
        """With the caller's patterns relative to this directory."""
        return Scope(((patterns, ""), *self._given), self._lying) if patterns else self

    def with_lying(self, patterns: Patterns) -> Scope:
        """With the patterns of an ignore file of this directory."""
        return Scope(self._given, ((patterns, ""), *self._lying)) if patterns else self
