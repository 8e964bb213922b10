"""`fault_proxy`: a proxy before an S3 server that loses, delays, cuts, repeats and refuses, as the test tells it.

    with fault_proxy(server.endpoint) as proxy:
        proxy.add(Rule("drop_after", method="PUT", match="/log/"))
        ...                                     # the client is given `proxy.endpoint`
        assert [exchange.action for exchange in proxy.exchanges] == ["drop_after"]

- Signatures stay valid: what is signed (method, path, `Host`, body) passes as it came.
- A rule acts on the next `count` requests that fit it, and then no more; the first rule that fits acts, alone.
- Each request that reached the proxy whole is one line of `exchanges`, in the order of arrival; what a client library
  repeats by itself shows there as another line.
- It serves from a thread of its own. At the end of the block its connections are closed, also those of requests that a
  rule still delays.

Plain HTTP/1.1; a body is held in memory as a whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

HOST: Final = "127.0.0.1"

Action: TypeAlias = Literal[
    "drop_before",  # the connection is closed; the server never sees the request
    "drop_after",  # the server does what it is asked; then the connection is closed instead of a reply
    "reset",  # as `drop_before`, with a reset of the connection instead of its regular end
    "delay",  # `delay_s` pass before the server sees the request
    "delay_reply",  # `delay_s` pass between the server's reply and the client's
    "truncate",  # the head of the reply and half of its body come, then the connection is closed
    "corrupt",  # the first bit of the body of the reply is flipped
    "status",  # the proxy answers `status` with the error `code`; the server never sees the request
    "status_after",  # as `status`, but the server did what it was asked
    "duplicate",  # the server gets the request twice; its second reply is the one that comes
]


@dataclass(slots=True)
class Rule:
    """What to do with requests of `method` (empty: any) whose path and query hold the pattern `match`."""

    action: Action
    method: str = ""
    match: str = ""
    count: int | None = 1
    """How many requests to act on; `None`: all."""
    skip: int = 0
    """How many requests that fit are let through first."""
    probability: float = 1
    status: int = 503
    code: str = "SlowDown"
    delay_s: float = 0

    def takes(self, method: str, target: str, chance: random.Random) -> bool:
        """Whether the rule acts on this request; counts it if so."""
        if self.count == 0 or self.method not in ("", method) or not re.search(self.match, target):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if chance.random() >= self.probability:
            return False
        if self.count is not None:
            self.count -= 1
        return True


@dataclass(slots=True)
class Exchange:
    """A request that arrived: what a rule did to it, and what the server answered if it was asked."""

    method: str
    target: str
    """Path and query, as they were sent."""
    headers: dict[str, str]
    """By their names in lower case."""
    action: Action | None
    status: int | None = None


@dataclass(slots=True)
class _Message:
    """A request or a reply: its first line and headers as bytes, and its body as it goes over the wire."""

    first: bytes
    lines: list[bytes]
    body: bytes = b""
    fields: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        return b"\r\n".join([self.first, *self.lines, b"", b""]) + self.body


class FaultProxy:
    """See the module. `add`, `clear` and `exchanges` may be used from any thread, while requests are on their way."""

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        parts = urllib.parse.urlsplit(upstream)
        self._upstream = parts.hostname or HOST, parts.port or 80
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._exchanges: list[Exchange] = []
        self._transports: list[asyncio.WriteTransport] = []
        self.endpoint = ""

    def add(self, *rules: Rule) -> None:
        """From now on these rules hold, after those that hold already."""
        with self._lock:
            self._rules.extend(rules)

    def clear(self) -> None:
        """Forget all rules and exchanges."""
        with self._lock:
            self._rules.clear()
            self._exchanges.clear()

    @property
    def exchanges(self) -> list[Exchange]:
        """What arrived since the start, or the last `clear`."""
        with self._lock:
            return list(self._exchanges)

    async def end(self) -> None:
        """Cut what is still open: a connection with bytes on their way does not close by itself."""
        for transport in self._transports:
            transport.abort()
        await asyncio.sleep(0.01)  # It is closed in the next round of the loop.

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        self._transports.append(writer.transport)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while True:
                request = await _read_request(reader, writer)
                if not await self._answer(request, writer):
                    writer.transport.abort()
                    return
                await writer.drain()

    async def _answer(self, request: _Message, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False if its connection must be cut."""
        rule, exchange = self._received(request)
        action = exchange.action
        if action == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if action in ("reset", "drop_before"):
            return False
        if action == "status":
            writer.write(_refusal(rule, exchange.method))
            return True
        if action == "delay":
            await asyncio.sleep(rule.delay_s)
        if action == "duplicate":
            await self._forwarded(request, exchange)
        reply = await self._forwarded(request, exchange)
        if action == "delay_reply":
            await asyncio.sleep(rule.delay_s)
        if action == "drop_after":
            return False
        if action == "status_after":
            writer.write(_refusal(rule, exchange.method))
            return True
        if action == "corrupt" and reply.body:
            reply.body = bytes([reply.body[0] ^ 0x80]) + reply.body[1:]
        whole = reply.encode()
        if action == "truncate":
            writer.write(whole[: len(whole) - (len(reply.body) + 1) // 2])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            return False
        writer.write(whole)
        return True

    def _received(self, request: _Message) -> tuple[Rule, Exchange]:
        """Note a request, and the rule that acts on it (any, if none does)."""
        method, target, _ = request.first.decode("latin-1").split(" ", 2)
        with self._lock:
            acting = next((rule for rule in self._rules if rule.takes(method, target, self._chance)), None)
            exchange = Exchange(method, target, request.fields, acting.action if acting else None)
            self._exchanges.append(exchange)
        return acting or Rule("delay"), exchange

    async def _forwarded(self, request: _Message, exchange: Exchange) -> _Message:
        """What the server answers. Each request has a connection of its own, which ends with the reply."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        self._transports.append(writer.transport)
        with contextlib.closing(writer):
            # A client that waits for leave to send its body was given it by the proxy; neither header is signed.
            lines = [line for line in request.lines if not line.lower().startswith((b"connection:", b"expect:"))]
            writer.write(_Message(request.first, [*lines, b"Connection: close"], request.body).encode())
            reply = await _read_reply(reader, exchange.method)
        exchange.status = int(reply.first.split(b" ")[1])
        return reply


@contextlib.contextmanager
def fault_proxy(upstream: str, *, seed: int = 0) -> Iterator[FaultProxy]:
    """A proxy on a free port before the endpoint `upstream`. `seed` decides for rules with a probability."""
    proxy = FaultProxy(upstream, seed=seed)
    loop = asyncio.new_event_loop()
    listening = threading.Event()
    ending = asyncio.Event()
    connections: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = loop.create_task(proxy.serve(reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    async def main() -> None:
        server = await asyncio.start_server(accept, HOST, 0, limit=1 << 20)
        proxy.endpoint = f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
        listening.set()
        await ending.wait()
        server.close()
        left = list(connections)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await proxy.end()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), name="fault proxy", daemon=True)
    thread.start()
    listening.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        loop.close()


async def _read_head(reader: asyncio.StreamReader) -> _Message:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    named = (line.decode("latin-1").partition(":") for line in lines)
    return _Message(first, lines, fields={name.lower(): value.strip() for name, _, value in named})


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Message:
    request = await _read_head(reader)
    if request.fields.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if "content-length" in request.fields or "transfer-encoding" in request.fields:
        request.body = await _read_body(reader, request.fields)
    return request


async def _read_reply(reader: asyncio.StreamReader, method: str) -> _Message:
    """A reply without the headers that speak of the connection to the server, which is not the client's."""
    reply = await _read_head(reader)
    if method != "HEAD" and reply.first.split(b" ")[1] not in (b"204", b"304"):
        reply.body = await _read_body(reader, reply.fields)
        if "content-length" not in reply.fields and "transfer-encoding" not in reply.fields:
            reply.lines.append(b"Content-Length: %d" % len(reply.body))
    reply.lines = [line for line in reply.lines if not line.lower().startswith((b"connection:", b"keep-alive:"))]
    return reply


async def _read_body(reader: asyncio.StreamReader, fields: dict[str, str]) -> bytes:
    """A body as it goes over the wire, with the frames of its chunks if it has any."""
    if "chunked" not in fields.get("transfer-encoding", "").lower():
        return await (
            reader.readexactly(int(fields["content-length"])) if "content-length" in fields else reader.read()
        )
    wire = bytearray()
    size = 1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        wire += line
        if size:
            wire += await reader.readexactly(size + 2)
    line = b""
    while line != b"\r\n":
        line = await reader.readuntil(b"\r\n")
        wire += line
    return bytes(wire)


def _refusal(rule: Rule, method: str) -> bytes:
    text = f"<?xml version='1.0'?><Error><Code>{rule.code}</Code><Message>as the test asked</Message></Error>".encode()
    first = b"HTTP/1.1 %d As-Asked" % rule.status
    headers = [b"Content-Type: application/xml", b"Content-Length: %d" % len(text)]
    return _Message(first, headers, b"" if method == "HEAD" else text).encode()
