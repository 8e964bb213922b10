"""Contents: content-addressed values as grains, deduplicated, compressed, sealed; large ones as clasts of parts.

The way of a put: hash, grain key, look-up; only if nothing countable holds it: compress, seal, append to the active
stratum. Contents that carry links, clasts, and what is put as `hot` go to a META stratum, everything else to a DATA
stratum.

Invariants:

- A content that was found is *relied on*: the place goes into the caller's `Relied`, and the commit checks that the
  stratum still counts, because a compactor may be removing it meanwhile.
- What is returned has the content key that was asked for: by its seal, or, in an open basin, by hashing it again.
- What is put as `hot` lies in a META stratum, also where a DATA stratum holds it already: `data/` may be cold.
- Appending is serialised by one mutex; hashing, compressing and decompressing happen outside of it.

Longer than most files: putting and getting are two halves of one thought.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any, Final, TypeAlias, TypeVar

import zstandard
from blake3 import blake3

from basin.engine.clasts import ListedParts, Parts
from basin.engine.cutting import Cutter, make_cutter
from basin.engine.index import GrainLocator
from basin.engine.keyring import Keyring
from basin.engine.options import Options
from basin.engine.reader import (
    CHANGED_IN_MEMORY,
    SealedGrain,
    StratumReader,
    StratumReaders,
    open_again,
    open_all,
    open_together,
)
from basin.engine.sources import BytesSource, Reading, Source
from basin.engine.streaming import Packed, Stream
from basin.engine.together import POOL_NAME, Together, stretches
from basin.engine.writer import StratumWriter
from basin.errors import (
    BasinError,
    ChecksumMismatch,
    ContentNotFound,
    CorruptionError,
    GrainNotReady,
    ObjectMissing,
    TruncatedStratum,
)
from basin.format.clast import Clast, decode_clast, decode_part_list, encode_clast
from basin.format.layout import CODEC_STORED, FLAG_LINKS, Kind, StratumKind
from basin.format.payload import COMPRESS_SIZE_MIN, Payload, compress, join_links, shorter
from basin.terms import ContentKey, Location, StratumId

T = TypeVar("T")
U = TypeVar("U")
Relied: TypeAlias = dict[bytes, StratumId]
"""Content keys that a batch found instead of writing them, and the stratum each was found in."""
Linked: TypeAlias = tuple[bytes, list[bytes]]
"""A content, and the content keys that one of its grains links to."""

_PARALLEL_SIZE_MIN: Final = 256 << 10
"""Below this many bytes a batch is done before a second thread has woken up."""
_PARALLEL_ITEM_MIN: Final = 512
"""Below this mean size threads wait for the interpreter's lock more than they work."""
_FETCH_ITEM_MIN: Final = 16 << 10
"""The same where every item is read and opened by calls of its own."""
_TASK_SIZE: Final = 128 << 10
_READ_TASK_SIZE: Final = 512 << 10
_AHEAD_SIZE: Final = 256 << 10
"""Bytes that are compressed together: enough that a task costs little, few enough that sealing soon has work."""
_LOOKS: Final = 8
"""Times that something is searched anew while others merge away what is looked into."""
_contexts = threading.local()


def links_digest(links: Sequence[bytes]) -> bytes:
    """What tells one list of links from another."""
    return blake3(b"".join(links)).digest(16)


class Contents:
    """Puts and gets contents of one handle. Safe for threads."""

    def __init__(
        self,
        keyring: Keyring,
        readers: StratumReaders,
        locator: GrainLocator,
        options: Options,
        writer_for: Callable[[StratumKind], StratumWriter],
        reload: Callable[[], None],
    ) -> None:
        """`writer_for` gives the active stratum of a kind; `reload` follows the log when a stratum went missing."""
        self._keyring = keyring
        self._cutter: Cutter | None = None
        self._map = keyring.grain_keys
        self._sealed = keyring.profile == "encrypted"
        self._readers = readers
        self._cached = readers.grains.get
        self._locator = locator
        self._options = options
        self._writer_for = writer_for
        self._reload = reload
        self._pool: ThreadPoolExecutor | None = None
        self._together = Together(
            readers, locator, self._executor, self._reader_of, self._get_whole, sealed=self._sealed
        )
        self.mutex = threading.RLock()
        """Held while appending, and by whoever switches or syncs strata."""
        self.damaged: frozenset[bytes] = frozenset()
        """Content keys whose grains are known to be damaged: they do not count as found."""
        self.linked: Relied = {}
        """What the grains with links that this handle appended link to, and where that lies; until it is logged."""
        self.new_count = self.new_size = self.found_count = self.found_size = self.stored_size = 0

    # --- putting ----------------------------------------------------------------------------------------------------

    def put(self, content: bytes, relied: Relied, links: Sequence[bytes] = (), *, hot: bool = False) -> bytes:
        """Store `content`, unless it is there; returns its content key."""
        if len(content) > self._options.part_max:
            return self.put_stream(BytesSource(content), relied, links, hot=hot)
        return self._put_grain(Kind.BLOB, content, relied, links, hot=hot)

    def _put_grain(
        self,
        kind: Kind,
        content: bytes,
        relied: Relied,
        links: Sequence[bytes],
        *,
        hot: bool,
        counted: int | None = None,
    ) -> bytes:
        key = blake3(content).digest()
        self._put_keyed(kind, key, content, relied, links, hot=hot, counted=counted)
        return key

    def _put_keyed(
        self,
        kind: Kind,
        key: bytes,
        content: bytes,
        relied: Relied,
        links: Sequence[bytes],
        *,
        hot: bool,
        counted: int | None = None,
    ) -> None:
        """`counted` is the size to count, where `content` only describes what is counted elsewhere."""
        size = len(content) if counted is None else counted
        if self._is_there(key, relied, links, size, hot=hot):
            return
        marked = key + links_digest(links) if links else key
        codec, data = compress(join_links(links, content) if links else content, self._compressor())
        flags = FLAG_LINKS if links else 0
        with self.mutex:
            writer = self._writer_for(StratumKind.META if links or hot else StratumKind.DATA)
            location = writer.append(kind, self._map.grain_key(key), codec, flags, data)
            relied[marked] = location.stratum
            self.linked.update((link, relied[link]) for link in links)
        self._count_new(size, location)

    def _is_there(self, key: bytes, relied: Relied, links: Sequence[bytes], size: int, *, hot: bool) -> bool:
        """Whether a put is superfluous; then what it found is relied on, and counted."""
        place = self._duplicate(self._map.grain_key(key), key, links, hot=hot)
        if place is None:
            return False
        self._rely(relied, key + links_digest(links) if links else key, place)
        self._count_many(0, 0, 1, size)
        return True

    def _count_new(self, size: int, location: Location) -> None:
        self.new_count += 1
        self.new_size += size
        self.stored_size += location.length

    def rely_on(self, key: bytes, relied: Relied) -> None:
        """Refer to content by its key; raise `ContentNotFound` unless it is there."""
        grain_key = self._map.grain_key(key)
        place = self._looking_again(lambda: self._locator.find(grain_key))
        if place is None:
            self._reload()  # Somebody else may have committed it since this handle last looked.
            place = self._locator.find_surely(grain_key)
        if place is None:
            self._require_all_indexes()
            raise ContentNotFound(f"no content {key.hex()} in this basin", content_key=ContentKey(key))
        self._rely(relied, key, place)

    def rely_on_many(self, keys: Sequence[bytes], relied: Relied) -> None:
        """`rely_on` for many keys, which are looked for together: 0.6 µs each."""
        grain_keys = self._grain_keys(keys)
        places = self._looking_again(lambda: self._locator.find_many(grain_keys))
        for key, place in zip(keys, places, strict=True):
            if place is None:
                self.rely_on(key, relied)
            else:
                relied[key] = place.stratum

    def missing(self, keys: Sequence[bytes], relied: Relied) -> list[bytes]:
        """Those that no countable stratum holds undamaged, as far as is known. Reads no content; 1 us each.

        Where damage is known it also reads the lists of parts. The others are relied on.
        """
        grain_keys = self._grain_keys(keys)
        places = self._looking_again(lambda: self._locator.find_many(grain_keys))
        missing = []
        for key, place in zip(keys, places, strict=True):
            if place is None or (self.damaged and not self._is_whole(key, place)):
                missing.append(key)
            else:
                relied[key] = place.stratum
        return missing

    def _is_whole(self, key: bytes, place: Location) -> bool:
        """Whether nothing of a content is known to be damaged."""
        if key in self.damaged:
            return self._is_readable(key)
        if self._locator.kind_of(place.stratum) != StratumKind.META:
            return True  # No clast: those have links.
        parts = self.parts(key)
        return isinstance(parts, bytes) or all(
            part.key not in self.damaged or self._is_readable(part.key) for part in parts
        )

    def _grain_keys(self, keys: Sequence[bytes]) -> list[bytes]:
        joined = self._map.grain_keys(b"".join(keys))
        return [joined[at : at + 32] for at in range(0, len(joined), 32)]

    def _duplicate(self, grain_key: bytes, key: bytes, links: Sequence[bytes], *, hot: bool) -> Location | None:
        """A grain that makes a put superfluous: any of the key, or one with the same links if there are links."""
        if key in self.damaged and not self._is_readable(key):
            return None
        if not links and not hot:
            return self._looking_again(lambda: self._locator.find(grain_key))

        def search() -> Location | None:
            for place in self._places_in_meta(grain_key):
                if not links or self._read(place, grain_key)[1].links == list(links):
                    return place
            return None

        return self._looking_again(search)

    def _places_in_meta(self, grain_key: bytes) -> Iterator[Location]:
        """Where grains of a key may have links. None of `data/` has, and reading one there may take hours."""
        for place in self._locator.find_all(grain_key):
            if self._locator.kind_of(place.stratum) == StratumKind.META:
                yield place

    def _looking_again(self, search: Callable[[], T]) -> T:
        """What `search` finds, also if somebody merges strata that it looks into."""
        for _ in range(_LOOKS):
            try:
                return search()
            except ObjectMissing:
                self._reload()
        return search()

    def find_linked(self, key: bytes, digest: bytes) -> Location | None:
        """Where a grain of `key` lies that has the links of which `digest` is."""
        grain_key = self._map.grain_key(key)
        for place in self._locator.find_all(grain_key):
            with contextlib.suppress(ObjectMissing, CorruptionError):
                if self._locator.kind_of(place.stratum) != StratumKind.META:
                    continue
                if links_digest(self._read(place, grain_key)[1].links) == digest:
                    return place
        return None

    def _is_readable(self, key: bytes) -> bool:
        """Whether a content that was recorded as damaged has been put again since."""
        try:
            self._grain(key)
        except (BasinError, KeyError):
            return False
        return True

    def _rely(self, relied: Relied, key: bytes, place: Location) -> None:
        """Also on what this handle itself is writing: that may be logged, and collected, before the batch is."""
        relied[key] = place.stratum

    def put_many(self, contents: Sequence[bytes], relied: Relied, *, hot: bool = False) -> list[bytes]:
        """`put` without links for many; hashing and compressing on all cores where they are large."""
        sizes = [len(content) for content in contents]
        total = sum(sizes)
        if sizes and max(sizes) > self._options.part_max:
            return [self.put(content, relied, hot=hot) for content in contents]
        parallel = self._is_parallel(total, len(sizes))
        keys = self._map_batch(_hash_all, contents, sizes) if parallel else _hash_all(contents)
        grain_keys = self._grain_keys(keys)
        find = self._find_many_in_meta if hot else self._locator.find_many
        found = self._looking_again(lambda: find(grain_keys))
        kind = StratumKind.META if hot else StratumKind.DATA
        if not any(found) and len(set(keys)) == len(keys):
            self._append_new(contents, sizes, keys, grain_keys, range(len(keys)), relied, kind, parallel=parallel)
            self._count_many(len(keys), total, 0, 0)
            return keys
        rows: list[int] = []
        found_size, seen = 0, set[bytes]()
        for row, place in enumerate(found):
            if place is not None and (keys[row] not in self.damaged or self._is_readable(keys[row])):
                self._rely(relied, keys[row], place)
                found_size += sizes[row]
            elif keys[row] in seen:
                found_size += sizes[row]
            else:
                seen.add(keys[row])
                rows.append(row)
        self._append_new(contents, sizes, keys, grain_keys, rows, relied, kind, parallel=parallel)
        self._count_many(len(rows), total - found_size, len(contents) - len(rows), found_size)
        return keys

    def _count_many(self, new: int, new_size: int, found: int, found_size: int) -> None:
        with self.mutex:
            self.new_count += new
            self.new_size += new_size
            self.found_count += found
            self.found_size += found_size

    def _find_many_in_meta(self, grain_keys: Sequence[bytes]) -> list[Location | None]:
        """For each key a place in `meta/`, if there is one."""
        found = self._locator.find_many(grain_keys)
        kinds = {place.stratum: 0 for place in found if place is not None}
        for stratum in kinds:
            kinds[stratum] = self._locator.kind_of(stratum)
        return [
            place
            if place is None or kinds[place.stratum] == StratumKind.META
            else next(self._places_in_meta(grain_key), None)
            for grain_key, place in zip(grain_keys, found, strict=True)
        ]

    def _is_parallel(self, size: int, count: int) -> bool:
        """Whether a batch is worth the pool, and this is not one of its threads."""
        return (
            size >= _PARALLEL_SIZE_MIN
            and size >= _PARALLEL_ITEM_MIN * count
            and self._options.worker_count > 1
            and not threading.current_thread().name.startswith(POOL_NAME)
        )

    def _append_new(
        self,
        contents: Sequence[bytes],
        sizes: Sequence[int],
        keys: Sequence[bytes],
        grain_keys: Sequence[bytes],
        rows: Sequence[int],
        relied: Relied,
        kind: StratumKind,
        *,
        parallel: bool,
    ) -> None:
        """Compress the contents at `rows` and append them, switching strata as they fill up."""
        plain = contents
        if len(rows) != len(contents):
            plain, keys = [contents[row] for row in rows], [keys[row] for row in rows]
            grain_keys = [grain_keys[row] for row in rows]
        if not plain or max(map(len, plain)) < COMPRESS_SIZE_MIN:
            self._append_packed(keys, grain_keys, [CODEC_STORED] * len(plain), plain, relied, kind)
            return
        batches = (
            self._compressed_ahead(plain, [sizes[row] for row in rows]) if parallel else [self._compress_all(plain)]
        )
        start = 0
        for packed in batches:
            stop = start + len(packed)
            codecs, payloads = [codec for codec, _ in packed], [data for _, data in packed]
            self._append_packed(keys[start:stop], grain_keys[start:stop], codecs, payloads, relied, kind)
            start = stop

    def _append_packed(
        self,
        content_keys: Sequence[bytes],
        keys: Sequence[bytes],
        codecs: Sequence[int],
        payloads: Sequence[bytes],
        relied: Relied,
        kind: StratumKind,
    ) -> None:
        start = 0
        with self.mutex:
            while start < len(keys):
                writer = self._writer_for(kind)
                stop = _fitting(payloads, start, writer.room)
                before = writer.offset
                new_keys, kinds, data = keys[start:stop], codecs[start:stop], payloads[start:stop]
                if not writer.locations.keys().isdisjoint(new_keys):
                    # Another thread has put some of them since they were looked for.
                    fresh = [row for row, key in enumerate(new_keys) if key not in writer.locations]
                    new_keys, kinds = [new_keys[row] for row in fresh], [kinds[row] for row in fresh]
                    data = [data[row] for row in fresh]
                writer.append_blobs(new_keys, kinds, data)
                relied.update(dict.fromkeys(content_keys[start:stop], writer.id))
                self.stored_size += writer.offset - before
                start = stop

    def _compressed_ahead(self, plain: Sequence[bytes], sizes: Sequence[int]) -> Iterator[Sequence[tuple[int, bytes]]]:
        """The contents compressed, in order, some at a time; while those are sealed, the next ones are compressed."""
        waiting: deque[Future[Sequence[tuple[int, bytes]]]] = deque()
        for part in stretches(plain, sizes, _AHEAD_SIZE):
            waiting.append(self._executor().submit(self._compress_together, part))
            if len(waiting) > self._options.worker_count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _compress_together(self, plain: Sequence[bytes]) -> Sequence[tuple[int, bytes]]:
        """`_compress_all` without the interpreter's lock, which a call for each would take again and again.

        zstandard's own threads are no help: it gives fewer than 1,000 items of 4 KiB to one of them.
        """
        large: list[bytes | bytearray | memoryview[int]] = [one for one in plain if len(one) >= COMPRESS_SIZE_MIN]
        if not large:
            return self._compress_all(plain)
        segments = self._compressor().multi_compress_to_buffer(large)
        packed = (segments[number].tobytes() for number in range(len(large)))
        return [
            shorter(content, next(packed)) if len(content) >= COMPRESS_SIZE_MIN else (CODEC_STORED, content)
            for content in plain
        ]

    def _map_batch(
        self, work: Callable[[Sequence[bytes]], list[Any]], items: Sequence[bytes], sizes: Sequence[int]
    ) -> list[Any]:
        """`work` over slices of `items` of about `_TASK_SIZE` bytes each, on the pool, in order."""
        return list(chain.from_iterable(self._executor().map(work, stretches(items, sizes, _TASK_SIZE))))

    def _compress_all(self, plain: Sequence[bytes]) -> list[tuple[int, bytes]]:
        compressor = self._compressor()
        return [compress(content, compressor) for content in plain]

    def put_stream(self, source: Source, relied: Relied, links: Sequence[bytes] = (), *, hot: bool = False) -> bytes:
        """Store all that `source` gives, in bounded memory: one grain up to `part_max`, a clast of parts above."""
        options = self._options
        reading = Reading(source, options.part_max)
        head = reading.whole()
        if head is not None:
            return self._put_grain(Kind.BLOB, head, relied, links, hot=hot)
        if self._cutter is None:
            self._cutter = make_cutter(options.chunker, options.part_size, options.part_max, self._keyring)

        def put_list(content: bytes, parts: Sequence[bytes]) -> bytes:
            key = self._put_grain(Kind.BLOB, content, relied, parts, hot=hot, counted=0)
            relied[key] = relied[key + links_digest(parts)]
            return key

        listed = ListedParts(put_list)
        part_stored = reading.part_stored

        def append(size: int, packed: Packed) -> None:
            self._put_packed(size, packed, relied, hot=hot)
            listed.add(packed[0], size)
            part_stored(packed[0], size)

        pack = partial(self._pack_part, hot=hot)
        stream = Stream(self._executor(), options.worker_count, options.part_size, pack, append)
        key = stream.run(reading.parts(self._cutter), is_sparse=reading.is_sparse)
        content, linked = listed.finish(links)
        self._put_keyed(Kind.CLAST, key, content, relied, linked, hot=hot, counted=0)
        return key

    def _pack_part(self, part: bytes, *, hot: bool) -> Packed:
        """Content key, codec and compressed payload of a part; not compressed if it is there already."""
        key = blake3(part).digest()
        with contextlib.suppress(ObjectMissing):  # Looked for again when its turn comes.
            if not hot and self._locator.find(self._map.grain_key(key)) is not None:
                return key, CODEC_STORED, part
        return key, *compress(part, self._compressor())

    def _put_packed(self, size: int, packed: Packed, relied: Relied, *, hot: bool) -> None:
        """Append a part, unless it is there."""
        key, codec, data = packed
        if self._is_there(key, relied, (), size, hot=hot):
            return
        with self.mutex:
            writer = self._writer_for(StratumKind.META if hot else StratumKind.DATA)
            location = writer.append(Kind.PART, self._map.grain_key(key), codec, 0, data)
            relied[key] = location.stratum
        self._count_new(size, location)

    # --- getting ----------------------------------------------------------------------------------------------------

    def get(self, key: bytes) -> bytes:
        """The whole content; raise `ContentNotFound`. A clast is put together in memory."""
        sealed = self._cached(key)
        if sealed is not None:
            try:
                known = open_again(sealed)
                if self._sealed or blake3(known).digest() == key:
                    return known
            except CHANGED_IN_MEMORY:
                pass
            self._readers.grains.pop(key, None)
        grain_key = self._map.grain_key(key)
        place = self._locator.place(grain_key)
        if place is not None:
            content = self._read_plain(place, grain_key, key)
            if content is not None:
                return content
        return self._get_whole(key)

    def _get_whole(self, key: bytes) -> bytes:
        kind, payload = self._grain(key)
        if kind != Kind.CLAST:
            return payload.content
        parts = Parts(decode_clast(payload), self._read_list)
        content = b"".join(self.get_many([part.key for part in parts]))
        if blake3(content, max_threads=self._options.worker_count).digest() != key:
            raise ChecksumMismatch(f"the parts of {key.hex()} do not make up its content", object=key.hex(), offset=0)
        return content

    def _read_plain(self, place: tuple[StratumId, int, int], grain_key: bytes, key: bytes) -> bytes | None:
        """The content at `place` if that is a plain grain in an open file; None: `grain` must look closer."""
        stratum, offset, length = place
        reader = self._readers.opened(stratum)
        if reader is None:
            return None
        try:
            found = reader.read_content(offset, length, grain_key)
        except (ObjectMissing, TruncatedStratum, GrainNotReady):
            return None  # Removed, not yet handed to the operating system, or perhaps hot elsewhere.
        if found is None or not (self._sealed or blake3(found.content).digest() == key):
            return None
        self._readers.keep_grain(key, found.sealed, stratum)
        return found.content

    def grain(self, key: bytes) -> tuple[int, Payload]:
        """(kind, payload) of the grain of a content key; raise `ContentNotFound`.

        A clast is given as one that lists all its parts, also where it is stored as a list of lists.
        """
        kind, payload = self._grain(key)
        if kind != Kind.CLAST:
            return kind, payload
        clast = decode_clast(payload)
        if not clast.counts:
            return kind, payload
        parts = list(Parts(clast, self._read_list))
        lengths = encode_clast([part.stop - part.start for part in parts], len(clast.links))
        return kind, Payload([*clast.links, *(part.key for part in parts)], lengths)

    def _grain(self, key: bytes) -> tuple[int, Payload]:
        """`grain` as it is stored."""
        grain_key = self._map.grain_key(key)
        place = self._looking_again(lambda: self._locator.find_surely(grain_key))
        if place is None and self._locator.is_behind:
            self._reload()
        missing: Location | None = None
        while (place := self._looking_again(lambda: self._locator.find_surely(grain_key))) is not None:
            try:
                kind, payload = self._read_any(place, grain_key)
            except ObjectMissing:
                # Rewritten by somebody else since we last looked, perhaps twice: the log says where it lies now.
                if place == missing:
                    raise
                missing = place
                self._reload()
                continue
            if not self._sealed and kind != Kind.CLAST and blake3(payload.content).digest() != key:
                raise ChecksumMismatch(
                    f"stratum {place.stratum} at byte {place.offset}: not the content that its key says",
                    object=str(place.stratum),
                    offset=place.offset,
                )
            return kind, payload
        self._require_all_indexes()
        raise ContentNotFound(f"no content {key.hex()} in this basin", content_key=ContentKey(key))

    def clast(self, key: bytes) -> Clast | None:
        """The clast of a large content with all its parts, or None if it is one grain."""
        kind, payload = self.grain(key)
        return decode_clast(payload) if kind == Kind.CLAST else None

    def parts(self, key: bytes) -> Parts | bytes:
        """The parts of a large content, which are looked up as they are asked for; one grain's content. One read."""
        kind, payload = self._grain(key)
        return Parts(decode_clast(payload), self._read_list) if kind == Kind.CLAST else payload.content

    def _read_list(self, key: bytes) -> Clast:
        ((content, parts),) = self.get_linked_many([key])
        return decode_part_list(Payload(parts, content))

    def contains(self, key: bytes) -> bool:
        """Whether a countable stratum holds the content."""
        grain_key = self._map.grain_key(key)
        if self._looking_again(lambda: self._locator.find_surely(grain_key)) is not None:
            return True
        self._require_all_indexes()
        return False

    def _require_all_indexes(self) -> None:
        """Nothing is called absent while an index cannot be read."""
        for error in self._locator.broken.values():
            raise error

    def get_many(self, keys: Sequence[bytes]) -> list[bytes]:
        """The contents in the order of `keys`; raise `ContentNotFound` for the first that is nowhere."""
        cached = list(map(self._cached, keys))
        missing = [key for key, sealed in zip(keys, cached, strict=True) if sealed is None]
        if len(missing) == len(keys):
            return self._fetch_many(keys)
        if not missing:
            return self._open_all(keys, cached)
        opened = iter(self._open_all([key for key, sealed in zip(keys, cached, strict=True) if sealed], cached))
        fetched = iter(self._fetch_many(missing))
        return [next(fetched if sealed is None else opened) for sealed in cached]

    def _open_all(self, keys: Sequence[bytes], cached: Sequence[SealedGrain | None]) -> list[bytes]:
        """The contents of the grains in memory among `cached`, whose content keys are `keys`."""
        grains = [sealed for sealed in cached if sealed is not None]
        try:
            size = sum([len(sealed.data) for sealed in grains])
            if self._is_parallel(size, len(grains)):
                contents = self._on_pool(open_together, grains, size)
            else:
                contents = open_all(grains)
            if self._sealed or _hash_all(contents) == list(keys):
                return contents
        except CHANGED_IN_MEMORY:
            pass
        for key in keys:
            self._readers.grains.pop(key, None)
        return self._fetch_many(keys)

    def _fetch_many(self, keys: Sequence[bytes]) -> list[bytes]:
        """`get_many` of contents that are not in memory."""
        grain_keys = self._grain_keys(keys)
        places = self._looking_again(lambda: self._locator.find_many(grain_keys))
        size = sum([place.length for place in places if place is not None])
        wanted = list(zip(keys, grain_keys, places, strict=True))
        if self._readers.are_remote:
            return self._together.fetch(wanted)
        if size >= _FETCH_ITEM_MIN * len(keys) and self._is_parallel(size, len(keys)):
            return self._on_pool(self._fetch_all, wanted, size)
        return self._fetch_all(wanted)

    def _on_pool(self, work: Callable[[Sequence[T]], list[U]], items: Sequence[T], size: int) -> list[U]:
        """`work` over all `items`, which hold `size` bytes, in slices on the pool."""
        step = max(1, len(items) * _READ_TASK_SIZE // size)
        slices = [items[at : at + step] for at in range(0, len(items), step)]
        return list(chain.from_iterable(self._executor().map(work, slices)))

    def _fetch_all(self, wanted: Sequence[tuple[bytes, bytes, Location | None]]) -> list[bytes]:
        """Contents by (content key, grain key, where it lies)."""
        contents = []
        for key, grain_key, place in wanted:
            content = None if place is None else self._read_plain(place, grain_key, key)
            contents.append(self._get_whole(key) if content is None else content)
        return contents

    @property
    def are_remote(self) -> bool:
        """Whether reading costs a request."""
        return self._readers.are_remote

    def get_ahead(self, keys: Sequence[bytes]) -> Future[list[bytes]]:
        """`get_many` on another thread."""
        return self._executor().submit(self.get_many, keys)

    def links(self, key: bytes) -> list[bytes]:
        """Union of the links of all grains of a key; raise `ContentNotFound`, and why a stratum cannot be searched."""
        grain_key = self._map.grain_key(key)

        def search() -> list[list[bytes]]:
            found: list[list[bytes]] = []
            for place in self._locator.find_all(grain_key):
                is_meta = self._locator.kind_of(place.stratum) == StratumKind.META
                found.append(self._links_at(place, grain_key) if is_meta else [])
            return found

        found = self._looking_again(search)
        self._require_all_indexes()
        if not found:
            raise ContentNotFound(f"no content {key.hex()} in this basin", content_key=ContentKey(key))
        return list(dict.fromkeys(link for links in found for link in links))

    def _links_at(self, place: Location, grain_key: bytes) -> list[bytes]:
        """What the grain at `place` keeps alive; its parts, where it links to lists of them."""
        kind, payload = self._read(place, grain_key)
        clast = decode_clast(payload) if kind == Kind.CLAST else None
        if clast is None or not clast.counts:
            return payload.links
        return [*clast.links, *(part.key for part in Parts(clast, self._read_list))]

    def get_linked_many(self, keys: Sequence[bytes]) -> list[Linked]:
        """Content and links of a grain of each key, its links in their order; raise `ContentNotFound`.

        Of several grains of one key, it is one that has links, where there is one. Of a large content, the links are
        the caller's. One read each, on all cores; in a bucket of pieces that are kept.
        """
        grain_keys = self._grain_keys(keys)
        places = self._looking_again(lambda: self._find_many_in_meta(grain_keys))
        wanted = list(zip(keys, grain_keys, places, strict=True))
        size = sum([place.length for place in places if place is not None])
        if self._is_parallel(size, len(keys)) and (size >= _FETCH_ITEM_MIN * len(keys) or self._readers.are_remote):
            return self._on_pool(self._linked_all, wanted, size)
        return self._linked_all(wanted)

    def _linked_all(self, wanted: Sequence[tuple[bytes, bytes, Location | None]]) -> list[Linked]:
        """Content and links by (content key, grain key, where it lies)."""
        return [self._get_linked(*one) for one in wanted]

    def _get_linked(self, key: bytes, grain_key: bytes, place: Location | None) -> Linked:
        found = None if place is None else self._linked_at(place, grain_key, key)
        if found is not None and found[1]:
            return found

        def search() -> Linked | None:
            others = (self._linked_at(one, grain_key, key) for one in self._places_in_meta(grain_key) if one != place)
            return next((other for other in others if other is not None and other[1]), None)

        found = self._looking_again(search) or found
        if found is not None:
            return found
        kind, payload = self._grain(key)
        if kind == Kind.CLAST:
            return self._get_whole(key), decode_clast(payload).links
        return payload.content, payload.links

    def _linked_at(self, place: Location, grain_key: bytes, key: bytes) -> Linked | None:
        """Content and links of the grain at `place`; None if it cannot be read there, or is large."""
        try:
            kind, payload = self._read(place, grain_key)
        except (ObjectMissing, CorruptionError):
            return None
        if kind == Kind.CLAST or not (self._sealed or blake3(payload.content).digest() == key):
            return None
        return payload.content, payload.links

    def _read_any(self, place: Location, grain_key: bytes) -> tuple[int, Payload]:
        """The grain at `place`, or, if that is damaged or cold, another grain of the same key."""
        try:
            return self._read(place, grain_key)
        except (CorruptionError, GrainNotReady):
            for other in self._locator.find_all(grain_key):
                if other != place:
                    with contextlib.suppress(CorruptionError, GrainNotReady):
                        return self._read(other, grain_key)
            raise

    def _read(self, place: Location, grain_key: bytes) -> tuple[int, Payload]:
        return self._reader_of(place).read_grain(place.offset, place.length, grain_key)

    def _reader_of(self, place: Location) -> StratumReader:
        writer = self._locator.writer_of(place.stratum)
        if writer is not None and place.offset >= writer.flushed_offset:
            with self.mutex:
                writer.flush()
        return self._readers.opened(place.stratum) or self._readers.get(
            self._locator.kind_of(place.stratum), place.stratum
        )

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _compressor(self) -> zstandard.ZstdCompressor:
        level = self._options.compression_level
        compressors: dict[int, zstandard.ZstdCompressor] = _contexts.__dict__.setdefault("compressors", {})
        compressor = compressors.get(level)
        if compressor is None:
            compressor = compressors[level] = zstandard.ZstdCompressor(level=level, write_checksum=False)
        return compressor

    def _executor(self) -> ThreadPoolExecutor:
        with self.mutex:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._options.worker_count, thread_name_prefix=POOL_NAME)
            return self._pool

    def close(self) -> None:
        """End the worker threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _hash_all(contents: Sequence[bytes]) -> list[bytes]:
    return [blake3(content).digest() for content in contents]


def _fitting(payloads: Sequence[bytes], start: int, room: int) -> int:
    """End of a stretch of payloads that about fills `room` bytes, at least one and at most 2^13."""
    stop = start
    for payload in payloads[start : start + 8192]:
        stop += 1
        room -= len(payload) + 64
        if room <= 0:
            break
    return stop
