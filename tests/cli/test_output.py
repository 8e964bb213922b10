"""The forms in which results are shown: printable text, JSON fields, times, tables, progress bars."""

from __future__ import annotations

import io
import json
import re
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basin.cli import output, progress
from basin.cli.log import _sentence
from basin.cli.stats import _rounded

ERASED_LINE = "\x1b[2K"


class Terminal(io.TextIOWrapper):
    """Standard output or error that claims to be a terminal, and keeps what it is sent."""

    def __init__(self) -> None:
        self.kept = io.BytesIO()
        super().__init__(self.kept, encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> str:
        return self.kept.getvalue().decode()


def unescape(text: str) -> bytes:
    """The inverse of `printable`, by Python's own reading of the same escapes."""
    result = bytearray()
    position = 0
    while position < len(text):
        rest = text[position:]
        size = {"\\x": 4, "\\u": 6, "\\U": 10}.get(rest[:2], 2 if rest[0] == "\\" else 1)
        piece = rest[:size]
        if piece.startswith("\\x"):
            result += bytes.fromhex(piece[2:])
        elif piece[0] == "\\":
            result += piece.encode("ascii").decode("unicode_escape").encode("utf-8", "surrogatepass")
        else:
            result += piece.encode("utf-8")
        position += size
    return bytes(result)


@given(st.binary() | st.text(st.characters(exclude_categories=["Cs"])).map(str.encode))
def test_printable_text_is_one_printing_line_and_reads_back(data: bytes) -> None:
    shown = output.printable(data)
    assert shown.isprintable()
    assert unescape(shown) == data


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"plain", "plain"),
        ("\u20ac".encode(), "\u20ac"),
        (b"a\\b", "a\\\\b"),
        (b"\t\n\r", "\\t\\n\\r"),
        (b"\x00\x1b\x7f\x80\xff", "\\x00\\x1b\\x7f\\x80\\xff"),
        ("\u0080\u202e\U000e0001".encode(), "\\u0080\\u202e\\U000e0001"),
    ],
)
def test_printable_forms(data: bytes, shown: str) -> None:
    assert output.printable(data) == shown


def test_a_sentence_keeps_its_backslashes_and_loses_its_controls() -> None:
    assert output.printable("b'\\xff' \x1b[31m") == "b'\\xff' \\x1b[31m"


@given(st.binary())
def test_json_fields_are_text_or_base64_never_both(data: bytes) -> None:
    import base64

    field = json.loads(json.dumps(output.bytes_field("name", data)))
    if "name" in field:
        assert field == {"name": data.decode()}
    else:
        assert base64.b64decode(field["name_base64"]) == data


@pytest.mark.parametrize(("time_ms", "text"), [(0, "1970-01-01T00:00:00.000+00:00"), (1 << 62, str(1 << 62))])
def test_times_outside_the_calendar_are_shown_as_numbers(time_ms: int, text: str) -> None:
    assert output.time_text(time_ms) == text


def test_sizes_are_rounded_to_units() -> None:
    assert [_rounded(size) for size in (1024, 1536, 1 << 20, 1 << 70)] == [
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "1024.0 EiB",
    ]


def test_changes_read_as_a_sentence() -> None:
    assert _sentence({"names": 2, "session_begun": 1, "a\nb": "x\ny"}) == "names 2, session begun 1, a\\x0ab x\\x0ay"
    assert _sentence({}) == ""


def test_a_terminal_gets_a_table_with_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    output.print_table(("name", "value"), [("[bold]a[/bold]", "1"), ("b", "2")])
    lines = re.sub("\x1b\\[[0-9;]*m", "", terminal.shown).splitlines()
    assert lines[0].split() == ["name", "value"]
    assert lines[1].split() == ["[bold]a[/bold]", "1"]


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    captured = io.StringIO()
    monkeypatch.setattr(sys, "stderr", captured)
    with progress.Progress("storing", 10) as bar:
        bar.advance(5)
        assert bar._timer is None
    assert captured.getvalue() == ""


def test_no_bar_for_a_short_job(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.Progress("storing", 10) as bar:
        bar.advance(10)
    assert terminal.shown == ""


@pytest.mark.parametrize("total", [None, 10])
def test_a_bar_for_a_long_job_on_a_terminal(monkeypatch: pytest.MonkeyPatch, total: int | None) -> None:
    terminal = Terminal()
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    shown = threading.Event()
    start = progress.Progress._start

    def started(self: progress.Progress) -> object:
        bar = start(self)
        shown.set()
        return bar

    monkeypatch.setattr(progress.Progress, "_start", started)
    with progress.Progress("storing", total) as bar:
        assert shown.wait(10)
        bar.advance(5)
        with bar.hidden():
            assert terminal.shown.endswith(ERASED_LINE)
            bar.advance(1)
            assert terminal.shown.endswith(ERASED_LINE)
    assert "storing" in terminal.shown
    assert terminal.shown.endswith(ERASED_LINE)


def test_reading_through_the_counter_counts() -> None:
    with progress.Progress("storing", 10) as bar:
        reader = progress.CountingReader(io.BytesIO(b"0123456789"), bar)
        assert reader.read(4) + reader.read() == b"0123456789"
        assert (reader.size, bar._done) == (10, 10)
