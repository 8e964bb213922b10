"""The table of errors: what client libraries raise, by its shape, and which typed error it becomes."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Any

import pytest

from basin.errors import (
    AlreadyExists,
    BasinError,
    GrainNotReady,
    NotABasin,
    ObjectMissing,
    OutOfSpace,
    ReadOnly,
    StorageError,
    StorageUnavailable,
)
from basin.storage.object_errors import answered_code, object_error, refused

URL = "s3://some-bucket/prefix"
SECRET = "AWS4-HMAC-SHA256 Credential=AKIDSECRET/x, Signature=0123456789abcdef"
READS = ("get", "size", "list")
WRITES = ("put", "put_new", "put_file", "delete")


class ClientError(Exception):
    """Of the shape of botocore's: the parsed answer in `response`."""

    def __init__(self, code: str, status: int, **more: Any) -> None:
        super().__init__(f"An error occurred ({code}): {SECRET}")
        self.response = {
            "Error": {"Code": code, "Message": SECRET, **more},
            "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {"authorization": SECRET}},
        }


def named(name: str, *bases: type[Exception]) -> Exception:
    """An exception of another library, of which only the name of the class is known."""
    kind = type(name, bases or (Exception,), {})
    made: Exception = kind(SECRET)
    return made


def typed(error: BaseException, operation: str = "get", name: str = "log/7") -> BasinError:
    """The typed error, after what holds for all: one line that says where, and no secret."""
    found = object_error(error, operation, name, URL)
    assert isinstance(found, BasinError)
    assert found.fields["object"] == name
    assert found.fields["operation"] == operation
    for part in ("AKIDSECRET", "Signature=", "0123456789abcdef", "\n"):
        assert part not in str(found) + repr(found.fields)
    return found


@pytest.mark.parametrize(
    ("code", "status", "operation", "kind", "reason", "text"),
    [
        ("NoSuchKey", 404, "get", ObjectMissing, "NoSuchKey", "no such object"),
        ("404", 404, "size", ObjectMissing, "404", "no such object"),
        ("NoSuchBucket", 404, "get", StorageError, "NoSuchBucket", "there is no bucket 'some-bucket'"),
        ("NoSuchBucket", 404, "put_new", StorageError, "NoSuchBucket", "there is no bucket 'some-bucket'"),
        ("404", 404, "put", StorageError, "404", "there is no bucket 'some-bucket'"),
        ("InvalidBucketName", 400, "put", StorageError, "InvalidBucketName", "bucket name 'some-bucket'"),
        ("PreconditionFailed", 412, "put_new", AlreadyExists, "PreconditionFailed", "exists already"),
        ("412", 412, "put_new", AlreadyExists, "412", "exists already"),
        ("PreconditionFailed", 412, "put", StorageError, "PreconditionFailed", "refused"),
        ("ConditionalRequestConflict", 409, "put_new", StorageUnavailable, "contended", "same name"),
        ("ConcurrentModification", 409, "put_new", StorageUnavailable, "contended", "same name"),
        ("OperationAborted", 409, "put_new", StorageUnavailable, "contended", "same name"),
        ("SomethingNew", 409, "put_new", StorageUnavailable, "contended", "same name"),
        ("RequestTimeout", 400, "put", StorageUnavailable, "timeout", "in time"),
        ("SlowDown", 503, "get", StorageUnavailable, "throttled", "fewer requests"),
        ("503", 503, "size", StorageUnavailable, "throttled", "fewer requests"),
        ("TooManyRequests", 429, "get", StorageUnavailable, "throttled", "fewer requests"),
        ("SomethingNew", 429, "get", StorageUnavailable, "throttled", "fewer requests"),
        ("InternalError", 500, "get", StorageUnavailable, "server", "failed inside"),
        ("InternalError", 200, "put_file", StorageUnavailable, "server", "failed inside"),
        ("BadGateway", 502, "get", StorageUnavailable, "server", "failed inside"),
        ("SomethingNew", 504, "get", StorageUnavailable, "server", "failed inside"),
        ("NoSuchUpload", 404, "put_file", StorageUnavailable, "server", "failed inside"),
        ("BadDigest", 400, "put", StorageUnavailable, "connection", "damaged"),
        ("AccessDenied", 403, "get", StorageError, "AccessDenied", "no permission to read"),
        ("403", 403, "size", StorageError, "403", "no permission to read"),
        ("AccessDenied", 403, "list", StorageError, "AccessDenied", "no permission to list"),
        ("AccessDenied", 403, "put", ReadOnly, "AccessDenied", "no permission to write"),
        ("AccessDenied", 403, "put_new", ReadOnly, "AccessDenied", "no permission to write"),
        ("AccessDenied", 403, "put_file", ReadOnly, "AccessDenied", "no permission to write"),
        ("AccessDenied", 403, "delete", ReadOnly, "AccessDenied", "no permission to delete"),
        ("InvalidAccessKeyId", 403, "put", StorageError, "InvalidAccessKeyId", "check the access key"),
        ("SignatureDoesNotMatch", 403, "get", StorageError, "SignatureDoesNotMatch", "check the access key"),
        ("ExpiredToken", 400, "get", StorageError, "ExpiredToken", "credentials have expired"),
        ("RequestTimeTooSkewed", 403, "put", StorageError, "RequestTimeTooSkewed", "clock is off"),
        ("InvalidObjectState", 403, "get", GrainNotReady, "InvalidObjectState", "cold storage"),
        ("NotImplemented", 501, "put_new", StorageError, "NotImplemented", "does not implement conditional writes"),
        ("NotImplemented", 501, "delete", StorageError, "NotImplemented", "does not implement the operation"),
        ("PermanentRedirect", 301, "get", StorageError, "PermanentRedirect", "another region"),
        ("301", 301, "size", StorageError, "301", "another region"),
        ("AuthorizationHeaderMalformed", 400, "put", StorageError, "AuthorizationHeaderMalformed", "another region"),
        ("QuotaExceeded", 403, "put", OutOfSpace, "QuotaExceeded", "quota"),
        ("InsufficientStorage", 507, "put", OutOfSpace, "InsufficientStorage", "quota"),
        ("AllAccessDisabled", 403, "put", StorageError, "AllAccessDisabled", "closed this account"),
        ("SomethingNew", 400, "get", StorageError, "SomethingNew", "refused it (SomethingNew)"),
    ],
)
def test_an_answer(code: str, status: int, operation: str, kind: type[BasinError], reason: str, text: str) -> None:
    direct = ClientError(code, status)
    face = OSError(errno.EINVAL, SECRET)  # s3fs puts a face of the file system before it.
    face.__cause__ = direct
    for error in (direct, face):
        found = typed(error, operation)
        assert type(found) is kind
        assert text in str(found)
        assert found.reason == reason
        assert found.status == status
        assert answered_code(error) == code


@pytest.mark.parametrize(
    ("face", "code"),
    [(FileExistsError, "PreconditionFailed"), (FileNotFoundError, "NoSuchBucket"), (PermissionError, "")],
)
def test_the_answer_counts_and_not_its_face(face: type[OSError], code: str) -> None:
    error = face(SECRET)
    error.__cause__ = ClientError(code or "ExpiredToken", 400)
    assert typed(error, "put_new").reason == (code or "ExpiredToken")


def test_cold_storage_names_its_tier() -> None:
    assert typed(ClientError("InvalidObjectState", 403, StorageClass="DEEP_ARCHIVE")).tier == "DEEP_ARCHIVE"
    assert typed(ClientError("InvalidObjectState", 403)).tier == ""
    assert typed(ClientError("InvalidObjectState", 403, StorageClass=SECRET)).tier == ""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError(SECRET), "timeout"),
        (named("FSTimeoutError"), "timeout"),
        (named("ReadTimeoutError", type("HTTPClientError", (Exception,), {})), "timeout"),
        (named("ConnectTimeoutError", type("ConnectionError", (Exception,), {})), "timeout"),
        (named("ServerTimeoutError", TimeoutError), "timeout"),
        (ConnectionResetError(errno.ECONNRESET, SECRET), "connection"),
        (ConnectionRefusedError(errno.ECONNREFUSED, SECRET), "connection"),
        (BrokenPipeError(errno.EPIPE, SECRET), "connection"),
        (socket.gaierror(socket.EAI_NONAME, SECRET), "connection"),
        (named("EndpointConnectionError"), "connection"),
        (named("ConnectionClosedError", type("HTTPClientError", (Exception,), {})), "connection"),
        (named("ClientPayloadError", type("ClientError", (Exception,), {})), "connection"),
        (named("IncompleteReadError"), "connection"),
        (named("ResponseStreamingError"), "connection"),
        (named("FlexibleChecksumError"), "connection"),
        (ssl.SSLError(1, SECRET), "connection"),
        (named("ResponseParserError"), "server"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_a_failure_without_an_answer_may_be_tried_again(error: Exception, reason: str) -> None:
    for operation in (*READS, *WRITES):
        found = typed(error, operation)
        assert type(found) is StorageUnavailable
        assert found.reason == reason
        if reason == "connection" and type(error).__name__ != "FlexibleChecksumError":
            assert "check the endpoint" in str(found)
    assert answered_code(error) == ""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (named("NoCredentialsError"), "no complete credentials were found"),
        (named("PartialCredentialsError"), "no complete credentials were found"),
        (named("ProfileNotFound"), "no complete credentials were found"),
        (named("UnauthorizedSSOTokenError"), "credentials have expired"),
        (named("NoRegionError"), "another region"),
        (named("SomethingNew"), "the client library failed (SomethingNew)"),
        (ValueError(SECRET), "the client library failed (ValueError)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_a_failure_that_only_the_user_mends(error: Exception, text: str) -> None:
    found = typed(error, "put")
    assert type(found) is StorageError
    assert text in str(found)
    assert found.reason == type(error).__name__


def test_a_certificate_that_is_not_trusted_is_no_broken_connection() -> None:
    outer = named("SSLError")
    outer.__cause__ = ssl.SSLCertVerificationError(1, SECRET)
    found = typed(outer)
    assert type(found) is StorageError
    assert "certificate is not trusted" in str(found)


@pytest.mark.parametrize(
    ("error", "operation", "kind"),
    [
        (FileNotFoundError(errno.ENOENT, SECRET), "get", ObjectMissing),
        (IsADirectoryError(errno.EISDIR, SECRET), "get", ObjectMissing),
        (NotADirectoryError(errno.ENOTDIR, SECRET), "size", ObjectMissing),
        (FileExistsError(SECRET), "put_new", AlreadyExists),
        (PermissionError(errno.EACCES, SECRET), "get", StorageError),
        (PermissionError(errno.EACCES, SECRET), "list", StorageError),
        (PermissionError(errno.EACCES, SECRET), "put", ReadOnly),
        (PermissionError(errno.EACCES, SECRET), "delete", ReadOnly),
        (OSError(errno.ENOSPC, SECRET), "put", OutOfSpace),
        (OSError(SECRET), "put", StorageError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_other_file_systems_speak_in_errors_of_files(error: Exception, operation: str, kind: type[BasinError]) -> None:
    found = typed(error, operation)
    assert type(found) is kind
    assert found.reason == type(error).__name__


def test_what_botocore_wraps_is_looked_at() -> None:
    outer = named("SomethingNew")
    outer.kwargs = {"error": TimeoutError(SECRET), "endpoint_url": SECRET}  # type: ignore[attr-defined]  # as botocore does
    assert typed(outer).reason == "timeout"


def test_what_was_handled_before_is_not_looked_at() -> None:
    error = named("SomethingNew")
    error.__context__ = ClientError("NoSuchKey", 404)
    error.__suppress_context__ = True
    assert type(typed(error)) is StorageError


def test_a_circle_of_causes_ends() -> None:
    first, second = named("First"), named("Second")
    first.__cause__, second.__cause__ = second, first
    assert type(typed(first)) is StorageError


@pytest.mark.parametrize("code", ["", SECRET, "x" * 65, "two words", "https://host/?X-Amz-Signature=1", "a\nb"])
def test_a_code_that_does_not_look_like_one_is_not_repeated(code: str) -> None:
    found = typed(ClientError(code, 418))
    assert found.reason == "418"
    assert "refused it (418)" in str(found)
    assert typed(ClientError(code, 403), "put").reason == "403"


def test_an_error_of_basin_stays_as_it_is() -> None:
    error = NotABasin("as it was", url="x")
    assert object_error(error, "get", "a", URL) is error


def test_a_code_alone_is_enough() -> None:
    found = refused("AccessDenied", "delete", "a", URL)
    assert type(found) is ReadOnly
    assert "status" not in found.fields
    assert str(found).startswith(
        "delete 'a' at s3://some-bucket/prefix: no permission to delete from the bucket 'some-bucket'"
    )
