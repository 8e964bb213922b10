"""Small documents that a person may look into: `basin.json` and `slot.json`, as JSON in exactly one spelling.

Invariants:

- A document has one spelling only: ASCII, sorted fields, two spaces of indentation, one newline at the end. What is not
  byte for byte the encoding of what it says is damaged; so no changed bit goes unseen, in white space or anywhere else.
- Its fields are text, integers of 64 bits, booleans, null, and at most one level of objects of these.
- `checksum` is the BLAKE3 (hex) of the same spelling without that field. This rule and the fields `format` and
  `version` hold for every version, so that a newer document is told from a damaged one.

Pure. Imported by `basin.format.slots` only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NoReturn, TypeAlias

from blake3 import blake3

from basin.errors import ChecksumMismatch, InvalidArgument, UnsupportedVersion
from basin.format.layout import FORMAT_VERSION

DOCUMENT_SIZE_MAX: Final = 16 << 10
"""Cap of a whole document, checked before anything is parsed."""

Scalar: TypeAlias = str | int | bool | None
Value: TypeAlias = Scalar | Mapping[str, Scalar]

_INTEGER_LIMIT: Final = 1 << 63


def encode_document(form: str, fields: Mapping[str, Value]) -> bytes:
    """Spell a document of the current version; `form` says what it is.

    `fields` must not hold `format`, `version` or `checksum`. Raises `InvalidArgument` if it could not be read back.
    """
    whole = {**fields, "format": form, "version": FORMAT_VERSION}
    if not all(map(_is_value, whole.values())):
        raise InvalidArgument("a document holds text, integers of 64 bits, booleans, null and objects of these")
    encoded = _spell_checked(whole)
    if len(encoded) > DOCUMENT_SIZE_MAX:
        raise InvalidArgument(f"a document of {len(encoded)} bytes exceeds the limit of {DOCUMENT_SIZE_MAX}")
    return encoded


def decode_document(form: str, data: bytes, *, name: str) -> dict[str, Any]:
    """Return the fields of a document, without `format`, `version` and `checksum`; `name` is its file, for errors.

    Raises `ChecksumMismatch` for anything but an exact spelling of a document of this `form`, and `UnsupportedVersion`
    for an intact one of a newer version. The types of the fields are left to the caller.
    """
    fields = _parse(data, name)
    checksum = fields.pop("checksum", None)
    if not isinstance(checksum, str) or not all(map(_is_value, fields.values())) or _spell_checked(fields) != data:
        raise _damaged(name)
    found_form, version = fields.pop("format", None), fields.pop("version", None)
    if found_form != form or type(version) is not int or version < 1:
        raise _damaged(name)
    if version > FORMAT_VERSION:
        raise UnsupportedVersion(
            f"{name} was written by a newer Basin (format version {version}, this one knows {FORMAT_VERSION}): upgrade",
            version=version,
            object=name,
        )
    return fields


def _parse(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > DOCUMENT_SIZE_MAX:
        raise _damaged(name)
    try:
        parsed = json.loads(data.decode("ascii"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _damaged(name) from None
    if not isinstance(parsed, dict):
        raise _damaged(name)
    return parsed


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _spell_checked(fields: Mapping[str, Any]) -> bytes:
    checksum = blake3(_spell(fields)).hexdigest()
    return _spell({**fields, "checksum": checksum})


def _spell(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, sort_keys=True, indent=2) + "\n").encode("ascii")


def _is_value(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_scalar, value.values()))
    return _is_scalar(value)


def _is_scalar(value: object) -> bool:
    if isinstance(value, int):
        return -_INTEGER_LIMIT <= value < _INTEGER_LIMIT
    return value is None or isinstance(value, str)


def _damaged(name: str) -> ChecksumMismatch:
    return ChecksumMismatch(f"{name} is damaged: restore it from a copy of the basin", object=name)
