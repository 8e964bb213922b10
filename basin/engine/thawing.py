"""`thaw`: has contents in cold storage made readable, and waits for it.

Invariants:

- What is asked for is found in hot storage alone: indexes, and the lists of parts of large contents.
- A stratum that can be read, or is on its way, is not asked for again.
- Nothing is written to the basin; stopping at any moment leaves what was asked for on its way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from basin.engine.writer import stratum_name
from basin.errors import ContentNotFound, InvalidArgument
from basin.format.clast import decode_clast
from basin.format.layout import STRATUM_FOLDERS, Kind, StratumKind
from basin.format.record import StratumAdded
from basin.storage.archive import RESTORE_TIERS
from basin.storage.objects import Readiness
from basin.terms import ContentKey, PartAddress, StratumId, parse_address

if TYPE_CHECKING:
    from basin.engine.core import Core

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_DATA_START: Final = f"{STRATUM_FOLDERS[StratumKind.DATA]}/"
_DAYS_MAX: Final = 36_500
_POLL_FIRST_S: Final = 0.5
_POLL_MAX_S: Final = 60.0
"""A restoration takes minutes at best: asking more often costs requests and tells nothing."""
_WITHOUT_DAYS: Final = "INTELLIGENT_TIERING"
"""A body of this class comes back for good."""


@dataclass(frozen=True, slots=True)
class ThawReport:
    """What `thaw` found and did, in strata of contents: `strata` of them are needed, and hold `size` bytes.

    `requested` had to be asked for, `waiting` cannot be read yet.
    """

    strata: int
    size: int
    requested: int
    waiting: int


def thaw(
    core: Core,
    addresses: Iterable[ContentKey | PartAddress | str] | None = None,
    *,
    days: int,
    tier: str,
    wait: bool,
    progress: Callable[[int, int], None] | None = None,
) -> ThawReport:
    """See `Database.thaw`. `progress` is called with (bytes that can be read, bytes in all)."""
    core.require_open()
    if type(days) is not int or not 1 <= days <= _DAYS_MAX:
        raise InvalidArgument(f"days is a number from 1 to {_DAYS_MAX}, not {days!r}", argument="days")
    if tier not in RESTORE_TIERS:
        raise InvalidArgument(f"tier is one of {', '.join(RESTORE_TIERS)}, not {tier!r}", argument="tier")
    needed = strata_of(core, addresses)
    size = sum(added.length for added in needed)

    def report(waiting: Iterable[StratumAdded]) -> None:
        if progress is not None:
            progress(size - sum(added.length for added in waiting), size)

    found = _readiness(core, needed)
    archived = [added for added, state in found if state.state == "archived"]
    classes = {added.id: state.storage_class for added, state in found}

    def ask(added: StratumAdded) -> None:
        without_days = classes[added.id] == _WITHOUT_DAYS
        core.storage.restore(_name(added), days=0 if without_days else days, tier=tier)

    _all_at_once(core, ask, archived)
    waiting = [added for added, state in found if state.state != "readable"]
    report(waiting)
    pause_s = _POLL_FIRST_S
    while wait and waiting:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_MAX_S)
        waiting = [added for added, state in _readiness(core, waiting) if state.state != "readable"]
        report(waiting)
    return ThawReport(len(needed), size, len(archived), len(waiting))


def strata_of(core: Core, addresses: Iterable[ContentKey | PartAddress | str] | None) -> list[StratumAdded]:
    """The data strata that contents lie in, each once; of all contents for None. Raises `ContentNotFound`."""
    strata = core.state.strata
    if addresses is None:
        return [known.added for known in strata.values() if known.added.kind == StratumKind.DATA]
    wanted: dict[StratumId, None] = {}
    for address in addresses:
        wanted.update(dict.fromkeys(_strata_at(core, address)))
    return [strata[identity].added for identity in wanted if identity in strata]


def _strata_at(core: Core, address: ContentKey | PartAddress | str) -> list[StratumId]:
    if isinstance(address, str) and address.startswith(_DATA_START):
        return [_named(core, address)]
    if isinstance(address, str):
        address = parse_address(address)
    if isinstance(address, ContentKey):
        return _strata_of_content(core, address.digest)
    if not isinstance(address, PartAddress):
        raise InvalidArgument(f"a content key is a ContentKey or text, not {type(address).__name__}")
    parts = _parts(core, address.whole.digest)
    if not 0 <= address.number < len(parts):
        raise ContentNotFound(f"{address.whole} has {len(parts)} parts, no part {address.number}", address=address)
    return _strata_of_content(core, parts[address.number])


def _named(core: Core, name: str) -> StratumId:
    """The stratum of a file's name, as errors give it."""
    try:
        identity = StratumId(bytes.fromhex(name.removeprefix(_DATA_START)))
    except ValueError:
        identity = None
    known = core.state.strata.get(identity) if identity is not None else None
    if known is None or known.added.kind != StratumKind.DATA:
        raise InvalidArgument(f"no content lies in {name}, or not any more", object=name)
    return known.added.id


def _strata_of_content(core: Core, key: bytes) -> list[StratumId]:
    """The data strata that a content, or all its parts, lie in."""
    found = []
    for part in _parts(core, key):
        place = core.locator.find_surely(core.keyring.grain_keys.grain_key(part))
        if place is None:
            raise ContentNotFound(f"no content {part.hex()} in this basin", content_key=ContentKey(part))
        if core.locator.kind_of(place.stratum) == StratumKind.DATA:
            found.append(place.stratum)
    return found


def _parts(core: Core, key: bytes) -> list[bytes]:
    """The keys of a content's parts; its own, if it is one grain. Reads nothing that may be cold."""
    place = core.locator.find_surely(core.keyring.grain_keys.grain_key(key))
    if place is None or core.locator.kind_of(place.stratum) == StratumKind.DATA:
        return [key]
    kind, payload = core.contents.grain(key)
    return list(decode_clast(payload).parts) if kind == Kind.CLAST else [key]


def _name(added: StratumAdded) -> str:
    return stratum_name(added.kind, added.id)


def _readiness(core: Core, strata: Sequence[StratumAdded]) -> list[tuple[StratumAdded, Readiness]]:
    states = _all_at_once(core, lambda added: core.storage.readiness(_name(added)), strata)
    return list(zip(strata, states, strict=True))


def _all_at_once(core: Core, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`work` for all items, as many at a time as requests may be on their way."""
    if len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(len(items), core.options.request_count), thread_name_prefix="basin-thaw") as pool:
        return list(pool.map(work, items))
