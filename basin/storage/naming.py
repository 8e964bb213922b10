"""The names that a storage accepts, and nothing else.

- One or more components of lower-case letters, digits, `.` and `-`, joined by single `/`; each begins with a letter or
  digit. So no absolute path, no `..`, no hidden file, and nothing that two file systems would spell differently.
- At most 255 characters.

Imported by the storages; imports `basin.errors` only. User input never becomes a name: ids and numbers do.
"""

from __future__ import annotations

import re
from typing import Final

from basin.errors import InvalidArgument

NAME_SIZE_MAX: Final = 255

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]*(?:/[a-z0-9][a-z0-9.-]*)*")


def is_name(name: str) -> bool:
    """Whether `name` may be given to a storage as the name of a file."""
    return len(name) <= NAME_SIZE_MAX and _NAME.fullmatch(name) is not None


def checked_name(name: str) -> str:
    """Return `name`; raise `InvalidArgument` unless it is the name of a file."""
    if not is_name(name):
        raise InvalidArgument(f"not a storage name: {name[:NAME_SIZE_MAX]!r}", name=name)
    return name


def checked_folder(folder: str) -> str:
    """Return `folder`; raise `InvalidArgument` unless it is the name of a folder, or `""`, the root."""
    return checked_name(folder) if folder else folder


def parent_of(name: str) -> str:
    """The folder that holds `name`: `"a"` for `"a/b"`, and `""` for a name in the root."""
    return name.rpartition("/")[0]


def folders_above(name: str) -> list[str]:
    """Every folder on the way to `name`, without the root, outermost first."""
    return [name[:end] for end, character in enumerate(name) if character == "/"]
