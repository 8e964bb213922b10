"""The documentation is true: links lead somewhere, examples run, commands exist, byte tables equal the code."""

from __future__ import annotations

import ast
import os
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from basin.format import clast, flat, layout, slots, tree
from tests.source_tree import ROOT, sources
from tests.storage.s3_servers import S3Server

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SHELL_LANGUAGES = ("sh", "shell", "bash", "console")
SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q nox && "
TYPE_OF_CODE = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64", "s": "bytes"}
EXAMPLE_TIMEOUT_S = 120
OTHER_LAYOUTS = (clast, flat, slots, tree)  # modules that keep the layout of what they alone know


class Block(NamedTuple):
    """A fenced block: where it starts, its language, its text."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> Iterator[Block]:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```([\w-]*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
            if match[2] in languages:
                line = text.count("\n", 0, match.start()) + 1
                yield Block(document, line, match[2], textwrap.dedent(match[3]))


def anchors(document: Path) -> set[str]:
    """The anchors that headings get: lower case, punctuation dropped, spaces become hyphens."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(document: Path) -> None:
    broken = []
    prose = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("block", list(blocks("python")), ids=lambda block: block.place)
def test_python_examples_run(block: Block, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bucket = bucket_for(request.getfixturevalue("ministack")) if "s3://" in block.text else {}
    warnings = [] if bucket else ["-W", "error"]  # The client libraries of a bucket have warnings of their own.
    run_example([sys.executable, *warnings, "-c", block.text], tmp_path, bucket)


def bucket_for(server: S3Server) -> dict[str, str]:
    """The environment in which `s3://my-bucket` is an empty bucket of `server`."""
    assert server.client().put("/my-bucket", b"") in (200, 409)  # Or it is there already, from another example.
    return {
        "AWS_ACCESS_KEY_ID": server.key,
        "AWS_SECRET_ACCESS_KEY": server.secret,
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_DEFAULT_REGION": server.region,
        "BUCKET_KEY": server.key,
        "BUCKET_SECRET": server.secret,
        "BUCKET_ENDPOINT": server.endpoint,
    }


@pytest.mark.parametrize("block", list(blocks(*SHELL_LANGUAGES)), ids=lambda block: block.place)
def test_commands_run(block: Block, tmp_path: Path) -> None:
    """Each block is one script, started in an empty folder. What starts nox is checked against the noxfile instead."""
    script = ["set -e"]
    for line in block.text.splitlines():
        command = line.strip().removeprefix("$ ")
        if "nox" in command:
            session = re.fullmatch(
                r"(?:\.venv/bin/nox|python3 -m nox) -s ([\w-]+)(?: -- .*)?", command.removeprefix(SET_UP)
            )
            assert session, f"not a command of the README: {command}"
            assert session[1] in nox_sessions()
        else:
            script.append(command)
    run_example(["sh", "-c", "\n".join(script)], tmp_path)


def run_example(command: list[str], folder: Path, variables: Mapping[str, str] | None = None) -> None:
    """Run an example in `folder`, with this installation's commands on the path and a passphrase to use."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "BASIN_PASSPHRASE": "correct horse battery staple",
        "LC_ALL": "C.UTF-8",
        **(variables or {}),
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=EXAMPLE_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def nox_sessions() -> set[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    return {
        node.name.replace("_", "-")  # as the sessions of two words are named
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("session" in ast.unparse(mark) for mark in node.decorator_list)
    }


class Row(NamedTuple):
    """One line of a byte table; `size` is -1 where the table says that it varies."""

    offset: int
    size: int
    type: str
    field: str


def byte_tables() -> dict[str, list[Row]]:
    """The tables of docs/format.md that follow a `<!-- struct: NAME -->` comment."""
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    tables = {}
    for match in re.finditer(r"<!-- struct: (\w+) -->\n+((?:\|.*\n)+)", text):
        head, _, *lines = match[2].splitlines()
        assert [cell.strip() for cell in head.strip("|").split("|")] == ["offset", "size", "type", "field", "meaning"]
        rows = []
        for line in lines:
            offset, size, kind, field, _ = (cell.strip() for cell in line.strip("|").split("|", 4))
            rows.append(Row(int(offset), int(size) if size.isdigit() else -1, kind, field.strip("`")))
        tables[match[1]] = rows
    return tables


def layout_structs() -> dict[str, struct.Struct]:
    constants = {name: value for module in (layout, *OTHER_LAYOUTS) for name, value in vars(module).items()}
    return {
        name: value
        for name, value in constants.items()
        if isinstance(value, struct.Struct) and not name.startswith("_") and f"{name}_SIZE" in constants
    }


def rows_of(shape: struct.Struct) -> list[tuple[int, int, str]]:
    """(offset, size, type) of every field of a little-endian struct without padding."""
    assert shape.format.startswith("<")
    rows, offset = [], 0
    for count, code in re.findall(r"(\d*)([a-zA-Z?])", shape.format):
        repeat = 1 if code == "s" else int(count or 1)
        size = int(count or 1) if code == "s" else struct.calcsize("<" + code)
        for _ in range(repeat):
            rows.append((offset, size, TYPE_OF_CODE[code]))
            offset += size
    return rows


@pytest.mark.parametrize("name", sorted(layout_structs()))
def test_byte_tables_equal_the_structs(name: str) -> None:
    rows = byte_tables()[name]
    fixed = [(row.offset, row.size, row.type) for row in rows if row.size >= 0]
    assert fixed == rows_of(layout_structs()[name])
    assert all(row.offset == layout_structs()[name].size for row in rows if row.size < 0)
    assert len({row.field for row in rows}) == len(rows)


@pytest.mark.parametrize("name", sorted(layout_structs()))
def test_sizes_that_the_code_names_equal_the_structs(name: str) -> None:
    (named,) = {getattr(module, f"{name}_SIZE", None) for module in (layout, *OTHER_LAYOUTS)} - {None}
    assert named == layout_structs()[name].size


def test_no_byte_table_describes_a_struct_that_is_gone() -> None:
    assert set(byte_tables()) == set(layout_structs())


def test_the_guarantees_name_tests_that_exist() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text))
    assert named
    tests = {source.path: source.text for source in sources("tests")}
    missing = [
        path for path, function in named if path not in tests or (function and f"def {function}(" not in tests[path])
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:basin|tests|fuzz|benchmarks|docs)/[\w./]*)`", text))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_document_is_reachable_from_the_readme() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in seen or document.suffix != ".md":
            continue
        seen.add(document)
        targets = re.findall(r"\]\((?![a-z]+:)([^)\s#]+)", document.read_text(encoding="utf-8"))
        waiting += [(document.parent / target).resolve() for target in targets]
    assert set(DOCUMENTS) <= seen
