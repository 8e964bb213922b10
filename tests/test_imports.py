"""Who may import whom, read from the sources: the architecture as a test.

The rule: every package of Basin has a number, and imports only go to smaller numbers or stay inside the package. Each
rule is a function over sources, so that it is tried on an offending source as well as on the real ones.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator

import pytest

from tests.source_tree import Source, imports, modules_imported, parse, sources

LEVELS = {
    "errors": 0,
    "terms": 0,
    "format": 1,
    "storage": 1,
    "engine": 2,
    "layers": 3,
    "api": 4,
    "fs": 4,
    "": 4,  # basin/__init__.py, the list of public names
    "cli": 5,
    "testing": 6,  # may use everything; nothing may use it
}
SAME_LEVEL = {("terms", "errors"), ("", "api"), ("", "fs"), ("fs", "api")}

PURE_MODULES = {
    "__future__",
    "abc",
    "bisect",
    "collections",
    "collections.abc",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "hmac",
    "itertools",
    "json",
    "math",
    "operator",
    "re",
    "struct",
    "types",
    "typing",
}
CODEC_LIBRARIES = {"blake3", "cryptography", "msgpack", "numpy", "xxhash", "zstandard"}
IMPURE_BUILTINS = {"open", "print", "input", "breakpoint", "__import__"}

UNTYPED_LIBRARIES = ("fsspec", "sortedcontainers")
FACES = {"basin/fs.py"}  # is a file system of fsspec, where the other is a user of them
PUBLIC_IN_SPITE_OF_ITS_NAME = {"_replace"}  # of named tuples

# What the engine and the layers may take from `os`: nothing that touches a file, because every effect on a disk goes
# through the storage port, where the crash explorer sees it.
HARMLESS_OF_OS = {"urandom", "getpid", "cpu_count", "sched_getaffinity", "register_at_fork", "PathLike", "fspath"}
FILE_MODULES = {"pathlib", "shutil", "tempfile", "fcntl", "mmap", "glob", "io"}
TOUCHES_USER_FILES = {
    "basin.engine.secret": "reads and writes the user's key file, which is no part of the basin",
    "basin.engine.ingest": "looks at the size of a file that the user hands to `ingest`",
    "basin.layers.blobs": "reads the file that the user hands to `blobs.put`, and is a file object to who reads",
    "basin.layers.snapshots.attributes": "takes apart what `os.stat` says of the user's files; opens none",
    "basin.layers.snapshots": "makes paths absolute that the user wants to be backed up",
    "basin.layers.snapshots.create": "reads the files that are backed up",
    "basin.layers.snapshots.large": "reads a large file that is backed up",
    "basin.layers.snapshots.reading": "reads small files that are backed up",
    "basin.layers.snapshots.documents": "spells paths of the user as bytes",
    "basin.layers.snapshots.patterns": "reads the files of patterns that the user names",
    "basin.layers.snapshots.snapshot": "gives file objects to who reads a snapshot",
    "basin.layers.snapshots.scan": "walks what the user backs up: lists folders, reads attributes and ignore files",
    "basin.layers.snapshots.target": "all effects of a restore: relative to open directories of the user's target",
    "basin.layers.snapshots.metadata": "compares and sets, through the target, what `os.stat` says of files",
    "basin.layers.snapshots.placing": "makes links and devices, and removes, through the target",
    "basin.layers.snapshots.writing": "writes and reads back the files that the target has opened",
    "basin.layers.snapshots.restore": "leads a restore: looks at what is in the target",
}

Rule = Callable[[Iterable[Source]], Iterator[str]]


def package_of(module: str) -> str:
    """`basin.format.grain` -> `format`; `basin` -> the empty string."""
    return [*module.split("."), ""][1]


def rule_numbers_go_down(product: Iterable[Source]) -> Iterator[str]:
    for source in product:
        own = package_of(source.module)
        for line, target in modules_imported(source):
            if target.split(".")[0] != "basin":
                continue
            other = package_of(target)
            allowed = own == other or LEVELS[other] < LEVELS[own] or (own, other) in SAME_LEVEL
            if not allowed:
                yield f"{source.path}:{line} imports {target}"


def rule_format_is_pure(product: Iterable[Source]) -> Iterator[str]:
    for source in product:
        if package_of(source.module) != "format" and source.module != "basin.engine.state":
            continue
        for line, module, _ in imports(source):
            root = module.split(".")[0]
            if root != "basin" and module not in PURE_MODULES and root not in CODEC_LIBRARIES:
                yield f"{source.path}:{line} imports {module}"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_BUILTINS:
                yield f"{source.path}:{node.lineno} calls {node.func.id}"


def rule_testing_stays_outside(product: Iterable[Source]) -> Iterator[str]:
    for source in product:
        if package_of(source.module) == "testing":
            continue
        for line, target in modules_imported(source):
            if target == "basin.testing" or target.startswith(("basin.testing.", "tests", "hypothesis", "pytest")):
                yield f"{source.path}:{line} imports {target}"


def rule_untyped_libraries_are_wrapped_once(product: Iterable[Source]) -> Iterator[str]:
    users: dict[str, set[str]] = {library: set() for library in UNTYPED_LIBRARIES}
    for source in product:
        for _, module, _ in imports(source):
            if module.split(".")[0] in users and source.path not in FACES:
                users[module.split(".")[0]].add(source.path)
    for library, paths in users.items():
        if len(paths) > 1:
            yield f"{library} is imported by {sorted(paths)}"


def rule_layers_use_public_names(product: Iterable[Source]) -> Iterator[str]:
    for source in product:
        if package_of(source.module) not in ("layers", "cli"):
            continue
        for line, module, names in imports(source):
            if module in ("__future__", "_typeshed"):
                continue
            private = [part for part in (*module.split("."), *names) if part.startswith("_")]
            if private:
                yield f"{source.path}:{line} imports {private[0]}"
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.endswith("__"):
                continue
            if node.attr in PUBLIC_IN_SPITE_OF_ITS_NAME:
                continue
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "other"):
                continue
            yield f"{source.path}:{node.lineno} uses {node.attr}"


def rule_environment_is_read_at_the_edge(product: Iterable[Source]) -> Iterator[str]:
    """Only the commands and `Secret.from_env` look at the environment; only the commands look at argv and print."""
    for source in product:
        if package_of(source.module) in ("cli", "testing"):
            continue
        allowed = set(_nodes_of_method(source.tree, "Secret", "from_env"))
        for node in ast.walk(source.tree):
            name = _environment_name(node)
            if name == "environ" and node in allowed:
                continue
            if name:
                yield f"{source.path}:{getattr(node, 'lineno', 0)} uses {name}"


def _nodes_of_method(tree: ast.Module, class_name: str, method: str) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == method:
                    yield from ast.walk(item)


def _environment_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
        return "environ"
    if isinstance(node, ast.Attribute) and node.attr in ("argv", "stdout", "stderr", "stdin"):
        return f"sys.{node.attr}" if isinstance(node.value, ast.Name) and node.value.id == "sys" else ""
    if isinstance(node, ast.alias) and node.name in ("environ", "environb", "getenv", "argv", "putenv"):
        return node.name
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input"):
        return node.func.id
    return ""


def rule_disk_effects_go_through_the_port(product: Iterable[Source]) -> Iterator[str]:
    for source in product:
        if package_of(source.module) not in ("engine", "layers", "api") or source.module in TOUCHES_USER_FILES:
            continue
        for line, module, names in imports(source):
            if module.split(".")[0] in FILE_MODULES and not (module == "pathlib" and names == ("Path",)):
                yield f"{source.path}:{line} imports {module}"
            if module == "os" and set(names) - HARMLESS_OF_OS:
                yield f"{source.path}:{line} imports {sorted(set(names) - HARMLESS_OF_OS)} of os"
        own_open = any(isinstance(node, ast.FunctionDef) and node.name == "open" for node in source.tree.body)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                if node.attr not in HARMLESS_OF_OS:
                    yield f"{source.path}:{node.lineno} uses os.{node.attr}"
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "open"
                and not own_open
            ):
                yield f"{source.path}:{node.lineno} opens a file"


RULES: dict[Rule, list[tuple[str, str]]] = {
    rule_numbers_go_down: [
        ("basin.format.bad", "from basin.storage.protocol import Storage"),
        ("basin.errors", "import basin.terms"),
        ("basin.engine.bad", "def late():\n    from basin.api import open"),
        ("basin.layers.bad", "import basin"),
        ("basin.api", "from basin.cli import main"),
    ],
    rule_format_is_pure: [
        ("basin.format.bad", "import os"),
        ("basin.format.bad", "from time import monotonic"),
        ("basin.format.bad", "data = open('x').read()"),
        ("basin.engine.state", "import threading"),
    ],
    rule_testing_stays_outside: [
        ("basin.engine.bad", "import basin.testing.faults"),
        ("basin.api", "import hypothesis"),
    ],
    rule_untyped_libraries_are_wrapped_once: [],
    rule_layers_use_public_names: [
        ("basin.layers.bad", "from basin.engine.log import _tail"),
        ("basin.layers.bad", "def size(engine):\n    return engine._state"),
    ],
    rule_environment_is_read_at_the_edge: [
        ("basin.engine.bad", "import os\nhome = os.environ['HOME']"),
        ("basin.engine.bad", "from os import getenv"),
        ("basin.layers.bad", "print('hello')"),
        ("basin.api", "import sys\nprogram = sys.argv[0]"),
        ("basin.engine.keyring", "class Secret:\n    def from_file(self):\n        return os.environ['X']"),
    ],
    rule_disk_effects_go_through_the_port: [
        ("basin.engine.bad", "import os\nos.fsync(3)"),
        ("basin.layers.bad", "from os import rename"),
        ("basin.engine.bad", "with open('x') as file: pass"),
        ("basin.engine.bad", "import mmap"),
    ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("rule_"))
def test_the_sources_keep_the_rule(rule: Rule) -> None:
    assert list(rule(sources())) == []


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [(rule, module, text) for rule, offences in RULES.items() for module, text in offences],
)
def test_an_offence_is_found(rule: Rule, module: str, text: str) -> None:
    assert list(rule([parse(module, text)]))


def test_a_second_user_of_an_untyped_library_is_found() -> None:
    users = [parse(f"basin.engine.{name}", "import sortedcontainers") for name in ("memtable", "other")]
    assert list(rule_untyped_libraries_are_wrapped_once(users))
    assert not list(rule_untyped_libraries_are_wrapped_once(users[:1]))


def test_secret_from_env_may_read_the_environment() -> None:
    text = "class Secret:\n    def from_env(cls):\n        return os.environ.get('X')"
    assert not list(rule_environment_is_read_at_the_edge([parse("basin.engine.keyring", text)]))


def test_every_exception_is_still_needed() -> None:
    assert set(TOUCHES_USER_FILES) <= {source.module for source in sources()}


def test_every_package_has_a_level() -> None:
    assert {package_of(source.module) for source in sources()} <= set(LEVELS)
