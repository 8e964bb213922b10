"""Descriptor, key slots, sealed generations and the hint: what is wrong with them, and how it is mended.

Invariants:

- A generation is sealed again only to the public half that the log names for the slot, and only if this handle holds
  its master key: a slot that was planted gets nothing.
- A slot is restored only from a copy that has the public half in the log; a secret that is lost is not made up for.
- A slot that the log does not know is left alone: the record that made it valid may be what was lost.

`check` tells of these problems, `repair` carries out what mends them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import xxhash
from blake3 import blake3

from basin.engine.hints import HINT_NAME, hint_of, read_hint, write_hint
from basin.engine.keyring import SlotInfo, list_slots
from basin.engine.log import CHECKPOINT_FOLDER
from basin.errors import CorruptionError, ObjectMissing, UnsupportedVersion
from basin.format.document import DOCUMENT_SIZE_MAX
from basin.format.layout import HINT_SIZE_MAX
from basin.format.slots import (
    DESCRIPTOR_NAME,
    GENERATION_HEADER,
    GENERATION_HEADER_SIZE,
    GENERATION_MAGIC,
    GENERATION_SIZE,
    decode_slot,
    generation_name,
    slot_name,
)
from basin.storage.protocol import Storage
from basin.storage.tiered import TieredStorage

if TYPE_CHECKING:
    from basin.engine.core import Core

_DESCRIPTOR_SIZE_MAX: Final = 1 << 20
_CHECKSUM_SIZE: Final = 4
_Mend = Callable[[], bool]


class KeyProblem(NamedTuple):
    """What is wrong with one file. `mend` carries out what `remedy` says, where anything can be done."""

    kind: str
    severity: str
    object: str
    detail: str
    readable: str
    remedy: str
    mend: _Mend | None = None


def key_problems(core: Core) -> Iterator[KeyProblem]:
    """All of them. Cost: a small read for the descriptor, for every slot and for every generation of it."""
    yield from _descriptor_problems(core)
    if core.keyring.profile != "open":
        slots = list(list_slots(core.storage, core.keyring.basin_id))
        yield from _slot_problems(core, slots)
        yield from _generation_problems(core, slots)
    yield from _hint_problems(core)


def _replace(storage: Storage, name: str, data: bytes) -> bool:
    """Put other bytes under a name. A kill in between leaves none, which is mended the same way."""
    storage.delete(name)
    storage.put_if_absent(name, data)
    return True


# --- descriptor -------------------------------------------------------------------------------------------------------


def _descriptor_problems(core: Core) -> Iterator[KeyProblem]:
    """`basin.json`, and the copy of it beside contents that have a root of their own."""
    storage = core.storage
    roots = [storage.hot, storage.cold] if isinstance(storage, TieredStorage) else [storage]
    stored = [_descriptor_in(root, core.keyring.descriptor_hash) for root in roots]
    whole = next((data for data in stored if data), b"")
    for root, data in zip(roots, stored, strict=True):
        if not data:
            name = DESCRIPTOR_NAME if root is roots[0] else f"{root.url}/{DESCRIPTOR_NAME}"
            yield KeyProblem(
                "descriptor",
                "damage",
                name,
                f"{name} is not the descriptor that this basin was opened with",
                "all, by handles that are open; a new one does not open" if root is roots[0] else "all",
                "write it again from the other copy" if whole else "restore it from a copy",
                partial(_replace, root, DESCRIPTOR_NAME, whole) if whole else None,
            )


def _descriptor_in(root: Storage, digest: bytes) -> bytes:
    """The descriptor below a root; empty if it is gone or another one."""
    try:
        data = root.read_file(DESCRIPTOR_NAME, _DESCRIPTOR_SIZE_MAX)
    except ObjectMissing:
        return b""
    return data if blake3(data).digest() == digest else b""


# --- slots ------------------------------------------------------------------------------------------------------------


def _slot_problems(core: Core, slots: list[SlotInfo]) -> Iterator[KeyProblem]:
    known = core.state.slots
    for slot in slots:
        name = slot_name(slot.slot_id)
        if slot.problem is not None:
            yield _lost_slot(core, slot.slot_id, str(slot.problem))
        elif slot.slot_id not in known:
            yield KeyProblem(
                "slot",
                "warning",
                name,
                "this key slot is not in the log: a leftover, or planted; it gets no new keys",
                "",
                f"delete {name.rpartition('/')[0]}/ if nobody knows the secret of it",
            )
    if known:
        for slot_id in sorted(known.keys() - {slot.slot_id for slot in slots}):
            yield _lost_slot(core, slot_id, f"{slot_name(slot_id)} is gone")


def _lost_slot(core: Core, slot_id: str, detail: str) -> KeyProblem:
    copy = _hinted(core, slot_name(slot_id))
    is_whole = copy is not None and _has_public_key(core, slot_id, copy)
    return KeyProblem(
        "slot",
        "damage",
        slot_name(slot_id),
        detail,
        "everything, with another secret",
        "write it again from the copy in the hint"
        if is_whole
        else "restore it from a copy, or remove the slot and add its secret again: its secret opens nothing now",
        partial(_replace, core.storage, slot_name(slot_id), copy) if copy is not None and is_whole else None,
    )


def _hinted(core: Core, name: str) -> bytes | None:
    """The copy of a file of a slot that the hint of a bucket holds."""
    if not core.is_remote:
        return None
    hint = read_hint(core.storage)
    return None if hint is None else hint.keys.get(name)


def _has_public_key(core: Core, slot_id: str, data: bytes) -> bool:
    with contextlib.suppress(CorruptionError, UnsupportedVersion):
        slot = decode_slot(data[: DOCUMENT_SIZE_MAX + 1], slot_id)
        return slot.basin_id == core.keyring.basin_id and core.state.slots.get(slot_id) == slot.public_key
    return False


# --- generations ------------------------------------------------------------------------------------------------------


def _generation_problems(core: Core, slots: list[SlotInfo]) -> Iterator[KeyProblem]:
    """Every valid slot has every generation that something is sealed under; what else is damaged of the own slot."""
    state, keyring = core.state, core.keyring
    needed = {known.added.generation for known in state.strata.values()} | {state.generation}
    needed -= state.generations_dropped
    told = set()
    for slot in slots:
        if slot.problem is not None or slot.slot_id not in state.slots:
            continue
        for generation in sorted(needed):
            name = generation_name(slot.slot_id, generation)
            problem = _sealed_problem(core, slot.slot_id, generation)
            if problem:
                told.add(name)
                yield _lost_generation(core, slot.slot_id, generation, problem)
    for generation, error in keyring.problems().items():
        name = str(error.fields.get("object", "keys"))
        if name not in told:
            readable = f"all but generation {generation}"
            yield KeyProblem("generation", "damage", name, str(error), readable, "restore it from a copy")


def _sealed_problem(core: Core, slot_id: str, generation: int) -> str:
    """What is wrong with a sealed generation, as far as it shows without the slot's secret; empty if nothing is."""
    name = generation_name(slot_id, generation)
    try:
        data = core.storage.read_file(name, GENERATION_SIZE + 1)
    except ObjectMissing:
        return f"{name} is gone"
    if len(data) != GENERATION_SIZE or not data.startswith(GENERATION_MAGIC):
        return f"{name} is damaged"
    if xxhash.xxh32_digest(data[:-_CHECKSUM_SIZE])[::-1] != data[-_CHECKSUM_SIZE:]:
        return f"{name} is damaged"
    _, _, _, stated, basin_id, slot, _ = GENERATION_HEADER.unpack(data[:GENERATION_HEADER_SIZE])
    if (stated, basin_id, slot) != (generation, core.keyring.basin_id, bytes.fromhex(slot_id)):
        return f"{name} belongs to another basin, slot or generation"
    own = core.keyring.slot
    error = core.keyring.problems().get(generation)
    return str(error) if own is not None and own.slot_id == slot_id and error is not None else ""


def _lost_generation(core: Core, slot_id: str, generation: int, detail: str) -> KeyProblem:
    own = core.keyring.slot
    is_own = own is not None and own.slot_id == slot_id
    is_held = generation in core.keyring.generations()
    return KeyProblem(
        "generation",
        "damage",
        generation_name(slot_id, generation),
        detail,
        f"all but generation {generation}" if is_own and not is_held else "everything, with another secret",
        "seal it to the slot again" if is_held else "repair with a secret that opens this generation",
        partial(_seal_again, core, slot_id, generation) if is_held else None,
    )


def _seal_again(core: Core, slot_id: str, generation: int) -> bool:
    public_key = core.state.slots.get(slot_id)
    if public_key is None or generation in core.state.generations_dropped:
        return False
    sealed = core.keyring.seal_to(slot_id, public_key, generation, core.keyring.master(generation))
    _replace(core.storage, generation_name(slot_id, generation), sealed)
    write_hint(core, keys_changed=True)
    return True


# --- the hint of a bucket ---------------------------------------------------------------------------------------------


def _hint_problems(core: Core) -> Iterator[KeyProblem]:
    if not core.is_remote:
        return
    with contextlib.suppress(ObjectMissing):
        if hint_of(core.storage.read_file(HINT_NAME, HINT_SIZE_MAX)) is not None:
            return
        yield KeyProblem("hint", "warning", HINT_NAME, "the hint is damaged: whoever opens looks for itself", "all", "")


def hint_is_behind(core: Core) -> bool:
    """Whether a bucket has no hint that is whole, or one that names an older checkpoint than there is.

    Without any checkpoint a lost hint is no loss: whoever opens to write leaves one. A read and a list.
    """
    if not core.is_remote:
        return False
    body = b""
    with contextlib.suppress(ObjectMissing):
        body = core.storage.read_file(HINT_NAME, HINT_SIZE_MAX)
    hint = hint_of(body)
    newest = max([int(name) for name in core.storage.list(CHECKPOINT_FOLDER) if name.isdigit()], default=0)
    return newest > hint.checkpoint if hint is not None else bool(body or newest)


def newest_checkpoint(core: Core) -> int:
    """The position of the newest checkpoint that can be read; 0: there is none."""
    for name in reversed(core.storage.list(CHECKPOINT_FOLDER)):
        with contextlib.suppress(CorruptionError, ObjectMissing, ValueError, UnsupportedVersion):
            return core.read_checkpoint(name).position
    return 0


def write_hint_again(core: Core) -> bool:
    """A hint that names the newest checkpoint, and all key files."""
    write_hint(core, checkpoint=newest_checkpoint(core), keys_changed=True)
    return not hint_is_behind(core)
