"""`counting_proxy`: a proxy before an S3 server that counts requests and the bytes of bodies, for every client alike.

Invariants: nothing that is signed is changed (method, path, `Host`, body), so signatures stay valid. A request is
counted when its head has arrived, what a client library repeats by itself too. Bytes are those of bodies as they go
over the wire, with the frames of their chunks. It serves from a thread of its own; bodies pass in pieces.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

_HOST: Final = "127.0.0.1"
_PIECE_SIZE: Final = 256 << 10
_HEAD_SIZE_MAX: Final = 1 << 20
_NO_BODY: Final = (b"204", b"304")


@dataclass(slots=True)
class Traffic:
    """What passed: requests by their kind (the method, or LIST), and bytes from the client (out) and to it (in)."""

    requests: Counter[str] = field(default_factory=Counter)
    bytes_out: int = 0
    bytes_in: int = 0

    def since(self, earlier: Traffic) -> Traffic:
        """The difference."""
        requests = self.requests - earlier.requests
        return Traffic(requests, self.bytes_out - earlier.bytes_out, self.bytes_in - earlier.bytes_in)

    def copy(self) -> Traffic:
        return Traffic(self.requests.copy(), self.bytes_out, self.bytes_in)


@dataclass(slots=True)
class _Head:
    """First line and headers of a message."""

    first: bytes
    lines: list[bytes]
    fields: dict[bytes, bytes]

    def encode(self) -> bytes:
        return b"\r\n".join([self.first, *self.lines, b"", b""])


class CountingProxy:
    """See the module. `traffic` may be read from any thread."""

    def __init__(self, upstream: str) -> None:
        parts = urllib.parse.urlsplit(upstream)
        self._upstream = parts.hostname or _HOST, parts.port or 80
        self._lock = threading.Lock()
        self._traffic = Traffic()
        self.endpoint = ""

    def traffic(self) -> Traffic:
        """Everything so far; a copy."""
        with self._lock:
            return self._traffic.copy()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on the requests of one connection, over one connection to the server."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            upstream_reader, upstream_writer = await self._connect()
            try:
                while True:
                    request = await _read_head(reader)
                    if upstream_reader.at_eof():
                        upstream_writer.close()
                        upstream_reader, upstream_writer = await self._connect()
                    await self._pass_request(request, reader, writer, upstream_writer)
                    method = request.first.split(b" ", 1)[0]
                    if not await self._pass_reply(method, upstream_reader, writer):
                        return
            finally:
                upstream_writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self._upstream, limit=_HEAD_SIZE_MAX)

    async def _pass_request(
        self,
        request: _Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream: asyncio.StreamWriter,
    ) -> None:
        with self._lock:
            self._traffic.requests[kind_of(request.first)] += 1
        if request.fields.get(b"expect", b"").lower() == b"100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.lines = [line for line in request.lines if not line.lower().startswith(b"expect:")]
        upstream.write(request.encode())
        has_body = b"content-length" in request.fields or b"transfer-encoding" in request.fields
        size = await _pass_body(request, reader, upstream) if has_body else 0
        await upstream.drain()
        with self._lock:
            self._traffic.bytes_out += size

    async def _pass_reply(self, method: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """False if the reply ends with its connection."""
        reply = await _read_head(reader)
        status = reply.first.split(b" ", 2)[1]
        while status.startswith(b"1"):
            reply = await _read_head(reader)
            status = reply.first.split(b" ", 2)[1]
        writer.write(reply.encode())
        size = 0
        if method != b"HEAD" and status not in _NO_BODY:
            size = await _pass_body(reply, reader, writer)
        await writer.drain()
        with self._lock:
            self._traffic.bytes_in += size
        has_end = b"content-length" in reply.fields or b"transfer-encoding" in reply.fields or method == b"HEAD"
        return (has_end or status in _NO_BODY) and reply.fields.get(b"connection", b"").lower() != b"close"


def kind_of(first: bytes) -> str:
    """The method of a request line; LIST for a GET that lists."""
    method, target, _ = first.decode("latin-1").split(" ", 2)
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(target).query, keep_blank_values=True)
    return "LIST" if method == "GET" and ("list-type" in query or "delimiter" in query) else method


@contextlib.contextmanager
def counting_proxy(upstream: str) -> Iterator[CountingProxy]:
    """A proxy on a free port of the loopback before the endpoint `upstream`; its connections end with the block."""
    proxy = CountingProxy(upstream)
    loop = asyncio.new_event_loop()
    listening = threading.Event()
    ending = asyncio.Event()
    connections: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = loop.create_task(proxy.serve(reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    async def main() -> None:
        server = await asyncio.start_server(accept, _HOST, 0, limit=_HEAD_SIZE_MAX)
        proxy.endpoint = f"http://{_HOST}:{server.sockets[0].getsockname()[1]}"
        listening.set()
        await ending.wait()
        server.close()
        left = list(connections)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), name="counting proxy", daemon=True)
    thread.start()
    listening.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        loop.close()


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    named = (line.partition(b":") for line in lines)
    return _Head(first, lines, {name.lower(): value.strip() for name, _, value in named})


async def _pass_body(head: _Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    """Pass on a body; returns its size."""
    if b"chunked" in head.fields.get(b"transfer-encoding", b"").lower():
        return await _pass_chunks(reader, writer)
    if b"content-length" in head.fields:
        return await _pass_bytes(int(head.fields[b"content-length"]), reader, writer)
    size = 0
    while piece := await reader.read(_PIECE_SIZE):
        writer.write(piece)
        await writer.drain()
        size += len(piece)
    return size


async def _pass_bytes(size: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    left = size
    while left:
        piece = await reader.read(min(left, _PIECE_SIZE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        writer.write(piece)
        await writer.drain()
        left -= len(piece)
    return size


async def _pass_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    passed = 0
    size = 1
    while size:
        line = await reader.readline()
        writer.write(line)
        size = int(line.split(b";")[0], 16)
        passed += len(line)
        if size:
            passed += await _pass_bytes(size + 2, reader, writer)
    line = b""
    while line != b"\r\n":  # Trailers, and the empty line that ends them.
        line = await reader.readline()
        if not line:
            raise asyncio.IncompleteReadError(b"", None)
        writer.write(line)
        passed += len(line)
    return passed
