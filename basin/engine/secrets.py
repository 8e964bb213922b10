"""`db.secrets`: the key slots of an encrypted basin.

Which slots are valid is in the log, so that a slot planted in the folder gets no new keys. Invariants: a slot's files
are durable before a record names it; a removed slot leaves the log before its files go; a generation is sealed to
exactly the slots that are valid in the record that names it, and leaves the log before its keys go (see `generations`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from basin.engine.generations import GenerationUse, drop_generations, end_segment, finish_drops, generation_uses
from basin.engine.hints import write_hint
from basin.engine.keyring import add_slot, delete_slot_files, list_slots, remove_slot, rotate
from basin.engine.secret import Secret
from basin.engine.state import State
from basin.errors import Conflict, InvalidArgument
from basin.format.record import Record, Slot

if TYPE_CHECKING:
    from basin.engine.core import Core


class SlotInfo(NamedTuple):
    """One key slot. `kind` is "passphrase" or "key-file"; `valid`: the log names it; `problem`: what is wrong."""

    slot_id: str
    kind: str
    created_ms: int
    generations: tuple[int, ...]
    valid: bool
    current: bool
    problem: str | None


class GenerationInfo(NamedTuple):
    """One generation of the master key that was not dropped. `current`: it is what is written under now.

    `uses` says what needs an older one; nothing: it can be dropped.
    """

    generation: int
    current: bool
    uses: tuple[GenerationUse, ...]


_Infos: TypeAlias = list[GenerationInfo]  # In the class below, `list` is a method.
_Numbers: TypeAlias = list[int]


class Secrets:
    """Lists, adds, removes, rotates and drops. Every change is durable on return."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def _require_encrypted(self) -> None:
        if self._core.keyring.profile == "open":
            raise InvalidArgument("an open basin has no secrets")

    def list(self) -> list[SlotInfo]:
        """The slots, sorted by id; empty in an open basin. `current` is the one this handle was opened with."""
        core = self._core
        core.refresh()
        own = core.keyring.slot.slot_id if core.keyring.slot is not None else ""
        return [
            SlotInfo(
                slot.slot_id,
                slot.kind,
                slot.created_ms,
                tuple(slot.generations),
                slot.slot_id in core.state.slots,
                slot.slot_id == own,
                None if slot.problem is None else str(slot.problem),
            )
            for slot in (list_slots(core.storage, core.keyring.basin_id) if core.keyring.profile != "open" else [])
        ]

    def add(self, secret: Secret | str) -> str:
        """Let one more secret open the basin; returns the new slot's id. A `str` is a passphrase."""
        self._require_encrypted()
        core = self._core
        core.require_writable()
        core.refresh()
        given = Secret.from_passphrase(secret) if isinstance(secret, str) else secret
        held = core.keyring.generations()
        slot_id, public_key = add_slot(core.storage, core.keyring, given, dropped=core.state.generations_dropped)

        def build(state: State) -> Record | None:
            # A rotation in between would leave this slot without the new generation.
            if state.generation not in held:
                return None
            return Record(slots_added=[Slot(slot_id, public_key)])

        if not core.append(build):
            delete_slot_files(core.storage, slot_id)
            raise Conflict("the keys were rotated meanwhile: add the secret again", slot_id=slot_id)
        write_hint(core, keys_changed=True)
        finish_drops(core)  # Of what was dropped while the slot was made.
        return slot_id

    def remove(self, slot_id: str) -> None:
        """Let a secret open the basin no more. Raises `InvalidArgument` for an unknown or the last slot.

        Whoever opened the basin with it before may have kept its keys: `rotate`, and compact, if that matters.
        """
        self._require_encrypted()
        core = self._core
        core.require_writable()
        core.refresh()
        if slot_id not in core.state.slots:
            raise InvalidArgument(f"there is no key slot {slot_id!r}", slot_id=slot_id)
        if len(core.state.slots) == 1:
            raise InvalidArgument("the last key slot cannot be removed: nothing would open the basin", slot_id=slot_id)
        if not core.append(
            lambda state: Record(slots_removed=[slot_id]) if slot_id in state.slots and len(state.slots) > 1 else None
        ):
            raise Conflict(f"key slot {slot_id} was changed meanwhile", slot_id=slot_id)
        remove_slot(core.storage, core.keyring.basin_id, slot_id)
        write_hint(core, keys_changed=True)

    def rotate(self) -> int:
        """Begin a new key generation, sealed to every valid slot; returns its number.

        From now on everything is written under it; what was written before stays as it is until a compaction.
        """
        self._require_encrypted()
        core = self._core
        core.require_writable()
        core.refresh()
        valid = dict(core.state.slots)
        generation = rotate(core.storage, core.keyring, valid)
        if not core.append(lambda state: Record(generation=generation) if dict(state.slots) == valid else None):
            raise Conflict("the key slots were changed meanwhile: rotate again", generation=generation)
        write_hint(core, keys_changed=True)
        end_segment(core, range(generation))  # So that history lets go of the old log as a whole.
        return generation

    def generations(self) -> _Infos:
        """The generations that were not dropped, ascending, and what needs those before the newest.

        Empty in an open basin. Cost: see `generation_uses`, once a generation.
        """
        core = self._core
        core.refresh()
        if core.keyring.profile == "open":
            return []
        current = core.state.generation
        return [
            GenerationInfo(one, one == current, () if one == current else tuple(generation_uses(core, one)))
            for one in self._known()
        ]

    def _known(self) -> _Numbers:
        """Generations up to the newest that were not dropped."""
        core = self._core
        core.keyring.reload()
        stored = {one for slot in list_slots(core.storage, core.keyring.basin_id) for one in slot.generations}
        known = stored.union(core.keyring.generations()).difference(core.state.generations_dropped)
        return sorted(one for one in known if one <= core.state.generation)

    def drop(self, generation: int | None = None, *, forget_history: bool = False) -> _Numbers:
        """Delete the keys of a generation (or of all but the newest) that nothing needs any more, from every slot.

        Compact first: what was written under it has to be written anew. The log under it goes with it, as far as
        history has passed it; with `forget_history` history is given up that has not. Whoever holds the keys already
        can go on opening copies of what was sealed under them. Returns what was dropped now.

        Raises `InvalidArgument` while the generation is needed; field `uses` says by what, the text also what to do.
        """
        self._require_encrypted()
        core = self._core
        core.require_writable()
        core.refresh()
        if generation is not None and type(generation) is not int:
            raise InvalidArgument(f"a generation is a number, not {generation!r}", generation=generation)
        older = [one for one in self._known() if one != core.state.generation]
        return drop_generations(core, older if generation is None else [generation], forget_history=forget_history)
