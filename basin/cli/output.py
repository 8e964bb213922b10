r"""How results reach standard output: lines, JSON lines, tables and raw bytes.

Invariants:
- Standard output carries results alone; everything else goes to standard error.
- Text form: bytes are shown as UTF-8, with `\\`, `\t`, `\n`, `\r`, `\xNN` (a byte that is not UTF-8, or a control
  character) and `\uNNNN` (another character that does not print), so a line is one line and reads back unambiguously.
- JSON form: a field `name` holds bytes that are UTF-8; otherwise it is called `name_base64`. Never both.
- A table is drawn for a terminal only; a pipe gets the same cells with tabs between them and no heading.

Only `basin.cli` imports this module.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO, Final

import click

_ESCAPES: Final = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_JSON_META: Final = "basin.cli.json"


def request_json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001  (click)
    """Callback of `--json`, wherever it stands on the command line; click shares `meta` among nested commands."""
    if value:
        context.meta[_JSON_META] = True


def wants_json() -> bool:
    """Whether `--json` was given to the command that runs now."""
    return bool(click.get_current_context().meta.get(_JSON_META))


def printable(data: bytes | str) -> str:
    """One line of printing characters for any bytes, in the form of the module header; of a text, only what does not
    print is replaced: it is a sentence, whose backslashes already mean something.
    """
    if isinstance(data, str):
        return "".join(character if character.isprintable() else _code(character) for character in data)
    text = data.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_ESCAPES.get(character) or printable(character) for character in text)


def _code(character: str) -> str:
    point = ord(character)
    if 0xDC80 <= point <= 0xDCFF:
        return f"\\x{point - 0xDC00:02x}"
    if point < 0x80:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point <= 0xFFFF else f"\\U{point:08x}"


def json_text(value: object) -> str:
    """JSON on one line; bytes inside (identifiers, parts of names) become hex digits."""
    return json.dumps(value, separators=(",", ":"), default=_jsonable)


def bytes_field(label: str, data: bytes) -> dict[str, str]:
    """The JSON field for bytes: `label` if they are UTF-8, else `label_base64`."""
    try:
        return {label: data.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{label}_base64": base64.b64encode(data).decode("ascii")}


def time_text(time_ms: int) -> str:
    """ISO 8601 in UTC; the number itself if it lies outside the calendar (a stored time may be anything)."""
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return str(time_ms)


def write(data: bytes | memoryview) -> None:
    """Send bytes to standard output as they are."""
    _stream().write(data)


def print_line(text: str) -> None:
    """Print one line. The caller has made it printable."""
    _stream().write(text.encode("utf-8", "surrogateescape") + b"\n")
    if sys.stdout.isatty():
        flush()


def print_json(fields: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own (ASCII, so that any terminal and any parser takes it)."""
    print_line(json_text(fields))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of printable cells: drawn on a terminal (which holds them all first), tab-separated elsewhere."""
    if not sys.stdout.isatty():
        for row in rows:
            print_line("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headings, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))  # Text, so that a name is never read as markup
    flush()
    Console(file=sys.stdout).print(table)


def read_input() -> bytes:
    """All of standard input."""
    return input_stream().read()


def input_stream() -> BinaryIO:
    """Standard input as bytes; an `OSError` if it is closed."""
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return sys.stdin.buffer


def flush() -> None:
    """Hand everything printed so far to the system; raise `BrokenPipeError` if nobody reads any more."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()
        _stream().flush()


def _stream() -> BinaryIO:
    if sys.stdout is None:
        raise OSError("standard output is closed")
    return sys.stdout.buffer


def _jsonable(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else str(value)
