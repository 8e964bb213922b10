"""Who takes part: an engine in a variant, which can be opened in a folder as often as needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from benchmarks import peers
from benchmarks.contestant import Contestant, RawPeer, WorkingPeer

Variant: TypeAlias = Literal["encrypted", "raw", "work"]

SUBJECT: Final = "basin"
_CIPHER_KEY: Final = bytes(range(32))


@dataclass(frozen=True, slots=True, order=True)
class Entrant:
    """`engine` is "basin" or a peer; `variant` is "encrypted" for Basin, "raw" or "work" (the same work) for a peer."""

    engine: str
    variant: Variant

    def __str__(self) -> str:
        return self.engine if self.engine == SUBJECT else f"{self.engine} {self.variant}"

    @property
    def folder_name(self) -> str:
        """A name for this entrant's files."""
        return f"{self.engine}-{self.variant}"

    def open(self, folder: Path, *, value_size: int) -> Contestant:
        """Open (creating it if absent) the engine's store in `folder`. Its library is imported here, not before."""
        if self.engine == SUBJECT:
            from benchmarks.subject import Subject

            return Subject(folder)
        store = peers.open_store(self.engine, folder, value_size=value_size)
        if self.variant == "raw":
            return RawPeer(store)
        from benchmarks.sealing import Sealer

        return WorkingPeer(store, Sealer(_CIPHER_KEY, value_size))


BASIN: Final = Entrant(SUBJECT, "encrypted")


def all_entrants() -> list[Entrant]:
    """Basin, then every installed peer, raw and with the same work."""
    variants: tuple[Variant, ...] = ("raw", "work")
    return [BASIN, *(Entrant(peer, variant) for peer in peers.available() for variant in variants)]
