"""Cryptography on bytes: every key that Basin derives, the grain-key permutation, sealing, and page tags.

Invariants:

- Each derivation has a label of its own, and after the label only fields of fixed length: no two share an input.
- A cipher key never seals two messages under one nonce. A stratum has its own cipher key and its nonces are grain
  offsets (`nonce_of_offset`); a log record has its own cipher key.
- Nothing here draws randomness or reads a clock: random bytes are arguments.
- Only `cryptography` and `blake3` compute; nothing is hand-made.

Any module of `basin.format` and `basin.engine` may import this one. It knows no file. It cannot erase keys from memory:
Python gives no such promise.
"""

from __future__ import annotations

from typing import Final, NamedTuple, NoReturn

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher as BlockCipher
from cryptography.hazmat.primitives.ciphers import CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from basin.errors import AuthenticationFailed, InvalidArgument
from basin.format.layout import PAGE_TAG_SIZE

KEY_SIZE: Final = 32
TAG_SIZE: Final = 16
NONCE_SIZE: Final = 12
COMMITMENT_SIZE: Final = 32

_ID_SIZE: Final = 16
_HASH_SIZE: Final = 32

_STRATUM_LABEL: Final = b"basin 1 stratum"
_LOG_LABEL: Final = b"basin 1 log"
_OPEN_PAGE_TAG_CONTEXT: Final = "basin 1 page tags of an open basin"
_NO_COMMITMENT: Final = bytes(COMMITMENT_SIZE)


class MasterKey:
    """The master key of one generation. Shows its generation only; refuses pickling and copying."""

    __slots__ = ("generation", "secret")

    generation: int
    secret: bytes

    def __init__(self, generation: int, secret: bytes) -> None:
        """Raise `InvalidArgument` unless `secret` is 32 bytes."""
        require_size("master key", secret, KEY_SIZE)
        self.generation = generation
        self.secret = secret

    def __repr__(self) -> str:
        return f"MasterKey(generation={self.generation})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a master key is not pickled; let the other process open the basin with its own secret source")


class StratumKeys(NamedTuple):
    """What one stratum needs: `cipher_key` (empty in an open basin), the public `commitment`, `tag_key` for pages."""

    cipher_key: bytes
    commitment: bytes
    tag_key: bytes

    def __repr__(self) -> str:
        return "StratumKeys()"


def require_size(what: str, data: bytes, size: int) -> None:
    """Raise `InvalidArgument`, naming `what` but never its bytes, unless `data` is `size` bytes long."""
    if len(data) != size:
        raise InvalidArgument(f"{what} must be {size} bytes, not {len(data)}")


def derive_stratum_keys(
    master: bytes, key_material: bytes, descriptor_hash: bytes, stratum_id: bytes, kind: int
) -> StratumKeys:
    """Derive one stratum's keys: HKDF-SHA256, salted with the 32 random bytes of the stratum's header.

    The descriptor's hash is an input, so that a changed `basin.json` (a flipped profile, say) opens nothing; id and
    kind are inputs, so that a stratum cannot take another's name or role. AES-GCM does not commit to its key; the
    stored `commitment` does, and tells a wrong key from damage before anything is decrypted (compare by
    `hmac.compare_digest`).

    `kind` is 0..255. Costs about 5 µs: once per stratum, never per grain.
    """
    _require_stratum_context(key_material, descriptor_hash, stratum_id, kind)
    require_size("master key", master, KEY_SIZE)
    info = _STRATUM_LABEL + descriptor_hash + stratum_id + bytes((kind,))
    derived = HKDF(algorithm=SHA256(), length=3 * KEY_SIZE, salt=key_material, info=info).derive(master)
    return StratumKeys(derived[:32], derived[32:64], derived[64:])


def open_stratum_keys(descriptor_hash: bytes, stratum_id: bytes, kind: int) -> StratumKeys:
    """The counterpart of `derive_stratum_keys` in an open basin: no cipher key, an all-zero commitment.

    The tag key comes from public values only: page tags then are checksums that also tell swapped pages and strata, and
    no protection against somebody who computes them anew.
    """
    _require_stratum_context(bytes(KEY_SIZE), descriptor_hash, stratum_id, kind)
    hasher = blake3(descriptor_hash + stratum_id + bytes((kind,)), derive_key_context=_OPEN_PAGE_TAG_CONTEXT)
    return StratumKeys(b"", _NO_COMMITMENT, hasher.digest())


def _require_stratum_context(key_material: bytes, descriptor_hash: bytes, stratum_id: bytes, kind: int) -> None:
    require_size("key material", key_material, KEY_SIZE)
    require_size("descriptor hash", descriptor_hash, _HASH_SIZE)
    require_size("stratum id", stratum_id, _ID_SIZE)
    if not 0 <= kind <= 255:
        raise InvalidArgument(f"a stratum kind is 0..255, not {kind}")


def derive_log_key(master: bytes, descriptor_hash: bytes) -> bytes:
    """Derive the 32-byte key of the log for one generation. It seals nothing itself; it only derives record keys."""
    require_size("master key", master, KEY_SIZE)
    require_size("descriptor hash", descriptor_hash, _HASH_SIZE)
    return HKDF(algorithm=SHA256(), length=KEY_SIZE, salt=None, info=_LOG_LABEL + descriptor_hash).derive(master)


def derive_record_key(log_key: bytes, randomness: bytes) -> bytes:
    """Derive the cipher key of one log record from the 32 fresh random bytes that the record carries.

    A segment has many writers, and a losing record is written again at another place, so offsets would repeat as nonces
    there. With a cipher key of its own a record may use any fixed nonce. Keyed BLAKE3 is a pseudo-random function, and
    costs an eighth of HKDF; a commit pays it, so it matters.
    """
    require_size("record randomness", randomness, KEY_SIZE)
    return blake3(randomness, key=log_key).digest()


class GrainKeyMap:
    """The one-to-one map between content keys (public BLAKE3 hashes) and grain keys (what stands in grain headers).

    In an open basin (`id_key` None) it is the identity. In an encrypted one a content key's two 16-byte blocks are
    encrypted, each by itself, with AES-256 under the id key.

    Why that mode, ECB, is right *here*: content keys are outputs of a cryptographic hash, so their blocks are uniform
    and distinct contents share a block with probability about count² / 2¹²⁷. On distinct inputs AES is a keyed
    pseudo-random permutation: without the id key an image says nothing about its input but equality, and equality of
    grain keys is what deduplication shows anyway. It needs no nonce, has an inverse (so listing needs no second
    column), and runs in batches. It would be wrong for anything with structure: for text, counters or padded values
    equal blocks would show as equal, and nothing is authenticated (the grain's associated data authenticates its grain
    key). Never use it for anything but hashes.

    The id key never rotates: a new one would rename every grain.

    Safe for several threads. One `cryptography` context refuses simultaneous calls ("Already borrowed"), so each call
    takes one from a list (`pop` and `append` are atomic) and gives it back; there are never more than threads at once.
    """

    __slots__ = ("_decryptors", "_encryptors", "_permutation")

    def __init__(self, id_key: bytes | None) -> None:
        """Raise `InvalidArgument` unless `id_key` is None or 32 bytes."""
        if id_key is not None:
            require_size("id key", id_key, KEY_SIZE)
        self._permutation = None if id_key is None else BlockCipher(algorithms.AES256(id_key), modes.ECB())  # noqa: S305 - see above: uniform blocks
        self._encryptors: list[CipherContext] = []
        self._decryptors: list[CipherContext] = []

    def grain_key(self, content_key: bytes) -> bytes:
        """Map one content key. Raise `InvalidArgument` unless it is 32 bytes. Costs about 0.3 µs."""
        if len(content_key) != KEY_SIZE:
            raise InvalidArgument(f"a content key is made of 32 bytes, not {len(content_key)}")
        return self.grain_keys(content_key)

    def grain_keys(self, joined: bytes) -> bytes:
        """Map many content keys, joined without gaps (n * 32 bytes), in order. Costs about 5 ns a key."""
        if self._permutation is None:
            return joined
        # A rest that fills no block would stay in the context and shift every later result.
        if len(joined) % KEY_SIZE:
            raise InvalidArgument(f"joined content keys must be a multiple of 32 bytes, not {len(joined)}")
        try:
            context = self._encryptors.pop()
        except IndexError:
            context = self._permutation.encryptor()
        result = context.update(joined)
        self._encryptors.append(context)
        return result

    def content_key(self, grain_key: bytes) -> bytes:
        """The inverse of `grain_key`."""
        if len(grain_key) != KEY_SIZE:
            raise InvalidArgument(f"a grain key is made of 32 bytes, not {len(grain_key)}")
        return self.content_keys(grain_key)

    def content_keys(self, joined: bytes) -> bytes:
        """The inverse of `grain_keys`."""
        if self._permutation is None:
            return joined
        if len(joined) % KEY_SIZE:
            raise InvalidArgument(f"joined grain keys must be a multiple of 32 bytes, not {len(joined)}")
        try:
            context = self._decryptors.pop()
        except IndexError:
            context = self._permutation.decryptor()
        result = context.update(joined)
        self._decryptors.append(context)
        return result

    def __repr__(self) -> str:
        return f"GrainKeyMap({'identity' if self._permutation is None else 'keyed'})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a grain-key map holds the id key and is not pickled")


class Cipher:
    """AES-256-GCM under one key. Safe for several threads.

    `aead` is the object underneath, for loops that cannot afford one more call a grain; whoever uses it translates
    `cryptography.exceptions.InvalidTag` as `open` does.
    """

    __slots__ = ("aead",)

    aead: AESGCM

    def __init__(self, cipher_key: bytes) -> None:
        """Raise `InvalidArgument` unless `cipher_key` is 32 bytes."""
        require_size("cipher key", cipher_key, KEY_SIZE)
        self.aead = AESGCM(cipher_key)

    def seal(self, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
        """Encrypt and authenticate: `len(plaintext) + 16` bytes. Never use a `nonce` (12 bytes) twice."""
        return self.aead.encrypt(nonce, plaintext, associated)

    def open(self, nonce: bytes, sealed: bytes, associated: bytes) -> bytes:
        """Return the plaintext, or raise `AuthenticationFailed` if any bit of the arguments is not what `seal` saw."""
        try:
            return self.aead.decrypt(nonce, sealed, associated)
        except InvalidTag:
            raise AuthenticationFailed(
                "sealed bytes do not authenticate: they were changed, moved or swapped"
            ) from None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a cipher holds a cipher key and is not pickled")


def nonce_of_offset(offset: int) -> bytes:
    """The nonce of the grain at `offset` (0 .. 2^64 - 1) of its stratum: 8 bytes little-endian, then 4 zero bytes.

    Why an offset may be a nonce: a cipher key belongs to one stratum (32 random bytes enter it), a stratum has one
    writer, and no offset is written twice, because after a crash, a failed write or a reopen a new stratum is begun. So
    no (key, nonce) pair repeats, without a counter that would have to survive crashes and copies of a machine.
    """
    return offset.to_bytes(NONCE_SIZE, "little")


def page_tag(tag_key: bytes, stratum_id: bytes, page_number: int, page: bytes) -> bytes:
    """The 16-byte tag of an index page: keyed BLAKE3 over stratum id, page number (8 bytes, little-endian) and page.

    Id and number are inputs, so that a page cannot stand in for another. Compare by `hmac.compare_digest`.
    """
    hasher = blake3(stratum_id + page_number.to_bytes(8, "little"), key=tag_key)
    return hasher.update(page).digest(length=PAGE_TAG_SIZE)
