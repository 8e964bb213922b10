"""A web server on the loopback that answers ranges, or does not, and counts what it sent."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FlatServer(ThreadingHTTPServer):
    """Serves the files of `folder`. `asked`: the ranges of all GETs, `sent`: bytes of bodies."""

    daemon_threads = True

    def __init__(self, folder: Path, *, knows_ranges: bool, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.knows_ranges = knows_ranges
        self.status = status
        self.asked: list[str] = []
        self.sent = 0

    def url(self, name: str) -> str:
        """Where a file of the folder is."""
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlatServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base's name for it
        """Tests print nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range", ""))
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/").partition("?")[0]
        status = self.server.status or (200 if path.is_file() else 404)
        data = path.read_bytes() if status == 200 else b""
        size, first = len(data), 0
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and wanted and self.server.knows_ranges:
            first = int(wanted[1])
            data = data[first : int(wanted[2] or size) + 1]
            status = 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.server.sent += len(data)  # Before: whoever has the body may look at once.
            self.wfile.write(data)


@contextlib.contextmanager
def flat_server(folder: Path, *, knows_ranges: bool = True, status: int = 0) -> Iterator[FlatServer]:
    """Serve `folder` while the block runs. `status`: answer this, whatever is asked."""
    with FlatServer(folder, knows_ranges=knows_ranges, status=status) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
