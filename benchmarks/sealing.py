"""The work that Basin does on every value and a plain store does not, for use on top of a plain store.

For content: BLAKE3 of the value is its key, zstd level 1 from 128 bytes on (below, Basin stores the bytes as they
are, and so does this), AES-256-GCM. Contexts are made once. It is at most what Basin does: Basin also looks every
key up (to store equal values once), checksums every grain, turns content keys into grain keys, and keeps track of
liveness.

The nonce of a value is the head of its digest (content) or a counter stored before it (names). That keeps the
peers' side as cheap as it can be; it is no advice for real stores.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Final

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from zstandard import ZstdCompressor, ZstdDecompressor

from benchmarks.workload import Pair

COMPRESSED_FROM: Final = 128
COMPRESSION_LEVEL: Final = 1
NONCE_SIZE: Final = 12


class Sealer:
    """Hashes, compresses and encrypts; and the way back. All values of one sealer have one size.

    `seal_name` may be called from several threads while values are below 128 bytes; the rest from one.
    """

    def __init__(self, cipher_key: bytes, value_size: int) -> None:
        """`cipher_key` is 32 bytes; `value_size` decides whether values are compressed."""
        self._cipher = AESGCM(cipher_key)
        self._compressed = value_size >= COMPRESSED_FROM
        self._compress = ZstdCompressor(level=COMPRESSION_LEVEL).compress
        self._decompress = ZstdDecompressor().decompress
        self._nonces = itertools.count()

    def seal_contents(self, values: Iterable[bytes]) -> Iterator[Pair]:
        """Each value as (digest, sealed bytes). The loop is flat: a call per step would be billed to the peer."""
        hash_value, encrypt, compress = blake3, self._cipher.encrypt, self._compress
        if self._compressed:
            for value in values:
                digest = hash_value(value).digest()
                yield digest, encrypt(digest[:NONCE_SIZE], compress(value), digest)
        else:
            for value in values:
                digest = hash_value(value).digest()
                yield digest, encrypt(digest[:NONCE_SIZE], value, digest)

    def open_contents(self, digests: Iterable[bytes], sealed: Iterable[bytes]) -> Iterator[bytes]:
        """The values of sealed bytes, in order."""
        decrypt, decompress = self._cipher.decrypt, self._decompress
        if self._compressed:
            for digest, data in zip(digests, sealed, strict=True):
                yield decompress(decrypt(digest[:NONCE_SIZE], data, digest))
        else:
            for digest, data in zip(digests, sealed, strict=True):
                yield decrypt(digest[:NONCE_SIZE], data, digest)

    def seal_names(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """Each (name, value) as (name, nonce and sealed bytes)."""
        encrypt, nonces = self._cipher.encrypt, self._nonces
        if self._compressed:
            pairs = ((name, self._compress(value)) for name, value in pairs)
        for name, value in pairs:
            nonce = next(nonces).to_bytes(NONCE_SIZE, "little")
            yield name, nonce + encrypt(nonce, value, name)

    def seal_name(self, name: bytes, value: bytes) -> bytes:
        """One value as `seal_names` has it."""
        return next(self.seal_names([(name, value)]))[1]

    def open_names(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """Each (name, sealed bytes) as (name, value)."""
        decrypt, decompress, compressed = self._cipher.decrypt, self._decompress, self._compressed
        for name, data in pairs:
            value = decrypt(data[:NONCE_SIZE], data[NONCE_SIZE:], name)
            yield name, decompress(value) if compressed else value
