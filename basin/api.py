"""`open`: the only place that knows URLs and modes; composes storage, keys, engine and layers.

Creating a basin writes, in this order: a copy of `basin.json` where `data/` has a root of its own, a key slot with
generation 0, `basin.json`, then the first record, which makes the slot valid. A crash in between leaves nothing, or a
basin that opens; and perhaps that copy, because of which the root is not taken for empty.

Longer than most files because the contracts of all that a user calls first stand in it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import unquote, urlsplit

from basin.engine.basin import Basin, Batch, Transaction, View
from basin.engine.core import Core
from basin.engine.cutting import CHUNKERS
from basin.engine.flat import open_flat
from basin.engine.hints import HINT_NAME, hint_of, write_hint
from basin.engine.keyring import Keyring, create_basin_keys, delete_slot_files, unlock
from basin.engine.keyspace import SNAPSHOTS_KEYSPACE, Scope, prefix_of
from basin.engine.options import Options, make_options
from basin.engine.secret import Secret
from basin.engine.state import State
from basin.errors import (
    AlreadyExists,
    AuthenticationFailed,
    BasinError,
    CommitUnknown,
    CorruptionError,
    InvalidArgument,
    NotABasin,
    ObjectMissing,
    ReadOnly,
    RollbackDetected,
    StorageUnavailable,
    UnsupportedVersion,
    WrongSecret,
)
from basin.format.hint import Hint
from basin.format.layout import FORMAT_VERSION, HINT_SIZE_MAX
from basin.format.record import Record, Slot
from basin.format.slots import DESCRIPTOR_NAME, Descriptor, decode_descriptor, encode_descriptor
from basin.layers.blobs import Address, Blobs
from basin.storage.flat import FlatStorage
from basin.storage.flat_remote import FLAT_SUFFIX, find_flat_file
from basin.storage.flat_target import require_free, scratch_folder
from basin.storage.local import LocalStorage
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.protocol import Storage
from basin.storage.remote import RemoteStorage
from basin.storage.tiered import TieredStorage
from basin.terms import ContentKey, Head, Position

if TYPE_CHECKING:
    from basin.engine.copying import Span
    from basin.engine.export import ExportProgress, ExportReport
    from basin.engine.ingest import Item, Report, Ticket
    from basin.engine.thawing import ThawReport
    from basin.layers.snapshots import Snapshots
    from basin.storage.disk_cache import DiskCache

Mode = Literal["r", "w", "c", "x", "n"]
_DESCRIPTOR_SIZE_MAX: Final = 1 << 20
_FLAT_REFRESH_S: Final = 86_400.0
"""A flat file never changes: nothing is to be seen by looking again."""


class DatabaseBatch(Batch):
    """A batch with its layers."""

    @property
    def blobs(self) -> Blobs:
        """Contents, put and deleted together with the batch's names."""
        return Blobs(self)


class DatabaseTransaction(Transaction):
    """A transaction with its layers."""

    @property
    def blobs(self) -> Blobs:
        """Contents, put and deleted together with the transaction's names."""
        return Blobs(self)


class DatabaseView(View):
    """A view with its layers."""

    @property
    def blobs(self) -> Blobs:
        """Contents, with the roots of the view's position."""
        return Blobs(self)

    @property
    def snapshots(self) -> Snapshots:
        """Backups, those of the view's position."""
        from basin.layers.snapshots import Snapshots

        return Snapshots(self)


class Database(Basin):
    """An open basin with its layers: what `basin.open` returns."""

    def __init__(
        self,
        core: Core,
        url: str,
        secret: Secret | None,
        options: dict[str, Any],
        storage_options: dict[str, Any] | None = None,
        data_storage_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(core, url)
        self._blobs = Blobs(self)
        self._secret = secret
        self._options = options
        self._storage_options = storage_options or {}
        self._data_storage_options = data_storage_options

    @property
    def blobs(self) -> Blobs:
        """Content-addressed values."""
        return self._blobs

    @property
    def snapshots(self) -> Snapshots:
        """Backups of directory trees."""
        from basin.layers.snapshots import Snapshots

        return Snapshots(self)

    def ticket(self) -> Ticket:
        """What a worker process needs to write for this handle with `basin.ingest`. Can be pickled; holds no key.

        The worker takes a secret of its own from where this handle's came from: a file, or the environment.
        """
        from basin.engine.ingest import make_ticket

        core, options = self._core, self._options
        return make_ticket(core, self.url, self._secret, options, self._storage_options, self._data_storage_options)

    def adopt(self, reports: Iterable[Report]) -> Position:
        """Commit what workers reported, in one record; returns its position."""
        from basin.engine.ingest import adopt

        return adopt(self._core, reports)

    def ingest(
        self,
        items: Iterable[Item],
        executor: Executor | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[ContentKey]:
        """Store many blobs, or (name, value) pairs, on several processes, and commit them in one record.

        Values are bytes or `Path`s, which the workers read. `executor` is any `concurrent.futures.Executor`; by default
        a process pool with a process a core. `progress` is called with the bytes of every task that is done. Returns
        the content keys in the order of the items.
        """
        from basin.engine.ingest import content_keys, default_executor, run_ingest

        ticket = self.ticket()
        again = partial(_ingest, secret=self._secret)
        own = default_executor(self._secret, self._core.options.worker_count) if executor is None else None
        try:
            reports = run_ingest(ticket, ingest, again, items, own or executor, progress)  # type: ignore[arg-type]  # one is set
        finally:
            if own is not None:
                own.shutdown()
        self.adopt(reports)
        return content_keys(reports)

    def thaw(
        self,
        addresses: Iterable[Address] | None = None,
        *,
        days: int = 7,
        tier: Literal["Standard", "Bulk", "Expedited"] = "Standard",
        wait: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> ThawReport:
        """Have contents in cold storage made readable for `days`, all parts of large ones; needs no right to write.

        `addresses`: those of contents, or names of strata as a `GrainNotReady` gives them; None: all contents. What is
        restored already, or on its way, is not asked for again. With `wait` it returns when all can be read, which
        takes hours: from an archive class "Standard" 3 to 12, "Bulk" up to 48, "Expedited" (dear) minutes; `progress`
        is called with (bytes that can be read, bytes in all). Raises `ContentNotFound`, `StorageError`. One request for
        each stratum, one more for each to be restored, and while it waits one a minute for each that is not ready.
        """
        from basin.engine.thawing import thaw

        self._core.maybe_refresh()
        return thaw(self._core, addresses, days=days, tier=tier, wait=wait, progress=progress)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        prefix: Any = None,
        keyspace: str | None = None,
        snapshot: str | None = None,
        secret: Secret | str | None = None,
        profile: Literal["open", "encrypted"] | None = None,
        progress: ExportProgress | None = None,
    ) -> ExportReport:
        """Write a new file `path`, on the local disk, that `basin.open(path, mode="r")` reads in place.

        Without a selection it is this whole basin as it is now, as it is stored: the same id, opened by the same
        secrets. With `prefix` and `keyspace` (either, or both) it is a new basin of those names and the contents that
        they reach by references and links, encrypted anew under `secret`, or `profile="open"`; nothing in it is of a
        key of this basin. With `snapshot`, as `snapshots.get` takes it, it is that snapshot alone. `progress` is called
        with bytes done, and in all where that is known. Raises `AlreadyExists`, `NameNotFound` for a selection without
        names, `InvalidArgument`, and what reading raises. Holds a window in memory; a selection is gathered in a folder
        beside `path`, which goes afterwards.
        """
        if not os.fspath(path).endswith(FLAT_SUFFIX):
            raise InvalidArgument(
                f"the name of a flat file ends with {FLAT_SUFFIX}: by that it is recognised", path=path
            )
        if snapshot is not None:
            if prefix is not None or keyspace is not None:
                raise InvalidArgument("a snapshot is exported alone: without prefix and keyspace")
            span = _span_of_snapshot(self, snapshot)
            return _export_selection(self, path, lambda _view, _selection: [span], secret, profile, progress)
        if prefix is not None or keyspace is not None:
            from basin.engine.copying import selected_spans

            select = partial(selected_spans, keyspace=keyspace, prefix=prefix)
            return _export_selection(self, path, select, secret, profile, progress)
        if secret is not None or profile is not None:
            raise InvalidArgument("a whole basin keeps its secrets: give none, or select names by prefix or keyspace")
        from basin.engine.export import export_all

        return export_all(self._core, path, progress)

    def batch(self) -> DatabaseBatch:
        return DatabaseBatch(self._core)

    def transaction(self) -> DatabaseTransaction:
        return DatabaseTransaction(self._core)

    def view(self) -> DatabaseView:
        return DatabaseView(self._view_scope())

    def at(self, position: Position) -> DatabaseView:
        return DatabaseView(self._past_scope(position))


def open(  # noqa: A001  # the name every user knows from dbm, shelve and gzip
    url: str | os.PathLike[str],
    mode: Mode = "c",
    secret: Secret | str | None = None,
    profile: Literal["open", "encrypted"] | None = None,
    storage_options: dict[str, Any] | None = None,
    expect_head: Head | None = None,
    data_storage_options: dict[str, Any] | None = None,
    salvage: bool = False,  # noqa: FBT001, FBT002  # as every other argument of `open`
    **options: Any,
) -> Database:
    """Open the basin in a folder, or in a bucket: `s3://bucket/prefix`, `memory://name`, or any fsspec URL.

    Where the URL ends with `.basin` and names a file, as `Database.export` writes it, that is read in place, also over
    http; it needs mode "r", every other raises `ReadOnly`.

    Modes: "r" read; "w" write an existing one; "c" create if absent; "x" must not exist; "n" delete all names.
    `secret`: a `Secret`, or a `str`, which is a passphrase. An encrypted basin needs one, an open one refuses it;
    creating needs a secret or `profile="open"`. `storage_options` go to the fsspec file system (credentials, endpoint);
    without them it looks where its own documentation says (environment, profiles). `data_storage_options` stand in
    their place for `data/`, where the basin was created with a `data_url`. `expect_head` is a head this client
    remembers: an older or different history raises `RollbackDetected`. `salvage`: open also a basin whose log is too
    damaged to be followed: the handle shows what `repair` would leave, and writes nothing before `repair` has run.
    `options` are the fields of `basin.Options`.

    Raises `NotABasin`, `AlreadyExists`, `SecretRequired`, `WrongSecret`, `UnsupportedVersion`, `CorruptionError`,
    `ReadOnly`, `InvalidArgument`, `MissingDependency`, `StorageError`. Cost: a few small reads, and the log since the
    last checkpoint; in a bucket at most 6 GET and no LIST beside that log.
    """
    if mode not in ("r", "w", "c", "x", "n"):
        raise InvalidArgument(f"mode is one of r, w, c, x, n, not {mode!r}", mode=mode)
    if options.get("data_url"):
        options["data_url"] = _absolute(options["data_url"])
    make_options(options)
    storage, text = _storage_of(url, storage_options, options, mode)
    try:
        return open_storage(
            storage,
            text,
            mode=mode,
            secret=secret,
            profile=profile,
            expect_head=expect_head,
            options=options,
            storage_options=storage_options,
            data_storage_options=data_storage_options,
            salvage=salvage,
        )
    except BaseException:
        storage.close()
        raise


def open_storage(
    storage: Storage,
    url: str,
    *,
    mode: Mode = "c",
    secret: Secret | str | None = None,
    profile: str | None = None,
    expect_head: Head | None = None,
    options: dict[str, Any] | None = None,
    storage_options: dict[str, Any] | None = None,
    data_storage_options: dict[str, Any] | None = None,
    salvage: bool = False,
) -> Database:
    """`open` on a storage that is there already: what tests with a simulated disk call."""
    secret = Secret.from_passphrase(secret) if isinstance(secret, str) else secret
    if profile not in (None, "open", "encrypted"):
        raise InvalidArgument(f"profile is 'open' or 'encrypted', not {profile!r}", profile=profile)
    given = options or {}
    second_options = storage_options if data_storage_options is None else data_storage_options
    remote = storage.objects is not None
    data, hint = _read_descriptor(storage)
    if data is None:
        if mode in ("r", "w"):
            raise NotABasin(f"{url} is not a basin: it has no {DESCRIPTOR_NAME}", url=url)
        create_options = make_options(given, remote=remote)
        data_root = partial(_data_root, storage, create_options, second_options, create=True)
        data = _create(storage, url, secret, profile, create_options, data_root)
    elif mode == "x":
        raise AlreadyExists(f"there is a basin in {url} already", object=url, operation="create")
    descriptor, data = _descriptor_in(storage, data)
    if profile is not None and profile != descriptor.profile:
        raise InvalidArgument(f"{url} was created as {descriptor.profile!r}, not {profile!r}", profile=profile)
    writable = mode != "r"
    if writable and not storage.writable():
        raise ReadOnly(f"{url} cannot be written; open it with mode='r'", object=url, operation="open")
    if descriptor.chunker not in CHUNKERS:
        raise UnsupportedVersion(
            f"{url} cuts contents by {descriptor.chunker!r}, which needs a newer Basin", version=descriptor.chunker
        )
    stored_options = {**descriptor.options, "chunker": descriptor.chunker}
    if isinstance(storage, FlatStorage):
        given = {"refresh_interval_s": _FLAT_REFRESH_S, **given}
        stored_options |= {"data_url": "", "data_storage_class": ""}  # Whatever they were, all lies in the file.
    handle_options = make_options(given, stored_options, remote=remote)

    def begun(keyring: Keyring) -> Core:
        # Not before the keys have shown that the descriptor is whole: it says where to send requests.
        cold = _data_root(storage, handle_options, second_options)
        core = None
        try:
            whole = storage if cold is None else TieredStorage(storage, cold)
            core = Core(whole, keyring, handle_options, writable=writable)
            _start(core, expect_head, hint, salvage=salvage)
        except BaseException:
            if core is not None:
                core.abandon()
            if cold is not None:
                cold.close()
            raise
        return core

    hinted = _hinted_keys(storage, data, secret, hint)
    core = None
    if hinted is not None:
        with contextlib.suppress(WrongSecret, AuthenticationFailed):
            core = begun(hinted)  # Else the keys have changed since the hint: the files say how, or what is wrong.
    if core is None:
        core = begun(unlock(storage, data, secret)[0])
    try:
        database = Database(core, url, secret, given, storage_options, data_storage_options)
        if mode == "n":
            _empty(database)
        return database
    except BaseException:
        core.release("the basin could not be opened")
        raise


def _read_descriptor(storage: Storage) -> tuple[bytes | None, Hint | None]:
    """`basin.json`, if it is there; and of a bucket the hint, which is read at the same time."""
    if storage.objects is None:
        try:
            return storage.read_file(DESCRIPTOR_NAME, _DESCRIPTOR_SIZE_MAX), None
        except ObjectMissing:
            return None, None
    wanted = [ByteRange(DESCRIPTOR_NAME, 0, _DESCRIPTOR_SIZE_MAX), ByteRange(HINT_NAME, 0, HINT_SIZE_MAX)]
    data, hint = storage.read_ranges(wanted)
    if isinstance(data, ObjectMissing):
        return None, None
    if isinstance(data, BasinError):
        raise data
    return data, hint_of(hint)


def _descriptor_in(storage: Storage, data: bytes) -> tuple[Descriptor, bytes]:
    """The descriptor, and its bytes; from a bucket read again if the first reading was damaged on its way."""
    try:
        return decode_descriptor(data), data
    except CorruptionError:
        if storage.objects is None:
            raise
    again = storage.read_file(DESCRIPTOR_NAME, _DESCRIPTOR_SIZE_MAX)
    return decode_descriptor(again), again


def _hinted_keys(storage: Storage, descriptor: bytes, secret: Secret | None, hint: Hint | None) -> Keyring | None:
    """The keyring from the copies of the key files in the hint, if there are any that the secret opens."""
    if isinstance(storage, RemoteStorage) and hint is not None and hint.keys:
        storage.suppose(hint.keys)
        try:
            return unlock(storage, descriptor, secret)[0]
        except (WrongSecret, CorruptionError, UnsupportedVersion):
            return None
        finally:
            storage.suppose({})
    return None


def ingest(ticket: Ticket, items: Iterable[Item]) -> Report:
    """In a worker process: store items in strata of the ticket's session; returns what the coordinator adopts.

    Opens the basin with a secret from the source that the ticket names.
    """
    from basin.engine.ingest import worker_secret

    return _ingest(ticket, items, worker_secret(ticket))


def _ingest(ticket: Ticket, items: Iterable[Item], secret: Secret | None) -> Report:
    from basin.engine.ingest import write_items

    options = {**ticket.options, "threads": 1}
    with open(ticket.url, "r", secret=secret, storage_options=ticket.storage_options or None, **options) as database:
        full_name = database._full
        return write_items(database.core, ticket.session, items, full_name)


def _storage_of(
    url: str | os.PathLike[str], storage_options: dict[str, Any] | None, options: dict[str, Any], mode: Mode
) -> tuple[Storage, str]:
    text = os.fspath(url)
    if type(text) is not str or not text:
        raise InvalidArgument(f"a basin is opened by a path or URL, not {url!r}")
    create = mode in ("c", "x", "n")
    scheme = urlsplit(text).scheme if "://" in text else ""
    flat = _flat_storage(text, storage_options, options, mode)
    if flat is not None:
        return flat, text
    if scheme not in ("", "file"):
        return _remote_storage(text, scheme, storage_options, make_options(options, remote=True)), text
    if scheme:
        text = unquote(text.removeprefix("file://"))
    if storage_options:
        raise InvalidArgument("a basin on a local disk takes no storage_options")
    path = Path(text)
    if not create and not _may_be_folder(path):
        raise NotABasin(f"{text} is not a basin: there is no such folder", url=text)
    return LocalStorage(path, create=create), text


def _flat_storage(
    text: str, storage_options: dict[str, Any] | None, options: dict[str, Any], mode: Mode
) -> FlatStorage | None:
    """The files in the flat file that a URL names; None where it names none. Raises `ReadOnly` but for mode "r"."""
    whole = find_flat_file(text, storage_options, make_options(options, remote=True).request_policy())
    if whole is None:
        return None
    try:
        if mode != "r":
            raise ReadOnly(f"{text} is one flat file, which is only read: open it with mode='r'", url=text)
        return open_flat(whole, text)
    except BaseException:
        whole.close()
        raise


def _export_selection(
    source: Database,
    path: str | os.PathLike[str],
    select: Callable[[Scope, Database], list[Span]],
    secret: Secret | str | None,
    profile: Literal["open", "encrypted"] | None,
    progress: ExportProgress | None,
) -> ExportReport:
    """A basin of its own, filled through the engine beside `path`, and exported whole."""
    from basin.engine.copying import copy_names
    from basin.engine.export import export_all

    require_free(path)
    kept = source.core.options
    options: dict[str, Any]
    options = {"inline_max": kept.inline_max, "part_max": kept.part_max, "part_size": kept.part_size}
    options |= {"chunker": kept.chunker, "reserve_size": 0}
    with scratch_folder(path) as folder, source.view() as view:
        with open(folder, "x", secret=secret, profile=profile, **options) as selection:
            copied = copy_names(view.scope, selection, select(view.scope, selection), progress)
        with open(folder, "r", secret=secret) as selection:
            report = export_all(selection.core, path)
    return report._replace(names=copied.names, contents=copied.contents)


def _span_of_snapshot(source: Database, snapshot: str) -> Span:
    """The one name that leads to all of a snapshot."""
    from basin.engine.copying import Span
    from basin.layers.snapshots.documents import snapshot_name

    prefix = prefix_of(SNAPSHOTS_KEYSPACE)
    name = prefix + snapshot_name(source.snapshots.get(snapshot).id)
    return Span(name, name + b"\0", prefix)


def _data_root(
    storage: Storage, options: Options, storage_options: dict[str, Any] | None, *, create: bool = False
) -> Storage | None:
    """The root of `data/` where it has one of its own; and whichever it is, learns the storage class.

    Raises `InvalidArgument` where a root or class does not fit the basin's storage.
    """
    root, cold = storage, None
    if options.data_url:
        root = cold = _open_data_root(storage, options, storage_options, create=create)
    if options.data_storage_class:
        if not isinstance(root, RemoteStorage) or not root.objects.knows_classes:
            if cold is not None:
                cold.close()
            raise InvalidArgument(f"{root.url} has no storage classes", option="data_storage_class")
        root.data_class = options.data_storage_class
    return cold


def _open_data_root(
    storage: Storage, options: Options, storage_options: dict[str, Any] | None, *, create: bool
) -> Storage:
    url = options.data_url
    scheme = urlsplit(url).scheme if "://" in url else ""
    if (storage.objects is None) != (scheme == ""):
        text = f"the contents of a basin in {storage.url} cannot lie in {url}: both are folders of a disk, or buckets"
        raise InvalidArgument(text, option="data_url")
    if scheme:
        return _remote_storage(url, scheme, storage_options, replace(options, disk_cache_size=0))
    try:
        return LocalStorage(url, create=create)
    except ObjectMissing as error:
        raise ObjectMissing(f"{url}, where this basin keeps its contents, is not there", object=url) from error


def _absolute(data_url: Any) -> Any:
    """A URL as it is; a folder by its whole path, for the basin remembers it."""
    if type(data_url) is not str or urlsplit(data_url).scheme not in ("", "file"):
        return data_url
    return str(Path(unquote(data_url.removeprefix("file://"))).absolute())


def _remote_storage(url: str, scheme: str, storage_options: dict[str, Any] | None, options: Options) -> RemoteStorage:
    """A bucket, with its cache folder; `memory://` is one that this process keeps."""
    policy = options.request_policy()
    cache: DiskCache | None = None
    if scheme == "memory":
        from basin.storage.memory_objects import memory_objects

        store: ObjectStore = memory_objects(url)
    else:
        from basin.storage.s3_choice import open_s3

        store = open_s3(url, storage_options, policy)
        if options.disk_cache_size:
            folder = Path(options.cache_folder) if options.cache_folder else Path("~/.cache/basin").expanduser()
            from basin.storage.disk_cache import DiskCache

            cache = DiskCache(folder, options.disk_cache_size)
    spool_folder = Path(options.spool_folder) if options.spool_folder else None
    return RemoteStorage(store, policy, cache=cache, spool_folder=spool_folder, uploads=options.upload_count)


def _may_be_folder(path: Path) -> bool:
    """False for what is certainly no folder; of what cannot be looked at, the storage says why."""
    try:
        return path.is_dir()
    except OSError:
        return True


def _create(
    storage: Storage,
    url: str,
    secret: Secret | None,
    profile: str | None,
    options: Options,
    data_root: Callable[[], Storage | None],
) -> bytes:
    """Write slot, generation and descriptor; somebody else's descriptor wins."""
    if (secret is None) == (profile != "open"):
        raise InvalidArgument(
            "creating a basin needs a secret, or profile='open' for one that is not encrypted (not both)", url=url
        )
    if _strangers(storage):
        if storage.exists(DESCRIPTOR_NAME):  # Somebody else created the basin since we looked.
            return storage.read_file(DESCRIPTOR_NAME, _DESCRIPTOR_SIZE_MAX)
        raise NotABasin(f"{url} has other files in it and no basin: choose an empty place", url=url)
    cold = data_root()
    try:
        return _create_in(storage, cold, secret, options)
    finally:
        if cold is not None:
            cold.close()


def _create_in(storage: Storage, cold: Storage | None, secret: Secret | None, options: Options) -> bytes:
    """`_create`, in a place that is empty; `cold` is the root of `data/`, where it has one."""
    storage.require_create_only()
    descriptor = Descriptor(
        format=FORMAT_VERSION,
        basin_id=os.urandom(16),
        profile="open" if secret is None else "encrypted",
        chunker=options.chunker,
        created_ms=time.time_ns() // 1_000_000,
        options=options.stored(),
    )
    data = encode_descriptor(descriptor)
    if cold is not None and not _claim(cold, data):
        if storage.exists(DESCRIPTOR_NAME):  # As above: by somebody who was faster.
            return storage.read_file(DESCRIPTOR_NAME, _DESCRIPTOR_SIZE_MAX)
        text = f"{options.data_url} has files in it, perhaps the contents of another basin: choose an empty place"
        raise NotABasin(text, url=options.data_url)
    keyring = create_basin_keys(storage, data, secret)
    try:
        storage.put_if_absent(DESCRIPTOR_NAME, data)
    except AlreadyExists:
        if keyring.slot is not None:
            delete_slot_files(storage, keyring.slot.slot_id)
        stored = storage.read_file(DESCRIPTOR_NAME, _DESCRIPTOR_SIZE_MAX)
        if cold is not None:
            cold.delete(DESCRIPTOR_NAME)
            if stored == data:
                text = f"{options.data_url} is the basin's own place: it has no other root"
                raise InvalidArgument(text, option="data_url") from None
        return stored
    storage.sync_folder("")
    return data


def _claim(cold: Storage, descriptor: bytes) -> bool:
    """Leave a copy of the descriptor where the contents will lie; False if anything lies there.

    A second basin with the same root for its contents would take those of the first for leftovers, and delete them.
    """
    if _strangers(cold):
        return False
    try:
        cold.put_if_absent(DESCRIPTOR_NAME, descriptor)
    except AlreadyExists:
        return False
    cold.sync_folder("")
    return True


def _strangers(storage: Storage) -> list[str]:
    """Files and folders that a basin which was never finished would not have: a log without a descriptor lost it."""
    folders = set(storage.list_folders("")) - {"keys", "tmp"}
    return sorted(folders | set(storage.list("")))


def _start(core: Core, expect_head: Head | None, hint: Hint | None, *, salvage: bool) -> None:
    """Read the log; check the remembered head; make the first slot valid; leave a hint where there is none."""
    salvaged = False
    if salvage:
        from basin.engine.repair_log import is_salvaged, load_anyhow

        load_anyhow(core, hint)
        salvaged = is_salvaged(core)
    else:
        core.load(hint)
    slot = core.keyring.slot
    if slot is not None and core.state.slots and slot.slot_id not in core.state.slots:
        raise WrongSecret(f"the key slot {slot.slot_id} of this secret was removed", refused=1, damaged=[])
    if expect_head is not None:
        check_head(core, expect_head)
    if salvaged:
        return  # Nothing is written before `repair` has run.
    if core.writable and slot is not None and not core.state.slots:

        def build(state: State) -> Record | None:
            if state.slots:
                return None
            return Record(slots_added=[Slot(slot.slot_id, slot.public_key)])

        try:
            core.append(build)
        except CommitUnknown as error:
            raise StorageUnavailable(f"the basin could not be opened: {error.message}", object="log") from error
    if core.writable and core.is_remote and hint is None:
        write_hint(core, keys_changed=True)
    core.hold_reserve()


def check_head(core: Core, expected: Head) -> None:
    """Raise `RollbackDetected` unless the log contains the head that a client remembers."""
    position, digest = expected
    found = core.state.head
    if position > found.position:
        raise RollbackDetected(
            f"this basin ends at position {found.position}, but {position} was seen before",
            expected=expected,
            found=found,
        )
    if position == found.position:
        at = found.hash
    elif position == 0:
        return
    else:
        stored = core.log.hash_at(position)
        if stored is None and position < core.state.floor - 1:
            return  # Its part of the log was removed since.
        at = stored or b""
    if at != digest:
        raise RollbackDetected(
            f"position {position} holds another record than the one seen before", expected=expected, found=found
        )


def _empty(database: Database) -> None:
    """Mode "n": no name, no keyspace and no root is left; contents go with the next compaction."""
    with database.batch() as batch:
        batch.scope.delete_range(b"", b"\xff" * 5)
