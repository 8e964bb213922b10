"""The complete tree of exceptions that Basin raises on purpose.

Kinds follow what the caller does next: fix the call (`InvalidArgument`), look elsewhere (`NameNotFound`), try again
(`Conflict`, `StorageUnavailable`), reopen (`BasinPoisoned`), restore or repair (`CorruptionError`), settle
(`CommitUnknown`). Errors carry fields, so that nobody parses their text. Anybody may import this module; it imports
nothing of Basin.
"""

from __future__ import annotations

from typing import Any


class BasinError(Exception):
    """Base of every error raised by Basin. `fields` holds the values that the text mentions, by name."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __str__(self) -> str:
        return self.message

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.fields))


def _rebuild(kind: type[BasinError], message: str, fields: dict[str, Any]) -> BasinError:
    """Unpickle an error: keyword fields do not fit the plain `Exception` protocol."""
    return kind(message, **fields)


class InvalidArgument(BasinError, ValueError):
    """The call itself is wrong (type, range, unknown option). Fix the call."""


class NameNotFound(BasinError, KeyError):
    """The name has no value here. Field: `name`."""


class ContentNotFound(BasinError, KeyError):
    """No countable stratum holds this content key. Field: `content_key`."""


class CorruptionError(BasinError):
    """Stored bytes are not what was written. Run `basin check`, then restore or repair. Fields: `object`, `offset`."""


class ChecksumMismatch(CorruptionError):
    """A stored checksum, hash or content key does not match the bytes."""


class TruncatedStratum(CorruptionError):
    """A file ends before the bytes that the log says it holds."""


class AuthenticationFailed(CorruptionError):
    """Bytes sealed under the right key do not authenticate: they were changed, moved or swapped."""


class WrongSecret(BasinError):
    """The secret opens none of the key slots. Use another secret."""


class SecretRequired(BasinError):
    """The basin is encrypted and no secret was given."""


class NotABasin(BasinError):
    """Nothing at this place is a basin (no `basin.json`). Field: `url`."""


class UnsupportedVersion(BasinError):
    """Written by a newer Basin in a way this one must not ignore. Upgrade. Field: `version`."""


class Conflict(BasinError):
    """Another commit came first. Read again and retry. Field: `names` or `content_keys`, where known."""


class CommitUnknown(BasinError):
    """It cannot be known whether the commit happened. Call `db.resolve(error.token)`. Field: `token`."""


class StorageError(BasinError):
    """The disk or bucket failed. Fields: `object`, `operation`."""


class StorageUnavailable(StorageError):
    """The storage did not answer in time, or a lock stayed held. Try again later."""


class ObjectMissing(StorageError):
    """A named file or object is not there."""


class AlreadyExists(StorageError):
    """A file or object that must be new is there already."""


class OutOfSpace(StorageError):
    """The disk or quota is full. Free space, then reopen."""


class GrainNotReady(BasinError):
    """The grain lies in cold storage. Run `restore`, a command line, or call `db.thaw`; then read again.

    Fields: `object`, `storage_class` (and `tier`, the same), `restore`.
    """


class RollbackDetected(BasinError):
    """The basin is older than, or forked from, the head this client remembers. Fields: `expected`, `found`."""


class PositionGone(BasinError):
    """The log position lies below the history floor. Fields: `position`, `floor`."""


class MissingDependency(BasinError):
    """An optional package is needed. Field: `package`."""


class BasinClosed(BasinError):
    """The handle is closed, or was inherited through `fork`. Open a new one."""


class BasinPoisoned(BasinError):
    """A write or sync failed; the handle is read-only at its last durable position. Reopen. Field: `dropped`."""


class ReadOnly(BasinError):
    """The handle or the folder does not allow writing."""
