"""`open`: the only place that knows URLs and modes; composes storage, keys, engine and layers.

Creating a basin writes, in this order: a key slot with generation 0, `basin.json`, then the first record, which makes
the slot valid. A crash in between leaves nothing, or a basin that opens.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import unquote, urlsplit

from basin.engine.basin import Basin, Batch, Transaction, View
from basin.engine.core import Core
from basin.engine.hints import HINT_NAME, hint_of, write_hint
from basin.engine.ingest import (
    Item,
    Report,
    Ticket,
    adopt,
    content_keys,
    default_executor,
    make_ticket,
    run_ingest,
    worker_secret,
    write_items,
)
from basin.engine.keyring import Keyring, create_basin_keys, delete_slot_files, unlock
from basin.engine.log import RESERVE_NAME
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
from basin.layers.blobs import Blobs
from basin.storage.disk_cache import DiskCache
from basin.storage.local import LocalStorage
from basin.storage.memory_objects import memory_objects
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.protocol import Storage
from basin.storage.remote import RemoteStorage
from basin.storage.s3_choice import open_s3
from basin.terms import ContentKey, Head, Position

Mode = Literal["r", "w", "c", "x", "n"]
_DESCRIPTOR_SIZE_MAX: Final = 1 << 20
_CHUNKER: Final = "fixed"


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


class Database(Basin):
    """An open basin with its layers: what `basin.open` returns."""

    def __init__(
        self,
        core: Core,
        url: str,
        secret: Secret | None,
        options: dict[str, Any],
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(core, url)
        self._blobs = Blobs(self)
        self._secret = secret
        self._options = options
        self._storage_options = storage_options or {}

    @property
    def blobs(self) -> Blobs:
        """Content-addressed values."""
        return self._blobs

    def ticket(self) -> Ticket:
        """What a worker process needs to write for this handle with `basin.ingest`. Can be pickled; holds no key.

        The worker takes a secret of its own from where this handle's came from: a file, or the environment.
        """
        return make_ticket(self._core, self.url, self._secret, self._options, self._storage_options)

    def adopt(self, reports: Iterable[Report]) -> Position:
        """Commit what workers reported, in one record; returns its position."""
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
    **options: Any,
) -> Database:
    """Open the basin in a folder, or in a bucket: `s3://bucket/prefix`, `memory://name`, or any fsspec URL.

    Modes: "r" read; "w" write an existing one; "c" create if absent; "x" must not exist; "n" delete all names.
    `secret`: a `Secret`, or a `str`, which is a passphrase. An encrypted basin needs one, an open one refuses it;
    creating needs a secret or `profile="open"`. `storage_options` go to the fsspec file system (credentials, endpoint);
    without them it looks where its own documentation says (environment, profiles). `expect_head` is a head this client
    remembers: an older or different history raises `RollbackDetected`. `options` are the fields of `basin.Options`.

    Raises `NotABasin`, `AlreadyExists`, `SecretRequired`, `WrongSecret`, `UnsupportedVersion`, `CorruptionError`,
    `ReadOnly`, `InvalidArgument`, `MissingDependency`, `StorageError`. Cost: a few small reads, and the log since the
    last checkpoint; in a bucket at most 6 GET and no LIST beside that log.
    """
    if mode not in ("r", "w", "c", "x", "n"):
        raise InvalidArgument(f"mode is one of r, w, c, x, n, not {mode!r}", mode=mode)
    make_options(options)
    storage, text = _storage_of(url, storage_options, options, create=mode in ("c", "x", "n"))
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
) -> Database:
    """`open` on a storage that is there already: what tests with a simulated disk call."""
    secret = Secret.from_passphrase(secret) if isinstance(secret, str) else secret
    if profile not in (None, "open", "encrypted"):
        raise InvalidArgument(f"profile is 'open' or 'encrypted', not {profile!r}", profile=profile)
    given = options or {}
    remote = storage.objects is not None
    data, hint = _read_descriptor(storage)
    if data is None:
        if mode in ("r", "w"):
            raise NotABasin(f"{url} is not a basin: it has no {DESCRIPTOR_NAME}", url=url)
        data = _create(storage, url, secret, profile, make_options(given, remote=remote))
    elif mode == "x":
        raise AlreadyExists(f"there is a basin in {url} already", object=url, operation="create")
    descriptor, data = _descriptor_in(storage, data)
    if profile is not None and profile != descriptor.profile:
        raise InvalidArgument(f"{url} was created as {descriptor.profile!r}, not {profile!r}", profile=profile)
    writable = mode != "r"
    if writable and not storage.writable():
        raise ReadOnly(f"{url} cannot be written; open it with mode='r'", object=url, operation="open")
    handle_options = make_options(given, dict(descriptor.options), remote=remote)

    def begun(keyring: Keyring) -> Core:
        core = Core(storage, keyring, handle_options, writable=writable)
        try:
            _start(core, expect_head, hint)
        except BaseException:
            core.abandon()
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
        database = Database(core, url, secret, given, storage_options)
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
    return _ingest(ticket, items, worker_secret(ticket))


def _ingest(ticket: Ticket, items: Iterable[Item], secret: Secret | None) -> Report:
    options = {**ticket.options, "threads": 1}
    with open(ticket.url, "r", secret=secret, storage_options=ticket.storage_options or None, **options) as database:
        full_name = database._full
        return write_items(database.core, ticket.session, items, full_name)


def _storage_of(
    url: str | os.PathLike[str], storage_options: dict[str, Any] | None, options: dict[str, Any], *, create: bool
) -> tuple[Storage, str]:
    text = os.fspath(url)
    if type(text) is not str or not text:
        raise InvalidArgument(f"a basin is opened by a path or URL, not {url!r}")
    scheme = urlsplit(text).scheme if "://" in text else ""
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


def _remote_storage(url: str, scheme: str, storage_options: dict[str, Any] | None, options: Options) -> RemoteStorage:
    """A bucket, with its cache folder; `memory://` is one that this process keeps."""
    policy = options.request_policy()
    cache: DiskCache | None = None
    if scheme == "memory":
        store: ObjectStore = memory_objects(url)
    else:
        store = open_s3(url, storage_options, policy)
        if options.disk_cache_size:
            folder = Path(options.cache_folder) if options.cache_folder else Path("~/.cache/basin").expanduser()
            cache = DiskCache(folder, options.disk_cache_size)
    spool_folder = Path(options.spool_folder) if options.spool_folder else None
    return RemoteStorage(store, policy, cache=cache, spool_folder=spool_folder, uploads=options.upload_count)


def _may_be_folder(path: Path) -> bool:
    """False for what is certainly no folder; of what cannot be looked at, the storage says why."""
    try:
        return path.is_dir()
    except OSError:
        return True


def _create(storage: Storage, url: str, secret: Secret | None, profile: str | None, options: Options) -> bytes:
    """Write slot, generation and descriptor; somebody else's descriptor wins."""
    if (secret is None) == (profile != "open"):
        raise InvalidArgument(
            "creating a basin needs a secret, or profile='open' for one that is not encrypted (not both)", url=url
        )
    if _strangers(storage):
        if storage.exists(DESCRIPTOR_NAME):  # Somebody else created the basin since we looked.
            return storage.read_file(DESCRIPTOR_NAME, _DESCRIPTOR_SIZE_MAX)
        raise NotABasin(f"{url} has other files in it and no basin: choose an empty place", url=url)
    storage.require_create_only()
    descriptor = Descriptor(
        format=FORMAT_VERSION,
        basin_id=os.urandom(16),
        profile="open" if secret is None else "encrypted",
        chunker=_CHUNKER,
        created_ms=time.time_ns() // 1_000_000,
        options=options.stored(),
    )
    data = encode_descriptor(descriptor)
    keyring = create_basin_keys(storage, data, secret)
    try:
        storage.put_if_absent(DESCRIPTOR_NAME, data)
    except AlreadyExists:
        if keyring.slot is not None:
            delete_slot_files(storage, keyring.slot.slot_id)
        return storage.read_file(DESCRIPTOR_NAME, _DESCRIPTOR_SIZE_MAX)
    storage.sync_folder("")
    return data


def _strangers(storage: Storage) -> list[str]:
    """Files and folders that a basin which was never finished would not have: a log without a descriptor lost it."""
    folders = set(storage.list_folders("")) - {"keys", "tmp"}
    return sorted(folders | set(storage.list("")))


def _start(core: Core, expect_head: Head | None, hint: Hint | None) -> None:
    """Read the log; check the remembered head; make the first slot valid; leave a hint where there is none."""
    core.load(hint)
    slot = core.keyring.slot
    if slot is not None and core.state.slots and slot.slot_id not in core.state.slots:
        raise WrongSecret(f"the key slot {slot.slot_id} of this secret was removed", refused=1, damaged=[])
    if expect_head is not None:
        check_head(core, expect_head)
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
    if core.writable and core.options.reserve_size:
        core.storage.reserve(RESERVE_NAME, core.options.reserve_size)


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
