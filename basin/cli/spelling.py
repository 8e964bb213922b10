"""How `basin kv` writes names and values: what an argument means, and how a name or value is shown.

Invariants:
- Names and values of bytes: an argument is the bytes that the shell passes, or with `--hex` (names alone) what the hex
  digits say; they are shown the same way.
- In a keyspace whose names are numbers or tuples, or whose values are JSON, they are written and shown as JSON.

Only `basin.cli` imports this module.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from basin.cli.failures import EXIT_USAGE, Failure, reason
from basin.cli.output import bytes_field, json_text, printable, read_input
from basin.errors import InvalidArgument

_ORDERS: Final = ("bytes", "u64", "tuple")
_VALUES: Final = ("bytes", "json")


@dataclass(frozen=True, slots=True)
class Spelling:
    """The names and values of one keyspace, as text."""

    is_hex: bool
    order: str = "bytes"
    values: str = "bytes"

    def parse_name(self, text: str) -> Any:
        """The name that an argument means; what cannot be one is a usage error."""
        if self.order != "bytes":
            name = _from_json(text)
            return _tuple_of(name) if isinstance(name, list) else name
        if not self.is_hex:
            return os.fsencode(text)  # exactly the bytes the shell passed, whether they are UTF-8 or not
        try:
            return bytes.fromhex(text)
        except ValueError:
            raise Failure(f"not hex digits: {text!r}", EXIT_USAGE) from None

    def parse_value(self, text: str) -> Any:
        """The value that an argument means: `-` is standard input, `@FILE` a file's bytes, else the text itself."""
        data = _read_value(text)
        return data if self.values == "bytes" else _from_json(data)

    def show_name(self, name: Any) -> str:
        """The name as one printable piece of text."""
        if not isinstance(name, bytes):
            return json_text(name)
        return name.hex() if self.is_hex else printable(name)

    def entry(self, name: Any, *value: Any) -> dict[str, Any]:
        """The JSON object of a name and, if given, its value."""
        fields = {"name": name.hex()} if self.is_hex and isinstance(name, bytes) else _field("name", name)
        return fields | (_field("value", value[0]) if value else {})


def names_of(source: Any, keyspace: str | None, *, is_hex: bool) -> tuple[Any, Spelling]:
    """The mapping that holds the names, of a database, view or batch or of one of its keyspaces; and their spelling."""
    if keyspace is None:
        return source, Spelling(is_hex)
    names = source.keyspace(keyspace)
    order = _fixed(source, keyspace, "order", _ORDERS)
    if is_hex and order != "bytes":
        raise Failure(f"--hex is for names of bytes; those of keyspace {keyspace!r} are {order}", EXIT_USAGE)
    return names, Spelling(is_hex, order, _fixed(source, keyspace, "values", _VALUES))


def _fixed(source: Any, keyspace: str, option: str, kinds: tuple[str, ...]) -> str:
    """Which of `kinds` a keyspace that exists was created with: the one that does not raise."""
    for kind in kinds:
        try:
            source.keyspace(keyspace, **{option: kind})
        except InvalidArgument:
            continue
        return kind
    raise InvalidArgument(f"keyspace {keyspace!r} holds another {option} than this program knows")


def show_value(value: Any) -> str:
    """A value as one printable piece of text."""
    return printable(value) if isinstance(value, bytes) else json_text(value)


def raw_value(value: Any) -> bytes:
    """A value as the bytes that `kv get` prints."""
    return value if isinstance(value, bytes) else json_text(value).encode()


def _field(label: str, value: Any) -> dict[str, Any]:
    return bytes_field(label, value) if isinstance(value, bytes) else {label: value}


def _tuple_of(elements: list[Any]) -> tuple[Any, ...]:
    return tuple(_tuple_of(element) if isinstance(element, list) else element for element in elements)


def _from_json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Failure(f"not JSON, which this keyspace holds: {error}", EXIT_USAGE) from None


def _read_value(text: str) -> bytes:
    if text == "-":
        return read_input()
    if not text.startswith("@"):
        return os.fsencode(text)
    try:
        return Path(text[1:]).read_bytes()
    except OSError as error:
        raise Failure(f"cannot read {text[1:]}: {reason(error)}") from None
