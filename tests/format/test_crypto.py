"""Derivations, the grain-key permutation, sealing and page tags, against published vectors and against misuse."""

from __future__ import annotations

import copy
import hashlib
import hmac
import pickle
import random
import sys
import threading
import traceback

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import AuthenticationFailed, InvalidArgument
from basin.format.crypto import (
    COMMITMENT_SIZE,
    Cipher,
    GrainKeyMap,
    MasterKey,
    StratumKeys,
    derive_log_key,
    derive_record_key,
    derive_stratum_keys,
    nonce_of_offset,
    open_stratum_keys,
    page_tag,
)

MASTER = bytes(range(32))
MATERIAL = bytes(range(32, 64))
DESCRIPTOR = bytes(range(64, 96))
STRATUM = bytes(range(96, 112))
PINNED = {
    "stratum": "f105f0333a515d5dfc7fbed039f0db1a",
    "open stratum": "8ac39a3abdc3408d9713ecbfd09b6e6e",
    "log": "34d330663896e8fe8d3b8508678c0851",
    "record": "bd20d286557dcbf522c7194ab9b4e68f",
    "grain key": "61a6936e4e8f101c1cc1f993b542a0d4",
    "page": "bdb213524a442a8a3aca5eada031c8dd",
}
CONTENT_KEYS = st.binary(min_size=32, max_size=32)


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 from its text, to check ours against."""
    extracted = hmac.digest(salt or bytes(32), secret, hashlib.sha256)
    output = block = b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes((number,)), hashlib.sha256)
        output += block
    return output[:length]


def test_the_reference_hkdf_gives_the_first_vector_of_rfc_5869() -> None:
    output = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert output.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")


def test_stratum_keys_are_hkdf_of_all_that_names_the_stratum() -> None:
    keys = derive_stratum_keys(MASTER, MATERIAL, DESCRIPTOR, STRATUM, 2)
    info = b"basin 1 stratum" + DESCRIPTOR + STRATUM + b"\x02"
    assert keys.cipher_key + keys.commitment + keys.tag_key == hkdf(MASTER, MATERIAL, info, 96)


def test_log_key_is_hkdf_without_salt() -> None:
    assert derive_log_key(MASTER, DESCRIPTOR) == hkdf(MASTER, b"", b"basin 1 log" + DESCRIPTOR, 32)


def test_derivations_are_pinned() -> None:
    """Whatever changes one of these makes existing basins unreadable."""
    keys = derive_stratum_keys(MASTER, MATERIAL, DESCRIPTOR, STRATUM, 1)
    log_key = derive_log_key(MASTER, DESCRIPTOR)
    assert {
        "stratum": blake3(b"".join(keys)).hexdigest(16),
        "open stratum": open_stratum_keys(DESCRIPTOR, STRATUM, 1).tag_key.hex()[:32],
        "log": log_key.hex()[:32],
        "record": derive_record_key(log_key, MATERIAL).hex()[:32],
        "grain key": GrainKeyMap(MASTER).grain_key(MATERIAL).hex()[:32],
        "page": page_tag(MASTER, STRATUM, 7, b"page").hex(),
    } == PINNED


@pytest.mark.parametrize(
    "changed",
    [
        (MATERIAL, MATERIAL, DESCRIPTOR, STRATUM, 1),
        (MASTER, MASTER, DESCRIPTOR, STRATUM, 1),
        (MASTER, MATERIAL, MASTER, STRATUM, 1),
        (MASTER, MATERIAL, DESCRIPTOR, STRATUM[::-1], 1),
        (MASTER, MATERIAL, DESCRIPTOR, STRATUM, 2),
    ],
    ids=["master", "material", "descriptor", "stratum", "kind"],
)
def test_every_input_of_a_derivation_changes_every_key(changed: tuple[bytes, bytes, bytes, bytes, int]) -> None:
    unchanged = derive_stratum_keys(MASTER, MATERIAL, DESCRIPTOR, STRATUM, 1)
    for old, new in zip(unchanged, derive_stratum_keys(*changed), strict=True):
        assert old != new


def test_open_strata_have_no_cipher_key_and_tag_keys_of_their_own() -> None:
    keys = open_stratum_keys(DESCRIPTOR, STRATUM, 1)
    assert keys.cipher_key == b""
    assert keys.commitment == bytes(COMMITMENT_SIZE)
    others = [
        open_stratum_keys(MATERIAL, STRATUM, 1),
        open_stratum_keys(DESCRIPTOR, STRATUM[::-1], 1),
        open_stratum_keys(DESCRIPTOR, STRATUM, 2),
    ]
    assert len({keys.tag_key, *(other.tag_key for other in others)}) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        (MASTER[:31], MATERIAL, DESCRIPTOR, STRATUM, 1),
        (MASTER, MATERIAL + b"x", DESCRIPTOR, STRATUM, 1),
        (MASTER, MATERIAL, b"", STRATUM, 1),
        (MASTER, MATERIAL, DESCRIPTOR, STRATUM[:15], 1),
        (MASTER, MATERIAL, DESCRIPTOR, STRATUM, 256),
        (MASTER, MATERIAL, DESCRIPTOR, STRATUM, -1),
    ],
)
def test_inputs_of_another_size_are_refused(arguments: tuple[bytes, bytes, bytes, bytes, int]) -> None:
    with pytest.raises(InvalidArgument):
        derive_stratum_keys(*arguments)


def test_record_keys_differ_by_randomness_and_by_log_key() -> None:
    keys = {
        derive_record_key(log_key, randomness) for log_key in (MASTER, MATERIAL) for randomness in (MASTER, MATERIAL)
    }
    assert len(keys) == 4


# --- grain keys -----------------------------------------------------------------------------------------------------


def test_grain_key_is_aes_256_of_each_block() -> None:
    """Vector: FIPS 197, appendix C.3."""
    plain = bytes.fromhex("00112233445566778899aabbccddeeff")
    encrypted = bytes.fromhex("8ea2b7ca516745bfeafc49904b496089")
    assert GrainKeyMap(MASTER).grain_key(plain + plain) == encrypted + encrypted


@given(st.lists(CONTENT_KEYS, max_size=20), CONTENT_KEYS)
def test_batches_equal_single_calls_and_are_undone(content_keys: list[bytes], id_key: bytes) -> None:
    grain_keys = GrainKeyMap(id_key)
    joined = grain_keys.grain_keys(b"".join(content_keys))
    assert joined == b"".join(grain_keys.grain_key(content_key) for content_key in content_keys)
    assert grain_keys.content_keys(joined) == b"".join(content_keys)
    for index, content_key in enumerate(content_keys):
        assert grain_keys.content_key(joined[32 * index : 32 * index + 32]) == content_key


def test_an_open_basin_shows_content_keys() -> None:
    grain_keys = GrainKeyMap(None)
    assert grain_keys.grain_key(MASTER) == grain_keys.content_key(MASTER) == MASTER
    assert grain_keys.grain_keys(MASTER + MATERIAL) == grain_keys.content_keys(MASTER + MATERIAL) == MASTER + MATERIAL


@pytest.mark.parametrize("id_key", [None, MASTER])
@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_single_keys_of_another_size_are_refused(id_key: bytes | None, size: int) -> None:
    grain_keys = GrainKeyMap(id_key)
    for one in (grain_keys.grain_key, grain_keys.content_key):
        with pytest.raises(InvalidArgument):
            one(bytes(size))


def test_a_refused_batch_does_not_shift_the_next() -> None:
    """A cipher context keeps a rest that fills no block: it must never see one."""
    grain_keys = GrainKeyMap(MASTER)
    expected = grain_keys.grain_key(MATERIAL)
    for many in (grain_keys.grain_keys, grain_keys.content_keys):
        with pytest.raises(InvalidArgument):
            many(bytes(40))
    assert grain_keys.grain_key(MATERIAL) == expected
    assert grain_keys.content_key(expected) == MATERIAL


def test_threads_share_a_map_without_mixing_results() -> None:
    grain_keys = GrainKeyMap(MASTER)
    batches = [random.Random(size).randbytes(32 * size) for size in (1, 50, 4_000)]
    expected = [grain_keys.grain_keys(batch) for batch in batches]
    failures: list[object] = []

    def work() -> None:
        try:
            for turn in range(300):
                chosen = turn % len(batches)
                if grain_keys.grain_keys(batches[chosen]) != expected[chosen]:
                    failures.append(chosen)
                if grain_keys.content_keys(expected[chosen]) != batches[chosen]:
                    failures.append(chosen)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


# --- sealing --------------------------------------------------------------------------------------------------------


def test_sealing_is_aes_256_gcm() -> None:
    """Vector: test case 14 of the GCM submission to NIST."""
    sealed = Cipher(bytes(32)).seal(bytes(12), bytes(16), b"")
    assert sealed.hex() == "cea7403d4d606b6e074ec5d3baf39d18" + "d0d1c8a799996bf0265b98b5d48ab919"


@given(st.binary(max_size=200), st.binary(max_size=50), st.integers(0, 2**64 - 1))
def test_what_is_sealed_opens(plaintext: bytes, associated: bytes, offset: int) -> None:
    cipher = Cipher(MASTER)
    sealed = cipher.seal(nonce_of_offset(offset), plaintext, associated)
    assert len(sealed) == len(plaintext) + 16
    assert cipher.open(nonce_of_offset(offset), sealed, associated) == plaintext


def test_every_changed_bit_is_refused() -> None:
    cipher = Cipher(MASTER)
    nonce, associated = nonce_of_offset(128), b"header"
    sealed = cipher.seal(nonce, b"plain", associated)
    whole = nonce + sealed + associated
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        parts = bytes(flipped[:12]), bytes(flipped[12:-6]), bytes(flipped[-6:])
        with pytest.raises(AuthenticationFailed):
            cipher.open(*parts)


@pytest.mark.parametrize("size", range(21))
def test_truncated_seals_are_refused(size: int) -> None:
    cipher = Cipher(MASTER)
    sealed = cipher.seal(bytes(12), b"plain", b"")
    with pytest.raises(AuthenticationFailed):
        cipher.open(bytes(12), sealed[:size], b"")


def test_nonces_of_distinct_offsets_are_distinct() -> None:
    offsets = [*range(100_000), *(1 << bit for bit in range(64)), 2**64 - 1, 2**32 + 1]
    nonces = {nonce_of_offset(offset) for offset in set(offsets)}
    assert len(nonces) == len(set(offsets))
    assert nonce_of_offset(0x0102) == b"\x02\x01" + bytes(10)


# --- page tags ------------------------------------------------------------------------------------------------------


def test_a_page_tag_belongs_to_one_page_of_one_stratum() -> None:
    assert page_tag(MASTER, STRATUM, 3, b"page") == blake3(
        STRATUM + (3).to_bytes(8, "little") + b"page", key=MASTER
    ).digest(length=16)
    tags = {
        page_tag(MASTER, STRATUM, 3, b"page"),
        page_tag(MATERIAL, STRATUM, 3, b"page"),
        page_tag(MASTER, STRATUM[::-1], 3, b"page"),
        page_tag(MASTER, STRATUM, 4, b"page"),
        page_tag(MASTER, STRATUM, 3, b"pagf"),
    }
    assert len(tags) == 5


# --- nothing shows --------------------------------------------------------------------------------------------------

HOLDERS = [MasterKey(3, MASTER), GrainKeyMap(MASTER), Cipher(MASTER), StratumKeys(MASTER, MATERIAL, MASTER)]


@pytest.mark.parametrize("holder", HOLDERS, ids=lambda holder: type(holder).__name__)
def test_no_holder_of_a_key_shows_it(holder: object) -> None:
    for text in (repr(holder), str(holder), f"{holder}"):
        assert MASTER.hex() not in text
        assert repr(MASTER)[2:20] not in text


@pytest.mark.parametrize("holder", HOLDERS[:3], ids=lambda holder: type(holder).__name__)
def test_holders_of_keys_are_not_pickled_or_copied(holder: object) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(holder, protocol)
    with pytest.raises(TypeError, match="not pickled"):
        copy.deepcopy(holder)


def test_errors_name_the_size_and_not_the_bytes() -> None:
    wrong = b"secret".rjust(40, b"-")
    with pytest.raises(InvalidArgument) as caught:
        MasterKey(0, wrong)
    assert "-secret" not in "".join(traceback.format_exception(caught.value))
