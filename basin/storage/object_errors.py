"""The one table by which what a client library of a bucket raises becomes a typed error of Basin.

Invariants:

- The text is one clear line of our own words: never the library's or the service's, which may quote a header, a signed
  address or an access key. A service's code is repeated only if it looks like one.
- `StorageUnavailable` means that trying again may help, and that the effect of a write cannot be known; its field
  `reason` is "contended", "timeout", "connection", "throttled" or "server". Every other error's `reason` is the
  service's code, or the name of the library's exception.
- `GrainNotReady` says how the object is made readable: its field `restore` is a command line.
- Libraries are recognised by the shape and the names of their exceptions, so that none of them is imported here.
  obstore's are recognised by their texts, which hold what it knows in the form that Rust prints for debugging.

Imports `basin.errors` and its neighbour `translation`, the same table for plain `OSError`.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from basin.errors import (
    AlreadyExists,
    BasinError,
    GrainNotReady,
    ObjectMissing,
    OutOfSpace,
    ReadOnly,
    StorageError,
    StorageUnavailable,
)
from basin.storage.translation import translated

_WRITING: Final = frozenset({"put", "put_new", "put_file", "delete"})
_TOKEN: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}|[0-9]{3}")
_CHAIN_MAX: Final = 16

# The text of an exception of obstore, from this line on: in quotes, a quotation mark has a backslash before it, so that
# an answer cannot pass for what is around it.
_DEBUG_LINE: Final = "\n\nDebug source:\n"
_DEBUG_ANSWER: Final = re.compile(
    r'(?:Status|Response) \{\s*status: (?P<status>[0-9]{3}),\s*body: (?:Some\(\s*)?(?P<body>"(?:[^"\\]|\\.)*"|None)'
)
_DEBUG_DELETION: Final = re.compile(
    r'DeleteFailed \{\s*path: "(?P<path>(?:[^"\\]|\\.)*)",\s*code: "(?P<code>(?:[^"\\]|\\.)*)"'
)
_DEBUG_URI: Final = re.compile(r"\buri: Some\(\s*[a-z]+://(?P<host>[^\s/,]+)(?P<path>[^\s,?]*)")
_XML_CODE: Final = re.compile(r"<Code>([^<]*)</Code>")
_XML_TIER: Final = re.compile(r"<StorageClass>([^<]*)</StorageClass>")
_CREDENTIAL_HOSTS: Final = re.compile(r"169\.254\.[0-9.]+|\[?fd00:ec2::[0-9a-f]+\]?|sts\..*")
_CREDENTIAL_PATHS: Final = re.compile(r"/latest/(api/token|meta-data/iam/security-credentials.*)")


class _Refusal(NamedTuple):
    """What an answer means. `reason` empty: the service's own code."""

    kind: type[BasinError]
    text: str
    reason: str = ""


_CONTENDED: Final = _Refusal(StorageUnavailable, "another request for the same name was under way", "contended")
_TIMEOUT: Final = _Refusal(StorageUnavailable, "the storage did not answer in time", "timeout")
_UNREACHABLE: Final = _Refusal(
    StorageUnavailable, "the endpoint cannot be reached, or broke the connection: check the endpoint", "connection"
)
_DAMAGED: Final = _Refusal(StorageUnavailable, "the bytes were damaged on their way", "connection")
_THROTTLED: Final = _Refusal(StorageUnavailable, "the storage asks for fewer requests", "throttled")
_SERVER: Final = _Refusal(StorageUnavailable, "the storage failed inside", "server")

_MISSING: Final = _Refusal(ObjectMissing, "there is no such object")
_NO_BUCKET: Final = _Refusal(StorageError, "there is no bucket {bucket!r}: create it, or check the URL")
_BAD_BUCKET: Final = _Refusal(StorageError, "the service does not accept the bucket name {bucket!r}: check the URL")
_EXISTS: Final = _Refusal(AlreadyExists, "an object of this name exists already")
_DENIED: Final = _Refusal(StorageError, "")  # Its kind and text depend on the operation: see `_denied`.
_NOT_IMPLEMENTED: Final = _Refusal(StorageError, "")  # See `_not_implemented`.
_COLD: Final = _Refusal(
    GrainNotReady, "the object lies in cold storage: it must be restored before it can be read: `basin thaw {name}`"
)
_NOTHING_TO_RESTORE: Final = _Refusal(StorageError, "the service says that there is nothing to restore")
_FULL: Final = _Refusal(OutOfSpace, "the quota of the bucket is used up: free some space, then reopen the basin")
_BAD_CREDENTIALS: Final = _Refusal(
    StorageError, "the service does not accept these credentials: check the access key, the secret and the endpoint"
)
_NO_CREDENTIALS: Final = _Refusal(
    StorageError, "no complete credentials were found: give storage options, or set up the profile or environment"
)
_EXPIRED: Final = _Refusal(StorageError, "the credentials have expired: renew them")
_CLOCK_OFF: Final = _Refusal(StorageError, "this machine's clock is off: set it")
_ELSEWHERE: Final = _Refusal(
    StorageError, "the bucket is in another region or behind another endpoint: check region_name and endpoint_url"
)
_DISABLED: Final = _Refusal(StorageError, "the service has closed this account or bucket: ask its operator")
_OTHER_RANGE: Final = _Refusal(StorageError, "the service answered another range than was asked for")
_BAD_NAME: Final = _Refusal(StorageError, "a name in the folder cannot be read: remove what is not of this basin")
_UNTRUSTED: Final = _Refusal(StorageError, "the endpoint's certificate is not trusted: check the endpoint and `verify`")

_CODES: Final[dict[str, _Refusal]] = {
    **dict.fromkeys(("NoSuchKey", "NoSuchVersion", "NotFound", "404"), _MISSING),
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": _BAD_BUCKET,
    **dict.fromkeys(("PreconditionFailed", "412"), _EXISTS),
    **dict.fromkeys(
        ("ConditionalRequestConflict", "ConcurrentModification", "OperationAborted", "Conflict", "409"), _CONTENDED
    ),
    **dict.fromkeys(("RequestTimeout", "RequestTimeoutException", "408"), _TIMEOUT),
    **dict.fromkeys(("SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException"), _THROTTLED),
    **dict.fromkeys(("TooManyRequests", "TooManyRequestsException", "RequestLimitExceeded", "429"), _THROTTLED),
    **dict.fromkeys(("ServiceUnavailable", "BandwidthLimitExceeded", "503"), _THROTTLED),
    # The upload in parts was ended by somebody else: it is begun anew.
    **dict.fromkeys(("InternalError", "NoSuchUpload"), _SERVER),
    **dict.fromkeys(("BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"), _DAMAGED),
    **dict.fromkeys(("AccessDenied", "Forbidden", "403"), _DENIED),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity"), _BAD_CREDENTIALS
    ),
    **dict.fromkeys(("AuthFailure", "InvalidClientTokenId", "UnrecognizedClientException", "401"), _BAD_CREDENTIALS),
    **dict.fromkeys(("CredentialsNotSupported", "MissingSecurityHeader"), _NO_CREDENTIALS),
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"), _EXPIRED),
    **dict.fromkeys(("RequestTimeTooSkewed", "RequestExpired"), _CLOCK_OFF),
    "InvalidObjectState": _COLD,
    **dict.fromkeys(("NotImplemented", "XNotImplemented", "501"), _NOT_IMPLEMENTED),
    **dict.fromkeys(("PermanentRedirect", "TemporaryRedirect", "Redirect", "301", "307", "308"), _ELSEWHERE),
    **dict.fromkeys(("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"), _ELSEWHERE),
    **dict.fromkeys(("QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507"), _FULL),
    **dict.fromkeys(("AllAccessDisabled", "AccountProblem", "NotSignedUp"), _DISABLED),
}
"""By the code of the service's answer; where an answer has no body (HEAD), its HTTP status stands for it."""

_CLASSES: Final[tuple[tuple[frozenset[str], _Refusal], ...]] = (
    (frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}), _NO_CREDENTIALS),
    (frozenset({"CredentialRetrievalError", "TokenRetrievalError", "SSOTokenLoadError"}), _NO_CREDENTIALS),
    (frozenset({"UnauthorizedSSOTokenError"}), _EXPIRED),
    (frozenset({"NoRegionError", "InvalidRegionError"}), _ELSEWHERE),
    (frozenset({"FlexibleChecksumError"}), _DAMAGED),
    (frozenset({"ReadTimeoutError", "ConnectTimeoutError", "FSTimeoutError", "TimeoutError"}), _TIMEOUT),
    (
        frozenset({"EndpointConnectionError", "ConnectionClosedError", "HTTPClientError", "IncompleteRead"}),
        _UNREACHABLE,
    ),
    (frozenset({"IncompleteReadError", "ResponseStreamingError", "ClientError", "ConnectionError"}), _UNREACHABLE),
    (frozenset({"gaierror", "SSLError"}), _UNREACHABLE),
    (frozenset({"ResponseParserError"}), _SERVER),
)
"""By the names of the exception's class and its bases, for failures without an answer; the first row that fits.

`ClientError` without an answer is aiohttp's, the base of its broken connections; botocore's always has one.
"""


_DEBUG_MARKS: Final[tuple[tuple[str, _Refusal, str], ...]] = (
    ("InvalidCertificate", _UNTRUSTED, "SSLCertVerificationError"),
    ("BareRedirect", _ELSEWHERE, "PermanentRedirect"),
    ("kind: Timeout", _TIMEOUT, ""),
    ("TimedOut", _TIMEOUT, ""),
    ("HttpError {", _UNREACHABLE, ""),
    ("InvalidListResponse", _SERVER, ""),
    ("InvalidDeleteObjectsResponse", _SERVER, ""),
    ("UnexpectedRange", _OTHER_RANGE, "UnexpectedRange"),
    ("InvalidPath", _BAD_NAME, "InvalidPathError"),
)
"""By a mark in the text of obstore, for failures without an answer; the first row that fits."""


def object_error(error: BaseException, operation: str, name: str, url: str) -> BasinError:
    """The typed error for `error`, to be raised `from` it; an error of Basin is returned as it is.

    `operation` is the port's word (`"put_new"`), `name` the object or folder, `url` the store's address for people.
    Fields: `object`, `operation`, `reason`; `status` where there was an answer; `tier` for cold storage.
    """
    if isinstance(error, BasinError):
        return error
    answer = next(_answers(error), None)
    if answer is not None:
        return _from_answer(answer, operation, name, url)
    known = next((found for one in _chain(error) if (found := _from_debug(_debug(one)))), None)
    if known is not None:
        refusal, reason = known
        fields = {"object": name, "operation": operation, "reason": refusal.reason or reason}
        return refusal.kind(f"{operation} {name!r} at {url}: {refusal.text}", **fields)
    return _from_classes(error, operation, name, url)


def refused(code: str, operation: str, name: str, url: str, *, status: int = 0, tier: str = "") -> BasinError:
    """The typed error for a code of the service, such as stands for single objects in the answer to a batch."""
    refusal = _refusal(code, status, operation)
    bucket = url.partition("://")[2].partition("/")[0]
    fields: dict[str, Any] = {"object": name, "operation": operation, "reason": refusal.reason or code}
    if status:
        fields["status"] = status
    if refusal is _COLD:
        fields |= {"tier": tier, "storage_class": tier, "restore": f"basin thaw {name}"}
    return refusal.kind(f"{operation} {name!r} at {url}: {refusal.text.format(bucket=bucket, name=name)}", **fields)


def answered_code(error: BaseException) -> str:
    """The service's code (or, without one, its HTTP status) behind an exception; `""` if there was no answer."""
    answer = next(_answers(error), None)
    return _code(answer)[0] if answer is not None else ""


def refused_path(error: BaseException) -> str:
    """The path in the bucket of the object that a batch of deletions left, if an exception of obstore says so."""
    found = next((found for one in _chain(error) if (found := _DEBUG_DELETION.search(_debug(one)))), None)
    return found["path"] if found is not None else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what lies behind it, outermost first; bounded, as chains may run in circles."""
    waiting: list[BaseException] = [error]
    for _ in range(_CHAIN_MAX):
        if not waiting:
            return
        current = waiting.pop(0)
        yield current
        wrapped = getattr(current, "kwargs", None)  # botocore keeps the error of its HTTP library here.
        inner = wrapped.get("error") if isinstance(wrapped, dict) else None
        behind = (current.__cause__, None if current.__suppress_context__ else current.__context__, inner)
        waiting.extend(one for one in behind if isinstance(one, BaseException))


def _answers(error: BaseException) -> Iterator[dict[str, Any]]:
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            yield response
        answer = _debug_answer(_debug(one))
        if answer is not None:
            yield answer


def _debug(error: BaseException) -> str:
    """What an exception of obstore says for debugging, else `""`."""
    return str(error).rpartition(_DEBUG_LINE)[2] if _DEBUG_LINE in str(error) else ""


def _debug_answer(text: str) -> dict[str, Any] | None:
    """The service's answer in a text of obstore, in the shape that botocore gives it."""
    found = _DEBUG_ANSWER.search(text)
    if found is None:
        refused_one = _DEBUG_DELETION.search(text)
        return {"Error": {"Code": refused_one["code"]}} if refused_one else None
    if _is_about_credentials(text):
        return None  # Not the bucket answered, but what should have given credentials.
    code, tier = _XML_CODE.search(found["body"]), _XML_TIER.search(found["body"])
    error = {"Code": code[1] if code else "", "StorageClass": tier[1] if tier else ""}
    return {"Error": error, "ResponseMetadata": {"HTTPStatusCode": int(found["status"])}}


def _is_about_credentials(text: str) -> bool:
    """Whether a text of obstore is about a request that should have given credentials, and not about the bucket."""
    asked = _DEBUG_URI.search(text)
    if asked is None:
        return False
    return bool(_CREDENTIAL_HOSTS.fullmatch(asked["host"]) or _CREDENTIAL_PATHS.fullmatch(asked["path"]))


def _from_debug(text: str) -> tuple[_Refusal, str] | None:
    """What a text of obstore means that holds no answer of the service, and the reason if the refusal has none."""
    if _is_about_credentials(text):
        return _NO_CREDENTIALS, "NoCredentialsError"
    for mark, refusal, reason in _DEBUG_MARKS:
        if mark in text:
            return refusal, reason
    return None


def _code(answer: dict[str, Any]) -> tuple[str, int]:
    """Code and HTTP status of an answer; the status (or "unknown") where the code is none that may be repeated."""
    metadata = answer.get("ResponseMetadata")
    status = metadata.get("HTTPStatusCode", 0) if isinstance(metadata, dict) else 0
    status = status if isinstance(status, int) else 0
    code = str(answer["Error"].get("Code") or "")
    if _TOKEN.fullmatch(code) is None:
        code = str(status) if status else "unknown"
    return code, status


def _from_answer(answer: dict[str, Any], operation: str, name: str, url: str) -> BasinError:
    code, status = _code(answer)
    tier = str(answer["Error"].get("StorageClass") or answer.get("StorageClass") or "")
    tier = tier if _TOKEN.fullmatch(tier) else ""
    return refused(code, operation, name, url, status=status, tier=tier)


def _refusal(code: str, status: int, operation: str) -> _Refusal:
    found = _CODES.get(code) or _CODES.get(str(status))
    if found is _COLD and operation == "restore":
        return _NOTHING_TO_RESTORE
    if found is _DENIED:
        return _denied(operation)
    if found is _NOT_IMPLEMENTED:
        return _not_implemented(operation)
    if found is _EXISTS and operation != "put_new":
        found = None  # Nothing else is sent under a condition.
    if found is _MISSING and operation in ("list", "put", "put_new", "put_file"):
        return _NO_BUCKET
    if found is None and status >= 500:
        return _SERVER
    return found or _Refusal(StorageError, f"the service refused it ({code})")


def _denied(operation: str) -> _Refusal:
    if operation in _WRITING:
        verb = "delete from" if operation == "delete" else "write to"
        return _Refusal(
            ReadOnly, f"no permission to {verb} the bucket {{bucket!r}}: check the policy of the credentials"
        )
    if operation == "restore":
        return _Refusal(StorageError, "no permission to restore objects of the bucket {bucket!r} (s3:RestoreObject)")
    if operation == "list":
        return _Refusal(
            StorageError, "no permission to list the bucket {bucket!r}: check the policy of the credentials"
        )
    # Services also say this of a missing object to somebody who may not list.
    return _Refusal(StorageError, "no permission to read it (or it is missing, and these credentials may not list)")


def _not_implemented(operation: str) -> _Refusal:
    if operation == "put_new":
        return _Refusal(StorageError, "this service does not implement conditional writes: use another, or one writer")
    return _Refusal(StorageError, "this service does not implement the operation")


def _from_classes(error: BaseException, operation: str, name: str, url: str) -> BasinError:
    where = f"{operation} {name!r} at {url}"
    fields: dict[str, Any] = {"object": name, "operation": operation}
    for one in _chain(error):
        if isinstance(one, ssl.SSLCertVerificationError):
            return _UNTRUSTED.kind(f"{where}: {_UNTRUSTED.text}", **fields, reason="SSLCertVerificationError")
    for one in _chain(error):
        names = {ancestor.__name__ for ancestor in type(one).__mro__}
        for known, refusal in _CLASSES:
            if names & known:
                return refusal.kind(f"{where}: {refusal.text}", **fields, reason=refusal.reason or type(one).__name__)
    return _from_bare(error, where, fields)


def _from_bare(error: BaseException, where: str, fields: dict[str, Any]) -> BasinError:
    """File systems of fsspec other than s3fs, and dummies, speak in the exceptions of files."""
    operation, reason = fields["operation"], type(error).__name__
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return ObjectMissing(f"{where}: {_MISSING.text}", **fields, reason=reason)
    if isinstance(error, FileExistsError):
        return AlreadyExists(f"{where}: {_EXISTS.text}", **fields, reason=reason)
    if isinstance(error, PermissionError):
        refusal = _denied(operation)
        bucket = where.partition("://")[2].partition("/")[0]
        return refusal.kind(f"{where}: {refusal.text.format(bucket=bucket)}", **fields, reason=reason)
    if isinstance(error, OSError) and error.errno:
        plain = translated(OSError(error.errno, ""), operation, fields["object"])
        return type(plain)(plain.message, **plain.fields, reason=reason)
    return StorageError(f"{where}: the client library failed ({reason})", **fields, reason=reason)
