"""Codecs that keep order: numbers and tuples as names whose byte order is their own order.

`u64` is eight bytes, big-endian. A tuple is its elements one after another, each behind the code of its type; types
sort as None < bool < int < float < bytes < str < tuple, and within a type by value. Bytes and text end with a zero
byte, in which a zero of their own becomes `00 FF`. The idea is that of FoundationDB's tuple layer; the codes are our
own. Pure.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from basin.errors import CorruptionError, InvalidArgument

U64_MAX: Final = (1 << 64) - 1
TUPLE_DEPTH_MAX: Final = 32

_END: Final = 0x00
_NONE: Final = 0x02
_FALSE: Final = 0x03
_TRUE: Final = 0x04
_NEGATIVE: Final = 0x10
_POSITIVE: Final = 0x20
"""Integers: 0x10 + (8 - size) for negative ones of `size` bytes, 0x20 + size for the others."""
_FLOAT: Final = 0x30
_BYTES: Final = 0x40
_TEXT: Final = 0x41
_TUPLE: Final = 0x50
_DOUBLE: Final = struct.Struct(">Q")
_RAW: Final = struct.Struct(">d")
_SIGN: Final = 1 << 63


def encode_u64(number: Any) -> bytes:
    """Eight bytes; raise `InvalidArgument` unless `number` is an int from 0 to 2^64 - 1."""
    if type(number) is not int or not 0 <= number <= U64_MAX:
        raise InvalidArgument(f"a name in this keyspace is an integer from 0 to 2^64 - 1, not {number!r}")
    return number.to_bytes(8, "big")


def decode_u64(data: bytes) -> int:
    """Undo `encode_u64`."""
    if len(data) != 8:
        raise CorruptionError("a name in a u64 keyspace has not eight bytes")
    return int.from_bytes(data, "big")


def encode_tuple(elements: Any, depth: int = 0) -> bytes:
    """A tuple of None, bool, int (64 bits and sign), float, bytes, str and tuples; else `InvalidArgument`."""
    if type(elements) is not tuple or depth > TUPLE_DEPTH_MAX:
        raise InvalidArgument(f"a name in this keyspace is a tuple, at most {TUPLE_DEPTH_MAX} deep, not {elements!r}")
    return b"".join([_encode_element(element, depth) for element in elements])


def _encode_element(element: Any, depth: int) -> bytes:
    match element:
        case None:
            return bytes([_NONE])
        case bool():
            return bytes([_TRUE if element else _FALSE])
        case int():
            return _encode_integer(element)
        case float():
            (raw,) = _DOUBLE.unpack(_RAW.pack(element))
            return bytes([_FLOAT]) + _DOUBLE.pack(raw ^ (U64_MAX if raw & _SIGN else _SIGN))
        case bytes():
            return bytes([_BYTES]) + element.replace(b"\0", b"\0\xff") + b"\0"
        case str():
            return bytes([_TEXT]) + _encode_text(element).replace(b"\0", b"\0\xff") + b"\0"
        case tuple():
            return bytes([_TUPLE]) + encode_tuple(element, depth + 1) + b"\0"
    raise InvalidArgument(f"a tuple name holds None, bool, int, float, bytes, str and tuples, not {element!r}")


def _encode_text(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"text in a tuple name cannot be encoded as UTF-8: {text!r}") from None


def _encode_integer(number: int) -> bytes:
    if abs(number) > U64_MAX:
        raise InvalidArgument(f"an integer in a tuple name has at most 64 bits: {number}")
    size = (abs(number).bit_length() + 7) // 8
    if number >= 0:
        return bytes([_POSITIVE + size]) + number.to_bytes(size, "big")
    return bytes([_NEGATIVE + 8 - size]) + (number + (1 << 8 * size) - 1).to_bytes(size, "big")


def decode_tuple(data: bytes) -> tuple[Any, ...]:
    """Undo `encode_tuple`; raise `CorruptionError` on anything else."""
    try:
        elements, end = _decode_elements(data, 0, 0)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise CorruptionError("a name in a tuple keyspace is malformed") from error
    if end != len(data):
        raise CorruptionError("a name in a tuple keyspace has bytes behind its end")
    return elements


def _decode_elements(data: bytes, at: int, depth: int) -> tuple[tuple[Any, ...], int]:
    elements: list[Any] = []
    if depth > TUPLE_DEPTH_MAX:
        raise CorruptionError("a name in a tuple keyspace is too deep")
    while at < len(data) and data[at] != _END:
        code, at = data[at], at + 1
        if code in (_NONE, _FALSE, _TRUE):
            elements.append({_NONE: None, _FALSE: False, _TRUE: True}[code])
        elif _NEGATIVE <= code <= _NEGATIVE + 8 or _POSITIVE <= code <= _POSITIVE + 8:
            negative = code < _POSITIVE
            size = _NEGATIVE + 8 - code if negative else code - _POSITIVE
            if at + size > len(data):
                raise IndexError("an integer is cut short")
            number = int.from_bytes(data[at : at + size], "big")
            number -= (1 << 8 * size) - 1 if negative else 0
            if data[at - 1 : at + size] != _encode_integer(number):
                raise CorruptionError("an integer in a tuple name is spelled in more bytes than it needs")
            elements.append(number)
            at += size
        elif code == _FLOAT:
            (raw,) = _DOUBLE.unpack_from(data, at)
            elements.append(_RAW.unpack(_DOUBLE.pack(raw ^ (_SIGN if raw & _SIGN else U64_MAX)))[0])
            at += 8
        elif code in (_BYTES, _TEXT):
            content, at = _decode_content(data, at)
            elements.append(content.decode() if code == _TEXT else content)
        elif code == _TUPLE:
            inner, at = _decode_elements(data, at, depth + 1)
            if data[at] != _END:
                raise IndexError("a tuple is cut short")
            elements.append(inner)
            at += 1
        else:
            raise CorruptionError(f"a name in a tuple keyspace holds an unknown code {code}")
    return tuple(elements), at


def _decode_content(data: bytes, at: int) -> tuple[bytes, int]:
    """Bytes up to their end mark, and the offset behind it."""
    pieces = []
    while True:
        end = data.find(b"\0", at)
        if end < 0:
            raise IndexError("bytes are cut short")
        pieces.append(data[at:end])
        if data[end + 1 : end + 2] != b"\xff":
            return b"".join(pieces), end + 1
        pieces.append(b"\0")
        at = end + 2
