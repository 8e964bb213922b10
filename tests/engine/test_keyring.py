"""Keyrings: creating, unlocking, slots, generations; wrong secrets told from damage; what was planted is not used."""

from __future__ import annotations

import copy
import json
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from basin.engine import keyring as keyring_module
from basin.engine.keyring import (
    Keyring,
    add_slot,
    create_basin_keys,
    delete_generation_files,
    delete_slot_files,
    list_slots,
    remove_slot,
    rotate,
    unlock,
)
from basin.engine.secret import Secret
from basin.errors import (
    AuthenticationFailed,
    ChecksumMismatch,
    Conflict,
    CorruptionError,
    InvalidArgument,
    NotABasin,
    SecretRequired,
    UnsupportedVersion,
    WrongSecret,
)
from basin.format.crypto import derive_log_key, derive_stratum_keys, open_stratum_keys
from basin.format.slots import (
    Descriptor,
    PassphraseCost,
    SlotKeys,
    create_slot,
    descriptor_hash,
    encode_descriptor,
    generation_name,
    seal_generation,
    slot_name,
)
from basin.storage.local import LocalStorage

BASIN = bytes(range(16))
CHEAP = PassphraseCost(memory_kib=64, passes=1, lanes=2)
DESCRIPTOR = encode_descriptor(Descriptor(1, BASIN, "encrypted", "fixed", 7, {}))
OPEN_DESCRIPTOR = encode_descriptor(Descriptor(1, BASIN, "open", "fixed", 7, {}))
SECRET = Secret.generate()
PASSPHRASE = Secret.from_passphrase("correct horse")
STRATUM = bytes(range(16))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "basin"


@pytest.fixture
def storage(folder: Path) -> Iterator[LocalStorage]:
    storage = LocalStorage(folder, create=True)
    yield storage
    storage.close()


@pytest.fixture
def keyring(storage: LocalStorage) -> Keyring:
    return create_basin_keys(storage, DESCRIPTOR, SECRET)


def own_slot(keyring: Keyring) -> str:
    assert keyring.slot is not None
    return keyring.slot.slot_id


def valid_slots(storage: LocalStorage) -> dict[str, bytes]:
    return {slot.slot_id: slot.public_key for slot in list_slots(storage, BASIN)}


def flip(path: Path, offset: int = 60) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


# --- creating and unlocking -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [SECRET, PASSPHRASE], ids=["key-file", "passphrase"])
def test_what_is_created_unlocks(storage: LocalStorage, secret: Secret) -> None:
    created = create_basin_keys(storage, DESCRIPTOR, secret, cost=CHEAP)
    unlocked, slot_id = unlock(storage, DESCRIPTOR, secret)
    assert slot_id == own_slot(created) == own_slot(unlocked)
    assert unlocked.master(0) == created.master(0)
    assert unlocked.grain_keys.grain_key(bytes(32)) == created.grain_keys.grain_key(bytes(32)) != bytes(32)
    assert (unlocked.basin_id, unlocked.profile, unlocked.generation) == (BASIN, "encrypted", 0)
    assert unlocked.descriptor_hash == descriptor_hash(DESCRIPTOR)


def test_two_basins_of_one_secret_share_no_key(tmp_path: Path) -> None:
    keyrings = [create_basin_keys(LocalStorage(tmp_path / name, create=True), DESCRIPTOR, SECRET) for name in "ab"]
    assert len({keyring.master(0) for keyring in keyrings}) == 2
    assert len({keyring.grain_keys.grain_key(bytes(32)) for keyring in keyrings}) == 2
    assert len({own_slot(keyring) for keyring in keyrings}) == 2


def test_keys_are_derived_with_the_hash_of_the_descriptor(keyring: Keyring, storage: LocalStorage) -> None:
    digest = descriptor_hash(DESCRIPTOR)
    assert keyring.log_key(0) == derive_log_key(keyring.master(0), digest)
    assert keyring.log_keys == {0: keyring.log_key(0)}
    derived = derive_stratum_keys(keyring.master(0), bytes(32), digest, STRATUM, 2)
    assert keyring.stratum_keys(0, bytes(32), STRATUM, 2) == derived
    other = encode_descriptor(Descriptor(1, BASIN, "encrypted", "other", 7, {}))
    changed, _ = unlock(storage, other, SECRET)
    assert changed.master(0) == keyring.master(0)
    assert changed.log_key(0) != keyring.log_key(0)
    assert changed.stratum_keys(0, bytes(32), STRATUM, 2).commitment != derived.commitment


def test_an_open_basin_has_no_keys(storage: LocalStorage) -> None:
    created = create_basin_keys(storage, OPEN_DESCRIPTOR, None)
    unlocked, slot_id = unlock(storage, OPEN_DESCRIPTOR, None)
    assert slot_id is None
    assert storage.list_folders("keys") == []
    for keyring in (created, unlocked):
        assert (keyring.profile, keyring.generation, keyring.log_keys, keyring.slot) == ("open", 0, None, None)
        assert keyring.grain_keys.grain_key(bytes(range(32))) == bytes(range(32))
        expected = open_stratum_keys(descriptor_hash(OPEN_DESCRIPTOR), STRATUM, 1)
        assert keyring.stratum_keys(0, bytes(32), STRATUM, 1) == expected
        keyring.reload()
        keyring.select_generation(0)
        assert keyring.generations() == []


def test_the_profiles_never_mix(storage: LocalStorage) -> None:
    for use in (create_basin_keys, unlock):
        with pytest.raises(InvalidArgument, match="open"):
            use(storage, OPEN_DESCRIPTOR, SECRET)
        with pytest.raises(SecretRequired):
            use(storage, DESCRIPTOR, None)
    open_keyring = Keyring.open_profile(basin_id=BASIN, descriptor_hash=bytes(32))
    with pytest.raises(InvalidArgument):
        add_slot(storage, open_keyring, SECRET)
    with pytest.raises(InvalidArgument):
        rotate(storage, open_keyring, {})
    assert storage.list_folders("keys") == []


def test_what_is_no_descriptor_opens_nothing(storage: LocalStorage) -> None:
    with pytest.raises(NotABasin):
        unlock(storage, b"", SECRET)
    with pytest.raises(ChecksumMismatch):
        unlock(storage, DESCRIPTOR.replace(b"encrypted", b"open"), None)


# --- wrong, damaged, foreign ----------------------------------------------------------------------------------------


def test_another_secret_is_wrong(storage: LocalStorage, keyring: Keyring) -> None:
    with pytest.raises(WrongSecret) as caught:
        unlock(storage, DESCRIPTOR, Secret.generate())
    assert caught.value.refused == 1
    with pytest.raises(WrongSecret, match="passphrase"):
        unlock(storage, DESCRIPTOR, PASSPHRASE)


def test_a_damaged_slot_is_not_a_wrong_secret(storage: LocalStorage, keyring: Keyring, folder: Path) -> None:
    name = slot_name(own_slot(keyring))
    flip(folder / name)
    with pytest.raises(ChecksumMismatch) as caught:
        unlock(storage, DESCRIPTOR, SECRET)
    assert caught.value.object == name


def test_a_damaged_slot_does_not_keep_another_from_opening(
    storage: LocalStorage, keyring: Keyring, folder: Path
) -> None:
    for _ in range(4):
        add_slot(storage, keyring, Secret.generate())
    for slot in list_slots(storage, BASIN):
        if slot.slot_id != own_slot(keyring):
            flip(folder / slot_name(slot.slot_id))
    assert unlock(storage, DESCRIPTOR, SECRET)[1] == own_slot(keyring)
    with pytest.raises(WrongSecret) as caught:
        unlock(storage, DESCRIPTOR, Secret.generate())
    assert len(caught.value.damaged) == 4
    assert all(name in str(caught.value) for name in caught.value.damaged)


def test_damage_behind_a_slot_that_accepts_the_secret_is_the_reason(
    storage: LocalStorage, keyring: Keyring, folder: Path
) -> None:
    add_slot(storage, keyring, Secret.generate())
    name = generation_name(own_slot(keyring), 0)
    flip(folder / name)
    with pytest.raises(ChecksumMismatch) as caught:
        unlock(storage, DESCRIPTOR, SECRET)
    assert caught.value.object == name
    (folder / name).unlink()
    with pytest.raises(CorruptionError) as gone:
        unlock(storage, DESCRIPTOR, SECRET)
    assert gone.value.object == name


def test_lost_slots_are_damage(storage: LocalStorage, keyring: Keyring) -> None:
    delete_slot_files(storage, own_slot(keyring))
    with pytest.raises(CorruptionError) as caught:
        unlock(storage, DESCRIPTOR, SECRET)
    assert caught.value.object == "keys"


def test_slots_of_another_basin_are_ignored(storage: LocalStorage, keyring: Keyring) -> None:
    """Two creators race: both wrote a slot, one descriptor won."""
    loser = encode_descriptor(Descriptor(1, bytes(16), "encrypted", "fixed", 7, {}))
    create_basin_keys(storage, loser, SECRET)
    assert [slot.slot_id for slot in list_slots(storage, BASIN)] == [own_slot(keyring)]
    assert unlock(storage, DESCRIPTOR, SECRET)[0].master(0) == keyring.master(0)
    with pytest.raises(InvalidArgument, match="last"):
        remove_slot(storage, BASIN, own_slot(keyring))


def test_unfinished_and_strange_entries_are_ignored(storage: LocalStorage, keyring: Keyring, folder: Path) -> None:
    (folder / "keys" / "0000000000000000").mkdir()
    (folder / "keys" / "0000000000000000" / "0000000000").write_bytes(b"left behind")
    (folder / "keys" / "not-a-slot").mkdir()
    (folder / "keys" / "a-file").write_bytes(b"")
    (folder / "keys" / own_slot(keyring) / "notes.txt").write_bytes(b"")
    assert unlock(storage, DESCRIPTOR, SECRET)[1] == own_slot(keyring)
    assert len(list_slots(storage, BASIN)) == 1


def test_swapped_slot_files_are_damage(storage: LocalStorage, keyring: Keyring, folder: Path) -> None:
    other_id, _ = add_slot(storage, keyring, Secret.generate())
    mine, other = folder / slot_name(own_slot(keyring)), folder / slot_name(other_id)
    first, second = mine.read_bytes(), other.read_bytes()
    mine.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(CorruptionError, match="moved"):
        unlock(storage, DESCRIPTOR, SECRET)
    assert all(isinstance(slot.problem, CorruptionError) for slot in list_slots(storage, BASIN))


def test_every_flipped_bit_of_the_key_files_is_reported(storage: LocalStorage, keyring: Keyring, folder: Path) -> None:
    for path in sorted((folder / "keys").rglob("*")):
        if path.is_dir():
            continue
        data = path.read_bytes()
        for offset in range(len(data)):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << offset % 8
            path.write_bytes(bytes(flipped))
            with pytest.raises(CorruptionError) as caught:
                unlock(storage, DESCRIPTOR, SECRET)
            assert caught.value.object == path.relative_to(folder).as_posix()
        path.write_bytes(data)
    unlock(storage, DESCRIPTOR, SECRET)


def test_a_newer_slot_asks_for_an_upgrade(storage: LocalStorage, keyring: Keyring, folder: Path) -> None:
    path = folder / slot_name(own_slot(keyring))
    fields = json.loads(path.read_bytes()) | {"version": 2}
    del fields["checksum"]
    checksum = blake3((json.dumps(fields, sort_keys=True, indent=2) + "\n").encode()).hexdigest()
    path.write_text(json.dumps({**fields, "checksum": checksum}, sort_keys=True, indent=2) + "\n")
    with pytest.raises(UnsupportedVersion) as caught:
        unlock(storage, DESCRIPTOR, SECRET)
    assert caught.value.version == 2


# --- slots ----------------------------------------------------------------------------------------------------------


def test_an_added_secret_opens_everything(storage: LocalStorage, keyring: Keyring) -> None:
    rotate(storage, keyring, valid_slots(storage))
    slot_id, public_key = add_slot(storage, keyring, PASSPHRASE, cost=CHEAP)
    unlocked, opened_by = unlock(storage, DESCRIPTOR, PASSPHRASE)
    assert opened_by == slot_id
    assert unlocked.generations() == [0, 1]
    assert [unlocked.master(0), unlocked.master(1)] == [keyring.master(0), keyring.master(1)]
    assert unlocked.grain_keys.grain_key(bytes(32)) == keyring.grain_keys.grain_key(bytes(32))
    listed = {slot.slot_id: slot for slot in list_slots(storage, BASIN)}[slot_id]
    assert (listed.kind, listed.public_key, listed.generations) == ("passphrase", public_key, (0, 1))
    assert listed.created_ms > 1_700_000_000_000


def test_a_removed_secret_opens_nothing_and_the_last_one_stays(storage: LocalStorage, keyring: Keyring) -> None:
    other = Secret.generate()
    other_id, _ = add_slot(storage, keyring, other)
    remove_slot(storage, BASIN, own_slot(keyring))
    with pytest.raises(WrongSecret):
        unlock(storage, DESCRIPTOR, SECRET)
    assert storage.list(f"keys/{own_slot(keyring)}") == []
    for slot_id, reason in ((other_id, "last"), (own_slot(keyring), "no key slot"), ("../keys", "no key slot")):
        with pytest.raises(InvalidArgument, match=reason):
            remove_slot(storage, BASIN, slot_id)
    assert unlock(storage, DESCRIPTOR, other)[1] == other_id


def test_a_damaged_slot_does_not_count_as_another_one(storage: LocalStorage, keyring: Keyring, folder: Path) -> None:
    other_id, _ = add_slot(storage, keyring, Secret.generate())
    flip(folder / slot_name(other_id))
    with pytest.raises(InvalidArgument, match="last"):
        remove_slot(storage, BASIN, own_slot(keyring))
    remove_slot(storage, BASIN, other_id)
    assert unlock(storage, DESCRIPTOR, SECRET)[1] == own_slot(keyring)


# --- generations ----------------------------------------------------------------------------------------------------


def test_rotation_seals_to_valid_slots_only(storage: LocalStorage, keyring: Keyring) -> None:
    other = Secret.generate()
    other_id, _ = add_slot(storage, keyring, other)
    valid = {own_slot(keyring): valid_slots(storage)[own_slot(keyring)]}
    assert rotate(storage, keyring, valid) == 1
    assert keyring.generation == 0
    keyring.select_generation(1)
    assert keyring.generation == 1
    left_out, _ = unlock(storage, DESCRIPTOR, other)
    assert left_out.generations() == [0]
    with pytest.raises(WrongSecret) as caught:
        left_out.master(1)
    assert (caught.value.generation, caught.value.slot_id) == (1, other_id)
    for ask in (left_out.log_key, left_out.select_generation):
        with pytest.raises(WrongSecret):
            ask(1)
    with pytest.raises(WrongSecret):
        left_out.stratum_keys(1, bytes(32), STRATUM, 1)


def test_generations_differ_and_the_id_key_stays(storage: LocalStorage, keyring: Keyring) -> None:
    before = keyring.grain_keys.grain_key(bytes(32))
    assert [rotate(storage, keyring, valid_slots(storage)) for _ in range(3)] == [1, 2, 3]
    unlocked, _ = unlock(storage, DESCRIPTOR, SECRET)
    assert unlocked.generation == 3
    assert len({unlocked.master(generation) for generation in range(4)}) == 4
    assert len({unlocked.log_key(generation) for generation in range(4)}) == 4
    assert unlocked.grain_keys.grain_key(bytes(32)) == before


def test_an_open_handle_finds_generations_that_others_made_when_it_meets_them(
    storage: LocalStorage, keyring: Keyring
) -> None:
    mine, _ = unlock(storage, DESCRIPTOR, SECRET)
    assert mine.log_keys is not None
    assert mine.log_keys.get(1) is None
    for _ in range(3):
        rotate(storage, keyring, valid_slots(storage))
    assert mine.generations() == [0]
    assert mine.log_keys[1] == keyring.log_key(1)
    assert mine.master(2) == keyring.master(2)
    assert dict(mine.log_keys) == {generation: keyring.log_key(generation) for generation in range(4)}
    assert len(mine.log_keys) == 4
    assert mine.generation == 0
    mine.select_generation(3)
    assert mine.generation == 3
    assert mine.log_keys.get(4) is None


def test_a_handle_that_others_left_out_of_a_rotation_is_told(storage: LocalStorage, keyring: Keyring) -> None:
    other = Secret.generate()
    other_id, public_key = add_slot(storage, keyring, other)
    second, _ = unlock(storage, DESCRIPTOR, other)
    rotate(storage, second, {other_id: public_key})
    with pytest.raises(WrongSecret, match="generation 1"):
        keyring.select_generation(1)
    assert keyring.generation == 0


def test_a_new_slot_gets_no_dropped_generation(storage: LocalStorage, keyring: Keyring) -> None:
    rotate(storage, keyring, valid_slots(storage))
    slot_id, _ = add_slot(storage, keyring, Secret.generate(), dropped={0})
    assert storage.list(f"keys/{slot_id}") == ["0000000001", "slot.json"]


def test_keys_of_a_generation_are_deleted_from_every_slot_of_this_basin(
    storage: LocalStorage, keyring: Keyring, folder: Path
) -> None:
    damaged, _ = add_slot(storage, keyring, Secret.generate())
    removed, _ = add_slot(storage, keyring, Secret.generate())
    foreign = create_basin_keys(
        storage, encode_descriptor(Descriptor(1, bytes(16), "encrypted", "fixed", 7, {})), SECRET
    )
    rotate(storage, keyring, valid_slots(storage))
    flip(folder / slot_name(damaged))
    storage.delete(slot_name(removed))
    assert delete_generation_files(storage, BASIN, {0}) == 3
    assert storage.list(f"keys/{own_slot(foreign)}") == ["0000000000", "slot.json"]
    for slot_id in (own_slot(keyring), damaged):
        assert storage.list(f"keys/{slot_id}") == ["0000000001", "slot.json"]
    assert storage.list(f"keys/{removed}") == ["0000000001"]
    assert delete_generation_files(storage, BASIN, {0}) == 0
    unlocked, _ = unlock(storage, DESCRIPTOR, SECRET)
    assert unlocked.generations() == [1]
    with pytest.raises(WrongSecret, match="dropped"):
        unlocked.master(0)


def test_a_generation_that_goes_while_a_keyring_looks_is_no_damage(
    storage: LocalStorage, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotate(storage, keyring, valid_slots(storage))
    storage.delete(generation_name(own_slot(keyring), 0))
    monkeypatch.setattr(keyring_module, "_stored_generations", lambda *_: [0, 1])
    unlocked, _ = unlock(storage, DESCRIPTOR, SECRET)
    assert (unlocked.generations(), dict(unlocked.problems())) == ([1], {})


def test_generations_come_to_an_end(storage: LocalStorage, keyring: Keyring) -> None:
    storage.put_if_absent(generation_name(own_slot(keyring), 2**32 - 1), b"")
    with pytest.raises(InvalidArgument, match="no more"):
        rotate(storage, keyring, valid_slots(storage))


def test_the_number_of_a_rotation_that_broke_off_is_not_given_out_again(
    storage: LocalStorage, keyring: Keyring
) -> None:
    other = Secret.generate()
    add_slot(storage, keyring, other)
    left_behind = keyring.seal_to(own_slot(keyring), valid_slots(storage)[own_slot(keyring)], 1, bytes(32))
    storage.put_if_absent(generation_name(own_slot(keyring), 1), left_behind)
    second, _ = unlock(storage, DESCRIPTOR, other)
    assert rotate(storage, second, valid_slots(storage)) == 2
    first, _ = unlock(storage, DESCRIPTOR, SECRET)
    assert first.master(2) == second.master(2)


def test_rotations_at_the_same_time_do_not_mix(
    storage: LocalStorage, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both choose a number before either writes: the second finds it taken and takes the next."""
    other = Secret.generate()
    add_slot(storage, keyring, other)
    valid = valid_slots(storage)
    second, _ = unlock(storage, DESCRIPTOR, other)
    choose = keyring_module._unused_generation
    monkeypatch.setattr(keyring_module, "_unused_generation", lambda *_: 1)
    assert rotate(storage, keyring, valid) == 1
    choices = iter([1])
    monkeypatch.setattr(
        keyring_module, "_unused_generation", lambda *arguments: next(choices, None) or choose(*arguments)
    )
    assert rotate(storage, second, valid) == 2
    for secret in (SECRET, other):
        unlocked, _ = unlock(storage, DESCRIPTOR, secret)
        assert (unlocked.master(1), unlocked.master(2)) == (keyring.master(1), second.master(2))
    monkeypatch.setattr(keyring_module, "_unused_generation", lambda *_: 1)
    with pytest.raises(Conflict):
        rotate(storage, keyring, valid)


def test_only_a_valid_slot_rotates(storage: LocalStorage, keyring: Keyring) -> None:
    other_id, public_key = add_slot(storage, keyring, Secret.generate())
    with pytest.raises(InvalidArgument):
        rotate(storage, keyring, {other_id: public_key})
    with pytest.raises(InvalidArgument, match="public key"):
        rotate(storage, keyring, valid_slots(storage) | {"0" * 16: bytes(32)})


def test_a_damaged_generation_leaves_the_others_readable(storage: LocalStorage, keyring: Keyring, folder: Path) -> None:
    for _ in range(2):
        rotate(storage, keyring, valid_slots(storage))
    name = generation_name(own_slot(keyring), 1)
    flip(folder / name)
    unlocked, _ = unlock(storage, DESCRIPTOR, SECRET)
    assert unlocked.generations() == [0, 2]
    assert list(unlocked.problems()) == [1]
    with pytest.raises(ChecksumMismatch) as caught:
        unlocked.master(1)
    assert caught.value.object == name
    flip(folder / name)
    assert unlocked.master(1) == keyring.master(1)
    assert not unlocked.problems()


def test_a_planted_generation_is_never_used(storage: LocalStorage, keyring: Keyring) -> None:
    """Anybody can seal to a public half; only holders of the basin know the id key that must enter the seal."""
    assert keyring.slot is not None
    planted = seal_generation(
        bytes(32),
        generation=9,
        basin_id=BASIN,
        slot_id=keyring.slot.slot_id,
        public_key=keyring.slot.public_key,
        id_key=bytes(32),
        ephemeral_private_key=bytes(range(32)),
    )
    storage.put_if_absent(generation_name(keyring.slot.slot_id, 9), planted)
    unlocked, _ = unlock(storage, DESCRIPTOR, SECRET)
    assert unlocked.generation == 0
    with pytest.raises(AuthenticationFailed):
        unlocked.master(9)


def test_a_planted_slot_gets_no_generation(storage: LocalStorage, keyring: Keyring) -> None:
    keys = SlotKeys(bytes(range(32)), bytes(32))
    planted, _ = create_slot(
        bytes(32), kind="key-file", basin_id=BASIN, slot_id="f" * 16, keys=keys, salt=bytes(16), created_ms=0
    )
    valid = valid_slots(storage)
    storage.put_if_absent(slot_name("f" * 16), planted)
    rotate(storage, keyring, valid)
    assert storage.list("keys/" + "f" * 16) == ["slot.json"]


# --- nothing shows --------------------------------------------------------------------------------------------------


def test_a_keyring_does_not_show_and_is_not_pickled(storage: LocalStorage, keyring: Keyring) -> None:
    shown = repr(keyring) + repr(keyring.slot) + repr(list_slots(storage, BASIN))
    for hidden in (keyring.master(0), keyring.log_key(0), SECRET.material()):
        assert hidden.hex() not in shown
        assert repr(hidden)[2:20] not in shown
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="ticket"):
            pickle.dumps(keyring, protocol)
    with pytest.raises(TypeError):
        copy.deepcopy(keyring)


def test_a_refused_passphrase_is_not_in_the_traceback(storage: LocalStorage) -> None:
    create_basin_keys(storage, DESCRIPTOR, PASSPHRASE, cost=CHEAP)
    wrong = Secret.from_passphrase("-".join(["swordfish", str(42)]))
    with pytest.raises(WrongSecret) as caught:
        unlock(storage, DESCRIPTOR, wrong)
    assert "swordfish-42" not in "".join(traceback.format_exception(caught.value))
    assert "swordfish-42" not in str(caught.value.fields)
    assert caught.value.__context__ is None
