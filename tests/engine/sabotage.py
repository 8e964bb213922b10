"""Engines broken on purpose: each leaves out one of the things that make a commit durable.

`SABOTAGES` names for each the script of `crash_scripts` in which the crash explorer must find a bad state. A sabotage
that nobody notices would mean that the explorer, or the script, shows nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest

from basin.engine import merging, recovery, runs
from basin.engine.core import Core
from basin.engine.file_log import FileLog, segment_name
from basin.engine.log import Cursor
from basin.engine.state import State, Stratum
from basin.engine.strata import OwnStrata
from basin.engine.writer import StratumWriter, stratum_name
from basin.errors import BasinClosed, BasinError
from basin.format.index import Entries
from basin.format.record import Record, StratumAdded
from basin.format.segment import Watermark, encode_watermark
from basin.storage.protocol import AppendFile
from basin.terms import Position, StratumId
from basin.testing.faults import _ObservedAppendFile
from basin.testing.simulated import SimulatedAppendFile, SimulatedStorage

Break = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Sabotage:
    """How the engine is broken, and the script that shows it."""

    apply: Break
    script: str


def _pretend_synced(writer: StratumWriter) -> None:
    writer.flush()
    writer.synced_offset, writer.synced_count = writer.offset, writer.grain_count


def strata_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    def sync(self: StratumWriter) -> None:
        _pretend_synced(self)
        self._storage.sync_folder(self.name.partition("/")[0])

    patch.setattr(StratumWriter, "sync", sync)


def folders_of_strata_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    def sync(self: StratumWriter) -> None:
        _pretend_synced(self)
        self._file.sync()

    patch.setattr(StratumWriter, "sync", sync)


def the_record_is_durable_before_the_strata(patch: pytest.MonkeyPatch) -> None:
    late: list[tuple[StratumWriter, Callable[[StratumWriter], None]]] = []
    sync, settle = StratumWriter.sync, OwnStrata.settle

    def sync_later(self: StratumWriter) -> None:
        _pretend_synced(self)
        late.append((self, sync))

    def sync_now(self: OwnStrata, added: Any, logged: Any) -> None:
        for writer, now in late:
            writer.synced_offset = 0
            with contextlib.suppress(BasinClosed):  # A handle of the script that has come to its end.
                now(writer)
        late.clear()
        settle(self, added, logged)

    patch.setattr(StratumWriter, "sync", sync_later)
    patch.setattr(StratumWriter, "close", lambda _: None)
    patch.setattr(OwnStrata, "settle", sync_now)


def commits_are_acknowledged_before_the_sync(patch: pytest.MonkeyPatch) -> None:
    append = FileLog.append

    def unsynced(self: FileLog, cursor: Any, frame: bytes, previous: bytes, *, sync: bool = True) -> Any:
        del sync
        return append(self, cursor, frame, previous, sync=False)

    patch.setattr(FileLog, "append", unsynced)


def a_torn_tail_is_appended_to(patch: pytest.MonkeyPatch) -> None:
    first = FileLog._open_segment

    def open_segment(self: FileLog, cursor: Any, previous: bytes, mark: Watermark | None) -> tuple[AppendFile, int]:
        if not cursor.segment:
            return first(self, cursor, previous, mark)
        self._drop_appender()
        size = self._size(cursor.segment)
        self._appender = self._storage.append_to(segment_name(cursor.segment), size)
        self._appender_segment = cursor.segment
        return self._appender, size

    patch.setattr(FileLog, "_open_segment", open_segment)


def a_stratum_is_used_after_its_sync_failed(patch: pytest.MonkeyPatch) -> None:
    sync = StratumWriter.sync

    def sync_anyway(self: StratumWriter) -> None:
        self.failed = False
        sync(self)

    def forgive(self: Core, error: BaseException, group: Any = ()) -> None:
        del error, group
        for writer in self.own_strata._writers.values():
            writer.failed = False

    patch.setattr(StratumWriter, "sync", sync_anyway)
    patch.setattr(Core, "poison", forgive)
    patch.setattr(_ObservedAppendFile, "_require_unfailed", lambda *_: None)


def the_watermark_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FileLog, "current_watermark", lambda _: None)


def the_watermark_is_written_before_the_record(patch: pytest.MonkeyPatch) -> None:
    def append(self: FileLog, cursor: Any, frame: bytes, previous: bytes, *, sync: bool = True) -> Any:
        del sync
        mark = self.current_watermark()
        file, start = self._open_segment(cursor, previous, mark)
        end = cursor._replace(segment=self._appender_segment, offset=start + len(frame), position=cursor.position + 1)
        if self._lock is not None:
            self._lock.write(encode_watermark(Watermark(self._boot_id, *end)))
        file.append(frame)
        file.sync()
        return end

    patch.setattr(FileLog, "append", append)


def where_a_segment_was_cut_is_ignored(patch: pytest.MonkeyPatch) -> None:
    def end_of(_self: FileLog, segment: int, _last: int, _numbers: list[int], mark: Watermark | None) -> int | None:
        return mark.offset if mark is not None and mark.segment == segment else None

    patch.setattr(FileLog, "_end_of", end_of)


def the_folder_of_new_segments_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    def put(self: SimulatedStorage, name: str, data: bytes) -> None:
        temporary = "tmp/" + name.replace("/", "-")
        file = self.create(temporary)
        file.append(data)
        file.sync()
        self.link(temporary, name)
        self.delete(temporary)

    patch.setattr(SimulatedStorage, "put_if_absent", put)


def log_that_is_still_needed_is_removed(patch: pytest.MonkeyPatch) -> None:
    remove = FileLog.remove_through

    def remove_all(self: FileLog, _position: Position, cursor: Cursor, *, checkpoint: Position, generation: int) -> int:
        return remove(self, Position(1 << 60), cursor, checkpoint=checkpoint, generation=generation)

    patch.setattr(FileLog, "remove_through", remove_all)


def files_are_deleted_before_the_record_that_removes_them(patch: pytest.MonkeyPatch) -> None:
    append = Core.append

    def delete_first(self: Core, build: Callable[[State], Record | None]) -> bool:
        def eager(state: State) -> Record | None:
            record = build(state)
            for identity in record.strata_removed if record is not None else ():
                self.storage.delete(stratum_name(state.strata[StratumId(identity)].added.kind, StratumId(identity)))
            return record

        return append(self, eager)

    patch.setattr(Core, "append", delete_first)


def adopted_strata_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    append_to = SimulatedStorage.append_to

    class Unsynced(SimulatedAppendFile):
        def sync(self) -> None:
            """Left out."""

    def open_unsynced(self: SimulatedStorage, name: str, offset: int) -> AppendFile:
        if name.startswith("data/"):
            return Unsynced(self.disk, self._existing("append_to", name), name)
        return append_to(self, name, offset)

    patch.setattr(SimulatedStorage, "append_to", open_unsynced)


def a_dead_session_s_stratum_counts_as_far_as_it_was_written(patch: pytest.MonkeyPatch) -> None:
    cut = recovery.cut_stratum

    def cut_at_end(core: Core, known: Stratum) -> tuple[StratumAdded, Entries]:
        size = core.readers.get(known.added.kind, known.added.id).size()
        return cut(core, known._replace(added=known.added._replace(length=size)))

    patch.setattr(recovery, "cut_stratum", cut_at_end)


def a_flush_leaves_out_the_newest_commit(patch: pytest.MonkeyPatch) -> None:
    columns = runs.memtable_columns

    def without_newest(table: Any) -> Any:
        return columns(table.__class__()) if len(table) == 0 else _all_but_newest(columns(table))

    def _all_but_newest(all_columns: Any) -> Any:
        newest = max(all_columns.versions)
        rows = [row for row in zip(*all_columns, strict=True) if row[1] != newest]
        return all_columns._replace(
            **{field: [row[at] for row in rows] for at, field in enumerate(all_columns._fields)}
        )

    patch.setattr(merging, "memtable_columns", without_newest)


def a_stratum_whose_sync_failed_is_left_behind(patch: pytest.MonkeyPatch) -> None:
    def abandon(self: StratumWriter, *, logged: bool = False) -> None:
        del logged
        self.failed = True
        try:
            self.close()
        except BasinError:
            return

    patch.setattr(StratumWriter, "abandon", abandon)


SABOTAGES: Final[dict[str, Sabotage]] = {
    sabotage.apply.__name__: sabotage
    for sabotage in (
        Sabotage(strata_are_not_synced, "commits"),
        Sabotage(folders_of_strata_are_not_synced, "commits"),
        Sabotage(the_record_is_durable_before_the_strata, "commits"),
        Sabotage(commits_are_acknowledged_before_the_sync, "commits"),
        Sabotage(a_torn_tail_is_appended_to, "torn-tail"),
        Sabotage(a_stratum_is_used_after_its_sync_failed, "failed-syncs"),
        Sabotage(a_stratum_whose_sync_failed_is_left_behind, "failed-finish"),
        Sabotage(the_watermark_is_ignored, "failed-syncs"),
        Sabotage(the_watermark_is_written_before_the_record, "commits"),
        Sabotage(where_a_segment_was_cut_is_ignored, "failed-syncs"),
        Sabotage(the_folder_of_new_segments_is_not_synced, "segments"),
        Sabotage(log_that_is_still_needed_is_removed, "checkpoint"),
        Sabotage(files_are_deleted_before_the_record_that_removes_them, "strata-merge"),
        Sabotage(adopted_strata_are_not_synced, "failed-finish"),
        Sabotage(a_dead_session_s_stratum_counts_as_far_as_it_was_written, "killed-in-write"),
        Sabotage(a_flush_leaves_out_the_newest_commit, "flush"),
    )
}
