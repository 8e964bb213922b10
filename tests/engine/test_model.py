"""A Hypothesis state machine: every operation on names and blobs, compared with the model of `tests.engine.model`.

Two handles on one simulated disk, an open batch, an open transaction and some views; the clock is the machine's own.
Memtables are tiny, so that flushes and merges happen all the time. A crash is a kill or a power cut of the disk.

Longer than most files: one rule for each operation.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import basin
from basin.api import Database, open_storage
from basin.engine.basin import View
from basin.engine.keyspace import NameMap
from basin.engine.merging import flush
from basin.errors import BasinError, Conflict, PositionGone
from basin.layers.blobs import Blobs
from basin.terms import ContentKey, Ref
from basin.testing.crash import crash_states
from basin.testing.disk import SimulatedDisk
from basin.testing.simulated import SimulatedStorage
from tests.engine.model import INLINE_MAX, Contents, Keyspace, Registry, Scope, Store, Version, content_key, sort_key

SECRET = basin.Secret.generate()
PART_SIZE = 64
KEYSPACES = {"plain": ("bytes", "bytes"), "numbers": ("u64", "bytes"), "tuples": ("tuple", "json")}
VIEWS_MAX = 3

ALL_NAMES = [b"", b"a", b"a\0", b"a\0b", b"aa", b"ab", b"b", b"b\xff", b"b\xff\xff", b"c", b"\xff"]
ALL_NAMES += [b"name/%03d" % number for number in range(15)]
bytes_names = st.sampled_from(ALL_NAMES)
elements = st.sampled_from([None, False, True, -300, -1, 0, 1, 255, 256, -0.5, 2.25, b"", b"a\0", "", "a", "a\0b", "é"])
names_of = {
    "bytes": bytes_names,
    "u64": st.sampled_from([0, 1, 2, 255, 256, 257, 1 << 40, (1 << 64) - 1]),
    "tuple": st.lists(elements, max_size=2).map(tuple),
}
bytes_values = st.one_of(
    st.sampled_from([b"", b"v", b"another"]),
    st.tuples(st.sampled_from([15, 16, 17, 64, 65, 200]), st.integers(0, 3)).map(
        lambda pair: b"%d." % pair[1] * pair[0]
    ),
)
json_values = st.sampled_from([None, True, 0, 1.5, "text", ["a", 1], {"k": "a value above the inline size"}])
blobs_data = st.tuples(st.sampled_from([0, 1, 40, 64, 65, 128, 150]), st.integers(0, 3)).map(
    lambda pair: bytes([65 + pair[1]]) * pair[0]
)
handles = st.sampled_from([0, 0, 0, 1])
places = st.sampled_from(["a", "a", "b", "batch", "tx"])
covered: set[str] = set()


def covers(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Note which public methods a rule calls."""
    covered.update(names)
    return lambda function: function


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """What a call returned, or the kind of error it raised."""
    try:
        result = call()
    except BasinError as error:
        return "error", type(error).__name__
    return "value", list(result) if isinstance(result, Iterator) else result


class Handle:
    """One open handle and the model's side of it."""

    def __init__(self, machine: BasinMachine, database: Database) -> None:
        self.database = database
        self.own: set[ContentKey] = set()
        self.scope = Scope(machine.store, lambda: machine.store.rows, machine.now_ms, self.own)

    def commit(self, machine: BasinMachine) -> None:
        """The model commits what this handle has pending."""
        if self.scope.dirty():
            machine.store.commit(self.scope.writes, self.own)
            self.scope.writes, self.scope.written = [], False


class Open:
    """An open batch or transaction: the engine's, its names in other keyspaces, and the model's scope."""

    def __init__(self, machine: BasinMachine, handle: Handle, *, transaction: bool) -> None:
        database = handle.database
        self.handle = handle
        self.engine: Any = database.transaction() if transaction else database.batch()
        self.since = 0
        self.position = database.core.state.position
        if transaction:
            handle.commit(machine)
            rows, now_ms = machine.store.rows, machine.now_ms()
            self.scope = Scope(machine.store, lambda: rows, lambda: now_ms, handle.own)
            self.scope.reads = []
            self.since = len(machine.store.writes)
        else:
            self.scope = Scope(machine.store, handle.scope.rows, machine.now_ms, handle.own)


class BasinMachine(RuleBasedStateMachine):
    """The rules. `both` calls engine and model and compares."""

    profile = "encrypted"

    def __init__(self) -> None:
        super().__init__()
        self.clock_ms = 1_800_000_000_000
        self.store = Store()
        self.disk = SimulatedDisk()
        self.handles: list[Handle] = []
        self.batch: Open | None = None
        self.tx: Open | None = None
        self.views: list[tuple[View, Scope]] = []
        self.clock = mock.patch("time.time_ns", side_effect=lambda: self.clock_ms * 1_000_000)
        self.clock.start()

    def now_ms(self) -> int:
        return self.clock_ms

    # --- life ---------------------------------------------------------------------------------------------------------

    @initialize(
        memtable_size=st.sampled_from([1024, 1024, 5000, 1 << 24]),
        batch_size=st.sampled_from([40, 1 << 20]),
        history_s=st.sampled_from([0.0, 3600.0]),
        threads=st.sampled_from([1, 2]),
    )
    def create(self, memtable_size: int, batch_size: int, history_s: float, threads: int) -> None:
        self.batch_size = mock.patch("basin.engine.core.BATCH_INLINE_MAX", batch_size)  # Larger ones become runs.
        self.batch_size.start()
        self.options = {
            "inline_max": INLINE_MAX,
            "part_max": 2 * PART_SIZE,
            "part_size": PART_SIZE,
            "memtable_size": memtable_size,
            "history_s": history_s,
            "stratum_size": 4096,
            "sync_interval_s": 3600.0,
            "refresh_interval_s": 0.0,
            "reserve_size": 0,
            "threads": threads,
        }
        self.handles = [self.open_handle("x"), self.open_handle("w")]
        self.note()

    def open_handle(self, mode: Any) -> Handle:
        secret = SECRET if self.profile == "encrypted" else None
        storage = SimulatedStorage(self.disk)
        options = {name: value for name, value in self.options.items() if mode == "x" or not name.startswith("part")}
        return Handle(
            self,
            open_storage(storage, "simulated:", mode=mode, secret=secret, profile=self.profile, options=options),
        )

    def note(self) -> None:
        """Commit in the model what the engine committed by itself, and remember the position."""
        for handle in self.handles:
            if handle.scope.writes and not handle.database.core.overlays():
                handle.commit(self)
        position = max(handle.database.core.state.position for handle in self.handles)
        self.store.note(position, self.clock_ms)

    def teardown(self) -> None:
        try:
            if self.handles and sys.exc_info()[0] is None:  # Else what went wrong has been said.
                for handle in self.handles:
                    handle.database.close()
                    handle.commit(self)
                with self.open_handle("r").database as reader:
                    self.compare_all(reader, Scope(self.store, lambda: self.store.rows, self.now_ms, set()))
                    assert [finding for finding in reader.check() if finding.severity == "damage"] == []
        finally:
            mock.patch.stopall()

    def close_scopes(self, handle: Handle) -> None:
        """Scopes end with their handle."""
        if self.batch is not None and self.batch.handle is handle:
            self.batch = None
        if self.tx is not None and self.tx.handle is handle:
            self.tx = None
        self.views = [entry for entry in self.views if entry[0].scope.core is not handle.database.core]

    @covers("close", "closed")
    @rule(who=handles)
    def reopen(self, who: int) -> None:
        handle = self.handles[who]
        self.close_scopes(handle)
        handle.database.close()
        assert handle.database.closed
        handle.commit(self)
        self.store.durable |= handle.own
        self.handles[who] = self.open_handle("w")
        self.note()

    @rule(power=st.booleans(), seed=st.integers(0, 99))
    def crash(self, power: bool, seed: int) -> None:
        if power:
            image = list(crash_states(self.disk, seed=seed, limit=8))[-1]
        else:
            image = self.disk.kill_image()
        for handle in self.handles:
            self.close_scopes(handle)
            handle.database.core.release("killed")
        self.disk = SimulatedDisk.from_image(image, boot=self.disk.boot + power)
        self.handles = [self.open_handle("w"), self.open_handle("c")]
        self.note()

    @rule(seconds=st.sampled_from([0.5, 3, 20, 2000, 9000]))
    def advance(self, seconds: float) -> None:
        self.clock_ms += int(seconds * 1000)

    # --- comparing ----------------------------------------------------------------------------------------------------

    def both(self, call: Callable[[], Any], expected: Callable[[], Any]) -> None:
        """Engine and model must return the same, or raise the same."""
        actual = outcome(call)
        wanted = outcome(expected)
        assert actual == wanted, (actual, wanted)
        self.note()

    def opened(self, place: str) -> tuple[Any, Scope, Handle]:
        """The engine's names, the model's scope, and the handle behind them."""
        if place == "batch" and self.batch is not None:
            return self.batch.engine, self.batch.scope, self.batch.handle
        if place == "tx" and self.tx is not None:
            return self.tx.engine, self.tx.scope, self.tx.handle
        handle = self.handles[place == "b"]
        return handle.database, handle.scope, handle

    def sides(self, place: str, space: str) -> tuple[Any, Keyspace]:
        """A keyspace of the engine and of the model; it is created first where it is missing."""
        engine, scope, handle = self.opened(place)
        if not space:
            return engine, Keyspace(scope)
        order, values = KEYSPACES[space]
        names = engine.keyspace(space, order, values)
        create = Scope(self.store, handle.scope.rows, self.now_ms, handle.own)
        if scope is handle.scope or (self.batch is not None and scope is self.batch.scope):
            model = Registry(scope, create).keyspace(space, order, values)
        else:
            model = Registry(scope).keyspace(space, order, values)
        if create.writes:  # At once, after what was pending.
            handle.commit(self)
            self.store.commit(create.writes, handle.own)
        self.note()
        return names, model

    def exclusive(self, place: str, space: str, method: str, *arguments: Any) -> None:
        """A method that is one transaction of its own on a handle."""
        names, model = self.sides(place, space)
        _, scope, handle = self.opened(place)
        if scope is handle.scope:
            handle.commit(self)
        self.both(lambda: getattr(names, method)(*arguments), lambda: getattr(model, method)(*arguments))
        if scope is handle.scope:
            handle.commit(self)
            self.note()

    def compare_all(self, engine: Any, scope: Scope) -> None:
        """Everything that can be seen in one scope."""
        registry = Registry(scope)
        pairs: list[tuple[Any, Any]] = [
            (list(engine.scan()), Keyspace(scope).scan()),
            (engine.keyspaces(), registry.keyspaces()),
            (list(engine.blobs), Contents(scope).roots()),
        ]
        pairs += [
            (list(engine.keyspace(name).items()), registry.keyspace(name).scan()) for name in registry.keyspaces()
        ]
        for actual, wanted in pairs:
            assert actual == wanted, (actual, wanted)
        for key in self.store.durable:
            assert engine.blobs[key] == self.store.contents[key]

    # --- names --------------------------------------------------------------------------------------------------------

    @covers("put")
    @rule(
        place=places,
        space=st.sampled_from(["", "", *KEYSPACES]),
        data=st.data(),
        ttl=st.sampled_from([None, None, 1, 30]),
    )
    def put(self, place: str, space: str, data: st.DataObject, ttl: float | None) -> None:
        names, model = self.sides(place, space)
        name, value = self.pair(data, model)
        self.both(lambda: names.put(name, value, ttl=ttl), lambda: model.put(name, value, ttl=ttl))

    def pair(self, data: st.DataObject, model: Keyspace) -> tuple[Any, Any]:
        """A name and a value for a keyspace; sometimes a reference."""
        name = data.draw(names_of[model.order])
        if model.codec == "json":
            return name, data.draw(json_values)
        known = sorted(self.store.durable | model.scope.own)
        if known and data.draw(st.integers(0, 5)) == 0:
            return name, Ref(data.draw(st.sampled_from(known)))
        return name, data.draw(bytes_values)

    @covers("__setitem__", "__getitem__", "__contains__", "get", "ref", "__delitem__", "delete")
    @rule(
        place=places,
        space=st.sampled_from(["", "", *KEYSPACES]),
        what=st.sampled_from(["set", "get", "index", "in", "ref", "delete", "del", "text"]),
        data=st.data(),
    )
    def single(self, place: str, space: str, what: str, data: st.DataObject) -> None:
        names, model = self.sides(place, space)
        name, value = self.pair(data, model)
        calls: dict[str, Callable[[Any], Any]] = {
            "set": lambda one: one.__setitem__(name, value),
            "get": lambda one: one.get(name, b"default"),
            "index": lambda one: one[name],
            "in": lambda one: name in one,
            "ref": lambda one: one.ref(name),
            "delete": lambda one: one.delete(name),
            "del": lambda one: one.__delitem__(name),
            "text": lambda one: one.put("näme", value) if model.order == "bytes" else one.get(name),
        }
        self.both(lambda: calls[what](names), lambda: calls[what](model))

    @covers("put_many", "get_many")
    @rule(
        place=places,
        space=st.sampled_from(["", *KEYSPACES]),
        count=st.integers(0, 6),
        data=st.data(),
        ttl=st.sampled_from([None, None, 5]),
    )
    def many(self, place: str, space: str, count: int, data: st.DataObject, ttl: float | None) -> None:
        names, model = self.sides(place, space)
        pairs = [self.pair(data, model) for _ in range(count)]
        self.both(lambda: names.put_many(iter(pairs), ttl=ttl), lambda: model.put_many(pairs, ttl=ttl))
        wanted = [name for name, _ in pairs] + [data.draw(names_of[model.order])]
        self.both(lambda: names.get_many(wanted), lambda: model.get_many(wanted))

    @covers("setdefault", "pop", "popitem", "update", "put")
    @rule(
        place=places,
        space=st.sampled_from(["", "", *KEYSPACES]),
        what=st.sampled_from(["setdefault", "pop", "pop default", "popitem", "update", "if_absent"]),
        data=st.data(),
    )
    def as_transaction(self, place: str, space: str, what: str, data: st.DataObject) -> None:
        _, model = self.sides(place, space)
        name, value = self.pair(data, model)
        if what == "setdefault" and isinstance(value, Ref):
            value = b"v" * 20
        match what:
            case "setdefault":
                self.exclusive(place, space, "setdefault", name, value)
            case "pop":
                self.exclusive(place, space, "pop", name)
            case "pop default":
                self.exclusive(place, space, "pop", name, b"nothing")
            case "popitem":
                self.exclusive(place, space, "popitem")
            case "update":
                self.exclusive(place, space, "update", [(name, value), self.pair(data, model)])
            case _:
                names, model = self.sides(place, space)
                _, scope, handle = self.opened(place)
                if scope is handle.scope:
                    handle.commit(self)
                self.both(
                    lambda: names.put(name, value, if_absent=True), lambda: model.put(name, value, if_absent=True)
                )
                if scope is handle.scope:
                    handle.commit(self)
                    self.note()

    @covers("delete_range", "clear")
    @rule(place=places, space=st.sampled_from(["", *KEYSPACES]), everything=st.integers(0, 4), data=st.data())
    def delete_many(self, place: str, space: str, everything: int, data: st.DataObject) -> None:
        names, model = self.sides(place, space)
        if everything == 0:
            self.both(names.clear, model.clear)
            return
        bounds = st.one_of(st.none(), names_of[model.order])
        start, stop = data.draw(bounds), data.draw(names_of[model.order])
        self.both(lambda: names.delete_range(start, stop), lambda: model.delete_range(start, stop))

    @rule(
        place=places,
        space=st.sampled_from(["", "", "tuples"]),
        kinds=st.lists(st.sampled_from(["put", "delete", "range", "many"]), min_size=2, max_size=5),
        commit=st.booleans(),
        data=st.data(),
    )
    def burst(self, place: str, space: str, kinds: list[str], commit: bool, data: st.DataObject) -> None:
        """Changes of the same few names, one after the other, in one batch."""
        names, model = self.sides(place, space)
        _, scope, handle = self.opened(place)
        few = data.draw(st.lists(names_of[model.order], min_size=2, max_size=3))
        few.sort(key=lambda name: sort_key(model.order, name))
        for kind in kinds:
            name, value = data.draw(st.sampled_from(few)), self.pair(data, model)[1]
            changes: dict[str, Callable[[Any], Any]] = {
                "put": lambda one: one.put(name, value),  # noqa: B023  # called at once
                "delete": lambda one: one.delete(name),  # noqa: B023  # called at once
                "range": lambda one: one.delete_range(few[0], few[-1]),
                "many": lambda one: one.put_many([(name, value) for name in few]),  # noqa: B023  # called at once
            }
            self.both(lambda: changes[kind](names), lambda: changes[kind](model))  # noqa: B023  # called at once
        if commit and scope is handle.scope:
            handle.database.commit()
            handle.commit(self)
            self.note()
        self.both(lambda: names.get_many(few), lambda: model.get_many(few))

    @covers("scan", "__iter__", "__len__", "__bool__", "keys", "values", "items")
    @rule(
        place=st.sampled_from(["a", "b", "batch", "tx", "view"]),
        space=st.sampled_from(["", "", *KEYSPACES]),
        bounds=st.sampled_from(["all", "prefix", "range", "from", "to", "after", "size", "views"]),
        reverse=st.booleans(),
        limit=st.sampled_from([None, None, 0, 1, 3]),
        keys_only=st.booleans(),
        data=st.data(),
    )
    def scan(
        self,
        place: str,
        space: str,
        bounds: str,
        reverse: bool,
        limit: int | None,
        keys_only: bool,
        data: st.DataObject,
    ) -> None:
        if place == "view" and self.views:
            view, scope = self.views[0]
            self.compare_all(view, scope)
            return
        names, model = self.sides(place, space)
        if bounds == "size":
            self.both(lambda: (len(names), bool(names)), lambda: (len(model), bool(model)))
            return
        if bounds == "views":
            self.both(
                lambda: [list(names), list(names.keys()), list(names.values()), list(names.items())],
                lambda: [
                    model.scan(keys_only=True),
                    model.scan(keys_only=True),
                    [value for _, value in model.scan()],
                    model.scan(),
                ],
            )
            return
        some = names_of[model.order]
        bounds_of: dict[str, Callable[[], dict[str, Any]]] = {
            "all": dict,
            "prefix": lambda: {"prefix": data.draw(some)},
            "range": lambda: {"start": data.draw(some), "stop": data.draw(some)},
            "from": lambda: {"start": data.draw(some)},
            "to": lambda: {"stop": data.draw(some), "prefix": data.draw(some)},
            "after": lambda: {"after": data.draw(some)},
        }
        given = bounds_of[bounds]()
        options: dict[str, Any] = {"reverse": reverse, "limit": limit, "keys_only": keys_only}
        self.both(lambda: names.scan(**given, **options), lambda: model.scan(**given, **options))

    @covers("keyspace", "keyspaces", "drop_keyspace")
    @rule(place=places, space=st.sampled_from(list(KEYSPACES)), drop=st.booleans())
    def keyspace(self, place: str, space: str, drop: bool) -> None:
        engine, scope, handle = self.opened(place)
        if drop:
            if scope is handle.scope:
                handle.commit(self)
            self.both(lambda: engine.drop_keyspace(space), lambda: Registry(scope).drop_keyspace(space))
            if scope is handle.scope:
                handle.commit(self)
                self.note()
        self.both(engine.keyspaces, Registry(scope).keyspaces)

    # --- scopes -------------------------------------------------------------------------------------------------------

    @covers("batch", "transaction")
    @rule(who=handles, transaction=st.booleans())
    def begin(self, who: int, transaction: bool) -> None:
        handle = self.handles[who]
        if transaction and self.tx is None:
            self.tx = Open(self, handle, transaction=True)
        elif not transaction and self.batch is None:
            self.batch = Open(self, handle, transaction=False)
        self.note()

    @precondition(lambda self: self.batch is not None)
    @rule(abort=st.integers(0, 3))
    def end_batch(self, abort: int) -> None:
        opened, self.batch = self.batch, None
        assert opened is not None
        if abort == 0:
            with pytest.raises(ZeroDivisionError), opened.engine:
                raise ZeroDivisionError
            return
        with opened.engine:
            pass
        self.commit_scope(opened)

    def commit_scope(self, opened: Open) -> None:
        """In the model: what the handle had pending comes first."""
        if opened.scope.dirty():
            opened.handle.commit(self)
            self.store.commit(opened.scope.writes, opened.handle.own)
        self.note()

    @precondition(lambda self: self.tx is not None)
    @rule(abort=st.integers(0, 3))
    def end_transaction(self, abort: int) -> None:
        self.finish_transaction(abort=abort == 0)

    def finish_transaction(self, *, abort: bool) -> None:
        """It must be committed, or must conflict, or may do either."""
        opened, self.tx = self.tx, None
        assert opened is not None
        if abort:
            with pytest.raises(ZeroDivisionError), opened.engine:
                raise ZeroDivisionError
            return
        dirty = opened.scope.dirty()
        if dirty:
            opened.handle.commit(self)  # Pending changes of the handle are logged first, then this is judged.
        must, may = opened.scope.conflicts(opened.since)
        opened.handle.database.refresh()
        may = may or opened.handle.database.core.state.floor > opened.position  # Too old to be judged.
        try:
            with opened.engine:
                pass
        except Conflict:
            assert dirty
            assert may
        else:
            assert not (dirty and must)
            self.commit_scope(opened)
        self.note()

    @rule(
        space=st.sampled_from(["", "plain", "tuples"]),
        read=st.sampled_from(["get", "scan", "prefix", "reverse", "limit", "len"]),
        change=st.sampled_from(["put", "delete", "delete_range", "clear", "many"]),
        flushed=st.booleans(),
        data=st.data(),
    )
    def race(self, space: str, read: str, change: str, flushed: bool, data: st.DataObject) -> None:
        """A transaction reads and writes, and the other handle commits a change before it does."""
        if self.tx is not None:
            return
        self.sides("b", space)
        self.tx = Open(self, self.handles[0], transaction=True)
        some = names_of[KEYSPACES[space][0] if space else "bytes"]
        name = data.draw(some)
        reads: dict[str, Callable[[Any], Any]] = {
            "get": lambda one: one.get(name),
            "scan": lambda one: list(one.scan(start=name)),
            "prefix": lambda one: list(one.scan(prefix=name)),
            "reverse": lambda one: list(one.scan(stop=name, reverse=True)),
            "limit": lambda one: list(one.scan(limit=2)),
            "len": len,
        }
        names, model = self.sides("tx", space)
        self.both(lambda: reads[read](names), lambda: reads[read](model))
        result, result_model = self.sides("tx", "numbers")
        self.both(lambda: result.put(7, b"result"), lambda: result_model.put(7, b"result"))
        other, start, stop = data.draw(some), data.draw(some), data.draw(some)
        value: Any = data.draw(json_values if model.codec == "json" else bytes_values)
        changes: dict[str, Callable[[Any], Any]] = {
            "put": lambda one: one.put(other, value),
            "delete": lambda one: one.delete(other),
            "delete_range": lambda one: one.delete_range(start, stop),
            "clear": lambda one: one.clear(),
            "many": lambda one: one.put_many([(other, value), (start, value), (stop, value)]),
        }
        names, model = self.sides("b", space)
        self.both(lambda: changes[change](names), lambda: changes[change](model))
        self.handles[1].database.commit()
        self.handles[1].commit(self)
        if flushed:
            flush(self.handles[1].database.core)
        self.note()
        self.finish_transaction(abort=False)

    @covers("compact")
    @rule(who=handles, prune=st.booleans())
    def compact(self, who: int, prune: bool) -> None:
        """Nothing changes: what is dead is condemned, and stays for the grace."""
        handle = self.handles[who]
        handle.database.compact(prune=prune, grace_s=86_400.0)
        handle.commit(self)
        self.note()

    @covers("run")
    @rule(who=handles, name=bytes_names)
    def run_counter(self, who: int, name: bytes) -> None:
        handle = self.handles[who]

        def increment(tx: Any) -> int:
            count = len(tx.get(name, b"")) % 8 + 1
            tx[name] = b"x" * count
            return count

        model = Keyspace(handle.scope)
        handle.commit(self)
        self.both(lambda: handle.database.run(increment), lambda: increment(model))
        handle.commit(self)
        self.note()

    @covers("view", "at")
    @rule(who=handles, past=st.booleans(), data=st.data())
    def look(self, who: int, past: bool, data: st.DataObject) -> None:
        handle = self.handles[who]
        database = handle.database
        if not past:
            view: View = database.view()
            handle.commit(self)
            version = Version(view.position, self.clock_ms, self.store.rows)
        else:
            version = self.draw_version(data)
            try:
                view = database.at(version.position)
            except PositionGone:
                assert version.position < database.core.state.floor or version.position == 0
                handle.commit(self)
                self.note()
                return
            handle.commit(self)
        self.note()
        assert view.position == version.position
        scope = Scope(self.store, lambda: version.rows, lambda: version.time_ms, set())
        scope.writable = False
        self.compare_all(view, scope)
        with pytest.raises(basin.errors.ReadOnly):
            view.put(b"a", b"v")
        self.views = [(view, scope), *self.views][:VIEWS_MAX]

    def draw_version(self, data: st.DataObject) -> Version:
        """One of the committed states, by its number."""
        return self.store.history[data.draw(st.integers(0, len(self.store.history) - 1))]

    @covers("changes")
    @rule(who=handles, data=st.data())
    def follow(self, who: int, data: st.DataObject) -> None:
        """Changes since a position lead from the state there to the state now."""
        handle = self.handles[who]
        version = self.draw_version(data)
        try:
            changes = list(handle.database.changes(since=version.position))
        except PositionGone:
            assert version.position < handle.database.core.state.floor
            handle.commit(self)
            self.note()
            return
        handle.commit(self)
        self.note()
        assert [change.position for change in changes] == sorted(change.position for change in changes)
        reached = {row.name: row.content or row.value for key, row in version.rows.items() if key[0] == 0}
        for change in changes:
            if change.keyspace:
                continue
            if change.kind == "delete_range":
                gone = [name for name in reached if name >= change.name and (change.stop is None or name < change.stop)]
                for name in gone:
                    del reached[name]
            elif change.kind == "delete":
                reached.pop(change.name, None)
            else:
                assert isinstance(change.value, ContentKey) == (change.kind == "ref")
                reached[change.name] = change.value
        assert reached == {row.name: row.content or row.value for key, row in self.store.rows.items() if key[0] == 0}

    @covers("commit", "refresh", "head", "resolve", "log")
    @rule(who=handles, what=st.sampled_from(["commit", "refresh", "head", "log"]))
    def position(self, who: int, what: str) -> None:
        handle = self.handles[who]
        database = handle.database
        if what == "refresh":
            database.refresh()
            self.note()
            return
        if what == "commit":
            assert database.commit() == database.core.state.position
        elif what == "head":
            assert database.head.position == database.core.state.position
            assert len(database.head.hash) == 32
        else:
            positions = [entry.position for entry in database.log()]
            last = database.core.state.position
            assert positions == list(range(last + 1 - len(positions), last + 1))
        handle.commit(self)
        self.note()

    # --- blobs --------------------------------------------------------------------------------------------------------

    @covers("blobs", "blobs.put", "blobs.put_many")
    @rule(place=places, data=blobs_data, kind=st.sampled_from(["bytes", "file", "view", "many"]), root=st.booleans())
    def put_blob(self, place: str, data: bytes, kind: str, root: bool) -> None:
        engine, scope, _ = self.opened(place)
        model = Contents(scope)
        if kind == "many":
            items = [data, data[::2], b"first", data]
            self.both(lambda: engine.blobs.put_many(iter(items), root=root), lambda: model.put_many(items, root=root))
            return
        given: Any = {"bytes": data, "file": io.BytesIO(data), "view": memoryview(data)}[kind]
        self.both(lambda: engine.blobs.put(given, root=root), lambda: model.put(data, root=root))

    @covers("blobs.links")
    @rule(place=places, data=blobs_data, count=st.integers(1, 2), draw=st.data())
    def link_blob(self, place: str, data: bytes, count: int, draw: st.DataObject) -> None:
        engine, scope, _ = self.opened(place)
        known = sorted(self.store.durable | scope.own)
        if not known:
            return
        links = [draw.draw(st.sampled_from(known)) for _ in range(count)]
        self.both(lambda: engine.blobs.put(data, links=links), lambda: Contents(scope).put(data, links))
        assert set(links) <= set(engine.blobs.links(content_key(data)))

    @covers(
        "blobs.get", "blobs.__getitem__", "blobs.__contains__", "blobs.size", "blobs.read", "blobs.open", "blobs.parts"
    )
    @covers("blobs.get_many")
    @rule(place=places, draw=st.data(), start=st.integers(0, 160), size=st.integers(0, 160))
    def get_blob(self, place: str, draw: st.DataObject, start: int, size: int) -> None:
        if not self.store.contents:
            return
        engine, scope, _ = self.opened(place)
        key = draw.draw(st.sampled_from(sorted(self.store.contents)))
        wanted = Contents(scope).get(key)
        found = engine.blobs.get(key)
        if wanted is None:  # Put and not committed elsewhere, or lost in a crash: there or not, but nothing else.
            assert found in (None, self.store.contents[key])
            return
        assert found == wanted == engine.blobs[key]
        assert key in engine.blobs
        assert engine.blobs.size(key) == len(wanted)
        assert engine.blobs.read(key, start, start + size) == wanted[start : start + size]
        with engine.blobs.open(str(key)) as file:
            file.seek(start)
            assert file.read(size) == wanted[start : start + size]
        parts = engine.blobs.parts(key)
        pieces = [engine.blobs[f"{key}-{number}"] for number in range(len(parts))]
        assert b"".join(pieces) == wanted
        assert [len(piece) for piece in pieces] == [length for _, length in parts]
        assert f"{key}-{len(parts)}" not in engine.blobs
        assert engine.blobs.get_many([key, str(key), key]) == [wanted] * 3

    @covers("blobs.delete", "blobs.__iter__")
    @rule(place=places, draw=st.data())
    def delete_blob(self, place: str, draw: st.DataObject) -> None:
        engine, scope, _ = self.opened(place)
        if self.store.contents:
            key = draw.draw(st.sampled_from(sorted(self.store.contents)))
            self.both(lambda: engine.blobs.delete(key), lambda: Contents(scope).delete(key))
        self.both(lambda: list(engine.blobs), Contents(scope).roots)

    @invariant()
    def names_are_those_of_the_model(self) -> None:
        """Scanned and looked up: those are two ways through the engine."""
        if not self.handles:
            return
        places: list[tuple[Any, Scope]] = [(self.handles[0].database, self.handles[0].scope)]
        if self.batch is not None:
            places.append((self.batch.engine, self.batch.scope))
        for engine, scope in places:
            model = Keyspace(scope)
            wanted = dict(model.scan())
            assert dict(engine.scan()) == wanted
            assert engine.get_many(ALL_NAMES) == [wanted.get(name) for name in ALL_NAMES]


class OpenMachine(BasinMachine):
    """The same without encryption."""

    profile = "open"


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "examples"), [(BasinMachine, 200), (OpenMachine, 100)])
def test_the_engine_does_what_the_model_does(machine: type[BasinMachine], examples: int, effort: int) -> None:
    chosen = settings(max_examples=examples * effort, stateful_step_count=50)
    run_state_machine_as_test(machine, settings=chosen)


ELSEWHERE = {
    "adopt": "test_ingest",
    "blobs.are_remote": "test_blobs_hot",
    "blobs.get_linked": "test_blobs_hot",
    "blobs.get_linked_many": "test_blobs_hot",
    "blobs.missing": "test_blobs_hot",
    "check": "in every teardown, and test_corruption",
    "core": "for layers",
    "explain_space": "test_space",
    "export": "test_export",
    "import_from": "test_copying",
    "ingest": "test_ingest",
    "pin": "test_compaction",
    "pins": "test_compaction",
    "plan_compaction": "test_compaction",
    "repair": "test_corruption",
    "reserved_keyspace": "for layers",
    "resolve": "test_api: nothing is ever unknown on a disk",
    "scope": "for layers",
    "secrets": "test_keyring",
    "snapshots": "tests/layers/snapshots",
    "stats": "test_api",
    "thaw": "test_cold",
    "ticket": "test_ingest",
    "unpin": "test_compaction",
    "url": "an attribute",
}
MAPPING = {"__getitem__", "__setitem__", "__delitem__", "__contains__", "__iter__", "__len__", "__bool__"}


def public(kind: type) -> set[str]:
    """Public methods and properties of a class, and the operators of a mapping that it defines."""
    return {name for name in dir(kind) if not name.startswith("_") or (name in MAPPING and hasattr(kind, name))}


def test_every_operation_on_names_and_blobs_has_a_rule() -> None:
    blobs = {f"blobs.{name}" for name in public(Blobs)}
    missing = (public(Database) | public(NameMap) | blobs) - covered - ELSEWHERE.keys()
    assert not missing
    stale = {name for name in ELSEWHERE if name not in public(Database) | blobs and name != "url"}
    assert not stale
