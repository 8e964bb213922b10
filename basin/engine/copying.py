"""Copying names, and the contents that they reach, from one basin into another: what `import` and a partial export do.

Invariants:

- A content is in the target, with all that it links to, before a name or another content there refers to it.
- What the target has already is neither read nor written again; so copying twice, or going on after a failure, is safe.
- Everything is committed in batches of bounded size; the whole is no transaction.
- Nothing of the source's keys, ids or log is copied: contents go by their content keys, names by themselves.

Memory is bounded by a batch, and by the link lists on the way from a name to the content that is being copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from basin.engine.contents import Relied
from basin.engine.keyspace import (
    DEFAULT_KEYSPACE,
    FIRST_USER_KEYSPACE,
    ORDERS,
    REGISTRY_KEYSPACE,
    ROOTS_KEYSPACE,
    VALUES,
    NameMap,
    Scope,
    end_of,
    prefix_of,
)
from basin.engine.memtable import Row
from basin.engine.scopes import BatchScope
from basin.engine.sources import IterableSource
from basin.errors import CorruptionError, NameNotFound
from basin.format.clast import Clast
from basin.format.layout import ENTRY_DELETE, ENTRY_INLINE, ENTRY_REFERENCE, KEYSPACE_PREFIX_SIZE, MIB, StratumKind
from basin.terms import CONTENT_KEY_SIZE

if TYPE_CHECKING:
    from basin.engine.core import Core

_BATCH_NAMES_MAX: Final = 4 * MIB
"""Bytes of names and values in one batch: a few runs of names, not many."""
_BATCH_CONTENTS_MAX: Final = 1 << 16
"""Contents that one batch relies on."""
_BATCH_BYTES_MAX: Final = 256 * MIB
"""Bytes of new contents in one batch: what is copied again after a failure, at most."""
_TOGETHER_MAX: Final = 64
"""Contents fetched together: at 4 MiB each they are what a scan of large values holds, too."""
_TOGETHER_BYTES_MAX: Final = 8 * MIB
_DONE_MAX: Final = 1 << 17
"""Content keys remembered as copied: many names lead to the same ones."""
_STREAM_PARTS: Final = 8
_ROOT: Final = prefix_of(ROOTS_KEYSPACE)


class CopyReport(NamedTuple):
    """What was copied, and how much of what was asked for was there already. `size`: bytes of contents copied."""

    names: int
    names_same: int
    contents: int
    contents_same: int
    size: int


class Span(NamedTuple):
    """The full names in [start, stop) of the source, and the keyspace prefix that they get in the target."""

    start: bytes
    stop: bytes
    prefix: bytes


class Target(Protocol):
    """The basin that is copied into."""

    @property
    def core(self) -> Core:
        """Its engine."""

    @property
    def scope(self) -> Scope:
        """Where its names are."""

    def keyspace(self, name: str, order: str | None = None, values: str | None = None) -> NameMap[Any, Any]:
        """Make sure that a keyspace is there; `InvalidArgument` if it is another one."""


def _registry(scope: Scope) -> NameMap[bytes, Any]:
    return NameMap(scope, REGISTRY_KEYSPACE, "bytes", "json")


def all_spans(source: Scope, target: Target) -> list[Span]:
    """Everything in `source`; keyspaces that the target does not have are created there."""
    reserved = [number for number in range(FIRST_USER_KEYSPACE) if number != REGISTRY_KEYSPACE]
    spans = [Span(prefix_of(number), end_of(prefix_of(number)), prefix_of(number)) for number in reserved]
    for name, entry in _registry(source).scan():
        if name:  # The empty one is the registry's counter.
            spans.append(_keyspace_span(name.decode(), _checked(entry), target, prefix=None))
    return spans


def selected_spans(source: Scope, target: Target, *, keyspace: str | None, prefix: Any) -> list[Span]:
    """The names of a keyspace (None: the basin's own), all or those that start with `prefix`.

    Raises `NameNotFound` if there is no such keyspace, or no such name in it; then nothing was created.
    """
    if keyspace is None:
        described: dict[str, Any] = {"id": DEFAULT_KEYSPACE, "order": "bytes", "values": "bytes"}
    else:
        found = _registry(source).get(keyspace.encode()) if keyspace else None
        if found is None:
            raise NameNotFound(f"no keyspace {keyspace!r}", name=keyspace)
        described = _checked(found)
    names: NameMap[Any, Any] = NameMap(source, described["id"], described["order"], described["values"])
    if next(names.scan(prefix=prefix, limit=1, keys_only=True), None) is None:
        text = "there is no name to export" if prefix is None else f"no name starts with {prefix!r}"
        raise NameNotFound(text, name=prefix)
    if keyspace is None:
        return [_span(described, prefix_of(DEFAULT_KEYSPACE), prefix)]
    return [_keyspace_span(keyspace, described, target, prefix=prefix)]


def _checked(entry: Any) -> dict[str, Any]:
    """A registry's entry, if it is one: in an open basin anybody could have written another."""
    try:
        described = {"id": int(entry["id"]), "order": entry["order"], "values": entry["values"]}
        if described["order"] in ORDERS and described["values"] in VALUES and described["id"] >= FIRST_USER_KEYSPACE:
            prefix_of(described["id"])
            return described
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise CorruptionError("the registry of keyspaces holds an impossible entry", object="names", offset=0)


def _keyspace_span(name: str, described: dict[str, Any], target: Target, *, prefix: Any) -> Span:
    target.keyspace(name, described["order"], described["values"])
    return _span(described, prefix_of(_registry(target.scope)[name]["id"]), prefix)


def _span(described: dict[str, Any], target_prefix: bytes, prefix: Any) -> Span:
    low = prefix_of(described["id"])
    stop = end_of(low)
    if prefix is not None:
        order = ORDERS[described["order"]]
        low += order.encode(prefix)
        stop = min(stop, order.end_of_prefix(low))
    return Span(low, stop, target_prefix)


def copy_names(
    source: Scope, target: Target, spans: Iterable[Span], progress: Callable[[int, int | None], None] | None = None
) -> CopyReport:
    """Copy the names in `spans`, with their expiry and all contents that they reach; committed on return.

    `source` is a view: one position and one time. Names that have another value in the target get the source's.
    `progress` is called with the bytes of contents done. Raises what reading the source raises, and `Conflict` if
    somebody collects in the target what was found there: copy again then. Cost: every content is looked up in the
    target; one that is not there is read, decrypted, and written once.
    """
    copier = _Copier(source, target.core, progress)
    try:
        for span in spans:
            for found in source.chunks(span.start, span.stop, reverse=False):
                copier.copy(span, found.names)
        copier.commit()
    except BaseException:
        copier.discard()
        raise
    return copier.report()


class _Copier:
    """The batch that is being filled, and the counts."""

    def __init__(self, source: Scope, target: Core, progress: Callable[[int, int | None], None] | None) -> None:
        self._source = source
        self._from = source.core
        self._to = target
        self._progress = progress
        self._batch = BatchScope(target)
        self._names_size = 0
        self._written = 0
        self._is_changed = False
        self._done: set[bytes] = set()
        self._counts = dict.fromkeys(CopyReport._fields, 0)

    def report(self) -> CopyReport:
        """What was copied so far."""
        return CopyReport(**self._counts)

    # --- names ------------------------------------------------------------------------------------------------------

    def copy(self, span: Span, names: Sequence[bytes]) -> None:
        """Copy some names; all of them are visible in the source."""
        rows = [(name, row) for name in names if (row := self._source.find(name)) is not None]
        self._copy_contents([key for name, row in rows for key in _reached(name, row)])
        for name, row in rows:
            self._copy_row(span.prefix + name[KEYSPACE_PREFIX_SIZE:], name, row)
            self._commit_if_full()

    def _copy_row(self, full: bytes, name: bytes, row: Row) -> None:
        _, kind, value, expiry_ms, _ = row
        relied: Relied = {}
        if kind == ENTRY_INLINE and len(value) > self._to.options.inline_max:
            self._to.ensure_session()
            kind, value = ENTRY_REFERENCE, self._to.contents.put(value, relied)
        known = self._batch.find(full)
        if known is not None and known[1:4] == (kind, value, expiry_ms):
            self._counts["names_same"] += 1
            return
        for key in _reached(name, row):
            self._to.contents.rely_on(key, relied)
        self._batch.put(full, kind, value, expiry_ms, relied)
        self._counts["names"] += 1
        self._is_changed = True
        self._names_size += len(full) + len(value)

    def _commit_if_full(self) -> None:
        pending = self._batch.pending
        if (
            self._names_size > _BATCH_NAMES_MAX
            or len(pending.relied) > _BATCH_CONTENTS_MAX
            or self._written > _BATCH_BYTES_MAX
        ):
            self.commit()
            self._batch = BatchScope(self._to)

    def commit(self) -> None:
        """Commit the batch, if it changes anything: what was only found is as it was."""
        if self._is_changed:
            self._batch.commit()
        else:
            self._batch.discard()
        self._names_size = self._written = 0
        self._is_changed = False

    def discard(self) -> None:
        """Forget what is not committed."""
        self._batch.discard()

    # --- contents ---------------------------------------------------------------------------------------------------

    def _copy_contents(self, keys: Iterable[bytes]) -> None:
        """Copy contents, after all that they link to: depth first, so that only link lists on the way are held."""
        stack = [iter(self._plain_first(keys))]
        waiting: list[tuple[bytes, Clast | None, list[bytes]]] = []
        while stack:
            key = next(stack[-1], None)
            if key is None:
                stack.pop()
                if waiting:
                    self._copy_linked(*waiting.pop())
                continue
            if key in self._done:
                continue
            clast = self._from.contents.clast(key)
            links = self._links(key, clast)
            if self._has(key, links):
                self._found(key)
                continue
            stack.append(iter(self._plain_first(links)))
            waiting.append((key, clast, links))

    def _plain_first(self, keys: Iterable[bytes]) -> list[bytes]:
        """Copy those of `keys` that link to nothing; returns the others."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self._done]
        linked: list[bytes] = []
        plain: list[tuple[bytes, int]] = []
        for key in wanted:
            size = self._stored_size(key)
            if size < 0:
                linked.append(key)
            elif self._to.locator.find(self._to.keyring.grain_keys.grain_key(key)) is not None:
                self._found(key)
            else:
                plain.append((key, size))
        for group in _groups(plain):
            self._copy_plain(group)
        return linked

    def _stored_size(self, key: bytes) -> int:
        """Bytes of a content's grain in the source; -1 if any grain of it may have links, or none is found at once."""
        locator, size = self._from.locator, -1
        for place in locator.find_all(self._from.keyring.grain_keys.grain_key(key)):
            if locator.kind_of(place.stratum) != StratumKind.DATA:
                return -1
            size = place.length
        return size

    def _is_hot(self, key: bytes) -> bool:
        """Whether the source keeps a content where metadata is."""
        locator = self._from.locator
        places = locator.find_all(self._from.keyring.grain_keys.grain_key(key))
        return any(locator.kind_of(place.stratum) == StratumKind.META for place in places)

    def _copy_plain(self, keys: list[bytes]) -> None:
        self._to.ensure_session()
        relied: Relied = {}
        contents = self._from.contents.get_many(keys)
        self._to.contents.put_many(contents, relied)
        self._batch.rely(relied)
        for key, content in zip(keys, contents, strict=True):
            self._copied(key, len(content))
        self._commit_if_full()

    def _links(self, key: bytes, clast: Clast | None) -> list[bytes]:
        """What a content keeps alive: the links of all its grains, without the parts of a large one."""
        links = self._from.contents.links(key)
        if clast is None:
            return links
        parts = set(clast.parts)
        return list(dict.fromkeys([*clast.links, *(link for link in links if link not in parts)]))

    def _has(self, key: bytes, links: list[bytes]) -> bool:
        """Whether the target has the content with all these links; then it has what they lead to as well."""
        contents = self._to.contents
        if not contents.contains(key):
            return False
        return not links or set(links) <= set(contents.links(key))

    def _copy_linked(self, key: bytes, clast: Clast | None, links: list[bytes]) -> None:
        """Copy a content whose links are there."""
        self._to.ensure_session()
        relied: Relied = {}
        for link in links:
            self._to.contents.rely_on(link, relied)
        if clast is None:
            content = self._from.contents.get(key)
            self._to.contents.put(content, relied, links, hot=self._is_hot(key))
            size = len(content)
        else:
            self._to.contents.put_stream(IterableSource(self._parts_of(clast)), relied, links)
            size = clast.size
        self._batch.rely(relied)
        self._copied(key, size)
        self._commit_if_full()

    def _parts_of(self, clast: Clast) -> Iterator[bytes]:
        for start in range(0, len(clast.parts), _STREAM_PARTS):
            yield from self._from.contents.get_many(clast.parts[start : start + _STREAM_PARTS])

    def _found(self, key: bytes) -> None:
        relied: Relied = {}
        self._to.contents.rely_on(key, relied)
        self._batch.rely(relied)
        self._counts["contents_same"] += 1
        self._remember(key)

    def _copied(self, key: bytes, size: int) -> None:
        self._counts["contents"] += 1
        self._counts["size"] += size
        self._written += size
        self._is_changed = True
        self._remember(key)
        if self._progress is not None:
            self._progress(self._counts["size"], None)

    def _remember(self, key: bytes) -> None:
        if len(self._done) >= _DONE_MAX:
            self._done.clear()
        self._done.add(key)


def _reached(name: bytes, row: Row) -> list[bytes]:
    """The contents that a row keeps alive: by reference, or by being their root."""
    if row[1] == ENTRY_REFERENCE:
        return [row[2]]
    if row[1] != ENTRY_DELETE and name.startswith(_ROOT) and len(name) == len(_ROOT) + CONTENT_KEY_SIZE:
        return [name[len(_ROOT) :]]
    return []


def _groups(sized: Iterable[tuple[bytes, int]]) -> Iterator[list[bytes]]:
    """Content keys, some at a time, by their stored sizes."""
    group: list[bytes] = []
    total = 0
    for key, size in sized:
        if group and (len(group) >= _TOGETHER_MAX or total + size > _TOGETHER_BYTES_MAX):
            yield group
            group, total = [], 0
        group.append(key)
        total += size
    if group:
        yield group
