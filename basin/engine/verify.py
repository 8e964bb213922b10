"""`check`: walks every invariant of a stored basin and yields what is wrong; never stops at the first finding.

Without data it reads headers, footers, indexes and runs of names; with data also every grain, and compares every index
entry with the grain it points to. It changes nothing. `basin.engine.rounds` reads the data a share at a time.

A finding of severity "damage" means that stored bytes are not what was written; "warning" that something is left over
or odd, and harmless; "info" that something could not be looked at, such as a stratum in cold storage.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from basin.engine.cache import Cache
from basin.engine.index import IndexReader
from basin.engine.keyspace import DEFAULT_KEYSPACE, FIRST_USER_KEYSPACE, ROOTS_KEYSPACE, prefix_of
from basin.engine.names import BrokenRun, open_run, scan
from basin.engine.reader import StratumReader, extent_of
from basin.engine.recovery import stored_strata
from basin.engine.repair_keys import key_problems
from basin.engine.repair_reading import HeldFile
from basin.engine.repair_survey import piece_name, survey_log
from basin.engine.state import ACTIVE, CUT, FINISHED, Stratum, last_version
from basin.engine.tiers import is_cold
from basin.engine.writer import stratum_name
from basin.errors import (
    BasinError,
    ContentNotFound,
    CorruptionError,
    GrainNotReady,
    ObjectMissing,
    StorageError,
    UnsupportedVersion,
    WrongSecret,
)
from basin.format.clast import decode_clast
from basin.format.layout import (
    KEYSPACE_PREFIX_SIZE,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.names import check_versions
from basin.format.record import StratumAdded
from basin.format.scan import Damage, GrainFound, scan_grains
from basin.storage.protocol import ReadFile
from basin.terms import StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

NAMES_LISTED_MAX: Final = 100
_CONTENT_KINDS: Final = (Kind.BLOB, Kind.PART, Kind.CLAST)


class FindingKind(enum.StrEnum):
    """What a finding can be. `repair` has an answer to each, if only what is lost."""

    DESCRIPTOR = "descriptor"
    SLOT = "slot"
    GENERATION = "generation"
    HINT = "hint"
    CHECKPOINT = "checkpoint"
    LOG = "log"
    VOID = "void"
    STRATUM = "stratum"
    TRUNCATED = "truncated"
    EXTENDED = "extended"
    INDEX = "index"
    GRAIN = "grain"
    HASH = "hash"
    NAMES = "names"
    MISSING = "missing"
    COLD = "cold"
    LEFTOVER = "leftover"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `check` found.

    `kind` is what (a word of `FindingKind`), `object` the file, `offset` the byte in it or -1, `names` up to 100 of the
    names it touches, `content_keys` likewise, and `readable` says what can still be read.
    """

    kind: str
    severity: str
    object: str
    detail: str
    offset: int = -1
    names: tuple[bytes, ...] = ()
    content_keys: tuple[str, ...] = ()
    readable: str = ""


@dataclass(slots=True)
class Walk:
    """What the checks of one run share."""

    core: Core
    read_data: bool
    progress: Callable[[int, int], None] | None
    damaged_keys: set[bytes] = field(default_factory=set)
    unreadable: set[StratumId] = field(default_factory=set)
    """Strata that cannot be read: a finding has said why."""
    archived: set[StratumId] = field(default_factory=set)
    """Of those, the ones that are in cold storage, and whole as far as their length says."""
    done: int = 0
    total: int = 0

    def advance(self, size: int) -> None:
        """Report bytes checked."""
        self.done += size
        if self.progress is not None:
            self.progress(self.done, self.total)


def check(
    core: Core, *, read_data: bool = True, progress: Callable[[int, int], None] | None = None
) -> Iterator[Finding]:
    """Yield what is wrong. Cost without data: every index, every run of names; with data: every byte."""
    walk = Walk(core, read_data, progress)
    walk.total = sum(known.added.length for known in core.state.strata.values())
    yield from check_all(walk, walk.advance)


def check_all(walk: Walk, advance: Callable[[int], None]) -> Iterator[Finding]:
    """`check` of one run; `advance` is told the bytes of each stratum."""
    core = walk.core
    core.open_everything()
    yield from _check_keys(core)
    yield from _check_checkpoints(core)
    yield from _check_log(core)
    for known in list(core.state.strata.values()):
        yield from _check_stratum(walk, known)
        advance(known.added.length)
    yield from _check_index_runs(walk)
    yield from _check_names(walk)
    yield from _check_leftovers(core)


def user_name(full: bytes) -> tuple[bytes, ...]:
    """The user's part of a full name, or nothing where the name is Basin's own (a root, say)."""
    number = int.from_bytes(full[:KEYSPACE_PREFIX_SIZE], "big")
    if DEFAULT_KEYSPACE < number < FIRST_USER_KEYSPACE:
        return ()
    return (full[KEYSPACE_PREFIX_SIZE:],)


def _shown(full: bytes) -> str:
    """A full name in a text."""
    return repr(full[KEYSPACE_PREFIX_SIZE:]) if user_name(full) else "a root or a name of Basin's own"


def finding(kind: str, name: str, error: BaseException | str, **more: object) -> Finding:
    """Damage of the file `name`; `more` are other fields of the finding."""
    offset = error.fields.get("offset", -1) if isinstance(error, BasinError) else -1
    fields: dict[str, object] = {"offset": offset, **more}
    return Finding(kind, "damage", name, str(error), **fields)  # type: ignore[arg-type]  # the fields of Finding


def _check_keys(core: Core) -> Iterator[Finding]:
    """Descriptor, key slots, sealed generations, hint."""
    for problem in key_problems(core):
        kind, severity, name, detail, readable, _, _ = problem
        yield Finding(kind, severity, name, detail, readable=readable)


def _check_checkpoints(core: Core) -> Iterator[Finding]:
    for name in core.storage.list("checkpoint"):
        try:
            core.read_checkpoint(name)
        except (CorruptionError, StorageError, UnsupportedVersion, ValueError) as error:
            yield finding("checkpoint", f"checkpoint/{name}", error, readable="everything: the log has it all")


def _check_log(core: Core) -> Iterator[Finding]:
    """Every record that should still be stored: decoded, chained, and not void."""
    try:
        survey = survey_log(core, core.state.position)
    except (CorruptionError, StorageError) as error:
        yield finding("log", str(error.fields.get("object", "log")), error, readable="all that checkpoints hold")
        return
    for gap in survey.gaps:
        which = "" if not gap.missing else f"; positions {gap.first} to {gap.last} are lost"
        readable = "the records before it, and all that checkpoints hold"
        yield finding("log", gap.name, f"{gap.reason}{which}", offset=gap.start, readable=readable)
    for piece in survey.unchained():
        name = piece_name(core, piece)
        yield finding("log", name, f"record {piece.position} does not follow the one before", offset=piece.offset)
    for position in core.state.voids:
        detail = f"record {position} is skipped by everybody: it broke a rule, or was cut off"
        yield Finding("void", "warning", "log", detail)


# --- strata ---------------------------------------------------------------------------------------------------------


def _check_stratum(walk: Walk, known: Stratum) -> Iterator[Finding]:
    added = known.added
    is_content = added.kind == StratumKind.DATA and added.status == FINISHED
    if is_content and not walk.read_data and is_cold(walk.core.options):
        yield from _check_from_afar(walk, added)
        return
    try:
        file = _file_of(walk, added) if walk.core.is_remote else None
        reader = StratumReader(walk.core.storage, walk.core.keyring, added.kind, added.id, file=file)
    except GrainNotReady:
        yield from _check_from_afar(walk, added)
        return
    except (CorruptionError, StorageError, UnsupportedVersion, WrongSecret) as error:
        yield from unreadable(walk, added, error)
        return
    try:
        yield from _check_open_stratum(walk, known, reader)
    except GrainNotReady:  # What was restored has expired meanwhile.
        yield from _check_from_afar(walk, added)
    finally:
        reader.close()


def unreadable(walk: Walk, added: StratumAdded, error: BasinError) -> Iterator[Finding]:
    """A stratum that cannot be read, unless others have merged it away meanwhile."""
    if isinstance(error, ObjectMissing):
        walk.core.refresh()
        if added.id not in walk.core.state.strata:
            return
    walk.unreadable.add(added.id)
    name = stratum_name(added.kind, added.id)
    yield finding("stratum", name, error, names=_names_in(walk, added.id), readable="nothing in this file")


def _check_from_afar(walk: Walk, added: StratumAdded) -> Iterator[Finding]:
    """A stratum in cold storage, by its length alone. Two requests, neither of which reads it."""
    storage, name = walk.core.storage, stratum_name(added.kind, added.id)
    try:
        file = storage.open(name)
        size = file.size()
        file.close()
        found = storage.readiness(name)
    except (CorruptionError, StorageError) as error:
        yield from unreadable(walk, added, error)
        return
    if size != added.length:
        kind, readable = ("truncated", "the grains before its end") if size < added.length else ("extended", "all")
        detail = f"the file has {size} bytes, and the log says {added.length}"
        yield finding(kind, name, detail, offset=min(size, added.length), readable=readable)
    if found.state != "readable":
        walk.unreadable.add(added.id)
        walk.archived.add(added.id)
        detail = f"cannot be read now: it lies in {found.storage_class}, and `basin thaw {name}` brings it back"
        yield Finding("cold", "info", name, f"{name} {detail}", readable="what its length and its index say is right")


def _file_of(walk: Walk, added: StratumAdded) -> ReadFile:
    """A stratum of a bucket for its check: with data all of it as it is stored now, in one request."""
    storage, name = walk.core.storage, stratum_name(added.kind, added.id)
    if walk.read_data:
        return HeldFile(name, storage.read_file(name, added.length + 1))
    stored = storage.open(name)
    return storage.open_known(extent_of(added)) if stored.size() == added.length else stored


def _check_open_stratum(walk: Walk, known: Stratum, reader: StratumReader) -> Iterator[Finding]:
    added = known.added
    size = reader.size()
    if size < added.length:
        detail = f"the file has {size} bytes, and the log says {added.length}"
        walk.unreadable.add(added.id)
        yield finding("truncated", reader.name, detail, offset=size, readable="the grains before its end")
    elif size > added.length and added.status not in (ACTIVE, CUT):
        detail = f"the file has {size} bytes, and the log says {added.length}"
        yield finding("extended", reader.name, detail, readable="all")
    index: IndexReader | None = None
    if added.status not in (ACTIVE, CUT):
        try:
            index = IndexReader(reader, reader.directory(), Cache(0))
            rows = list(index_rows(index))
        except (CorruptionError, StorageError) as error:
            yield finding("index", reader.name, error, readable="every grain, after `basin repair`")
            index, rows = None, []
        if index is not None and added.kind != StratumKind.INDEX and len(rows) != added.grain_count:
            detail = f"the index has {len(rows)} entries for {added.grain_count} grains"
            yield finding("index", reader.name, detail, readable="the grains that are in it")
    if walk.read_data and size >= added.length:
        data = memoryview(reader.read_raw(0, added.length))
        yield from check_bytes(walk, known, reader, index, 0, data, set())


def index_rows(index: IndexReader) -> Iterator[tuple[bytes, int, int, StratumId]]:
    """Every entry of an index, verified page by page: (key, offset, length, stratum)."""
    strata = index.directory.strata
    for number in range(index.directory.page_count):
        for key, offset, length, stratum, _, _ in index.rows(number):
            yield key, offset, length, strata[stratum]


def check_bytes(
    walk: Walk,
    known: Stratum,
    reader: StratumReader,
    index: IndexReader | None,
    begin: int,
    data: memoryview,
    places: set[tuple[bytes, int, int]],
) -> Iterator[Finding]:
    """Every grain in `data`, the stratum's bytes from `begin` on, and the index against them; of the whole, its hash.

    `data` ends with a grain, or with the stratum. What was found whole is added to `places`: (key, offset, length).
    """
    added = known.added
    is_whole = len(data) == added.length
    intact = not is_whole or blake3(data, max_threads=blake3.AUTO).digest() == added.hash
    stop = min(begin + len(data), reader.grains_end(added.length, finished=added.status not in (ACTIVE, CUT)))
    found_damage = False
    for scanned in scan_grains(data, max(0, STRATUM_HEADER_SIZE - begin), stop - begin):
        found = _moved(scanned, begin) if begin else scanned
        problem = _grain_problem(walk, reader, data, begin, found)
        if isinstance(found, GrainFound) and found.header.kind not in (Kind.INDEX_PAGES, Kind.INDEX_DIRECTORY):
            places.add((found.header.key, found.offset, found.header.stored_size))
        if problem is None:
            continue
        found_damage = True
        keys = _keys_at(walk, index, added.id, found)
        walk.damaged_keys.update(keys)
        yield finding(
            "grain",
            reader.name,
            problem,
            offset=found.offset,
            content_keys=tuple(key.hex() for key in keys[:NAMES_LISTED_MAX]),
            names=_names_of(walk, keys),
            readable="every other grain of the file",
        )
    if not intact and not found_damage:
        yield finding("hash", reader.name, "the file does not have the hash that the log names", readable="every grain")
    if index is not None and added.kind != StratumKind.INDEX:
        yield from _compare_index(reader, index, places, range(begin, begin + len(data)))


def _moved(found: GrainFound | Damage, begin: int) -> GrainFound | Damage:
    """What was found in a stretch that begins at `begin`, by its place in the file."""
    if isinstance(found, GrainFound):
        return GrainFound(found.offset + begin, found.header)
    return Damage(found.offset + begin, found.end + begin, found.reason)


def _grain_problem(
    walk: Walk, reader: StratumReader, data: memoryview, begin: int, found: GrainFound | Damage
) -> BasinError | None:
    """What is wrong with one grain, after decrypting and decompressing it."""
    if isinstance(found, Damage):
        return CorruptionError(f"{reader.name} at byte {found.offset}: {found.reason}", offset=found.offset)
    header = found.header
    if header.kind == Kind.INDEX_PAGES:
        return None
    at = found.offset - begin
    grain = bytes(data[at : at + header.stored_size])
    try:
        kind, payload = reader.decode_grain(grain, found.offset, header.key)
        if kind == Kind.CLAST:
            decode_clast(payload)
        elif kind in _CONTENT_KINDS and blake3(payload.content).digest() != walk.core.keyring.grain_keys.content_key(
            header.key
        ):
            return CorruptionError(f"{reader.name} at byte {found.offset}: the content is not what its key says")
    except BasinError as error:
        return error
    return None


def _compare_index(
    reader: StratumReader, index: IndexReader, places: set[tuple[bytes, int, int]], stretch: range
) -> Iterator[Finding]:
    """The entries of what lies in a stretch of the file, against the grains that were found in it."""
    try:
        listed = {(key, offset, length) for key, offset, length, _ in index_rows(index) if offset in stretch}
    except (CorruptionError, StorageError):
        return
    for key, offset, _ in sorted(places - listed):
        detail = f"the grain {key.hex()} at byte {offset} is missing from the index"
        yield finding("index", reader.name, detail, offset=offset, readable="every grain, after `basin repair`")
    for key, offset, _ in sorted(listed - places):
        detail = f"the index points to {key.hex()} at byte {offset}, where no such grain is"
        yield finding("index", reader.name, detail, offset=offset, readable="every other grain")
    for key, _, _ in places & listed:
        if not index.directory.may_contain(key) or not any(True for _ in index.find(key)):
            yield finding("index", reader.name, f"the grain {key.hex()} is not found by the index")


def _keys_at(walk: Walk, index: IndexReader | None, identity: StratumId, found: GrainFound | Damage) -> list[bytes]:
    """Content keys of what lies in a damaged stretch, as far as an index knows."""
    content_key = walk.core.keyring.grain_keys.content_key
    if isinstance(found, GrainFound):
        return [content_key(found.header.key)]
    indexes = [index] if index is not None else walk.core.locator.indexes
    keys = []
    for one in indexes:
        try:
            rows = list(index_rows(one))
        except (CorruptionError, StorageError):
            continue
        keys += [
            content_key(key)
            for key, offset, _, stratum in rows
            if stratum == identity and found.offset <= offset < found.end
        ]
    return list(dict.fromkeys(keys))


# --- merged indexes -------------------------------------------------------------------------------------------------


def _check_index_runs(walk: Walk) -> Iterator[Finding]:
    """Each merged index holds as many entries of every stratum as the stratum has grains; with data, all of them."""
    strata = walk.core.state.strata
    for run in walk.core.state.index_runs:
        name = stratum_name(StratumKind.INDEX, run.id)
        counts: dict[StratumId, int] = {}
        listed: dict[StratumId, set[tuple[bytes, int, int]]] = {}
        try:
            reader = walk.core.readers.get(StratumKind.INDEX, run.id)
            for key, offset, length, stratum in index_rows(IndexReader(reader, reader.directory(), Cache(0))):
                counts[stratum] = counts.get(stratum, 0) + 1
                if walk.read_data:
                    listed.setdefault(stratum, set()).add((key, offset, length))
        except (CorruptionError, StorageError) as error:
            yield finding("index", name, error, readable="every grain, after `basin repair`")
            continue
        for identity in run.strata:
            known = strata.get(identity)
            if known is None:
                continue
            missing = known.added.grain_count - counts.get(identity, 0)
            if missing > 0:
                detail = f"{missing} grains of {identity} are missing from this index"
                yield finding("index", name, detail, readable="every grain, after `basin repair`")
            elif walk.read_data:
                yield from _compare_run(walk, name, known, listed.get(identity, set()))


def _compare_run(walk: Walk, name: str, known: Stratum, listed: set[tuple[bytes, int, int]]) -> Iterator[Finding]:
    """The entries of one stratum in a merged index, against its grains."""
    try:
        reader = walk.core.readers.get(known.added.kind, known.added.id)
        places = set(scan_places(reader, known))
    except (CorruptionError, StorageError, GrainNotReady):
        return  # Reported with the stratum.
    for key, offset, _ in sorted(places - listed):
        detail = f"the grain {key.hex()} at byte {offset} of {known.added.id} is missing from this index"
        yield finding("index", name, detail, readable="every grain, after `basin repair`")


def scan_places(reader: StratumReader, known: Stratum) -> Iterator[tuple[bytes, int, int]]:
    """(grain key, offset, length) of every intact grain of a stratum that is not part of an index."""
    added = known.added
    data = memoryview(reader.read_raw(0, min(reader.size(), added.length)))
    stop = min(len(data), reader.grains_end(added.length, finished=added.status not in (ACTIVE, CUT)))
    for found in scan_grains(data, STRATUM_HEADER_SIZE, stop):
        if isinstance(found, GrainFound) and found.header.kind not in (Kind.INDEX_PAGES, Kind.INDEX_DIRECTORY):
            yield found.header.key, found.offset, found.header.stored_size


# --- names ----------------------------------------------------------------------------------------------------------


def _check_names(walk: Walk) -> Iterator[Finding]:
    """Every run of names, and that everything that names refer to is there."""
    core = walk.core
    for run in core.state.name_runs:
        name = stratum_name(StratumKind.META, run.id)
        entries = 0
        reader = open_run(run, core.readers)
        if isinstance(reader, BrokenRun):
            yield finding("names", name, reader.error, readable="names in other runs and in the log")
            continue
        for number, first in enumerate(reader.directory.firsts):
            try:
                block = reader.block(number, keep=False)
                check_versions(block)
                if block.names[0] != first:
                    raise CorruptionError(f"block {number} does not begin with the name that its directory says")
                entries += len(block.names)
                if not all(map(reader.directory.may_contain, block.names)):
                    raise CorruptionError(f"block {number} holds names that the filter denies")
            except (CorruptionError, StorageError) as error:
                following = [*reader.directory.firsts, reader.directory.last][number + 1]
                detail = f"{error} (names from {_shown(first)} to {_shown(following)})"
                yield finding(
                    "names",
                    name,
                    detail,
                    names=user_name(first) + user_name(following),
                    readable="names outside of it",
                )
                entries = run.entries
        if entries != run.entries:
            yield finding("names", name, f"the run holds {entries} entries, and the log says {run.entries}")
    yield from _checkreferences(walk)


def references(core: Core) -> Iterator[tuple[bytes, bytes]]:
    """(full name, content key) of every visible reference and root."""
    state, tables = core.current
    roots = prefix_of(ROOTS_KEYSPACE)
    for found in scan((), tables, b"", b"\xff" * 5, version_max=last_version(state.position), now_ms=0):
        referring = set(found.references)
        for row, name in enumerate(found.names):
            if row in referring:
                yield name, found.values[row]
            elif name.startswith(roots):
                yield name, name[len(roots) :]


def _checkreferences(walk: Walk) -> Iterator[Finding]:
    """Everything referred to is in some index; large contents have all their parts."""
    core = walk.core
    try:
        for batch in _batched(references(core), 4096):
            keys = [core.keyring.grain_keys.grain_key(key) for _, key in batch]
            for (name, key), place in zip(batch, core.locator.find_many(keys), strict=True):
                if place is None:
                    if core.locator.broken:
                        continue  # It may be in a stratum that was reported above.
                    detail = f"the content {key.hex()} that {_shown(name)} refers to is in no stratum"
                    yield finding("missing", "names", detail, names=user_name(name), content_keys=(key.hex(),))
                    continue
                try:
                    kind = core.locator.kind_of(place.stratum)
                    missing = _missing_links(core, key) if kind == StratumKind.META else []
                except (BasinError, KeyError):
                    continue  # Reported with its stratum.
                if missing:
                    detail = f"{len(missing)} contents that {key.hex()} links to are in no stratum"
                    yield finding("missing", "names", detail, names=user_name(name), content_keys=tuple(missing))
    except (CorruptionError, StorageError):
        return  # The runs of names or indexes that cannot be read were reported above.


def _missing_links(core: Core, key: bytes) -> list[str]:
    grain_key = core.keyring.grain_keys.grain_key
    missing = [link.hex() for link in core.contents.links(key) if core.locator.find(grain_key(link)) is None]
    return missing[:NAMES_LISTED_MAX]


def _batched(items: Iterable[tuple[bytes, bytes]], size: int) -> Iterator[list[tuple[bytes, bytes]]]:
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def _names_of(walk: Walk, keys: Iterable[bytes]) -> tuple[bytes, ...]:
    """Names that refer to damaged contents, at most 100. Reads the names once for each finding: damage is rare."""
    wanted = set(keys)
    if not wanted:
        return ()
    names: list[bytes] = []
    try:
        for name, key in references(walk.core):
            if key in wanted and len(names) < NAMES_LISTED_MAX:
                names += user_name(name)
    except (CorruptionError, StorageError):
        pass  # Names that cannot be read are findings of their own.
    return tuple(names)


def _names_in(walk: Walk, identity: StratumId) -> tuple[bytes, ...]:
    """Names whose content lies in a stratum, at most 100; where its own index is lost, all that lie nowhere else."""
    names: list[bytes] = []
    core = walk.core
    try:
        for name, key in references(core):
            place = core.locator.find(core.keyring.grain_keys.grain_key(key))
            inside = identity in core.locator.broken if place is None else place.stratum == identity
            if inside and len(names) < NAMES_LISTED_MAX:
                names += user_name(name)
    except (CorruptionError, StorageError, ContentNotFound, ObjectMissing):
        pass  # As above.
    return tuple(names)


def _check_leftovers(core: Core) -> Iterator[Finding]:
    """Files that no record names. Those of live sessions are no finding."""
    for kind, identity, header in stored_strata(core):
        if identity in core.state.strata or identity in core.state.retired or core.own_strata.owns(identity):
            continue
        if header is None:
            detail = "a file without a whole header, in no record"
        elif header.session not in core.state.sessions:
            detail = "a stratum of an ended session, in no record"
        else:
            continue
        yield Finding("leftover", "warning", stratum_name(kind, identity), detail)
