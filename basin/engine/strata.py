"""`OwnStrata`: the strata that one handle is writing, and those it finished and no record describes yet.

Invariants:

- At most one stratum of a kind is active. A full one is finished before the next is created.
- On a disk a stratum grows over many commits; in a bucket each commit finishes it, for nobody can read half an object.
  There a full one is sent while the next is written, and `sync` waits for all.
- What was finished stays in `_unlogged` until a record that describes it is in the log: also if a transaction that put
  contents there loses, for those of others stand beside them.
- A file is deleted only if no record names it, or after the record that removed it.
- Where `data/` is cold, a record that adds data strata also adds a run of their indexes (see `hot_indexes`).

Switching and syncing happen under the contents' mutex; which record describes what is `core`'s business.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Final

from basin.engine.hot_indexes import HotIndexes
from basin.engine.index import GrainLocator
from basin.engine.keyring import Keyring
from basin.engine.options import Options
from basin.engine.reader import StratumReaders
from basin.engine.state import ACTIVE, FINISHED, Stratum
from basin.engine.tiers import is_cold
from basin.engine.writer import StratumWriter, stratum_name
from basin.errors import StorageError
from basin.format.layout import MIB, StratumKind
from basin.format.record import IndexRun, StratumAdded
from basin.storage.protocol import Storage
from basin.terms import Position, StratumId

STRATA_ABOUT: Final = 1000
"""A basin with more strata than this makes larger ones: every handle keeps a line of each in memory."""
ACTIVE_PARENTS_MS: Final = 3_600_000
STRATUM_SIZE_MAX: Final = 512 * MIB


class OwnStrata:
    """Creates, switches, syncs and finishes strata of one session. `session` is 0 until it has begun."""

    def __init__(
        self, storage: Storage, keyring: Keyring, options: Options, readers: StratumReaders, locator: GrainLocator
    ) -> None:
        self.session: Position = 0
        self._storage = storage
        self._keyring = keyring
        self._options = options
        self._readers = readers
        self._locator = locator
        self._writers: dict[StratumKind, StratumWriter] = {}
        self._sending: list[StratumWriter] = []
        """Complete, and not known to be durable."""
        self._unlogged: list[StratumAdded] = []
        self._hot_indexes = HotIndexes()
        self._is_cold = is_cold(options)
        self._is_remote = storage.objects is not None
        self.stored_size = 0
        """Bytes of all strata of the basin, about."""

    def writable(self, kind: StratumKind) -> StratumWriter | None:
        """The active stratum of `kind` if there is room in it, and nobody has rotated the keys since it began."""
        writer = self._writers.get(kind)
        return writer if writer is not None and not writer.is_full and self._is_current(writer) else None

    def _is_current(self, writer: StratumWriter) -> bool:
        return writer.generation == self._keyring.generation

    def _may_grow(self, writer: StratumWriter) -> bool:
        """Whether a stratum stays active. While it is, its generation of keys cannot be dropped, and if it holds links,
        nothing that they lead to can be collected.
        """
        age_ms = time.time_ns() // 1_000_000 - writer.id.time_ms
        return self._is_current(writer) and (writer.kind == StratumKind.DATA or age_ms < ACTIVE_PARENTS_MS)

    def switch(self, kind: StratumKind) -> StratumWriter:
        """Finish the active stratum of `kind`, if there is one, and begin another."""
        writer = self._writers.get(kind)
        if writer is not None:
            self._finish(writer)
        writer = self._writers[kind] = self.create(kind)
        self._locator.add_writer(writer)
        return writer

    def create(self, kind: StratumKind) -> StratumWriter:
        """A stratum of this session under a fresh name and fresh keys."""
        identity = StratumId((time.time_ns() // 1_000_000).to_bytes(6, "big") + os.urandom(10))
        return StratumWriter(
            self._storage,
            self._keyring,
            kind,
            session=self.session,
            identity=identity,
            key_material=os.urandom(32),
            size_target=max(self._options.stratum_size, min(STRATUM_SIZE_MAX, self.stored_size // STRATA_ABOUT)),
        )

    def _finish(self, writer: StratumWriter) -> None:
        directory = writer.complete()
        if not self._is_remote:
            writer.sync()
        if self._is_cold and writer.kind == StratumKind.DATA:
            self._hot_indexes.add(writer.id, writer.entries())
        del self._writers[writer.kind]
        self._sending.append(writer)
        self._locator.writer_finished(writer, directory)
        if not self._is_remote:
            self._land(self._sending)
        if self._hot_indexes.is_full:
            self._write_hot_index()

    def _write_hot_index(self, only: Collection[StratumId] | None = None) -> None:
        """Write the indexes of cold data strata that wait; from then on this handle, too, looks into that run."""
        written = self._hot_indexes.write(partial(self.create, StratumKind.INDEX), self.discard, only)
        if written is not None:
            run, strata, directory = written
            self._unlogged.append(run)
            self._locator.strata_indexed(run, strata, directory)

    def _land(self, writers: Iterable[StratumWriter]) -> None:
        """Wait until complete strata are durable; then a record may describe them."""
        for writer in list(writers):
            writer.sync()
            writer.close()
            self._sending.remove(writer)
            self._unlogged.append(writer.describe(FINISHED))

    def landed(self) -> list[StratumAdded]:
        """What can be logged now without waiting for anything."""
        sent = [writer for writer in self._sending if writer.is_sent()]
        self._write_hot_index({writer.id for writer in sent})
        self._land(sent)
        held = self._hot_indexes.held_back({writer.id for writer in self._sending})
        return [one for one in self._unlogged if one.id not in held]

    def sync(self, logged: Mapping[StratumId, Stratum]) -> list[StratumAdded]:
        """Make all contents durable; returns how a record describes the strata that grew since those in `logged`."""
        if self._is_remote:
            return self.finish_all()
        for writer in [writer for writer in self._writers.values() if not self._may_grow(writer)]:
            self._finish(writer)
        self._write_hot_index()
        added = list(self._unlogged)
        for writer in self._writers.values():
            known = logged.get(writer.id)
            writer.sync()
            if known is None or known.added.length < writer.synced_offset:
                added.append(writer.describe(ACTIVE))
        return added

    def finish_all(self) -> list[StratumAdded]:
        """Finish the active strata; returns all that no record describes yet."""
        for writer in list(self._writers.values()):
            self._finish(writer)
        self._write_hot_index()
        self._land(self._sending)
        return list(self._unlogged)

    def hand_over(self) -> list[StratumAdded]:
        """`finish_all` for a worker, which appends no record: somebody else will."""
        described = self.finish_all()
        self._unlogged = []
        return described

    def runs_of(self, added: Sequence[StratumAdded]) -> list[IndexRun]:
        """The index runs that a record names which adds these strata."""
        return self._hot_indexes.runs_of(added)

    def add(
        self,
        finished: Iterable[StratumAdded],
        logged: Collection[StratumId] = (),
        runs: Iterable[IndexRun] = (),
    ) -> None:
        """The next record describes these, too, but for those that are in the log already. `runs` lie in them."""
        self._hot_indexes.adopt(runs)
        waiting = {one.id for one in self._unlogged}
        self._unlogged.extend(one for one in finished if one.id not in waiting and one.id not in logged)

    def settle(self, added: Sequence[StratumAdded], logged: Mapping[StratumId, Stratum]) -> None:
        """What the log says in full needs no describing again; a record whose batches all lost was never written."""
        for one in added:
            if one.id in logged and logged[one.id].added == one and one in self._unlogged:
                self._unlogged.remove(one)  # In place: other threads append meanwhile.
                self._hot_indexes.forget(one.id)

    def owns(self, identity: StratumId) -> bool:
        """Whether this handle is writing the stratum, or finished it and has not logged it yet."""
        unlogged = any(one.id == identity for one in self._unlogged)
        return unlogged or self._locator.is_own(identity) or any(one.id == identity for one in self._sending)

    @property
    def is_busy(self) -> bool:
        """Whether there is anything that no record describes yet."""
        return bool(self._writers or self._sending or self._unlogged)

    def forget_runs(self, refused: Collection[StratumId]) -> None:
        """Delete runs of names of large batches that no record names."""
        for one in [one for one in self._unlogged if one.id in refused]:
            self._unlogged.remove(one)  # In place: other threads append meanwhile.
        for identity in refused:
            with contextlib.suppress(StorageError):  # Then the sweep does it.
                self.delete(StratumKind.META, identity)

    def discard(self, writer: StratumWriter) -> None:
        """Give up a stratum that no record names or will name, and its file."""
        writer.abandon()
        with contextlib.suppress(StorageError):  # Then the sweep does it.
            self.delete(writer.kind, writer.id)

    def delete(self, kind: int, identity: StratumId) -> None:
        """Delete the file of a stratum that a record removed."""
        self._readers.forget(identity)
        self._storage.delete(stratum_name(kind, identity))

    def delete_kept(self, kinds: Mapping[StratumId, int]) -> None:
        """Delete files of strata that were removed a while ago, all at once."""
        for identity in kinds:
            self._readers.forget(identity)
        self._storage.delete_many([stratum_name(kind, identity) for identity, kind in kinds.items()])

    def abandon(self, logged: Collection[StratumId]) -> None:
        """Append to no active stratum again: something failed, or the handle ends. Those in `logged` keep the file."""
        for writer in [*self._writers.values(), *self._sending]:
            writer.abandon(logged=writer.id in logged)
            self._locator.writer_abandoned(writer)
        self._writers = {}
        self._sending = []
        self._hot_indexes.clear()
