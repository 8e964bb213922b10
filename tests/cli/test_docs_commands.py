"""`docs/commands.md` is true: its lines run as one session and print what it says, and it leaves out no command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from basin.cli.main import main
from tests.cli.conftest import ROOT, environment

DOCUMENT = ROOT / "docs" / "commands.md"
MARK = "=== line %d ended with %d ==="


class Line(NamedTuple):
    """One command of the page, its line number, and what the page says that it prints."""

    number: int
    command: str
    expected: str


def lines() -> list[Line]:
    found: list[Line] = []
    is_inside = False
    for number, text in enumerate(DOCUMENT.read_text(encoding="utf-8").splitlines(), 1):
        if text.startswith("```"):
            is_inside = text == "```shell-session"
        elif is_inside and text.startswith("$ "):
            found.append(Line(number, text[2:], ""))
        elif is_inside:
            found[-1] = found[-1]._replace(expected=found[-1].expected + text + "\n")
    return found


def script() -> str:
    return "\n".join(f"{line.command}\nprintf '{MARK}\\n' {line.number} $?" for line in lines())


def is_as_expected(printed: str, expected: str) -> bool:
    """Whether they are equal but for `…`, which stands for anything."""
    return re.fullmatch(re.escape(expected).replace("…", ".*"), printed, re.DOTALL) is not None


@pytest.fixture
def command_folder(tmp_path: Path) -> Path:
    """A folder that holds `basin`, started from these sources whether they are installed or not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "basin"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m basin.cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return folder


@pytest.mark.slow
def test_every_line_prints_what_the_page_says(tmp_path: Path, command_folder: Path) -> None:
    variables = environment(tmp_path)
    variables["PATH"] = f"{command_folder}:{variables['PATH']}"
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        ["bash", "-c", script()],
        cwd=work,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    position = 0
    for line in lines():
        match = re.compile(f"(.*?){MARK % (line.number, 0)}\n", re.DOTALL).match(done.stdout, position)
        assert match, f"line {line.number}: {line.command}\n{done.stdout[position:]}"
        assert is_as_expected(match[1], line.expected), f"line {line.number}: {line.command}\n{match[1]}"
        position = match.end()


def test_the_comparison_sees_a_difference() -> None:
    assert is_as_expected("a 1 b\n", "a … b\n")
    assert not is_as_expected("a 1 c\n", "a … b\n")
    assert not is_as_expected("a\nb\n", "a\n")


def test_every_command_has_an_example() -> None:
    commands = "\n".join(line.command for line in lines())
    for name, command in main.commands.items():
        children = command.commands if isinstance(command, click.Group) else {"": command}
        for child in children:
            assert re.search(rf"\bbasin (-b \S+ )?{name} {child}".rstrip(), commands), f"no example of {name} {child}"


def test_every_option_is_described() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")

    def options(command: click.Command) -> set[str]:
        found = {parameter.opts[-1] for parameter in command.params if isinstance(parameter, click.Option)}
        children = command.commands.values() if isinstance(command, click.Group) else ()
        return found.union(*(options(child) for child in children))

    assert {option for option in options(main) if option not in text} == set()
