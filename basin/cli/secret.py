"""`basin secret`: the secrets that open a basin, and the rotation of its master key. Uses public names of `basin` only.

Invariant: a new secret comes from the environment, a key file or a prompt, never from argv.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import click

from basin.cli.common import (
    Group,
    Target,
    ask_secret,
    can_ask,
    load_or_create_secret,
    pass_target,
)
from basin.cli.output import print_json, print_line, print_table, printable, time_text, wants_json
from basin.errors import SecretRequired

if TYPE_CHECKING:
    from basin import Secret, SlotInfo
    from basin.api import Database

NEW_PASSPHRASE_VARIABLE: Final = "BASIN_NEW_PASSPHRASE"  # noqa: S105  (the name of a variable)


@click.group(cls=Group)
def secret() -> None:
    """Add, remove and list the secrets that open the basin; rotate its master key, and drop old generations of it."""


@secret.command("add")
@click.option(
    "--secret-file", metavar="PATH", type=click.Path(dir_okay=False), help="Key file; created (mode 0600) if absent."
)
@pass_target
def add(target: Target, secret_file: str | None) -> None:
    """Let one more secret open the basin: a key file, $BASIN_NEW_PASSPHRASE, or a passphrase asked for twice."""
    with target.open("w") as db:
        slot_id = db.secrets.add(_new_secret(secret_file))
    if wants_json():
        print_json({"slot": slot_id})
    else:
        print_line(f"added slot {slot_id}")


def _new_secret(secret_file: str | None) -> Secret:
    import basin

    if secret_file is not None:
        return load_or_create_secret(secret_file)[0]
    passphrase = os.environ.get(NEW_PASSPHRASE_VARIABLE)
    if passphrase:
        return basin.Secret.from_passphrase(passphrase)
    if not can_ask():
        raise SecretRequired(f"no new secret: give --secret-file, set ${NEW_PASSPHRASE_VARIABLE}, or use a terminal")
    return ask_secret("New passphrase", confirm=True)


@secret.command("remove")
@click.argument("slot")
@pass_target
def remove(target: Target, slot: str) -> None:
    """Take away the slot that `secret list` shows: its secret opens the basin no more. The last one stays."""
    with target.open("w") as db:
        db.secrets.remove(slot)
    if wants_json():
        print_json({"removed": slot})
    else:
        print_line(f"removed slot {slot}; `basin secret rotate` keeps what is written from now on from its holder")


@secret.command("rotate")
@pass_target
def rotate(target: Target) -> None:
    """Start a new generation of the master key, for everything written from now on.

    `basin-compact` then writes anew what there is, and `basin secret drop-generation` deletes the old keys. None of it
    takes anything back: whoever held a secret could have kept the old master key and what it opens.
    """
    with target.open("w") as db:
        generation = db.secrets.rotate()
    if wants_json():
        print_json({"generation": generation})
    else:
        print_line(f"new generation {generation}")


@secret.command("drop-generation")
@click.argument("generation", metavar="[G]", required=False, type=click.IntRange(min=0))
@click.option("--forget-history", is_flag=True, help="Give up history, now, that still needs the generation.")
@pass_target
def drop_generation(target: Target, generation: int | None, *, forget_history: bool) -> None:
    """Delete the keys of generation G (or of all but the newest) once nothing needs them: compact first.

    Copies of the basin that somebody made before can still be opened with them.
    """
    with target.open("w") as db:
        dropped = db.secrets.drop(generation, forget_history=forget_history)
    if wants_json():
        print_json({"dropped": dropped})
        return
    for number in dropped:
        print_line(f"dropped generation {number}")
    if not dropped:
        print_line("there is no such generation any more" if generation is not None else "there is no older generation")


@secret.command("list")
@click.option("--generations", is_flag=True, help="List the generations of the master key, and what needs older ones.")
@pass_target
def list_slots(target: Target, *, generations: bool) -> None:
    """List the key slots: what opens the basin. Shows no secret."""
    with target.open("r") as db:
        if generations:
            _list_generations(db)
            return
        slots = db.secrets.list()
    if not wants_json():
        print_table(("slot", "kind", "created", "state"), map(_cells, slots))
        return
    for slot in slots:
        print_json(
            {
                "slot": slot.slot_id,
                "kind": slot.kind,
                "created": time_text(slot.created_ms),
                "generations": slot.generations,
                "valid": slot.valid,
                "current": slot.current,
                "problem": slot.problem,
            }
        )


def _list_generations(db: Database) -> None:
    found = db.secrets.generations()
    if not wants_json():
        rows = [
            (str(one.generation), "current" if one.current else _needs([f"{use.count} {use.kind}" for use in one.uses]))
            for one in found
        ]
        print_table(("generation", "state"), rows)
        return
    for one in found:
        uses = [
            {"kind": use.kind, "count": use.count, "objects": list(use.objects), "advice": use.advice}
            for use in one.uses
        ]
        print_json({"generation": one.generation, "current": one.current, "uses": uses})


def _needs(uses: list[str]) -> str:
    return f"needed by {', '.join(uses)}" if uses else "not needed: `basin secret drop-generation`"


def _cells(slot: SlotInfo) -> tuple[str, ...]:
    state = "current" if slot.current else "valid" if slot.valid else "unknown to the log"
    return slot.slot_id, slot.kind, time_text(slot.created_ms), printable(slot.problem or state)
