"""The descriptor (`basin.json`) and the key slots (`keys/<slot id>/…`): how a secret leads to the master keys.

    secret ──argon2id or HKDF──► wrap key ──unwraps──► the slot's X25519 private half, and the id key
                                                          └──opens──► the master key of each generation

Invariants:

- A slot belongs to one basin and one slot id: both enter its wrap key, its associated data and the seal of its
  generations. They do not depend on the descriptor, which is written after the first slot.
- "Wrong secret" and "damaged" are different errors: a file has a checksum, and the wrap key comes with a commitment,
  which is compared before anything is unwrapped.
- A generation is sealed to a slot's public half, so whoever rotates needs no secret but their own. The id key, which
  every holder of the basin knows and nobody else, enters the seal; so what a stranger planted is refused.
- Every cost that a file states is capped before it is paid.

Pure: randomness and times are arguments. Imported by `basin.engine.keyring` and the engine; knows no storage.
"""

from __future__ import annotations

import hmac
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import xxhash
from blake3 import blake3
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from basin.errors import (
    AuthenticationFailed,
    ChecksumMismatch,
    CorruptionError,
    InvalidArgument,
    MissingDependency,
    NotABasin,
    UnsupportedVersion,
    WrongSecret,
)
from basin.format.crypto import COMMITMENT_SIZE, KEY_SIZE, NONCE_SIZE, TAG_SIZE, Cipher, require_size
from basin.format.document import Scalar, Value, decode_document, encode_document
from basin.format.layout import FORMAT_VERSION

DESCRIPTOR_NAME: Final = "basin.json"
KEYS_FOLDER: Final = "keys"
BASIN_ID_SIZE: Final = 16
SALT_SIZE: Final = 16

PROFILES: Final = ("open", "encrypted")

KIND_PASSPHRASE: Final = "passphrase"  # noqa: S105 - the word, not one
KIND_KEY_FILE: Final = "key-file"
SLOT_KINDS: Final = (KIND_PASSPHRASE, KIND_KEY_FILE)

MEMORY_KIB_MAX: Final = 1 << 20
PASSES_MAX: Final = 16
LANES_MAX: Final = 16

GENERATION_MAX: Final = (1 << 32) - 1
GENERATION_MAGIC: Final = b"\x89BSN-GEN"
GENERATION_HEADER: Final = struct.Struct("<8sHHI16s8s32s")
"""magic, version, zero, generation, basin id, slot id, ephemeral public half."""
GENERATION_HEADER_SIZE: Final = 72
GENERATION_SIZE: Final = GENERATION_HEADER_SIZE + KEY_SIZE + TAG_SIZE + 4

_WRAP_SIZE: Final = KEY_SIZE + COMMITMENT_SIZE

_DESCRIPTOR_FORM: Final = "basin"
_SLOT_FORM: Final = "basin slot"
_DESCRIPTOR_MARKS: Final = (b'"format": "basin"', b'"basin_id": "')
"""Either tells a damaged descriptor from a file that was never one; one changed place cannot hide both."""

_PASSPHRASE_LABEL: Final = b"basin 1 passphrase slot"
_KEY_FILE_LABEL: Final = b"basin 1 key-file slot"
_GENERATION_LABEL: Final = b"basin 1 generation"
_VOUCHER_CONTEXT: Final = "basin 1 sealing of generations by holders of the id key"

_ZERO_NONCE: Final = bytes(NONCE_SIZE)
"""Wrap keys and generation keys each seal one message: a fresh salt or a fresh ephemeral pair enters every one."""

_SLOT_ID: Final = re.compile(r"[0-9a-f]{16}")
_GENERATION_NAME: Final = re.compile(r"[0-9]{10}")
_HEX: Final = re.compile(r"[0-9a-f]*")
_CHUNKER: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


# --- names of files -------------------------------------------------------------------------------------------------


def is_slot_id(text: str) -> bool:
    """Whether `text` is a slot id: 16 lower-case hex digits."""
    return _SLOT_ID.fullmatch(text) is not None


def slot_name(slot_id: str) -> str:
    """The file of a slot."""
    return f"{KEYS_FOLDER}/{slot_id}/slot.json"


def generation_name(slot_id: str, generation: int) -> str:
    """The file of one generation sealed to a slot."""
    return f"{KEYS_FOLDER}/{slot_id}/{generation:010}"


def parse_generation_name(text: str) -> int | None:
    """The generation that a file name in a slot's folder states, or None for other files."""
    if not _GENERATION_NAME.fullmatch(text) or int(text) > GENERATION_MAX:
        return None
    return int(text)


# --- descriptor -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What `basin.json` says. `created_ms` is milliseconds since 1970 UTC; `options` are those stored at creation.

    Raises `InvalidArgument` where a field is out of its range.
    """

    format: int
    basin_id: bytes
    profile: str
    chunker: str
    created_ms: int
    options: Mapping[str, Scalar]

    def __post_init__(self) -> None:
        if self.format != FORMAT_VERSION:
            raise InvalidArgument(f"format version {self.format} cannot be written")
        require_size("basin id", self.basin_id, BASIN_ID_SIZE)
        if self.profile not in PROFILES:
            raise InvalidArgument(f"a profile is open or encrypted, not {self.profile!r}")
        if not _CHUNKER.fullmatch(self.chunker):
            raise InvalidArgument(f"not the name of a chunker: {self.chunker!r}")
        if self.created_ms < 0:
            raise InvalidArgument("a basin is created after 1970")
        for name, value in self.options.items():
            if not name.isidentifier() or (isinstance(value, str) and not value.isprintable()):
                raise InvalidArgument(f"not an option that can be stored: {name!r}")


def encode_descriptor(descriptor: Descriptor) -> bytes:
    """Spell `basin.json`. It is written once and never changed: its hash enters every derivation."""
    fields: dict[str, Value] = {
        "basin_id": descriptor.basin_id.hex(),
        "profile": descriptor.profile,
        "chunker": descriptor.chunker,
        "created_ms": descriptor.created_ms,
        "options": dict(descriptor.options),
    }
    return encode_document(_DESCRIPTOR_FORM, fields)


def decode_descriptor(data: bytes) -> Descriptor:
    """Read `basin.json`.

    Raises `NotABasin` if it was never one, `ChecksumMismatch` if it is damaged, `UnsupportedVersion` if it is newer,
    `CorruptionError` if it is intact and says what no Basin writes.
    """
    if not any(mark in data for mark in _DESCRIPTOR_MARKS):
        raise NotABasin(f"{DESCRIPTOR_NAME} is not the descriptor of a basin", object=DESCRIPTOR_NAME)
    fields = _Fields(decode_document(_DESCRIPTOR_FORM, data, name=DESCRIPTOR_NAME), DESCRIPTOR_NAME)
    try:
        descriptor = Descriptor(
            format=FORMAT_VERSION,
            basin_id=fields.binary("basin_id", BASIN_ID_SIZE),
            profile=fields.text("profile"),
            chunker=fields.text("chunker"),
            created_ms=fields.integer("created_ms"),
            options=fields.table("options"),
        )
    except InvalidArgument as error:
        raise CorruptionError(f"{DESCRIPTOR_NAME}: {error}", object=DESCRIPTOR_NAME) from None
    fields.require_no_more()
    return descriptor


def descriptor_hash(data: bytes) -> bytes:
    """The 32 bytes that stand for the descriptor in every derivation: BLAKE3 of the file's bytes."""
    return blake3(data).digest()


class _Fields:
    """Takes typed fields out of a decoded document; whatever is missing, of another type or left over is damage."""

    def __init__(self, fields: dict[str, Any], name: str) -> None:
        self._fields = fields
        self._name = name

    def text(self, field: str) -> str:
        value = self._take(field)
        if not isinstance(value, str):
            raise self._bad(field)
        return value

    def binary(self, field: str, size: int) -> bytes:
        value = self.text(field)
        if len(value) != 2 * size or not _HEX.fullmatch(value):
            raise self._bad(field)
        return bytes.fromhex(value)

    def integer(self, field: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
        value = self._take(field)
        if type(value) is not int or not low <= value <= high:
            raise self._bad(field)
        return value

    def table(self, field: str) -> dict[str, Scalar]:
        value = self._take(field)
        if not isinstance(value, dict):
            raise self._bad(field)
        return value

    def require_no_more(self) -> None:
        for field in self._fields:
            raise self._bad(field)

    def _take(self, field: str) -> object:
        if field not in self._fields:
            raise self._bad(field)
        return self._fields.pop(field)

    def _bad(self, field: str) -> CorruptionError:
        return CorruptionError(f"{self._name}: the field {field[:80]!r} is not valid", object=self._name)


# --- slots ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PassphraseCost:
    """What one guess at a passphrase costs by argon2id: memory in KiB, passes over it, lanes. Caps: 1 GiB, 16, 16.

    The default is the second recommendation of RFC 9106: 64 MiB, 3 passes, 4 lanes; 0.13 s on one machine of 2026.
    """

    memory_kib: int = 65_536
    passes: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        if not (
            1 <= self.lanes <= LANES_MAX
            and 1 <= self.passes <= PASSES_MAX
            and 8 * self.lanes <= self.memory_kib <= MEMORY_KIB_MAX
        ):
            raise InvalidArgument(
                f"argon2id cost out of range: {self.memory_kib} KiB, {self.passes} passes, {self.lanes} lanes"
            )


DEFAULT_COST: Final = PassphraseCost()


@dataclass(frozen=True, slots=True)
class Slot:
    """A decoded `slot.json`. Everything in it is public; `wrapped` is the private half and the id key, sealed.

    `cost` is None in a key-file slot.
    """

    slot_id: str
    basin_id: bytes
    kind: str
    public_key: bytes
    created_ms: int
    salt: bytes
    cost: PassphraseCost | None
    commitment: bytes
    wrapped: bytes


class SlotKeys(NamedTuple):
    """What a slot holds for whoever has its secret."""

    private_key: bytes
    id_key: bytes

    def __repr__(self) -> str:
        return "SlotKeys()"


def create_slot(
    material: bytes,
    *,
    kind: str,
    basin_id: bytes,
    slot_id: str,
    keys: SlotKeys,
    salt: bytes,
    created_ms: int,
    cost: PassphraseCost = DEFAULT_COST,
) -> tuple[bytes, Slot]:
    """Wrap `keys` (a fresh private half of 32 random bytes, and the basin's id key) by the secret's `material`.

    `salt` is 16 fresh random bytes. Returns the bytes of `slot.json` and what they decode to. For a passphrase it costs
    what `cost` says, for a key file microseconds.
    """
    require_size("basin id", basin_id, BASIN_ID_SIZE)
    require_size("salt", salt, SALT_SIZE)
    require_size("private key", keys.private_key, KEY_SIZE)
    require_size("id key", keys.id_key, KEY_SIZE)
    if kind not in SLOT_KINDS or not is_slot_id(slot_id):
        raise InvalidArgument(f"not a slot: kind {kind!r}, id {slot_id!r}")
    unwrapped = Slot(
        slot_id=slot_id,
        basin_id=basin_id,
        kind=kind,
        public_key=public_key_of(keys.private_key),
        created_ms=created_ms,
        salt=salt,
        cost=cost if kind == KIND_PASSPHRASE else None,
        commitment=b"",
        wrapped=b"",
    )
    wrap_key, commitment = _derive_wrap_key(unwrapped, material)
    wrapped = Cipher(wrap_key).seal(_ZERO_NONCE, keys.private_key + keys.id_key, _wrap_context(unwrapped))
    slot = replace(unwrapped, commitment=commitment, wrapped=wrapped)
    return _encode_slot(slot), slot


def unlock_slot(slot: Slot, material: bytes) -> SlotKeys:
    """Return what the slot holds. Raise `WrongSecret` if `material` is not its secret, `AuthenticationFailed` if the
    secret is right and the slot was tampered with. For a passphrase it costs what the slot says (capped).
    """
    wrap_key, commitment = _derive_wrap_key(slot, material)
    if not hmac.compare_digest(commitment, slot.commitment):
        raise WrongSecret(f"this secret does not open slot {slot.slot_id}", slot_id=slot.slot_id)
    name = slot_name(slot.slot_id)
    try:
        opened = Cipher(wrap_key).open(_ZERO_NONCE, slot.wrapped, _wrap_context(slot))
    except AuthenticationFailed:
        raise AuthenticationFailed(f"{name} does not authenticate: it was changed", object=name) from None
    return SlotKeys(opened[:KEY_SIZE], opened[KEY_SIZE:])


def public_key_of(private_key: bytes) -> bytes:
    """The public half (32 bytes) of an X25519 private half: any 32 random bytes."""
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def _derive_wrap_key(slot: Slot, material: bytes) -> tuple[bytes, bytes]:
    """Wrap key and commitment: two halves of one derivation, so that the public one says nothing about the other."""
    context = slot.basin_id + bytes.fromhex(slot.slot_id)
    if slot.cost is not None:
        derived = _stretch(material, slot.salt, _PASSPHRASE_LABEL + context, slot.cost)
    else:
        require_size("key-file secret", material, KEY_SIZE)
        info = _KEY_FILE_LABEL + context
        derived = HKDF(algorithm=SHA256(), length=_WRAP_SIZE, salt=slot.salt, info=info).derive(material)
    return derived[:KEY_SIZE], derived[KEY_SIZE:]


def _stretch(material: bytes, salt: bytes, context: bytes, cost: PassphraseCost) -> bytes:
    try:
        kdf = Argon2id(
            salt=salt,
            length=_WRAP_SIZE,
            iterations=cost.passes,
            lanes=cost.lanes,
            memory_cost=cost.memory_kib,
            ad=context,
        )
    except UnsupportedAlgorithm as error:
        raise MissingDependency(
            "passphrases need argon2id: install a `cryptography` built with OpenSSL 3.2 or later",
            package="cryptography",
        ) from error
    return kdf.derive(material)


def _wrap_context(slot: Slot) -> bytes:
    label = _PASSPHRASE_LABEL if slot.kind == KIND_PASSPHRASE else _KEY_FILE_LABEL
    return label + slot.basin_id + bytes.fromhex(slot.slot_id) + slot.public_key


def _encode_slot(slot: Slot) -> bytes:
    fields: dict[str, Value] = {
        "basin_id": slot.basin_id.hex(),
        "slot_id": slot.slot_id,
        "kind": slot.kind,
        "public_key": slot.public_key.hex(),
        "created_ms": slot.created_ms,
        "salt": slot.salt.hex(),
        "commitment": slot.commitment.hex(),
        "wrapped": slot.wrapped.hex(),
    }
    if slot.cost is not None:
        fields |= {"memory_kib": slot.cost.memory_kib, "passes": slot.cost.passes, "lanes": slot.cost.lanes}
    return encode_document(_SLOT_FORM, fields)


def decode_slot(data: bytes, slot_id: str) -> Slot:
    """Read the `slot.json` that was found in the folder `slot_id`.

    The caller compares `basin_id`: a slot of another basin is ignored, not an error. Raises `ChecksumMismatch`,
    `CorruptionError` (intact, but of another slot, or with values that no Basin writes) or `UnsupportedVersion`.
    """
    name = slot_name(slot_id)
    fields = _Fields(decode_document(_SLOT_FORM, data, name=name), name)
    kind = fields.text("kind")
    if kind not in SLOT_KINDS:
        raise UnsupportedVersion(f"{name}: this Basin knows no slots of kind {kind[:80]!r}", object=name, version=kind)
    slot = Slot(
        slot_id=fields.text("slot_id"),
        basin_id=fields.binary("basin_id", BASIN_ID_SIZE),
        kind=kind,
        public_key=fields.binary("public_key", KEY_SIZE),
        created_ms=fields.integer("created_ms"),
        salt=fields.binary("salt", SALT_SIZE),
        cost=_decode_cost(fields, name) if kind == KIND_PASSPHRASE else None,
        commitment=fields.binary("commitment", COMMITMENT_SIZE),
        wrapped=fields.binary("wrapped", 2 * KEY_SIZE + TAG_SIZE),
    )
    fields.require_no_more()
    if slot.slot_id != slot_id:
        raise CorruptionError(f"{name} belongs to another slot: it was moved", object=name)
    return slot


def _decode_cost(fields: _Fields, name: str) -> PassphraseCost:
    try:
        return PassphraseCost(fields.integer("memory_kib"), fields.integer("passes"), fields.integer("lanes"))
    except InvalidArgument as error:
        raise CorruptionError(f"{name}: {error}", object=name) from None


# --- generations ----------------------------------------------------------------------------------------------------


def seal_generation(
    master: bytes,
    *,
    generation: int,
    basin_id: bytes,
    slot_id: str,
    public_key: bytes,
    id_key: bytes,
    ephemeral_private_key: bytes,
) -> bytes:
    """Seal one generation's master key to a slot's public half: the bytes of `keys/<slot id>/<generation>`.

    `ephemeral_private_key` is 32 fresh random bytes. Raises `InvalidArgument` for a public key that is none.
    """
    require_size("master key", master, KEY_SIZE)
    require_size("basin id", basin_id, BASIN_ID_SIZE)
    if not 0 <= generation <= GENERATION_MAX:
        raise InvalidArgument(f"a generation is 0..{GENERATION_MAX}, not {generation}")
    ephemeral = public_key_of(ephemeral_private_key)
    header = GENERATION_HEADER.pack(
        GENERATION_MAGIC, FORMAT_VERSION, 0, generation, basin_id, bytes.fromhex(slot_id), ephemeral
    )
    try:
        shared = X25519PrivateKey.from_private_bytes(ephemeral_private_key).exchange(
            X25519PublicKey.from_public_bytes(public_key)
        )
    except ValueError:
        raise InvalidArgument(f"slot {slot_id} has no valid public key", slot_id=slot_id) from None
    cipher = _generation_cipher(shared, public_key=public_key, ephemeral=ephemeral, id_key=id_key)
    body = header + cipher.seal(_ZERO_NONCE, master, header)
    return body + xxhash.xxh32_digest(body)[::-1]


def open_generation(data: bytes, *, generation: int, slot: Slot, keys: SlotKeys) -> bytes:
    """Return the master key (32 bytes) in the file `keys/<slot id>/<generation>`.

    Raises `ChecksumMismatch` (damaged), `UnsupportedVersion`, `CorruptionError` (intact, but the file of another basin,
    slot or generation) or `AuthenticationFailed` (not sealed by a holder of this basin, or changed on purpose).
    """
    name = generation_name(slot.slot_id, generation)
    header = _check_generation(data, name)
    _, version, zero, found_generation, basin_id, found_slot, ephemeral = GENERATION_HEADER.unpack(header)
    if version > FORMAT_VERSION:
        raise UnsupportedVersion(f"{name} was written by a newer Basin: upgrade", version=version, object=name)
    expected = (FORMAT_VERSION, 0, generation, slot.basin_id, bytes.fromhex(slot.slot_id))
    if (version, zero, found_generation, basin_id, found_slot) != expected:
        raise CorruptionError(f"{name} belongs to another basin, slot or generation: it was moved", object=name)
    private_key = X25519PrivateKey.from_private_bytes(keys.private_key)
    try:
        shared = private_key.exchange(X25519PublicKey.from_public_bytes(ephemeral))
        cipher = _generation_cipher(shared, public_key=slot.public_key, ephemeral=ephemeral, id_key=keys.id_key)
        return cipher.open(_ZERO_NONCE, data[GENERATION_HEADER_SIZE:-4], header)
    except (ValueError, AuthenticationFailed):  # ValueError: a point of small order, which no Basin writes
        raise AuthenticationFailed(f"{name} was not sealed by a holder of this basin", object=name) from None


def _check_generation(data: bytes, name: str) -> bytes:
    """Check length, magic and checksum; return the header."""
    if len(data) != GENERATION_SIZE or not data.startswith(GENERATION_MAGIC):
        raise ChecksumMismatch(f"{name} is damaged: restore it from a copy of the basin", object=name)
    if xxhash.xxh32_digest(data[:-4])[::-1] != data[-4:]:
        raise ChecksumMismatch(f"{name} is damaged: restore it from a copy of the basin", object=name)
    return data[:GENERATION_HEADER_SIZE]


def _generation_cipher(shared: bytes, *, public_key: bytes, ephemeral: bytes, id_key: bytes) -> Cipher:
    """The cipher of one sealed generation. The id key enters as HKDF's salt, by a derivation of its own."""
    voucher = blake3(id_key, derive_key_context=_VOUCHER_CONTEXT).digest()
    info = _GENERATION_LABEL + ephemeral + public_key
    return Cipher(HKDF(algorithm=SHA256(), length=KEY_SIZE, salt=voucher, info=info).derive(shared))
