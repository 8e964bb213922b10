"""What `ObstoreObjects` makes of answers that no server of the tests gives, and of lines that are slow or not safe."""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from basin.errors import GrainNotReady, ReadOnly, StorageError, StorageUnavailable
from basin.storage.objects import ByteRange, Listing
from basin.storage.obstore_objects import ObstoreObjects, open_obstore
from basin.storage.requests import RequestPolicy
from tests.storage.object_calls import CALLS, POLICY
from tests.storage.s3_servers import S3Server


@contextlib.contextmanager
def answering(*replies: bytes) -> Iterator[tuple[ObstoreObjects, list[str]]]:
    """A store whose service gives these replies, the last one for ever; and the methods of what it was asked."""
    waiting, asked = [*replies], list[str]()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(self.command)
            self.wfile.write(waiting.pop(0) if len(waiting) > 1 else waiting[0])
            self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815  the names that the library calls

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  the library's name
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.05,))
        thread.start()
        where = {"endpoint_url": f"http://127.0.0.1:{service.server_port}", "region_name": "us-east-1"}
        store = open_obstore("s3://bucket/p", {"key": "k", "secret": "s", "client_kwargs": where}, POLICY)
        try:
            yield store, asked
        finally:
            store.close()
            service.shutdown()
            thread.join()


def reply(status: int, body: str = "", *headers: str) -> bytes:
    """A reply as it goes over the wire."""
    lines = [f"HTTP/1.1 {status} As-Asked", f"Content-Length: {len(body)}", 'ETag: "x"', "Connection: close"]
    lines += ["Last-Modified: Wed, 01 Jan 2025 00:00:00 GMT", *headers]
    return "\r\n".join([*lines, "", body]).encode()


def test_a_server_that_knows_no_ranges_sends_the_whole_object() -> None:
    with answering(reply(200, "0123456789")) as (store, asked):
        assert store.get(ByteRange("a", 3, 6)) == b"345"
        assert store.get(ByteRange("a", 8)) == b"89"
        assert store.get(ByteRange("a", 12, 20)) == b""
        assert asked == ["GET"] * 4  # Only the first range is asked for in vain.


def test_a_server_that_sends_another_range_is_an_error() -> None:
    with (
        answering(reply(206, "012", "Content-Range: bytes 0-2/10")) as (store, _),
        pytest.raises(StorageError, match="another range"),
    ):
        store.get(ByteRange("a", 3, 6))


def test_a_body_shorter_than_its_range_is_no_success() -> None:
    with answering(reply(206, "34", "Content-Range: bytes 3-5/10")) as (store, _):
        with pytest.raises(StorageUnavailable) as caught:
            store.get(ByteRange("a", 3, 6))
        assert caught.value.reason == "connection"


def deletion(code: str) -> bytes:
    return reply(
        200, f"<DeleteResult><Error><Key>p/b</Key><Code>{code}</Code><Message>no</Message></Error></DeleteResult>"
    )


def test_a_deletion_that_is_refused_inside_a_batch_is_an_error() -> None:
    with answering(deletion("AccessDenied")) as (store, asked):
        with pytest.raises(ReadOnly) as caught:
            store.delete(["a", "b"])
        assert caught.value.fields["object"] == "b"
        assert caught.value.reason == "AccessDenied"
        assert asked == ["POST"]


def test_a_service_may_say_that_what_is_deleted_was_missing() -> None:
    missing = reply(404, "<Error><Code>NoSuchKey</Code></Error>")
    with answering(deletion("NoSuchKey"), reply(204), missing) as (store, asked):
        store.delete(["a", "b"])
        assert asked == ["POST", "DELETE", "DELETE"]


def test_a_deletion_that_is_refused_behind_a_missing_object_is_an_error() -> None:
    denied = reply(403, "<Error><Code>AccessDenied</Code></Error>")
    with answering(deletion("NoSuchKey"), denied) as (store, _), pytest.raises(ReadOnly):
        store.delete(["a", "b"])


def test_another_region_is_told() -> None:
    with answering(reply(301, "<Error><Code>PermanentRedirect</Code></Error>")) as (store, _):
        for call in CALLS.values():
            with pytest.raises(StorageError, match="another region or behind another endpoint"):
                call(store)


def test_cold_storage_names_its_tier() -> None:
    body = "<Error><Code>InvalidObjectState</Code><StorageClass>GLACIER</StorageClass></Error>"
    with answering(reply(403, body)) as (store, _):
        with pytest.raises(GrainNotReady) as caught:
            store.get(ByteRange("a"))
        assert caught.value.tier == "GLACIER"


def test_sending_on_a_slow_line_is_no_silence() -> None:
    with slow_service(rate=2 << 20) as endpoint:
        where = {"endpoint_url": endpoint, "region_name": "us-east-1"}
        options = {"key": "k", "secret": "s", "client_kwargs": where}
        store = open_obstore("s3://bucket/p", options, RequestPolicy(read_timeout_s=0.5))
        started_s = time.monotonic()
        store.put("a", bytes(4 << 20))
        assert time.monotonic() - started_s > 1
        store.close()


@contextlib.contextmanager
def slow_service(*, rate: int) -> Iterator[str]:
    """The endpoint of a service that takes one request, `rate` bytes of it in a second."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as stream:
                head = b"".join(iter(stream.readline, b"\r\n"))
                left = int(re.findall(rb"(?i)content-length: ([0-9]+)", head)[0])
                while left:
                    left -= len(stream.read(min(left, rate // 50)))
                    time.sleep(1 / 50)
                connection.sendall(reply(200))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_a_name_that_cannot_be_read_is_told(ministack: S3Server) -> None:
    bucket = ministack.new_bucket()
    store = open_obstore(f"s3://{bucket}/p", ministack.storage_options(), POLICY)
    ministack.client().put(f"/{bucket}/p/a//b", b"x")
    assert store.list("") == Listing([], ["a"])
    ministack.client().put(f"/{bucket}/p/../b", b"x")
    with pytest.raises(StorageError, match="cannot be read: remove what is not of this basin"):
        store.list("")
    store.close()


def test_a_certificate_that_is_not_trusted_is_told(tmp_path: Path) -> None:
    with encrypted_service(tmp_path) as endpoint:
        where = {"endpoint_url": endpoint, "region_name": "us-east-1"}
        for verify in (True, False):
            options = {"key": "k", "secret": "s", "client_kwargs": {**where, "verify": verify}}
            store = open_obstore("s3://bucket/p", options, POLICY)
            if verify:
                with pytest.raises(StorageError, match="certificate is not trusted") as caught:
                    store.get(ByteRange("a"))
                assert type(caught.value) is StorageError
            else:
                assert store.get(ByteRange("a")) == b"sealed"
            store.close()


@contextlib.contextmanager
def encrypted_service(folder: Path) -> Iterator[str]:
    """The endpoint of a service that nobody vouches for. It answers every request with the same body."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own_certificate(folder))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(reply(200, "sealed"))
            self.close_connection = True

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  the library's name
            return None

    class Service(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            return None  # A client that hangs up.

    with Service(("127.0.0.1", 0), Handler) as service:
        service.socket = context.wrap_socket(service.socket, server_side=True)
        thread = threading.Thread(target=service.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"https://localhost:{service.server_port}"
        finally:
            service.shutdown()
            thread.join()


def own_certificate(folder: Path) -> Path:
    """A file with a key and a certificate for `localhost` that is signed with that key itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    kind = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path
