"""Descriptor, slots and generations: round trips, every flipped bit, hostile values, wrong told from damaged."""

from __future__ import annotations

import json
import traceback
from typing import Any

import pytest
import xxhash
from blake3 import blake3
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import (
    AuthenticationFailed,
    BasinError,
    ChecksumMismatch,
    CorruptionError,
    InvalidArgument,
    MissingDependency,
    NotABasin,
    UnsupportedVersion,
    WrongSecret,
)
from basin.format.document import DOCUMENT_SIZE_MAX
from basin.format.slots import (
    DEFAULT_COST,
    GENERATION_HEADER,
    GENERATION_HEADER_SIZE,
    GENERATION_MAX,
    GENERATION_SIZE,
    Descriptor,
    PassphraseCost,
    Slot,
    SlotKeys,
    create_slot,
    decode_descriptor,
    decode_slot,
    descriptor_hash,
    encode_descriptor,
    generation_name,
    is_slot_id,
    open_generation,
    parse_generation_name,
    public_key_of,
    seal_generation,
    slot_name,
    unlock_slot,
)

BASIN = bytes(range(16))
OTHER_BASIN = bytes(range(1, 17))
SLOT_ID = "0123456789abcdef"
OTHER_SLOT_ID = "0123456789abcdee"
SECRET = bytes(range(32, 64))
MASTER = bytes(range(64, 96))
KEYS = SlotKeys(private_key=bytes(range(96, 128)), id_key=bytes(range(128, 160)))
SALT = bytes(range(160, 176))
EPHEMERAL = bytes(range(176, 208))
PINNED = {
    "descriptor": "8a09081852a7f407",
    "key-file slot": "60f52f265fe62dfa",
    "passphrase slot": "f7509806cec7d3ef",
    "generation": "1b62b94604f63c69",
}
CHEAP = PassphraseCost(memory_kib=64, passes=1, lanes=2)


def descriptor(**changes: Any) -> Descriptor:
    fields: dict[str, Any] = {
        "format": 1,
        "basin_id": BASIN,
        "profile": "encrypted",
        "chunker": "fixed-1m",
        "created_ms": 1_800_000_000_000,
        "options": {"part_max": 4 << 20, "label": "x", "sealed": True, "nothing": None},
    }
    return Descriptor(**{**fields, **changes})


def slot(kind: str = "key-file", material: bytes = SECRET, **changes: Any) -> tuple[bytes, Slot]:
    fields: dict[str, Any] = {"basin_id": BASIN, "slot_id": SLOT_ID, "keys": KEYS, "salt": SALT, "created_ms": 5}
    return create_slot(material, kind=kind, **{**fields, "cost": CHEAP, **changes})


def sealed(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "generation": 3,
        "basin_id": BASIN,
        "slot_id": SLOT_ID,
        "public_key": public_key_of(KEYS.private_key),
        "id_key": KEYS.id_key,
        "ephemeral_private_key": EPHEMERAL,
    }
    return seal_generation(MASTER, **{**fields, **changes})


def respelled(data: bytes, **changes: Any) -> bytes:
    """The same document with other fields and a right checksum: what somebody writes on purpose."""
    fields = json.loads(data)
    fields.update(changes)
    fields = {field: value for field, value in fields.items() if value is not ...}
    fields.pop("checksum")
    checksum = blake3((json.dumps(fields, sort_keys=True, indent=2) + "\n").encode()).hexdigest()
    return (json.dumps({**fields, "checksum": checksum}, sort_keys=True, indent=2) + "\n").encode()


def flips(data: bytes) -> list[bytes]:
    flipped = []
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(changed))
    return flipped


# --- primitives -----------------------------------------------------------------------------------------------------


def test_x25519_gives_the_vector_of_rfc_7748() -> None:
    private = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    public = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    other_public = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert public_key_of(private) == public
    exchanged = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(other_public))
    assert exchanged == shared


def test_argon2id_gives_the_vector_of_rfc_9106() -> None:
    kdf = Argon2id(
        salt=b"\x02" * 16, length=32, iterations=3, lanes=4, memory_cost=32, secret=b"\x03" * 8, ad=b"\x04" * 12
    )
    assert kdf.derive(b"\x01" * 32).hex() == "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659"


# --- descriptor -----------------------------------------------------------------------------------------------------


@given(
    st.binary(min_size=16, max_size=16),
    st.sampled_from(["open", "encrypted"]),
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,63}", fullmatch=True),
    st.integers(0, 2**63 - 1),
    st.dictionaries(
        st.sampled_from(["part_max", "größe", "a"]),
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text().filter(str.isprintable),
    ),
)
def test_a_descriptor_comes_back(
    basin_id: bytes, profile: str, chunker: str, created_ms: int, options: dict[str, Any]
) -> None:
    written = Descriptor(1, basin_id, profile, chunker, created_ms, options)
    assert decode_descriptor(encode_descriptor(written)) == written


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"basin_id": b"short"},
        {"profile": "Open"},
        {"chunker": ""},
        {"chunker": "a/b"},
        {"created_ms": -1},
        {"created_ms": 1 << 63},
        {"options": {"no identifier": 1}},
        {"options": {"a": "two\nlines"}},
        {"options": {"a": "\ud800"}},
        {"options": {"a": 1 << 63}},
        {"options": {"a": 1.5}},
        {"options": {"a": [1]}},
        {"options": {"a": "x" * DOCUMENT_SIZE_MAX}},
    ],
)
def test_a_descriptor_that_would_not_come_back_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        encode_descriptor(descriptor(**changes))


def test_every_flipped_bit_of_a_descriptor_is_damage() -> None:
    for flipped in flips(encode_descriptor(descriptor())):
        with pytest.raises(ChecksumMismatch) as caught:
            decode_descriptor(flipped)
        assert caught.value.object == "basin.json"


def test_every_truncated_descriptor_is_damage_or_none() -> None:
    whole = encode_descriptor(descriptor())
    for size in range(len(whole)):
        with pytest.raises((ChecksumMismatch, NotABasin)):
            decode_descriptor(whole[:size])
    with pytest.raises(ChecksumMismatch):
        decode_descriptor(whole + b"\n")


FOREIGN = [
    b"",
    b"{}",
    b"null",
    b"[1]",
    b'"basin"',
    b'{"a":1}',
    b"\xff\xfe",
    b"[" * 9_000,
    b"1" * 9_000,
    b'{"format": "other"}',
]


@pytest.mark.parametrize("data", FOREIGN, ids=lambda data: repr(data[:20]))
def test_other_files_are_not_a_basin(data: bytes) -> None:
    with pytest.raises(NotABasin):
        decode_descriptor(data)


HOSTILE = [
    b'{"basin_id": "' + b"[" * 9_000,
    b'{"basin_id": "", "options": ' + b"[" * 8_000 + b"]" * 8_000 + b"}",
    b'{"basin_id": "", "options": ' + b'{"a":' * 800 + b"1" + b"}" * 801,
    b'{"basin_id": "", "created_ms": ' + b"9" * 5_000 + b"}",
    b'{"basin_id": "", "created_ms": NaN}',
    b'{"basin_id": "", "created_ms": -Infinity}',
    b'{"basin_id": "", "checksum": 5}',
    b'{"basin_id": "", "checksum": "\\ud800"}',
    b'["basin_id", {"basin_id": ""}]',
    b'{"basin_id": "\xff"}',
    b'{"basin_id": "' + b" " * DOCUMENT_SIZE_MAX + b'"}',
]


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[:40]))
def test_hostile_descriptors_are_damage(data: bytes) -> None:
    with pytest.raises(ChecksumMismatch):
        decode_descriptor(data)


def test_a_field_given_twice_is_damage() -> None:
    whole = encode_descriptor(descriptor())
    line = b'  "profile": "encrypted",\n'
    assert line in whole
    with pytest.raises(ChecksumMismatch):
        decode_descriptor(whole.replace(line, line + line))


def test_other_white_space_is_damage() -> None:
    """One descriptor has one spelling, because the hash of its bytes enters every derivation."""
    with pytest.raises(ChecksumMismatch):
        decode_descriptor(json.dumps(json.loads(encode_descriptor(descriptor()))).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"basin_id": "00"},
        {"basin_id": BASIN.hex().upper()},
        {"basin_id": 5},
        {"profile": "locked"},
        {"profile": None},
        {"chunker": ["fixed"]},
        {"chunker": ...},
        {"created_ms": -1},
        {"created_ms": True},
        {"created_ms": 1 << 63},
        {"created_ms": 1.0},
        {"options": None},
        {"options": {"a": {"b": 1}}},
        {"more": 1},
        {"format": "basin slot"},
        {"options": {"a": "x" * DOCUMENT_SIZE_MAX}},
        {"version": 0},
        {"version": "2"},
        {"version": True},
    ],
)
def test_intact_descriptors_with_impossible_fields_are_corrupt(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptionError) as caught:
        decode_descriptor(respelled(encode_descriptor(descriptor()), **changes))
    assert caught.value.object == "basin.json"


def test_a_newer_descriptor_asks_for_an_upgrade_even_with_unknown_fields() -> None:
    with pytest.raises(UnsupportedVersion) as caught:
        decode_descriptor(respelled(encode_descriptor(descriptor()), version=2, unknown="field"))
    assert caught.value.version == 2


def test_the_hash_of_a_descriptor_is_blake3_of_its_bytes() -> None:
    assert descriptor_hash(b"bytes") == blake3(b"bytes").digest()


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_typed_errors(data: bytes) -> None:
    for decode in (lambda: decode_descriptor(data), lambda: decode_slot(data, SLOT_ID)):
        with pytest.raises(BasinError):
            decode()


FIELD = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.dictionaries(st.text(max_size=3), st.integers())
)
DESCRIPTOR_FIELDS = ("basin_id", "profile", "chunker", "created_ms", "options", "format", "version", "x")
SLOT_FIELDS = ("basin_id", "slot_id", "kind", "public_key", "salt", "memory_kib", "passes", "lanes", "wrapped", "x")


@given(st.dictionaries(st.sampled_from(DESCRIPTOR_FIELDS), FIELD | st.just(...), min_size=1))
def test_whatever_an_intact_descriptor_says_is_read_or_refused(changes: dict[str, Any]) -> None:
    data = respelled(encode_descriptor(descriptor()), **changes)
    try:
        decoded = decode_descriptor(data)
    except (CorruptionError, UnsupportedVersion, NotABasin):
        return
    assert encode_descriptor(decoded) == data


@given(st.dictionaries(st.sampled_from(SLOT_FIELDS), FIELD | st.just(...), min_size=1))
def test_whatever_an_intact_slot_says_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        decoded = decode_slot(respelled(slot("passphrase")[0], **changes), SLOT_ID)
    except (CorruptionError, UnsupportedVersion):
        return
    assert decoded.cost is None or decoded.cost.memory_kib <= 1 << 20


# --- slots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["passphrase", "key-file"])
def test_a_slot_comes_back_and_opens(kind: str) -> None:
    data, created = slot(kind)
    decoded = decode_slot(data, SLOT_ID)
    assert decoded == created
    assert decoded.basin_id == BASIN
    assert decoded.public_key == public_key_of(KEYS.private_key)
    assert unlock_slot(decoded, SECRET) == KEYS


def test_a_passphrase_costs_64_mib_three_passes_and_four_lanes_by_default() -> None:
    data, created = slot("passphrase", b"correct horse", cost=DEFAULT_COST)
    assert created.cost == PassphraseCost(65_536, 3, 4)
    assert unlock_slot(decode_slot(data, SLOT_ID), b"correct horse") == KEYS


def test_a_library_without_argon2id_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(**_: object) -> None:
        raise UnsupportedAlgorithm("argon2id")

    monkeypatch.setattr("basin.format.slots.Argon2id", unsupported)
    with pytest.raises(MissingDependency) as caught:
        slot("passphrase")
    assert caught.value.package == "cryptography"
    slot("key-file")


@pytest.mark.parametrize("kind", ["passphrase", "key-file"])
def test_another_secret_is_wrong_and_not_corruption(kind: str) -> None:
    _, created = slot(kind)
    with pytest.raises(WrongSecret) as caught:
        unlock_slot(created, SECRET[::-1])
    assert caught.value.slot_id == SLOT_ID


@pytest.mark.parametrize("kind", ["passphrase", "key-file"])
def test_every_flipped_bit_of_a_slot_is_damage(kind: str) -> None:
    data, _ = slot(kind)
    for flipped in flips(data):
        with pytest.raises(ChecksumMismatch) as caught:
            decode_slot(flipped, SLOT_ID)
        assert caught.value.object == f"keys/{SLOT_ID}/slot.json"


def test_every_truncated_or_extended_slot_is_damage() -> None:
    data, _ = slot()
    for changed in [*(data[:size] for size in range(len(data))), data + b" ", data + data]:
        with pytest.raises(ChecksumMismatch):
            decode_slot(changed, SLOT_ID)


@pytest.mark.parametrize("field", ["public_key", "wrapped"])
def test_a_slot_changed_on_purpose_does_not_authenticate(field: str) -> None:
    data, created = slot()
    changed = bytearray(getattr(created, field))
    changed[0] ^= 1
    tampered = decode_slot(respelled(data, **{field: changed.hex()}), SLOT_ID)
    with pytest.raises(AuthenticationFailed) as caught:
        unlock_slot(tampered, SECRET)
    assert caught.value.object == f"keys/{SLOT_ID}/slot.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"salt": SALT[::-1].hex()},
        {"commitment": bytes(32).hex()},
        {"basin_id": OTHER_BASIN.hex()},
        {"passes": 2},
        {"memory_kib": 65},
        {"lanes": 1},
    ],
)
def test_whatever_enters_the_wrap_key_leads_to_another_one(changes: dict[str, Any]) -> None:
    data, _ = slot("passphrase")
    with pytest.raises(WrongSecret):
        unlock_slot(decode_slot(respelled(data, **changes), SLOT_ID), SECRET)


def test_the_wrap_key_depends_on_the_kind() -> None:
    file_slot, pass_slot = slot("key-file")[1], slot("passphrase")[1]
    assert file_slot.commitment != pass_slot.commitment


def test_a_slot_found_in_the_folder_of_another_is_corrupt() -> None:
    data, _ = slot()
    with pytest.raises(CorruptionError, match="moved"):
        decode_slot(data, OTHER_SLOT_ID)


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_kib": (1 << 20) + 1},
        {"memory_kib": 1 << 62},
        {"memory_kib": 15},
        {"memory_kib": 0},
        {"passes": 17},
        {"passes": 0},
        {"lanes": 17},
        {"lanes": 0},
        {"lanes": -1},
        {"lanes": ...},
        {"passes": True},
        {"kind": "key-file"},
        {"kind": 5},
        {"wrapped": "00"},
        {"commitment": "zz" * 32},
        {"public_key": ""},
        {"more": 1},
    ],
)
def test_costs_beyond_the_caps_and_impossible_fields_are_corrupt(changes: dict[str, Any]) -> None:
    data, _ = slot("passphrase")
    with pytest.raises(CorruptionError):
        decode_slot(respelled(data, **changes), SLOT_ID)


def test_costs_at_the_caps_are_read() -> None:
    data, _ = slot("passphrase")
    decoded = decode_slot(respelled(data, memory_kib=1 << 20, passes=16, lanes=16), SLOT_ID)
    assert decoded.cost == PassphraseCost(1 << 20, 16, 16)


def test_a_kind_of_slot_that_is_not_known_asks_for_an_upgrade() -> None:
    data, _ = slot()
    with pytest.raises(UnsupportedVersion):
        decode_slot(respelled(data, kind="recipient"), SLOT_ID)
    with pytest.raises(UnsupportedVersion):
        decode_slot(respelled(data, version=9), SLOT_ID)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "none"},
        {"slot_id": "0123"},
        {"slot_id": "../../etc/passwd"},
        {"salt": b""},
        {"basin_id": b""},
        {"keys": SlotKeys(b"", KEYS.id_key)},
        {"keys": SlotKeys(KEYS.private_key, b"")},
        {"material": b"no 32 bytes"},
    ],
)
def test_slots_are_not_made_of_anything_else(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        slot(**changes)


# --- generations ----------------------------------------------------------------------------------------------------


def test_a_generation_comes_back() -> None:
    data = sealed()
    assert len(data) == GENERATION_SIZE
    assert GENERATION_HEADER.size == GENERATION_HEADER_SIZE
    assert open_generation(data, generation=3, slot=slot()[1], keys=KEYS) == MASTER
    assert sealed(ephemeral_private_key=EPHEMERAL[::-1]) != data


def test_every_flipped_bit_of_a_generation_is_damage() -> None:
    created = slot()[1]
    for flipped in flips(sealed()):
        with pytest.raises(ChecksumMismatch) as caught:
            open_generation(flipped, generation=3, slot=created, keys=KEYS)
        assert caught.value.object == f"keys/{SLOT_ID}/0000000003"


def test_every_bit_changed_on_purpose_is_refused() -> None:
    """With the checksum made right again: only the seal is left to notice."""
    created = slot()[1]
    for flipped in flips(sealed()[:-4]):
        whole = flipped + xxhash.xxh32_digest(flipped)[::-1]
        with pytest.raises((CorruptionError, UnsupportedVersion)):
            open_generation(whole, generation=3, slot=created, keys=KEYS)


def test_every_truncated_or_extended_generation_is_damage() -> None:
    created = slot()[1]
    data = sealed()
    for changed in [*(data[:size] for size in range(len(data))), data + b"\0"]:
        with pytest.raises(ChecksumMismatch):
            open_generation(changed, generation=3, slot=created, keys=KEYS)


@pytest.mark.parametrize("changes", [{"generation": 4}, {"basin_id": OTHER_BASIN}, {"slot_id": OTHER_SLOT_ID}])
def test_a_generation_found_elsewhere_is_corrupt(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptionError, match="moved"):
        open_generation(sealed(**changes), generation=3, slot=slot()[1], keys=KEYS)


def test_a_generation_planted_by_somebody_without_the_id_key_is_refused() -> None:
    planted = sealed(id_key=bytes(32))
    with pytest.raises(AuthenticationFailed) as caught:
        open_generation(planted, generation=3, slot=slot()[1], keys=KEYS)
    assert caught.value.object == f"keys/{SLOT_ID}/0000000003"


def test_a_generation_sealed_to_another_slot_is_refused() -> None:
    with pytest.raises(AuthenticationFailed):
        open_generation(sealed(public_key=public_key_of(SALT * 2)), generation=3, slot=slot()[1], keys=KEYS)


def test_points_of_small_order_are_refused_on_both_sides() -> None:
    with pytest.raises(InvalidArgument):
        sealed(public_key=bytes(32))
    body = bytearray(sealed()[:-4])
    body[40:72] = bytes(32)
    planted = bytes(body) + xxhash.xxh32_digest(bytes(body))[::-1]
    with pytest.raises(AuthenticationFailed):
        open_generation(planted, generation=3, slot=slot()[1], keys=KEYS)


def test_a_newer_generation_file_asks_for_an_upgrade() -> None:
    body = bytearray(sealed()[:-4])
    body[8] = 2
    with pytest.raises(UnsupportedVersion) as caught:
        open_generation(bytes(body) + xxhash.xxh32_digest(bytes(body))[::-1], generation=3, slot=slot()[1], keys=KEYS)
    assert caught.value.version == 2


@pytest.mark.parametrize("generation", [-1, GENERATION_MAX + 1])
def test_generations_out_of_range_are_refused(generation: int) -> None:
    with pytest.raises(InvalidArgument):
        sealed(generation=generation)


def test_the_files_are_pinned() -> None:
    """Whatever changes one of these makes existing basins impossible to open."""
    assert blake3(encode_descriptor(descriptor())).hexdigest(8) == PINNED["descriptor"]
    assert blake3(slot()[0]).hexdigest(8) == PINNED["key-file slot"]
    assert blake3(slot("passphrase")[0]).hexdigest(8) == PINNED["passphrase slot"]
    assert blake3(sealed()).hexdigest(8) == PINNED["generation"]


# --- names, and what shows ------------------------------------------------------------------------------------------


def test_names_of_key_files() -> None:
    assert slot_name(SLOT_ID) == "keys/0123456789abcdef/slot.json"
    assert generation_name(SLOT_ID, 12) == "keys/0123456789abcdef/0000000012"
    assert parse_generation_name("0000000012") == 12
    assert parse_generation_name("4294967295") == GENERATION_MAX
    for text in ("4294967296", "12", "slot.json", "-000000012", "0000000012\n", "٠٠٠٠٠٠٠٠١٢"):
        assert parse_generation_name(text) is None
    assert is_slot_id(SLOT_ID)
    for text in ("", SLOT_ID.upper(), SLOT_ID + "0", SLOT_ID[:15], SLOT_ID + "\n", "../" + SLOT_ID[3:]):
        assert not is_slot_id(text)


def test_nothing_shows_a_secret() -> None:
    passphrase = b"correct horse battery staple"
    data, created = slot("passphrase", passphrase)
    with pytest.raises(WrongSecret) as caught:
        unlock_slot(created, passphrase[::-1])
    shown = repr(created) + repr(KEYS) + data.decode() + "".join(traceback.format_exception(caught.value))
    for hidden in (passphrase, passphrase[::-1], KEYS.private_key, KEYS.id_key, MASTER):
        assert hidden.hex() not in shown
        assert repr(hidden)[2:20] not in shown
