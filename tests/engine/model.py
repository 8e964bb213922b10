"""The model that the state machine compares a basin with: plain dicts, one list of operations per commit.

`Store` is the committed state and its history. A `Scope` (handle, batch, transaction, view) sees a base and its own
operations on top. `Keyspace` repeats the public methods of a keyspace, `Contents` those of blobs; both return what the
engine must return, or raise the error it must raise. Nothing here is shared with the engine but errors and vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from blake3 import blake3

from basin.errors import ContentNotFound, InvalidArgument, NameNotFound, ReadOnly
from basin.terms import ContentKey, Ref

DEFAULT = 0
REGISTRY = 1
ROOTS = 2
FIRST_KEYSPACE = 16
INLINE_MAX = 16
COUNTER = b""
MISSING = object()

Key = tuple[int, Any]
"""(keyspace number, sort key of the name)."""


class Row(NamedTuple):
    """A name with its value, or with the key of its content."""

    name: Any
    value: Any
    content: ContentKey | None
    expiry_ms: int


Rows = dict[Key, Row]
Operation = Callable[[Rows], None]
"""A blind change of the rows. `keys` and `spaces` of a `Write` say what it touches."""


class Write(NamedTuple):
    """One operation and what it touches: keys, or names of a whole keyspace."""

    change: Operation
    keys: frozenset[Key]
    space: int | None = None


class Version(NamedTuple):
    """The committed state at a log position, and the clock of its record."""

    position: int
    time_ms: int
    rows: Rows


def content_key(data: bytes) -> ContentKey:
    """What the engine calls the content."""
    return ContentKey(blake3(data).digest())


def sort_key(order: str, name: Any) -> Any:
    """Names sort by this, and two names are one if theirs are equal."""
    if order == "tuple":
        return tuple((_RANKS[type(element)], 0 if element is None else element) for element in name)
    return name.encode() if isinstance(name, str) else name


_RANKS = {type(None): 0, bool: 1, int: 2, float: 3, bytes: 4, str: 5}


class Store:
    """What is committed, and what was."""

    def __init__(self) -> None:
        self.rows: Rows = {}
        self.history: list[Version] = [Version(0, 0, {})]
        self.writes: list[Write] = []
        """All committed writes, for finding what a transaction must not have missed."""
        self.contents: dict[ContentKey, bytes] = {}
        """Everything that was ever put."""
        self.durable: set[ContentKey] = set()

    def commit(self, writes: Iterable[Write], own: set[ContentKey]) -> None:
        """Apply the writes of one scope; its contents are durable with them."""
        rows = dict(self.rows)
        for write in writes:
            write.change(rows)
            self.writes.append(write)
        self.rows = rows
        self.durable |= own
        own.clear()

    def note(self, position: int, time_ms: int) -> None:
        """Remember that the log ends at `position` now."""
        if position > self.history[-1].position:
            self.history.append(Version(position, time_ms, self.rows))


@dataclass
class Read:
    """Something a transaction saw: `evaluate(rows)` repeats it."""

    evaluate: Callable[[Rows], Any]
    seen: Any
    keys: frozenset[Key]
    space: int | None = None


class Scope:
    """A place where names are read and written."""

    def __init__(self, store: Store, base: Callable[[], Rows], now_ms: Callable[[], int], own: set[ContentKey]) -> None:
        self.store = store
        self.base = base
        self.now_ms = now_ms
        self.own = own
        """Contents put through the handle since its last commit."""
        self.writes: list[Write] = []
        self.written = False
        self.reads: list[Read] | None = None
        self.writable = True

    def rows(self) -> Rows:
        """All rows as they are seen here."""
        if not self.writes:
            return self.base()
        rows = dict(self.base())
        for write in self.writes:
            write.change(rows)
        return rows

    def dirty(self) -> bool:
        """Whether a commit would write a record."""
        return bool(self.writes) or self.written

    def visible(self, rows: Rows, key: Key) -> Row | None:
        """The row of a name that has not expired."""
        row = rows.get(key)
        return row if row is not None and not 0 < row.expiry_ms <= self.now_ms() else None

    def find(self, key: Key) -> Row | None:
        """Read one name."""
        if self.reads is not None:

            def evaluate(rows: Rows) -> Row | None:
                return self.visible(rows, key)

            self.reads.append(Read(evaluate, evaluate(self.base()), frozenset([key])))
        return self.visible(self.rows(), key)

    def range(
        self, space: int, inside: Callable[[Any], bool], *, reverse: bool = False, limit: int | None = None
    ) -> list[Row]:
        """Read the names of a keyspace for which `inside(sort key)` holds."""
        rows = self.rows()
        keys = sorted(key for key in rows if key[0] == space and inside(key[1]) and self.visible(rows, key))
        if reverse:
            keys.reverse()
        found = keys if limit is None else keys[:limit]
        if self.reads is not None and limit != 0:
            last = found[-1] if limit is not None and len(found) == limit else None

            def evaluate(rows: Rows) -> list[tuple[Key, Row]]:
                return sorted(
                    (key, row)
                    for key, row in rows.items()
                    if key[0] == space
                    and inside(key[1])
                    and (last is None or (key >= last if reverse else key <= last))
                    and self.visible(rows, key)
                )

            self.reads.append(Read(evaluate, evaluate(self.base()), frozenset(), space))
        return [rows[key] for key in found]

    def put(self, key: Key, row: Row) -> None:
        """Set a row."""
        self.writes.append(Write(lambda rows: rows.__setitem__(key, row), frozenset([key])))

    def delete(self, key: Key) -> None:
        """Remove a row, or nothing."""
        self.writes.append(Write(lambda rows: rows.pop(key, None) and None, frozenset([key])))

    def delete_range(self, space: int, inside: Callable[[Any], bool]) -> None:
        """Remove the names of a keyspace for which `inside(sort key)` holds."""

        def change(rows: Rows) -> None:
            for key in [key for key in rows if key[0] == space and inside(key[1])]:
                del rows[key]

        self.writes.append(Write(change, frozenset(), space))

    def require_writable(self) -> None:
        """Views are not."""
        if not self.writable:
            raise ReadOnly("a view is read-only")

    def has(self, key: ContentKey) -> bool:
        """Whether the content must be found here."""
        return key in self.store.durable or key in self.own

    def conflicts(self, since: int) -> tuple[bool, bool]:
        """Whether a transaction that began after `since` writes must conflict, and whether it may."""
        reads = self.reads or []
        must = any(read.evaluate(self.store.rows) != read.seen for read in reads)
        keys = frozenset[Key]().union(*[read.keys for read in reads])
        spaces = {read.space for read in reads if read.space is not None}
        spaces_of_keys = {key[0] for key in keys}
        may = any(
            write.keys & keys or any(key[0] in spaces for key in write.keys) or write.space in spaces | spaces_of_keys
            for write in self.store.writes[since:]
        )
        return must, may


@dataclass
class Keyspace:
    """The public methods of one keyspace in one scope."""

    scope: Scope
    space: int = DEFAULT
    order: str = "bytes"
    codec: str = "bytes"

    def _key(self, name: Any) -> Key:
        return self.space, sort_key(self.order, name)

    def _row(self, name: Any, value: Any, ttl: float | None) -> Row:
        scope = self.scope
        if self.order == "bytes" and isinstance(name, str):
            name = name.encode()
        expiry_ms = 0 if ttl is None else scope.now_ms() + int(ttl * 1000)
        if isinstance(value, Ref):
            if not scope.has(value.content_key):
                raise ContentNotFound("")
            content = scope.store.contents[value.content_key]
            return Row(name, self._decode(content), value.content_key, expiry_ms)
        data = self._encode(value)
        if len(data) <= INLINE_MAX:
            return Row(name, value, None, expiry_ms)
        key = content_key(data)
        scope.store.contents[key] = data
        scope.own.add(key)
        return Row(name, value, key, expiry_ms)

    def _encode(self, value: Any) -> bytes:
        if self.codec == "json":
            return json.dumps(value, separators=(",", ":")).encode()
        if not isinstance(value, bytes):
            raise InvalidArgument("")
        return value

    def _decode(self, data: bytes) -> Any:
        return json.loads(data) if self.codec == "json" else data

    # --- reading ------------------------------------------------------------------------------------------------------

    def get(self, name: Any, default: Any = None) -> Any:
        row = self.scope.find(self._key(name))
        return default if row is None else row.value

    def __getitem__(self, name: Any) -> Any:
        row = self.scope.find(self._key(name))
        if row is None:
            raise NameNotFound("")
        return row.value

    def __contains__(self, name: Any) -> bool:
        return self.scope.find(self._key(name)) is not None

    def ref(self, name: Any) -> ContentKey | None:
        row = self.scope.find(self._key(name))
        return None if row is None else row.content

    def get_many(self, names: list[Any]) -> list[Any]:
        return [self.get(name) for name in names]

    def __len__(self) -> int:
        return len(self.scan())

    def __bool__(self) -> bool:
        return bool(self.scan(limit=1))

    def scan(
        self,
        prefix: Any = None,
        start: Any = None,
        stop: Any = None,
        after: Any = None,
        *,
        reverse: bool = False,
        limit: int | None = None,
        keys_only: bool = False,
    ) -> list[Any]:
        start, stop, after = (None if bound is None else sort_key(self.order, bound) for bound in (start, stop, after))

        def inside(key: Any) -> bool:
            return (
                (prefix is None or self._starts(key, prefix))
                and (start is None or key >= start)
                and (stop is None or key < stop)
                and (after is None or (key < after if reverse else key > after))
            )

        rows = self.scope.range(self.space, inside, reverse=reverse, limit=limit)
        return [row.name for row in rows] if keys_only else [(row.name, row.value) for row in rows]

    def _starts(self, key: Any, prefix: Any) -> bool:
        wanted = sort_key(self.order, prefix)
        if self.order == "u64":
            return bool(key == wanted)
        return bool(key[: len(wanted)] == wanted)

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(self, name: Any, value: Any, ttl: float | None = None, *, if_absent: bool = False) -> bool:
        self.scope.require_writable()
        if if_absent and self.scope.find(self._key(name)) is not None:
            return False
        self.scope.put(self._key(name), self._row(name, value, ttl))
        return True

    def __setitem__(self, name: Any, value: Any) -> None:
        self.put(name, value)

    def put_many(self, pairs: list[tuple[Any, Any]], ttl: float | None = None) -> None:
        self.scope.require_writable()
        rows = [(self._key(name), self._row(name, value, ttl)) for name, value in pairs]
        for key, row in rows:
            self.scope.put(key, row)

    def delete(self, name: Any) -> None:
        self.scope.require_writable()
        self.scope.delete(self._key(name))

    def __delitem__(self, name: Any) -> None:
        self.scope.require_writable()
        if self.scope.find(self._key(name)) is None:
            raise NameNotFound("")
        self.scope.delete(self._key(name))

    def delete_range(self, start: Any = None, stop: Any = None) -> None:
        self.scope.require_writable()
        low, high = (None if bound is None else sort_key(self.order, bound) for bound in (start, stop))
        if low is None and stop in (b"", "", ()):
            return  # Nothing lies before the first name there can be, so nothing is written either.
        if low is None or high is None or low < high:
            self.scope.delete_range(
                self.space, lambda key: (low is None or key >= low) and (high is None or key < high)
            )

    def clear(self) -> None:
        self.delete_range()

    def setdefault(self, name: Any, default: Any) -> Any:
        self.scope.require_writable()
        found = self.get(name, MISSING)
        if found is MISSING:
            self.put(name, default)
            return default
        return found

    def pop(self, name: Any, default: Any = MISSING) -> Any:
        self.scope.require_writable()
        found = self.get(name, MISSING)
        if found is not MISSING:
            self.delete(name)
            return found
        if default is MISSING:
            raise NameNotFound("")
        return default

    def popitem(self) -> tuple[Any, Any]:
        self.scope.require_writable()
        for name, value in self.scan(limit=1):
            self.delete(name)
            return name, value
        raise NameNotFound("")

    def update(self, pairs: list[tuple[Any, Any]]) -> None:
        self.put_many(pairs)


class Registry:
    """The keyspaces of a scope."""

    def __init__(self, scope: Scope, create: Scope | None = None) -> None:
        """Keyspaces are created through `create`: a handle and a batch do it at once, and not as part of anything."""
        self.scope = scope
        self.create = create or scope

    @staticmethod
    def _find(scope: Scope, name: str) -> tuple[int, str, str] | None:
        row = scope.find((REGISTRY, name.encode()))
        return None if row is None else row.value

    def keyspace(self, name: str, order: str | None = None, values: str | None = None) -> Keyspace:
        """Open or create a keyspace. One that a batch dropped, and that is made anew in it, is a part of the batch."""
        entry = self._find(self.scope, name)
        if entry is None:
            if not self.scope.writable:
                raise NameNotFound("")
            home = self.scope if self._find(self.create, name) else self.create
            counter = self.create.find((REGISTRY, COUNTER))
            number = FIRST_KEYSPACE if counter is None else counter.value
            entry = (number, order or "bytes", values or "bytes")
            self.create.put((REGISTRY, COUNTER), Row(COUNTER, number + 1, None, 0))
            home.put((REGISTRY, name.encode()), Row(name.encode(), entry, None, 0))
        if order not in (None, entry[1]) or values not in (None, entry[2]):
            raise InvalidArgument("")
        return Keyspace(self.scope, *entry)

    def keyspaces(self) -> list[str]:
        """Names of all keyspaces."""
        return [row.name.decode() for row in self.scope.range(REGISTRY, lambda key: key != COUNTER)]

    def drop_keyspace(self, name: str) -> None:
        """Forget a keyspace and its names."""
        self.scope.require_writable()
        entry = self._find(self.scope, name)
        if entry is None:
            raise NameNotFound("")
        self.scope.delete((REGISTRY, name.encode()))
        self.scope.delete_range(entry[0], lambda _: True)


class Contents:
    """The public methods of `blobs` in one scope."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def put(self, data: bytes, links: Iterable[ContentKey] = (), *, root: bool = True) -> ContentKey:
        """Store; its root is a row."""
        self.scope.require_writable()
        if not all(self.scope.has(key) for key in links):
            raise ContentNotFound("")
        key = content_key(data)
        self.scope.store.contents[key] = data
        self.scope.own.add(key)
        if root:
            self.scope.put((ROOTS, key.digest), Row(key.digest, b"", None, 0))
        else:
            self.scope.written = True
        return key

    def put_many(self, items: list[bytes], *, root: bool = True) -> list[ContentKey]:
        """Store many."""
        self.scope.require_writable()
        return [self.put(data, root=root) for data in items]

    def delete(self, key: ContentKey) -> None:
        """Remove the root."""
        self.scope.require_writable()
        self.scope.delete((ROOTS, key.digest))

    def roots(self) -> list[ContentKey]:
        """What `iter(blobs)` yields."""
        return [ContentKey(row.name) for row in self.scope.range(ROOTS, lambda _: True)]

    def get(self, key: ContentKey) -> bytes | None:
        """The content, where it must be there."""
        return self.scope.store.contents[key] if self.scope.has(key) else None
