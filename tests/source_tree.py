"""The project's own sources as syntax trees, for the tests that read them (imports, hygiene, documentation)."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ROOT / "basin"


class Source(NamedTuple):
    """One module: its dotted name, its path from the root, its text and its tree."""

    module: str
    path: str
    text: str
    tree: ast.Module


def parse(module: str, text: str) -> Source:
    """A module that exists only in a test."""
    return Source(module, module.replace(".", "/") + ".py", text, ast.parse(text))


@functools.cache
def sources(folder: str = "basin") -> tuple[Source, ...]:
    """Every module below `folder`, sorted by path."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        relative = path.relative_to(ROOT)
        parts = list(relative.with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        text = path.read_text(encoding="utf-8")
        found.append(Source(".".join(parts), relative.as_posix(), text, ast.parse(text, str(path))))
    return tuple(found)


def imports(source: Source) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Every import wherever it stands: line, module, and the names taken from it (none for `import module`)."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", tuple(alias.name for alias in node.names)


def modules_imported(source: Source) -> Iterator[tuple[int, str]]:
    """Every module of an import; `from basin.engine import log` counts as `basin.engine.log` if that is a module."""
    known = {other.module for other in sources()}
    for line, module, names in imports(source):
        submodules = [f"{module}.{name}" for name in names if f"{module}.{name}" in known]
        for target in submodules or [module]:
            yield line, target
