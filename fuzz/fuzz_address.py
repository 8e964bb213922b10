"""Content keys and addresses of parts as text: what parses prints as it was, but for upper-case digits."""

from __future__ import annotations

from collections.abc import Iterator

from basin.terms import parse_address
from fuzz.material import KEY


def one_input(data: bytes) -> None:
    text = data.decode("utf-8", errors="replace")
    if str(parse_address(text)) != text.lower():
        raise AssertionError("an address prints differently")


def seeds() -> Iterator[bytes]:
    yield KEY.hex().encode()
    yield KEY.hex().upper().encode()
    yield f"{KEY.hex()}-17".encode()
