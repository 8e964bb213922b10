"""Secrets: what the user holds to open an encrypted basin.

Invariants:

- The bytes of a secret stand in no `repr`, no error and no pickle.
- A secret file is read only if its owner alone may read it, and never replaced.

Imported by the engine, `basin.api` and `basin`. Together with the commands' prompt this is the only place that reads
secrets from the environment.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from pathlib import Path
from typing import Final, NoReturn

from basin.errors import AlreadyExists, InvalidArgument, OutOfSpace, SecretRequired, StorageError
from basin.format.crypto import KEY_SIZE
from basin.format.slots import KIND_KEY_FILE, KIND_PASSPHRASE

PASSPHRASE_VARIABLE: Final = "BASIN_PASSPHRASE"  # noqa: S105 - the variable's name
SECRET_FILE_VARIABLE: Final = "BASIN_SECRET_FILE"  # noqa: S105 - the variable's name

SOURCE_MEMORY: Final = "memory"
SOURCE_ENVIRONMENT: Final = "environment"
_SOURCE_FILE: Final = "file:"

_HEX_SECRET: Final = re.compile(rb"([0-9a-fA-F]{64})(?:\r?\n)?")
_HEX_SECRET_SIZE_MAX: Final = 66


class Secret:
    """What opens an encrypted basin: a passphrase, or 32 random bytes that are kept in a file.

    `source` says where another process of the same user finds it again: `"environment"`, `"file:<path>"`, or `"memory"`
    (nowhere). Immutable but for `to_file`, which makes the file the source.
    """

    __slots__ = ("_material", "kind", "source")

    kind: str
    source: str

    def __init__(self, kind: str, material: bytes, source: str = SOURCE_MEMORY) -> None:
        """Use the class methods instead."""
        self.kind = kind
        self.source = source
        self._material = material

    @classmethod
    def from_passphrase(cls, passphrase: str | bytes) -> Secret:
        """A passphrase; text is taken as UTF-8 in Unicode's composed form (NFC), so that keyboards agree on accents.

        Raises `InvalidArgument` for an empty one, and for text that is no valid Unicode.
        """
        if not isinstance(passphrase, str | bytes):
            raise InvalidArgument(f"a passphrase is text or bytes, not {type(passphrase).__name__}")
        if isinstance(passphrase, str):
            passphrase = _encode_passphrase(passphrase)
        if not passphrase:
            raise InvalidArgument("a passphrase must not be empty")
        return cls(KIND_PASSPHRASE, passphrase)

    @classmethod
    def generate(cls) -> Secret:
        """A new secret of 32 random bytes. Keep it with `to_file`: without it the basin is lost."""
        return cls(KIND_KEY_FILE, os.urandom(KEY_SIZE))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Secret:
        """Read a secret file: 32 raw bytes, or 64 hex digits and perhaps a line end.

        Raises `InvalidArgument` if there is no such file, if it holds anything else, or if group or others may read it.
        """
        absolute = Path(path).absolute()
        return cls(
            KIND_KEY_FILE, _parse_secret_file(_read_secret_file(absolute), absolute), f"{_SOURCE_FILE}{absolute}"
        )

    @classmethod
    def from_env(cls) -> Secret:
        """The passphrase in `$BASIN_PASSPHRASE`, else the file that `$BASIN_SECRET_FILE` names, else `SecretRequired`.

        A variable that is set but empty counts as not set.
        """
        passphrase = os.environ.get(PASSPHRASE_VARIABLE)
        path = os.environ.get(SECRET_FILE_VARIABLE)
        if passphrase:
            secret = cls.from_passphrase(passphrase)
        elif path:
            secret = cls.from_file(path)
        else:
            raise SecretRequired(f"no secret: set ${PASSPHRASE_VARIABLE} or ${SECRET_FILE_VARIABLE}")
        secret.source = SOURCE_ENVIRONMENT
        return secret

    @classmethod
    def from_source(cls, source: str) -> Secret:
        """Find a secret again by what `source` of another one said, in another process.

        Raises `InvalidArgument` for `"memory"`, and what `from_env` and `from_file` raise.
        """
        if source == SOURCE_ENVIRONMENT:
            return cls.from_env()
        if source.startswith(_SOURCE_FILE):
            return cls.from_file(source.removeprefix(_SOURCE_FILE))
        raise InvalidArgument(
            "this secret lives in one process only: take it from a file (Secret.from_file) or from the environment "
            f"(${PASSPHRASE_VARIABLE}, ${SECRET_FILE_VARIABLE}), where another process finds it too",
            source=source,
        )

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write the secret, durably, as 64 hex digits into a new file that its owner alone may read.

        Raises `AlreadyExists` (nothing is ever replaced), `InvalidArgument` for a passphrase, `StorageError`.
        """
        if self.kind != KIND_KEY_FILE:
            raise InvalidArgument("a passphrase is not written to a file")
        absolute = Path(path).absolute()
        try:
            _write_secret_file(absolute, self._material.hex().encode("ascii") + b"\n")
        except FileExistsError:
            raise AlreadyExists(
                f"there is already a file {absolute}", object=str(absolute), operation="create"
            ) from None
        except OSError as error:
            kind = OutOfSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
            message = f"cannot write the secret file {absolute}: {error.strerror}"
            raise kind(message, object=str(absolute), operation="create") from error
        self.source = f"{_SOURCE_FILE}{absolute}"

    def material(self) -> bytes:
        """The secret bytes. For this module and whoever hands a secret on purpose to another program."""
        return self._material

    def __repr__(self) -> str:
        return f"Secret({self.kind}, from {self.source})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a secret is not pickled: give the other process a ticket (db.ticket()) and a secret source of its own, "
            "a file or the environment"
        )


def _encode_passphrase(text: str) -> bytes:
    try:
        return unicodedata.normalize("NFC", text).encode("utf-8")
    except UnicodeEncodeError:
        # `from None`: the original error would carry the passphrase.
        raise InvalidArgument("the passphrase is not valid Unicode text; pass bytes instead") from None


def _read_secret_file(path: Path) -> bytes:
    """At most one byte more than a secret file has. Non-blocking, so that a pipe is refused instead of waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"cannot read the secret file {path}: {error}", path=str(path)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgument(f"the secret file {path} is not a regular file", path=str(path))
        if status.st_mode & 0o077:
            raise InvalidArgument(f"others may read the secret file {path}: run chmod 600 {path}", path=str(path))
        return os.read(descriptor, _HEX_SECRET_SIZE_MAX + 1)
    except OSError as error:
        raise InvalidArgument(f"cannot read the secret file {path}: {error}", path=str(path)) from error
    finally:
        os.close(descriptor)


def _parse_secret_file(data: bytes, path: Path) -> bytes:
    if len(data) == KEY_SIZE:
        return data
    matched = _HEX_SECRET.fullmatch(data)
    if matched is None:
        raise InvalidArgument(f"the secret file {path} holds neither 32 bytes nor 64 hex digits", path=str(path))
    return bytes.fromhex(matched[1].decode("ascii"))


def _write_secret_file(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
