"""Parallel ingest: worker processes write strata under the coordinator's session, which adopts them in one record.

A `Ticket` travels to the workers; it holds where the basin is and whose session the strata belong to, and never a key:
each worker opens the basin with a secret of its own source. A `Report` travels back. What a lost worker wrote is swept
once the session has ended, and its items are done again.

Invariants: a worker appends nothing to the log; its strata are finished and durable before its report exists; the
coordinator checks every stratum's footer and size before it counts it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from basin.engine.contents import Relied
from basin.engine.keyspace import ROOTS_KEYSPACE, prefix_of
from basin.engine.secret import SOURCE_MEMORY, Secret
from basin.engine.state import FINISHED
from basin.engine.tiers import is_archived
from basin.engine.writer import stratum_name
from basin.errors import CorruptionError, InvalidArgument
from basin.format.layout import ENTRY_INLINE, ENTRY_REFERENCE, MIB, StratumKind
from basin.format.record import IndexRun, StratumAdded
from basin.terms import ContentKey, Position, StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

Item: TypeAlias = "bytes | Path | tuple[bytes | str, bytes | Path]"
"""A blob, or (name, value): bytes, or the path of a file that the worker reads."""

SOURCE_NONE: Final = "none"
"""Where a worker finds the secret of an open basin."""
BATCH_COUNT: Final = 256
"""Items that one task carries at most: few enough that the last tasks end together, enough to outweigh pickling."""
BATCH_SIZE: Final = 32 * MIB
"""Bytes after which a task is full: half a stratum, which every task ends with one of its own."""
_TASKS_AHEAD: Final = 2
"""Tasks a worker that wait for it: what is not submitted yet is not held in memory."""
_WORKERS_ASSUMED: Final = 16
"""Of an executor that does not say how many it has."""
_ROOTS: Final = prefix_of(ROOTS_KEYSPACE)


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a worker needs to know, besides a secret. `secret_source` says where a worker finds one of its own."""

    url: str
    session: Position
    secret_source: str
    options: dict[str, Any] = field(default_factory=dict)
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    """May hold credentials, so it is not shown: whoever may send tickets may see them."""
    data_storage_options: dict[str, Any] | None = field(default=None, repr=False)
    """Those of the root of `data/`, where it has a root and options of its own."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker wrote: finished strata, the names that refer to contents, the content keys in item order."""

    session: Position
    strata: list[tuple[Any, ...]]
    rows: list[tuple[bytes, int, bytes]]
    relied: dict[bytes, bytes]
    content_keys: list[bytes]
    bytes_in: int
    bytes_new: int
    index_runs: list[tuple[Any, ...]] = field(default_factory=list)
    """Runs among `strata`, with the strata that each covers: where `data/` is cold."""


def make_ticket(
    core: Core,
    url: str,
    secret: Secret | None,
    options: dict[str, Any],
    storage_options: dict[str, Any],
    data_storage_options: dict[str, Any] | None = None,
) -> Ticket:
    """A ticket for workers of this handle; begins its session."""
    core.require_writable()
    core.ensure_session()
    core.tickets += 1
    source = SOURCE_MEMORY if secret is None else secret.source
    if core.keyring.profile == "open":
        source = SOURCE_NONE
    place = url if core.is_remote else os.fspath(Path(url).absolute())
    return Ticket(place, core.session, source, options, storage_options, data_storage_options)


def write_items(core: Core, session: Position, items: Iterable[Item], full_name: Any) -> Report:
    """Worker side: store the items in strata of `session`, finish them, and describe them."""
    core.own_strata.session = session
    relied: Relied = {}
    rows: list[tuple[bytes, int, bytes]] = []
    keys: list[bytes] = []
    for batch in _batches(items):
        names = [full_name(item[0]) if isinstance(item, tuple) else None for item in batch]
        values = [_value_of(item[1] if isinstance(item, tuple) else item) for item in batch]
        batch_keys = _put(core, values, relied)
        for name, key in zip(names, batch_keys, strict=True):
            rows.append((_ROOTS + key, ENTRY_INLINE, b"") if name is None else (name, ENTRY_REFERENCE, key))
        keys += batch_keys
    with core.contents.mutex:
        strata = core.own_strata.hand_over()
    own = {added.id for added in strata}
    contents = core.contents
    return Report(
        session,
        [tuple(added) for added in strata],
        rows,
        {key: bytes(identity) for key, identity in relied.items() if identity not in own},
        keys,
        contents.new_size + contents.found_size,
        contents.new_size,
        [tuple(run) for run in core.own_strata.runs_of(strata)],
    )


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += _size_of(item[1] if isinstance(item, tuple) else item)
        if len(batch) >= BATCH_COUNT or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size_of(value: Any) -> int:
    """Bytes of a value; 0 of a file that only the worker can see."""
    if isinstance(value, os.PathLike):
        with contextlib.suppress(OSError):
            return os.stat(value).st_size  # noqa: PTH116  # a file of the user's
        return 0
    return len(value) if isinstance(value, (bytes, bytearray, memoryview)) else 0


def _value_of(value: Any) -> bytes | Path:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, os.PathLike):
        return Path(value)
    raise InvalidArgument(f"an item is bytes, a Path, or (name, one of them), not {type(value).__name__}")


def _put(core: Core, values: Sequence[bytes | Path], relied: Relied) -> list[bytes]:
    """Content keys of values; small files are read and put together with the rest, large ones streamed."""
    part_max = core.options.part_max
    plain: list[bytes] = []
    places: list[int] = []
    keys: list[bytes] = [b""] * len(values)
    for place, value in enumerate(values):
        if isinstance(value, Path):
            with value.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size > part_max:
                    keys[place] = core.contents.put_stream(file, relied)
                    continue
                value = file.read()
        plain.append(value)
        places.append(place)
    for place, key in zip(places, core.contents.put_many(plain, relied) if plain else [], strict=True):
        keys[place] = key
    return keys


def adopt(core: Core, reports: Iterable[Report]) -> Position:
    """Commit what workers reported, in one record. Raises `CorruptionError` if a stratum is not as reported."""
    reports = list(reports)
    core.require_writable()
    strata: list[StratumAdded] = []
    relied: Relied = {}
    rows: list[tuple[bytes, int, bytes]] = []
    runs: list[IndexRun] = []
    for report in reports:
        if report.session != core.session:
            raise InvalidArgument("this report is of another handle's ticket", session=report.session)
        strata += [_verified(core, described) for described in report.strata]
        relied.update({key: StratumId(identity) for key, identity in report.relied.items()})
        rows += report.rows
        runs += [
            IndexRun(StratumId(identity), entries, list(covered)) for identity, entries, covered in report.index_runs
        ]
    core.commit_strata(strata, rows, relied, runs)
    return core.state.position


def _verified(core: Core, described: tuple[Any, ...]) -> StratumAdded:
    """A reported stratum, after comparing it with its file; of one that cannot be read, only its length."""
    added = StratumAdded(StratumId(described[0]), *described[1:])
    if added.kind == StratumKind.DATA and is_archived(core.options):
        name = stratum_name(added.kind, added.id)
        file = core.storage.open(name)
        if file.size() != added.length or added.status != FINISHED or added.session != core.session:
            raise CorruptionError(f"{name} is not what its worker reported", object=name, offset=0)
        return added
    reader = core.readers.get(added.kind, added.id)
    if added.kind not in tuple(StratumKind) or reader.header.session != core.session:
        raise CorruptionError(f"{reader.name} is not of this session", object=reader.name, offset=0)
    footer = reader.footer()
    if reader.size() != added.length or footer.grain_count != added.grain_count or added.status != FINISHED:
        name = stratum_name(added.kind, added.id)
        raise CorruptionError(f"{name} is not what its worker reported", object=name, offset=0)
    return added


# --- the default pool -----------------------------------------------------------------------------------------------


_worker_secret: Secret | None = None


def _receive_secret(connection: Any, lock: Any) -> None:
    """In a worker of our own pool: take a secret from a pipe that only parent and workers hold."""
    global _worker_secret  # noqa: PLW0603  # one worker process, one secret
    with lock:
        kind, material = connection.recv_bytes(), connection.recv_bytes()
    _worker_secret = Secret(kind.decode(), material)


def worker_secret(ticket: Ticket) -> Secret | None:
    """The secret of this worker process: handed over by the pool, or from the source that the ticket names."""
    if _worker_secret is not None:
        return _worker_secret
    return Secret.from_source(ticket.secret_source) if ticket.secret_source != SOURCE_NONE else None


def default_executor(secret: Secret | None, workers: int) -> Executor:
    """A process pool of this machine; a secret that lives in memory travels through a pipe, not in a pickle."""
    context = multiprocessing.get_context("spawn")
    if secret is None:
        return ProcessPoolExecutor(workers, mp_context=context)
    receiver, sender = context.Pipe(duplex=False)
    for _ in range(workers):
        sender.send_bytes(secret.kind.encode())
        sender.send_bytes(secret.material())
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_receive_secret, initargs=(receiver, context.Lock())
    )


def run_ingest(
    ticket: Ticket, work: Any, again: Any, items: Iterable[Item], executor: Executor, progress: Any = None
) -> list[Report]:
    """Spread items over an executor; a task whose worker was lost is done `again`, once, here."""
    reports: list[Report] = []
    ahead = _TASKS_AHEAD * getattr(executor, "_max_workers", _WORKERS_ASSUMED)
    batches = _batches(items)
    futures = deque((batch, _submitted(executor, work, ticket, batch)) for batch in islice(batches, ahead))
    while futures:
        batch, future = futures.popleft()
        try:
            report = future.result()
        except (InvalidArgument, CorruptionError):
            raise
        except Exception:  # noqa: BLE001  # whatever an executor raises when it loses a worker
            report = again(ticket, batch)
        futures.extend((batch, _submitted(executor, work, ticket, batch)) for batch in islice(batches, 1))
        reports.append(report)
        if progress is not None:
            progress(report.bytes_in)
    return reports


def _submitted(executor: Executor, work: Any, ticket: Ticket, batch: list[Item]) -> Future[Report]:
    """The task; one that failed already if the executor has lost its workers."""
    try:
        return executor.submit(work, ticket, batch)
    except Exception as error:  # noqa: BLE001  # whatever an executor raises when it has lost a worker
        failed: Future[Report] = Future()
        failed.set_exception(error)
        return failed


def content_keys(reports: Iterable[Report]) -> list[ContentKey]:
    """The content keys of all items, in order."""
    return [ContentKey(key) for report in reports for key in report.content_keys]
