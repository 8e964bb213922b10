"""The keys of an open basin (`Keyring`), and how they are made, unlocked by a secret, handed to slots and rotated.

Invariants:

- No bytes of a key stand in a `repr`, in an error or in a pickle.
- A slot exists from the moment its `slot.json` does; its generations are written before. `basin.json` comes after the
  first slot, so a basin that can be found can be opened.
- A generation counts once the log names it. What a rotation that broke off had sealed already stays unused, because
  its number is not given out again.
- The keys of a dropped generation are sealed to nobody any more. A handle that holds them keeps them until it closes.
- A secret for an open basin, or none for an encrypted one, is an error: the two profiles never mix.

Imported by the engine and by `basin.api`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, NoReturn

from basin.engine.secret import Secret
from basin.errors import (
    AlreadyExists,
    BasinError,
    Conflict,
    CorruptionError,
    InvalidArgument,
    ObjectMissing,
    SecretRequired,
    UnsupportedVersion,
    WrongSecret,
)
from basin.format.crypto import (
    KEY_SIZE,
    GrainKeyMap,
    MasterKey,
    StratumKeys,
    derive_log_key,
    derive_stratum_keys,
    open_stratum_keys,
)
from basin.format.document import DOCUMENT_SIZE_MAX
from basin.format.slots import (
    DEFAULT_COST,
    GENERATION_MAX,
    GENERATION_SIZE,
    KEYS_FOLDER,
    SALT_SIZE,
    PassphraseCost,
    Slot,
    SlotKeys,
    create_slot,
    decode_descriptor,
    decode_slot,
    descriptor_hash,
    generation_name,
    is_slot_id,
    open_generation,
    parse_generation_name,
    seal_generation,
    slot_name,
    unlock_slot,
)
from basin.storage.protocol import Storage

_SLOT_ID_BYTES: Final = 8
_ROTATION_ATTEMPTS: Final = 8


class Keyring:
    """The unlocked keys of one basin. Safe for several threads; shows nothing; refuses pickling.

    `generation` is the one that new strata and records use: after unlocking the newest that is sealed to the slot, then
    what `select_generation` was told, which is what the log says. `log_keys` maps each generation to its log key, and
    is None in an open basin. Whoever asks for a generation that is not at hand makes the keyring look once whether it
    was sealed to its slot since; so a handle follows the rotations of others while it reads their records.
    """

    __slots__ = (
        "_log_keys",
        "_masters",
        "_problems",
        "_slot",
        "_slot_keys",
        "_storage",
        "basin_id",
        "descriptor_hash",
        "generation",
        "grain_keys",
        "log_keys",
        "profile",
    )

    basin_id: bytes
    descriptor_hash: bytes
    profile: str
    generation: int
    grain_keys: GrainKeyMap
    log_keys: Mapping[int, bytes] | None

    def __init__(
        self, basin_id: bytes, descriptor: bytes, unlocked: tuple[Storage, Slot, SlotKeys] | None = None
    ) -> None:
        """`descriptor` is the hash of `basin.json`. Use `unlock`, `create_basin_keys` or `open_profile`."""
        self.basin_id = basin_id
        self.descriptor_hash = descriptor
        self.generation = 0
        self._masters: dict[int, MasterKey] = {}
        self._problems: dict[int, BasinError] = {}
        self._log_keys: dict[int, bytes] = {}
        self._storage: Storage | None
        self._slot: Slot | None
        self._slot_keys: SlotKeys | None
        self._storage, self._slot, self._slot_keys = unlocked or (None, None, None)
        self.profile = "open" if self._slot_keys is None else "encrypted"
        self.grain_keys = GrainKeyMap(None if self._slot_keys is None else self._slot_keys.id_key)
        self.log_keys = None if self._slot_keys is None else _LogKeys(self)

    @classmethod
    def open_profile(cls, *, basin_id: bytes, descriptor_hash: bytes) -> Keyring:
        """The keyring of an open basin: no cipher keys, and content keys as grain keys."""
        return cls(basin_id, descriptor_hash)

    @property
    def slot(self) -> Slot | None:
        """The slot that opened the basin (its fields are public); None in an open basin."""
        return self._slot

    def generations(self) -> list[int]:
        """The generations that this keyring can open, ascending; empty in an open basin."""
        return sorted(self._masters)

    def select_generation(self, generation: int) -> None:
        """Use `generation`, which the log names as current, for what is written from now on.

        Raises what `master` raises if it is not at hand.
        """
        if self.profile == "encrypted":
            self.master(generation)
        self.generation = generation

    def reload(self) -> None:
        """Load generations that were sealed to this slot since. Costs one listing, and one read for each new one."""
        if self._storage is None or self._slot is None or self._slot_keys is None:
            return  # an open basin has no generations
        for generation in _stored_generations(self._storage, self._slot.slot_id):
            if generation not in self._masters:
                self._load(self._storage, generation, self._slot, self._slot_keys)

    def _load(self, storage: Storage, generation: int, slot: Slot, keys: SlotKeys) -> None:
        """Open one generation. A problem is kept for whoever needs it: it concerns no other generation."""
        name = generation_name(slot.slot_id, generation)
        try:
            data = storage.read_file(name, GENERATION_SIZE + 1)
            master = open_generation(data, generation=generation, slot=slot, keys=keys)
        except ObjectMissing:
            return  # Dropped since the folder was listed.
        except (CorruptionError, UnsupportedVersion) as error:
            self._problems[generation] = error
            return
        self._accept(generation, master)

    def _accept(self, generation: int, master: bytes) -> None:
        self._log_keys[generation] = derive_log_key(master, self.descriptor_hash)
        self._masters[generation] = MasterKey(generation, master)
        self._problems.pop(generation, None)

    def problems(self) -> Mapping[int, BasinError]:
        """What is wrong with the files of generations that could not be opened, for `check`."""
        return MappingProxyType(self._problems)

    def master(self, generation: int) -> bytes:
        """The master key of a generation. Not for an open basin. Costs what `reload` costs if it is not at hand.

        Raises `WrongSecret` if it was never sealed to this slot, or what is wrong with its file.
        """
        if generation not in self._masters:
            self.reload()
        key = self._masters.get(generation)
        if key is not None:
            return key.secret
        problem = self._problems.get(generation)
        if problem is not None:
            raise problem
        slot_id = None if self._slot is None else self._slot.slot_id
        raise WrongSecret(
            f"generation {generation} of the keys is not sealed to slot {slot_id}: use a secret that was valid then, "
            "unless the generation was dropped",
            generation=generation,
            slot_id=slot_id,
        )

    def log_key(self, generation: int) -> bytes:
        """The log key of a generation; raises what `master` raises."""
        log_key = self._log_keys.get(generation)
        if log_key is None:
            self.master(generation)
            log_key = self._log_keys[generation]
        return log_key

    def stratum_keys(self, generation: int, key_material: bytes, stratum_id: bytes, kind: int) -> StratumKeys:
        """The keys of one stratum, from fields of its header; raises what `master` raises."""
        if self.profile == "open":
            return open_stratum_keys(self.descriptor_hash, stratum_id, kind)
        return derive_stratum_keys(self.master(generation), key_material, self.descriptor_hash, stratum_id, kind)

    def seal_to(self, slot_id: str, public_key: bytes, generation: int, master: bytes) -> bytes:
        """The file that hands `master` to a slot. `InvalidArgument`: an open basin, or a bad public key."""
        return seal_generation(
            master,
            generation=generation,
            basin_id=self.basin_id,
            slot_id=slot_id,
            public_key=public_key,
            id_key=self._require_slot_keys().id_key,
            ephemeral_private_key=os.urandom(KEY_SIZE),
        )

    def keys_for_new_slot(self) -> SlotKeys:
        """A fresh private half, beside the id key of this basin. Raises `InvalidArgument` in an open basin."""
        return SlotKeys(os.urandom(KEY_SIZE), self._require_slot_keys().id_key)

    def _require_slot_keys(self) -> SlotKeys:
        if self._slot_keys is None:
            raise InvalidArgument("an open basin has no secrets")
        return self._slot_keys

    def __repr__(self) -> str:
        return f"Keyring({self.profile}, generation {self.generation})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a keyring is not pickled: give the other process a ticket (db.ticket())")


class _LogKeys(Mapping[int, bytes]):
    """The log keys of a keyring by generation, as `FrameCipher` wants them; a missing one is looked for."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def __getitem__(self, generation: int) -> bytes:
        try:
            return self._keyring.log_key(generation)
        except WrongSecret:
            raise KeyError(generation) from None

    def __iter__(self) -> Iterator[int]:
        return iter(self._keyring.generations())

    def __len__(self) -> int:
        return len(self._keyring.generations())


# --- creating and unlocking -----------------------------------------------------------------------------------------


def create_basin_keys(
    storage: Storage, descriptor_bytes: bytes, secret: Secret | None, *, cost: PassphraseCost = DEFAULT_COST
) -> Keyring:
    """Make the keys of a new basin and, unless it is open, write its first slot with generation 0.

    Call it before `basin.json` is stored, with the bytes that will be stored. If somebody else's `basin.json` comes
    first, give the slot back by `delete_slot_files`; left behind it does no harm, because it states its basin's id.

    Raises `SecretRequired`, `InvalidArgument` (a secret for an open basin), `StorageError`.
    """
    descriptor = decode_descriptor(descriptor_bytes)
    digest = descriptor_hash(descriptor_bytes)
    wanted = _wanted_secret(descriptor.profile, secret)
    if wanted is None:
        return Keyring.open_profile(basin_id=descriptor.basin_id, descriptor_hash=digest)
    keys = SlotKeys(os.urandom(KEY_SIZE), os.urandom(KEY_SIZE))
    slot_bytes, slot = _wrap(keys, wanted, descriptor.basin_id, descriptor.created_ms, cost)
    keyring = Keyring(descriptor.basin_id, digest, (storage, slot, keys))
    keyring._accept(0, os.urandom(KEY_SIZE))
    _store_slot(storage, keyring, slot, slot_bytes)
    return keyring


def unlock(storage: Storage, descriptor_bytes: bytes, secret: Secret | None) -> tuple[Keyring, str | None]:
    """Open the keys of an existing basin: the keyring, and the id of the slot that opened (None in an open basin).

    Slots of another basin are ignored, and a damaged slot does not keep another one from opening.

    Raises `SecretRequired`; `InvalidArgument` for a secret with an open basin; `WrongSecret` if intact slots refused
    it; `CorruptionError` or `UnsupportedVersion`, naming the file, if that alone is the reason; and what
    `decode_descriptor` raises. Costs two listings, one read for each slot and each generation, and for a passphrase
    0.13 s or so for each slot tried.
    """
    descriptor = decode_descriptor(descriptor_bytes)
    digest = descriptor_hash(descriptor_bytes)
    wanted = _wanted_secret(descriptor.profile, secret)
    if wanted is None:
        return Keyring.open_profile(basin_id=descriptor.basin_id, descriptor_hash=digest), None
    attempt = _Attempt(wanted)
    for slot_id in _slot_ids(storage):
        keyring = attempt.open(storage, slot_id, descriptor.basin_id, digest)
        if keyring is not None:
            return keyring, slot_id
    raise attempt.reason()


def _wanted_secret(profile: str, secret: Secret | None) -> Secret | None:
    """None in an open basin, the secret in an encrypted one; a secret too many or too few raises."""
    if profile == "open":
        if secret is not None:
            raise InvalidArgument("this basin is open (not encrypted): open it without a secret")
        return None
    if secret is None:
        raise SecretRequired("this basin is encrypted: a passphrase or a secret file is needed")
    return secret


class _Attempt:
    """One secret against the slots of a basin, one after another; remembers why they did not open."""

    def __init__(self, secret: Secret) -> None:
        self._secret = secret
        self._refused = 0
        self._other_kinds = 0
        self._damaged: list[BasinError] = []
        self._damaged_behind: list[BasinError] = []

    def open(self, storage: Storage, slot_id: str, basin_id: bytes, descriptor: bytes) -> Keyring | None:
        try:
            slot = _read_slot(storage, slot_id, basin_id)
            if slot is None:
                return None
            if slot.kind != self._secret.kind:
                self._other_kinds += 1
                return None
            keys = unlock_slot(slot, self._secret.material())
        except WrongSecret:
            self._refused += 1
            return None
        except (CorruptionError, UnsupportedVersion) as error:
            self._damaged.append(error)
            return None
        keyring = Keyring(basin_id, descriptor, (storage, slot, keys))
        keyring.reload()
        generations = keyring.generations()
        if not generations:
            self._damaged_behind += list(keyring.problems().values()) or [_no_generation(slot_id)]
            return None
        keyring.generation = generations[-1]
        return keyring

    def reason(self) -> BasinError:
        """Why nothing opened. Damage behind a slot that did accept the secret comes first: the secret is right."""
        if self._damaged_behind:
            return self._damaged_behind[0]
        damaged = [str(error.fields.get("object")) for error in self._damaged]
        if self._refused:
            also = f" (damaged, so not tried: {', '.join(damaged)})" if damaged else ""
            return WrongSecret(f"this secret opens none of the key slots{also}", refused=self._refused, damaged=damaged)
        if self._damaged:
            return self._damaged[0]
        if self._other_kinds:
            return WrongSecret(f"no key slot is of the kind {self._secret.kind}", refused=0, damaged=[])
        return CorruptionError(f"the key slots of this basin are gone from {KEYS_FOLDER}/", object=KEYS_FOLDER)


def _no_generation(slot_id: str) -> CorruptionError:
    name = generation_name(slot_id, 0)
    return CorruptionError(f"{name} is gone: restore it from a copy of the basin", object=name)


def _slot_ids(storage: Storage) -> list[str]:
    return [folder for folder in storage.list_folders(KEYS_FOLDER) if is_slot_id(folder)]


def _read_slot(storage: Storage, slot_id: str, basin_id: bytes) -> Slot | None:
    """The slot of a folder; None if it is not (or no more) there, or belongs to another basin."""
    try:
        data = storage.read_file(slot_name(slot_id), DOCUMENT_SIZE_MAX + 1)
    except ObjectMissing:
        return None
    slot = decode_slot(data, slot_id)
    return slot if slot.basin_id == basin_id else None


# --- managing slots -------------------------------------------------------------------------------------------------


class SlotInfo(NamedTuple):
    """One slot as stored. Where `problem` says that its file is damaged, `kind` and `public_key` are empty."""

    slot_id: str
    kind: str
    created_ms: int
    public_key: bytes
    generations: tuple[int, ...]
    problem: BasinError | None


def list_slots(storage: Storage, basin_id: bytes) -> list[SlotInfo]:
    """The slots of a basin, by id. Needs no secret. Which of them are valid is for the log to say."""
    return list(_list_slots(storage, basin_id))


def _list_slots(storage: Storage, basin_id: bytes) -> Iterator[SlotInfo]:
    for slot_id in _slot_ids(storage):
        generations = tuple(_stored_generations(storage, slot_id))
        try:
            slot = _read_slot(storage, slot_id, basin_id)
        except (CorruptionError, UnsupportedVersion) as error:
            yield SlotInfo(slot_id, "", 0, b"", generations, error)
            continue
        if slot is not None:
            yield SlotInfo(slot_id, slot.kind, slot.created_ms, slot.public_key, generations, None)


def _stored_generations(storage: Storage, slot_id: str) -> list[int]:
    found = map(parse_generation_name, storage.list(f"{KEYS_FOLDER}/{slot_id}"))
    return [generation for generation in found if generation is not None]


def add_slot(
    storage: Storage,
    keyring: Keyring,
    secret: Secret,
    *,
    dropped: Collection[int] = (),
    cost: PassphraseCost = DEFAULT_COST,
) -> tuple[str, bytes]:
    """Let `secret` open the basin too: a new slot, with every generation that `keyring` holds, but those `dropped`.

    Returns slot id and public half; the slot is valid (gets later generations) once the log names both. Raises
    `InvalidArgument` in an open basin, and `StorageError`.
    """
    keys = keyring.keys_for_new_slot()
    now_ms = time.time_ns() // 1_000_000
    slot_bytes, slot = _wrap(keys, secret, keyring.basin_id, now_ms, cost)
    _store_slot(storage, keyring, slot, slot_bytes, dropped)
    return slot.slot_id, slot.public_key


def _wrap(keys: SlotKeys, secret: Secret, basin_id: bytes, now_ms: int, cost: PassphraseCost) -> tuple[bytes, Slot]:
    return create_slot(
        secret.material(),
        kind=secret.kind,
        basin_id=basin_id,
        slot_id=os.urandom(_SLOT_ID_BYTES).hex(),
        keys=keys,
        salt=os.urandom(SALT_SIZE),
        created_ms=now_ms,
        cost=cost,
    )


def _store_slot(
    storage: Storage, keyring: Keyring, slot: Slot, slot_bytes: bytes, dropped: Collection[int] = ()
) -> None:
    """Write the generations, then `slot.json`, which makes them a slot; durable on return."""
    for generation in set(keyring.generations()).difference(dropped):
        sealed = keyring.seal_to(slot.slot_id, slot.public_key, generation, keyring.master(generation))
        storage.put_if_absent(generation_name(slot.slot_id, generation), sealed)
    storage.put_if_absent(slot_name(slot.slot_id), slot_bytes)
    storage.sync_folder(KEYS_FOLDER)


def remove_slot(storage: Storage, basin_id: bytes, slot_id: str) -> None:
    """Delete a slot's files; its secret opens this basin no more (but for whoever kept a copy of the files).

    Raises `InvalidArgument` if there is no such slot, or no other intact one.
    """
    slots = list_slots(storage, basin_id)
    if slot_id not in [slot.slot_id for slot in slots]:
        raise InvalidArgument(f"there is no key slot {slot_id!r}", slot_id=slot_id)
    if not any(slot.problem is None and slot.generations for slot in slots if slot.slot_id != slot_id):
        raise InvalidArgument("the last key slot cannot be removed: nothing would open the basin", slot_id=slot_id)
    delete_slot_files(storage, slot_id)


def delete_slot_files(storage: Storage, slot_id: str) -> None:
    """Delete a slot's files without a question: `slot.json` first, so that no half of it is taken for a slot."""
    storage.delete(slot_name(slot_id))
    for generation in _stored_generations(storage, slot_id):
        storage.delete(generation_name(slot_id, generation))
    storage.sync_folder(f"{KEYS_FOLDER}/{slot_id}")


def delete_generation_files(storage: Storage, basin_id: bytes, dropped: Collection[int]) -> int:
    """Delete the keys of generations from the folder of every slot of this basin: valid, damaged, removed, unfinished.

    Durable on return, which says how many there were.
    """
    removed = 0
    for slot_id in _slot_ids(storage):
        going = [generation for generation in _stored_generations(storage, slot_id) if generation in dropped]
        if not going or _is_of_another_basin(storage, slot_id, basin_id):
            continue
        for generation in going:
            storage.delete(generation_name(slot_id, generation))
        storage.sync_folder(f"{KEYS_FOLDER}/{slot_id}")
        removed += len(going)
    return removed


def _is_of_another_basin(storage: Storage, slot_id: str, basin_id: bytes) -> bool:
    with contextlib.suppress(ObjectMissing, CorruptionError, UnsupportedVersion):
        return decode_slot(storage.read_file(slot_name(slot_id), DOCUMENT_SIZE_MAX + 1), slot_id).basin_id != basin_id
    return False


def rotate(storage: Storage, keyring: Keyring, valid_slots: Mapping[str, bytes]) -> int:
    """Make a new master key and seal it to the valid slots, given as slot id to public half *by the log*.

    A slot that is not among them gets nothing, whatever lies in `keys/`. Returns the new generation, which `keyring`
    can open from now on; it counts once a record names it (then call `select_generation`). It does not revoke what
    somebody already holds: old generations stay readable to them until everything is written anew.

    Raises `InvalidArgument` (open basin, a bad public key, or this handle's own slot is not valid), `Conflict` if
    others rotate all the time, `StorageError`.
    """
    if keyring.slot is None or keyring.slot.slot_id not in valid_slots:
        raise InvalidArgument("only a handle that a valid key slot opened can rotate the keys")
    master = os.urandom(KEY_SIZE)
    for _ in range(_ROTATION_ATTEMPTS):
        generation = _unused_generation(storage, keyring)
        try:
            for slot_id, public_key in sorted(valid_slots.items()):
                sealed = keyring.seal_to(slot_id, public_key, generation, master)
                storage.put_if_absent(generation_name(slot_id, generation), sealed)
        except AlreadyExists:
            continue  # somebody rotates at the same time; what this attempt sealed stays unused
        keyring._accept(generation, master)
        return generation
    raise Conflict("others rotate the keys of this basin at the same time: try again")


def _unused_generation(storage: Storage, keyring: Keyring) -> int:
    """A number above every one ever given out, also by rotations that broke off."""
    known = [keyring.generation, *keyring.generations()]
    for slot_id in _slot_ids(storage):
        known += _stored_generations(storage, slot_id)
    if max(known) >= GENERATION_MAX:
        raise InvalidArgument("there are no more generations")
    return max(known) + 1
