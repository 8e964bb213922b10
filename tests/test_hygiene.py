"""What no source of the project may hold: unfinished work, silenced tests and checks, code that runs stored bytes."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator

import pytest

from tests.source_tree import ROOT, Source, imports, parse, sources

FOLDERS = ("basin", "tests", "fuzz", "benchmarks")
LINES_MAX = 600
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK")) + r")\b")
RUNS_STORED_BYTES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}
SILENCERS = ("type: ignore", "noqa", "pragma: no cover")

Rule = Callable[[Iterable[Source]], Iterator[str]]


def comments(source: Source) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def calls(source: Source) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the dotted text of what is called."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def rule_nothing_is_left_unfinished(everything: Iterable[Source]) -> Iterator[str]:
    for source in everything:
        for number, line in enumerate(source.text.splitlines(), 1):
            if UNFINISHED.search(line):
                yield f"{source.path}:{number} {line.strip()}"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
                yield f"{source.path}:{node.lineno} raises NotImplementedError"


def rule_a_skip_names_its_reason(everything: Iterable[Source]) -> Iterator[str]:
    for source in everything:
        for node, called in calls(source):
            if called in ("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail"):
                if not any(keyword.arg == "reason" for keyword in node.keywords):
                    yield f"{source.path}:{node.lineno} {called} without a reason"
            elif called in ("pytest.skip", "pytest.xfail", "unittest.skip") and not (node.args or node.keywords):
                yield f"{source.path}:{node.lineno} {called} without a reason"
        called_marks = {id(node.func) for node, _ in calls(source)}
        for mark in ast.walk(source.tree):
            if not isinstance(mark, ast.Attribute) or id(mark) in called_marks:
                continue
            if ast.unparse(mark) in ("pytest.mark.skip", "pytest.mark.xfail"):
                yield f"{source.path}:{mark.lineno} a bare mark"


def rule_a_silenced_check_says_why(everything: Iterable[Source]) -> Iterator[str]:
    """After `type: ignore[code]` or `noqa: CODE` a reason follows, in the same comment or in the line above."""
    for source in everything:
        lines = source.text.splitlines()
        for number, comment in comments(source):
            if not any(silencer in comment for silencer in SILENCERS):
                continue
            words = re.sub(r"type: ignore(\[[\w, -]+\])?|noqa(: ?[A-Z0-9, ]+)?|pragma: no cover|[#\s()]+", " ", comment)
            above = lines[number - 2].strip() if number > 1 else ""
            if not words.split() and not above.startswith("#"):
                yield f"{source.path}:{number} {comment}"


def rule_stored_bytes_are_never_run(everything: Iterable[Source]) -> Iterator[str]:
    for source in everything:
        if not source.module.startswith("basin") or source.module.startswith("basin.testing"):
            continue
        for line, module, names in imports(source):
            for found in RUNS_STORED_BYTES & {module.split(".")[0], *names}:
                yield f"{source.path}:{line} imports {found}"
        for node, called in calls(source):
            if called == "importlib.import_module" and source.module == "basin":
                continue  # Its own names, from a table of literals: loaded with their first use.
            if called in ("eval", "exec", "compile", "__import__", "importlib.import_module"):
                yield f"{source.path}:{node.lineno} calls {called}"
            if called.endswith("load") and any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                yield f"{source.path}:{node.lineno} loads with allow_pickle"


def rule_a_long_file_says_why(everything: Iterable[Source]) -> Iterator[str]:
    for source in everything:
        length = len(source.text.splitlines())
        header = ast.get_docstring(source.tree) or ""
        if length > LINES_MAX and not re.search(r"\b(long|longer|lines)\b", header, re.IGNORECASE):
            yield f"{source.path} has {length} lines, and its header does not say why it is so long"


def rule_every_module_has_a_header(everything: Iterable[Source]) -> Iterator[str]:
    for source in everything:
        if not ast.get_docstring(source.tree) and source.text.strip():
            yield f"{source.path} has no docstring"


RULES: dict[Rule, list[str]] = {
    rule_nothing_is_left_unfinished: [
        "# TO" + "DO: later",
        "def f():\n    raise NotImplementedError('x')",
    ],
    rule_a_skip_names_its_reason: [
        "import pytest\n@pytest.mark.skip\ndef test(): ...",
        "import pytest\n@pytest.mark.skipif(True)\ndef test(): ...",
        "import pytest\npytest.skip()",
    ],
    rule_a_silenced_check_says_why: ["x = 1  # type: ignore[assignment]", "x = 1  # noqa: E501"],
    rule_stored_bytes_are_never_run: ["import pickle", "from marshal import loads", "eval('1')", "exec('1')"],
    rule_a_long_file_says_why: ["'''A header.'''\n" + "x = 1\n" * 601],
    rule_every_module_has_a_header: ["x = 1"],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("rule_"))
def test_the_sources_keep_the_rule(rule: Rule) -> None:
    assert list(rule([source for folder in FOLDERS for source in sources(folder)])) == []


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, offences in RULES.items() for text in offences])
def test_an_offence_is_found(rule: Rule, text: str) -> None:
    assert list(rule([parse("basin.engine.bad", text)]))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (rule_a_silenced_check_says_why, "x = 1  # type: ignore[assignment]  # the stub is wrong about None"),
        (rule_a_silenced_check_says_why, "# the stub is wrong about None\nx = 1  # type: ignore[assignment]"),
        (rule_a_skip_names_its_reason, "import pytest\npytest.skip('no second file system here')"),
        (rule_a_long_file_says_why, "'''Over 600 lines, because the table is one piece.'''\n" + "x = 1\n" * 601),
    ],
)
def test_what_has_its_reason_is_allowed(rule: Rule, text: str) -> None:
    assert not list(rule([parse("basin.engine.good", text)]))


def test_the_continuous_check_is_the_second_command_of_the_readme() -> None:
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
