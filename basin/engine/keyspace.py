"""`NameMap`: the mapping that users see, over any scope: the handle, a batch, a transaction, a view.

A keyspace is a stretch of the one space of full names: four bytes of keyspace number, then the user's name in the
keyspace's order. Number 0 is the handle's own; numbers below 16 are Basin's.

Invariants: names are checked here, once; values above `inline_max` become contents and the name refers to them.
"""

from __future__ import annotations

import abc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from collections.abc import ItemsView as AbstractItemsView
from collections.abc import ValuesView as AbstractValuesView
from itertools import chain, islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar, cast

from basin.engine.contents import Relied
from basin.engine.memtable import Row
from basin.engine.names import Found
from basin.errors import ContentNotFound, CorruptionError, InvalidArgument, NameNotFound
from basin.format.layout import ENTRY_DELETE, ENTRY_INLINE, ENTRY_REFERENCE, KEYSPACE_PREFIX_SIZE, NAME_SIZE_MAX
from basin.format.ordered import decode_tuple, decode_u64, encode_tuple, encode_u64
from basin.terms import ContentKey, Position, Ref, StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

K = TypeVar("K")
V = TypeVar("V")

DEFAULT_KEYSPACE: Final = 0
REGISTRY_KEYSPACE: Final = 1
ROOTS_KEYSPACE: Final = 2
SNAPSHOTS_KEYSPACE: Final = 3
CHECK_KEYSPACE: Final = 4
FIRST_USER_KEYSPACE: Final = 16
_MISSING: Final = object()
_NOTHING: Final[Mapping[bytes, StratumId]] = MappingProxyType({})
_SCAN_PREFETCH: Final = 64
"""Contents fetched at once while a scan yields large values: bounds memory, keeps both cores busy."""


class Scope(abc.ABC):
    """Where names are read and written: full names and rows in, nothing of users' types."""

    core: Core
    read_position: Position | None = None
    """The position that is read here; None where reading moves on with the log."""

    @abc.abstractmethod
    def find(self, name: bytes) -> Row | None:
        """The row of a full name that counts here."""

    @abc.abstractmethod
    def chunks(self, start: bytes, stop: bytes, *, reverse: bool) -> Iterator[Found]:
        """The visible full names in [start, stop)."""

    @abc.abstractmethod
    def put(self, name: bytes, kind: int, value: bytes, expiry_ms: int, relied: Relied | None) -> None:
        """Set a row, or delete it."""

    @abc.abstractmethod
    def put_all(self, rows: list[tuple[bytes, int, bytes]], expiry_ms: int, relied: Relied) -> None:
        """Set many rows (name, kind, value) together."""

    @abc.abstractmethod
    def put_same(self, names: list[bytes], value: bytes, relied: Relied) -> None:
        """Give many names the same inline value, together."""

    @abc.abstractmethod
    def rely(self, relied: Relied) -> None:
        """Contents were put without a name: they are committed with the rest."""

    @property
    def relied(self) -> Mapping[bytes, StratumId]:
        """Contents that are held on to until all this is committed, and where they were found: by a batch alone."""
        return _NOTHING

    def hold(self, relied: Relied) -> None:  # noqa: B027  # who is no batch has nothing to hold on to
        """Hold on to contents that were found, if this is a batch. What it changes stays the same."""

    @abc.abstractmethod
    def delete_range(self, start: bytes, stop: bytes) -> None:
        """Delete the full names in [start, stop)."""

    @abc.abstractmethod
    def require_writable(self) -> None:
        """Raise unless changes may be made here."""

    @abc.abstractmethod
    def exclusively(self, work: Callable[[Scope], Any]) -> Any:
        """Run reads and writes as one transaction (in a batch or transaction: as part of it)."""

    def require_kept(self) -> None:
        """Raise `PositionGone` if history has let go of the position that is read here, and so of contents."""
        if self.read_position is not None:
            self.core.refresh()
            self.core.require_kept(self.read_position)

    def now_ms(self) -> int:
        """The time by which names expire here."""
        return time.time_ns() // 1_000_000


class Order(NamedTuple):
    """How a keyspace's names become bytes, in order."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    end_of_prefix: Callable[[bytes], bytes]
    """The first full name behind all those that start with a given one."""


class Values(NamedTuple):
    """How a keyspace's values become bytes."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def encode_text(text: str) -> bytes:
    """UTF-8; raise `InvalidArgument` for halves of surrogate pairs, which have none."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"text that cannot be encoded as UTF-8: {text!r}") from None


def _encode_name(name: Any) -> bytes:
    if type(name) is str:
        return encode_text(name)
    if isinstance(name, (bytes, bytearray, memoryview)):
        return bytes(name)
    raise InvalidArgument(f"a name is bytes or str, not {type(name).__name__}")


def _encode_bytes(value: Any) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise InvalidArgument(f"a value is bytes, not {type(value).__name__}; a keyspace with values='json' takes more")


def _encode_json(value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"not a JSON value: {error}") from error


def _decode_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise CorruptionError("a value in a json keyspace is no JSON") from error


def prefix_of(number: int) -> bytes:
    """The four bytes before the full names of a keyspace."""
    return number.to_bytes(KEYSPACE_PREFIX_SIZE, "big")


def end_of(prefix: bytes) -> bytes:
    """The first byte string above all that start with `prefix`; empty if there is none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b""


ORDERS: Final[dict[str, Order]] = {
    "bytes": Order(_encode_name, lambda data: data, end_of),
    "u64": Order(encode_u64, decode_u64, end_of),
    # A zero byte within text or bytes is followed by FF, the end of an element never is.
    "tuple": Order(encode_tuple, decode_tuple, lambda low: low + b"\xff"),
}
VALUES: Final[dict[str, Values]] = {
    "bytes": Values(_encode_bytes, lambda data: data),
    "json": Values(_encode_json, _decode_json),
}


def expiry_of(ttl: float | None, now_ms: int) -> int:
    """Absolute milliseconds of a time to live in seconds; 0 for none. Raises `InvalidArgument`."""
    if ttl is None:
        return 0
    if type(ttl) not in (int, float) or not 0 < ttl < 1e11:
        raise InvalidArgument(f"a time to live is a number of seconds above 0, not {ttl!r}")
    return now_ms + max(1, int(ttl * 1000))


class NameMap(MutableMapping[K, V], Generic[K, V]):
    """Names and values of one keyspace, sorted, as a `MutableMapping`.

    Names are at most 65,535 bytes when encoded; values have any size. `str` names are UTF-8. Single operations are
    atomic; `d[k] += 1` is two of them. `setdefault`, `pop`, `popitem` and `update` are one transaction each. `len` and
    `bool` read names: O(n), and one seek.
    """

    def __init__(self, scope: Scope, number: int, order: str, values: str) -> None:
        """`number` is the keyspace's; `order` and `values` name its codecs."""
        self._scope = scope
        self._core = scope.core
        self._number = number
        self._prefix = prefix_of(number)
        self._end = end_of(self._prefix)
        self._order, self._values = ORDERS[order], VALUES[values]

    # --- encoding ---------------------------------------------------------------------------------------------------

    def _full(self, name: Any) -> bytes:
        encoded = name if type(name) is bytes and self._order is ORDERS["bytes"] else self._order.encode(name)
        if len(encoded) > NAME_SIZE_MAX:
            raise InvalidArgument(f"a name has at most {NAME_SIZE_MAX:,} bytes, not {len(encoded):,}")
        return self._prefix + encoded

    def _name(self, full: bytes) -> K:
        return cast(K, self._order.decode(full[KEYSPACE_PREFIX_SIZE:]))

    def _row_value(self, value: Any, relied: Relied) -> tuple[int, bytes]:
        """(kind, bytes) of a user's value: inline, or a reference to content that is stored now."""
        if isinstance(value, Ref):
            key = value.content_key.digest
            self._core.contents.rely_on(key, relied)
            return ENTRY_REFERENCE, key
        data = self._values.encode(value)
        if len(data) <= self._core.options.inline_max:
            return ENTRY_INLINE, data
        self._core.ensure_session()
        return ENTRY_REFERENCE, self._core.contents.put(data, relied)

    def _value(self, kind: int, value: bytes) -> V:
        if kind == ENTRY_REFERENCE:
            try:
                value = self._core.contents.get(value)
            except ContentNotFound:
                self._scope.require_kept()
                raise
        return cast(V, self._values.decode(value))

    def _contents_of(self, keys: list[bytes]) -> list[bytes]:
        """The contents that rows refer to."""
        try:
            return self._core.contents.get_many(keys) if keys else []
        except ContentNotFound:
            self._scope.require_kept()
            raise

    def _visible(self, row: Row | None) -> Row | None:
        if row is None or row[1] == ENTRY_DELETE or (row[3] and row[3] <= self._scope.now_ms()):
            return None
        return row

    # --- reading ----------------------------------------------------------------------------------------------------

    def __getitem__(self, name: K | str) -> V:
        """The value; raise `NameNotFound`."""
        row = self._visible(self._scope.find(self._full(name)))
        if row is None:
            raise NameNotFound(f"no such name: {name!r}", name=name)
        return self._value(row[1], row[2])

    def get(self, name: K | str, default: Any = None) -> Any:
        """The value, or `default`."""
        row = self._visible(self._scope.find(self._full(name)))
        return default if row is None else self._value(row[1], row[2])

    def __contains__(self, name: object) -> bool:
        return self._visible(self._scope.find(self._full(name))) is not None

    def ref(self, name: K | str) -> ContentKey | None:
        """The content key that the name refers to, or None if it has no value or a small one."""
        row = self._visible(self._scope.find(self._full(name)))
        return ContentKey(row[2]) if row is not None and row[1] == ENTRY_REFERENCE else None

    def get_many(self, names: Iterable[K | str]) -> list[V | None]:
        """The values in the order of `names`, None where there is none. Contents are fetched together."""
        rows = [self._visible(self._scope.find(self._full(name))) for name in names]
        references = [row[2] for row in rows if row is not None and row[1] == ENTRY_REFERENCE]
        contents = iter(self._contents_of(references))
        decode = self._values.decode
        return [
            None if row is None else decode(next(contents) if row[1] == ENTRY_REFERENCE else row[2]) for row in rows
        ]

    def __iter__(self) -> Iterator[K]:
        return cast(Iterator[K], self.scan(keys_only=True))

    def __len__(self) -> int:
        return sum(len(found.names) for found in self._scope.chunks(self._prefix, self._end, reverse=False))

    def __bool__(self) -> bool:
        return any(found.names for found in self._scope.chunks(self._prefix, self._end, reverse=False))

    def scan(
        self,
        prefix: K | str | None = None,
        start: K | str | None = None,
        stop: K | str | None = None,
        after: K | str | None = None,
        *,
        reverse: bool = False,
        limit: int | None = None,
        keys_only: bool = False,
    ) -> Iterator[Any]:
        """Yield (name, value), or names only, ascending, or descending with `reverse`.

        `start` is inclusive, `stop` exclusive; `after` continues behind a name already seen (before it, in reverse).
        The scan sees one log position, that of its first step. Values above `inline_max` are fetched some at a time.
        """
        low, high = self._bounds(prefix, start, stop, after, reverse=reverse)
        if limit is not None and (type(limit) is not int or limit < 0):
            raise InvalidArgument(f"limit is a count, not {limit!r}")
        if low >= high or limit == 0:
            return iter(())
        chunks = self._scope.chunks(low, high, reverse=reverse)
        pieces: Iterator[Iterable[Any]] = self._names_of(chunks) if keys_only else self._items_of(chunks)
        # Not a generator of items: once through its frame for each would be a twentieth of the whole scan.
        items = chain.from_iterable(pieces)
        return items if limit is None else islice(items, limit)

    def _bounds(self, prefix: Any, start: Any, stop: Any, after: Any, *, reverse: bool) -> tuple[bytes, bytes]:
        low, high = self._prefix, self._end
        if prefix is not None:
            low = self._full(prefix)
            high = min(high, self._order.end_of_prefix(low))
        if start is not None:
            low = max(low, self._full(start))
        if stop is not None:
            high = min(high, self._full(stop))
        if after is not None and reverse:
            high = min(high, self._full(after))
        elif after is not None:
            low = max(low, self._full(after) + b"\0")
        return low, high

    def _names_of(self, chunks: Iterator[Found]) -> Iterator[Iterable[K]]:
        decode, cut = self._order.decode, KEYSPACE_PREFIX_SIZE
        plain = self._order is ORDERS["bytes"]
        for found in chunks:
            if plain:
                yield cast(list[K], [name[cut:] for name in found.names])
            else:
                yield [decode(name[cut:]) for name in found.names]

    def _items_of(self, chunks: Iterator[Found]) -> Iterator[Iterable[tuple[K, V]]]:
        cut = KEYSPACE_PREFIX_SIZE
        plain = self._order is ORDERS["bytes"] and self._values is VALUES["bytes"]
        decode_name, decode_value = self._order.decode, self._values.decode
        for found in chunks:
            for names, values in self._filled(found):
                if plain:
                    yield cast(Iterator[tuple[K, V]], zip([name[cut:] for name in names], values, strict=True))
                else:
                    yield (
                        (decode_name(name[cut:]), decode_value(value))
                        for name, value in zip(names, values, strict=True)
                    )

    def _filled(self, found: Found) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Names and values with references replaced by contents, a few at a time where there are any."""
        if not found.references:
            yield found.names, found.values
            return
        referring = set(found.references)
        for begin in range(0, len(found.names), _SCAN_PREFETCH):
            values = found.values[begin : begin + _SCAN_PREFETCH]
            at = [place for place in range(len(values)) if begin + place in referring]
            contents = self._contents_of([values[place] for place in at])
            for place, content in zip(at, contents, strict=True):
                values[place] = content
            yield found.names[begin : begin + _SCAN_PREFETCH], values

    def items(self) -> AbstractItemsView[K, V]:
        """A view that scans, instead of looking every name up."""
        return _Items(self)

    def values(self) -> AbstractValuesView[V]:
        """A view that scans."""
        return _Values(self)

    # --- writing ----------------------------------------------------------------------------------------------------

    def __setitem__(self, name: K | str, value: V | Ref) -> None:
        self.put(name, value)

    def put(self, name: K | str, value: V | Ref, ttl: float | None = None, *, if_absent: bool = False) -> bool:
        """Set a value that expires after `ttl` seconds, or never. False if `if_absent` and the name has a value."""
        full = self._full(name)
        self._scope.require_writable()
        if if_absent:
            return cast(bool, self._scope.exclusively(lambda scope: self._put_absent(scope, full, value, ttl)))
        expiry_ms = 0 if ttl is None else expiry_of(ttl, self._scope.now_ms())
        relied: Relied = {}
        kind, data = self._row_value(value, relied)
        self._scope.put(full, kind, data, expiry_ms, relied)
        return True

    def _put_absent(self, scope: Scope, full: bytes, value: Any, ttl: float | None) -> bool:
        if self._visible(scope.find(full)) is not None:
            return False
        relied: Relied = {}
        kind, data = self._row_value(value, relied)
        scope.put(full, kind, data, expiry_of(ttl, scope.now_ms()), relied)
        return True

    def put_many(self, pairs: Iterable[tuple[K | str, V | Ref]], ttl: float | None = None) -> None:
        """Set many values together: all or none of them are in a commit. Large values use all cores."""
        self._scope.require_writable()
        expiry_ms = expiry_of(ttl, self._scope.now_ms())
        rows: list[tuple[bytes, int, bytes]] = []
        large: list[bytes] = []
        large_at: list[int] = []
        relied: Relied = {}
        inline_max = self._core.options.inline_max
        for name, value in pairs:
            full = self._full(name)
            if isinstance(value, Ref):
                rows.append((full, *self._row_value(value, relied)))
                continue
            data = self._values.encode(value)
            if len(data) <= inline_max:
                rows.append((full, ENTRY_INLINE, data))
            else:
                large_at.append(len(rows))
                large.append(data)
                rows.append((full, ENTRY_REFERENCE, b""))
        if large:
            self._core.ensure_session()
            keys = self._core.contents.put_many(large, relied)
            for at, key in zip(large_at, keys, strict=True):  # In their places: of equal names the last one counts.
                rows[at] = (rows[at][0], ENTRY_REFERENCE, key)
        self._scope.put_all(rows, expiry_ms, relied)

    def __delitem__(self, name: K | str) -> None:
        """Delete; raise `NameNotFound` if it has no value."""
        full = self._full(name)
        self._scope.require_writable()
        if self._visible(self._scope.find(full)) is None:
            raise NameNotFound(f"no such name: {name!r}", name=name)
        self._scope.put(full, ENTRY_DELETE, b"", 0, None)

    def delete(self, name: K | str) -> None:
        """Delete; a name without a value is no error."""
        full = self._full(name)
        self._scope.require_writable()
        self._scope.put(full, ENTRY_DELETE, b"", 0, None)

    def delete_range(self, start: K | str | None = None, stop: K | str | None = None) -> None:
        """Delete the names from `start` (inclusive; None: the first) to `stop` (exclusive; None: the last). O(1)."""
        self._scope.require_writable()
        low = self._prefix if start is None else self._full(start)
        high = self._end if stop is None else self._full(stop)
        if low < high:
            self._scope.delete_range(low, high)

    def clear(self) -> None:
        """Delete every name: one range deletion."""
        self.delete_range()

    def _inside(self, scope: Scope) -> NameMap[K, V]:
        """The same keyspace in another scope."""
        inner = NameMap.__new__(NameMap)
        inner.__dict__.update(self.__dict__)
        inner._scope = scope
        return cast("NameMap[K, V]", inner)

    def setdefault(self, name: K | str, default: Any = None) -> Any:
        """The value, set to `default` if there was none. One transaction."""

        def work(scope: Scope) -> Any:
            inner = self._inside(scope)
            found = inner.get(name, _MISSING)
            if found is _MISSING:
                inner.put(name, default)
                return default
            return found

        return self._scope.exclusively(work)

    def pop(self, name: K | str, default: Any = _MISSING) -> Any:
        """Remove a name and return its value, or `default`, or raise `NameNotFound`. One transaction."""

        def work(scope: Scope) -> Any:
            inner = self._inside(scope)
            found = inner.get(name, _MISSING)
            if found is not _MISSING:
                inner.delete(name)
                return found
            if default is _MISSING:
                raise NameNotFound(f"no such name: {name!r}", name=name)
            return default

        return self._scope.exclusively(work)

    def popitem(self) -> tuple[K, V]:
        """Remove and return the first name and its value; raise `NameNotFound` if there is none. One transaction."""

        def work(scope: Scope) -> tuple[K, V]:
            inner = self._inside(scope)
            for name, value in inner.scan(limit=1):
                inner.delete(name)
                return name, value
            raise NameNotFound("the keyspace is empty", name=b"")

        return cast(tuple[K, V], self._scope.exclusively(work))

    def update(self, other: Any = (), /, **named: Any) -> None:
        """Set many values, from a mapping, pairs or keywords. One transaction."""
        if hasattr(other, "keys"):
            other = [(name, other[name]) for name in other.keys()]  # noqa: SIM118  # what `dict.update` does
        pairs = [*other, *named.items()]
        self._scope.exclusively(lambda scope: self._inside(scope).put_many(pairs))


class _Items(AbstractItemsView[K, V]):
    """Items by one scan."""

    def __init__(self, names: NameMap[K, V]) -> None:
        super().__init__(names)
        self._names = names

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return self._names.scan()


class _Values(AbstractValuesView[V]):
    """Values by one scan."""

    def __init__(self, names: NameMap[Any, V]) -> None:
        super().__init__(names)
        self._names = names

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._names.scan())
