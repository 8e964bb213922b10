"""Servers that speak S3, started and ended by the tests themselves: `with ministack(folder) as server: ...`.

- They listen on free ports of 127.0.0.1 and keep what they store in `folder`, or in memory.
- Inside the block the server answers signed requests; after it, and after any failure, its processes are gone. They are
  ended by their process ids. Where `setpriv` exists (Linux) they also die with a test session that is killed.
- A server that another process robbed of its port between the choice and the start is started again on other ports.

`ministack` is the one for every test. `seaweedfs` stores on disk and is what benchmarks and kills need. `rclone_serve`
ignores conditions on a PUT, and `swift` (see `s3_swift`) obeys them but not atomically: Basin must refuse both.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from tests.s3_client import S3Client

HOST: Final = "127.0.0.1"
KEY: Final = "basinkey"
SECRET: Final = "basinsecret123"
READY_S: Final = 60
_STARTS_MAX: Final = 3


class ServerDied(Exception):
    """A server ended before it answered, or did not answer in time; the text holds the end of what it printed."""


@dataclass(frozen=True, slots=True)
class S3Server:
    """An endpoint that the tests may fill. `processes` are ours; none if somebody else runs the server."""

    name: str
    endpoint: str
    key: str = KEY
    secret: str = SECRET
    region: str = "us-east-1"
    place: str = ""
    """Bucket and prefix below which the tests stay; empty where each may make buckets of its own."""
    start_s: float = 0
    processes: tuple[subprocess.Popen[bytes], ...] = field(default=(), repr=False)

    def client(self, *, endpoint: str | None = None, timeout_s: float = 30) -> S3Client:
        """Signed requests around Basin; to another `endpoint` that leads here, such as a proxy, if one is given."""
        return S3Client(
            endpoint or self.endpoint, key=self.key, secret=self.secret, region=self.region, timeout_s=timeout_s
        )

    def storage_options(self, endpoint: str | None = None) -> dict[str, Any]:
        """What `fsspec.filesystem("s3", ...)` needs to reach this server, or `endpoint`, a proxy in front of it."""
        where = {"endpoint_url": endpoint or self.endpoint, "region_name": self.region}
        return {"key": self.key, "secret": self.secret, "client_kwargs": where}

    def new_bucket(self) -> str:
        """An empty place: `s3://` + it is a URL. A fresh bucket, or a fresh prefix of a bucket that was given."""
        name = f"basin-{secrets.token_hex(6)}"
        if self.place:
            return f"{self.place}/{name}"
        status = self.client().put(f"/{name}", b"")
        if status != 200:
            raise ServerDied(f"{self.name} answered {status} to a new bucket")
        return name

    def new_url(self) -> str:
        """`new_bucket` as a URL."""
        return f"s3://{self.new_bucket()}"


Commands: TypeAlias = Sequence[tuple[Sequence[str], Mapping[str, str]]]
"""Command lines, each with what it needs in the environment."""


def free_ports(count: int) -> list[int]:
    """Different ports on which nobody listens at this moment."""
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind((HOST, 0))
        return [listener.getsockname()[1] for listener in listeners]


def program(name: str) -> str:
    """Path of a program: beside this interpreter, else on the search path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed: see the group `test` of pyproject.toml")
    return found


@contextlib.contextmanager
def ministack(folder: Path) -> Iterator[S3Server]:
    """MiniStack: an emulator that keeps everything in memory, and believes any credentials."""

    def commands(port: int) -> Commands:
        settings = {
            "BIND_HOST": HOST,
            "GATEWAY_PORT": str(port),
            "SERVICES": "s3",
            "S3_PERSIST": "0",
            "LOG_LEVEL": "WARNING",
            "IOT_MTLS_ENABLED": "0",  # else it listens on every address, for devices
            "SFTP_ENABLED": "0",
        }
        return [([program("ministack")], settings)]

    with running("ministack", folder, commands) as server:
        yield server


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS: a real store on disk, all its parts in one process."""

    def commands(port: int) -> Commands:
        # Its inner ports, too, are a pair each: requests, and the same for its own parts. All must be named, or a
        # second server on the machine meets the first one's.
        parts = ("master.port", "volume.port", "filer.port", "admin.port")
        names = [name for part in parts for name in (part, f"{part}.grpc")]
        ports = [f"-{name}={free}" for name, free in zip([*names, "s3.port.grpc"], free_ports(9), strict=True)]
        data = folder / f"seaweedfs-{port}"
        data.mkdir()
        arguments = ["-logtostderr=true", "mini", f"-dir={data}", f"-ip={HOST}", f"-ip.bind={HOST}", "-webdav=false"]
        arguments += ["-admin.ui=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        # Every bucket takes volumes: with the default number of them, the sixtieth bucket refuses its first PUT.
        arguments += ["-volume.max=100000", f"-s3.port={port}"]
        credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        return [([program("weed"), *arguments, *ports], credentials)]

    with running("seaweedfs", folder, commands) as server:
        yield server


@contextlib.contextmanager
def rclone_serve(folder: Path) -> Iterator[S3Server]:
    """A folder served by rclone: it ignores the condition on a PUT, and answers 200 to the request for a range."""

    def commands(port: int) -> Commands:
        data = folder / f"rclone-{port}"
        data.mkdir()
        arguments = ["serve", "s3", "--addr", f"{HOST}:{port}", "--auth-key", f"{KEY},{SECRET}"]
        return [([program("rclone"), *arguments, "--config", os.devnull, str(data)], {})]

    with running("rclone", folder, commands) as server:
        yield server


@contextlib.contextmanager
def given_server(url: str, *, endpoint: str, key: str, secret: str) -> Iterator[S3Server]:
    """A server that somebody else runs. `url`, as `s3://bucket/prefix`, is the place that the tests may fill."""
    place = url.removeprefix("s3://").strip("/")
    yield S3Server("given", endpoint, key=key, secret=secret, place=place)


@contextlib.contextmanager
def running(
    name: str, folder: Path, commands: Callable[[int], Commands], *, key: str = KEY, secret: str = SECRET
) -> Iterator[S3Server]:
    """Start what `commands` says for a free port; give the server when it answers; end it."""
    with contextlib.ExitStack() as ending:
        yield _started_somewhere(S3Server(name, "", key=key, secret=secret), folder, commands, ending)


def _started_somewhere(
    server: S3Server, folder: Path, commands: Callable[[int], Commands], ending: contextlib.ExitStack
) -> S3Server:
    """Start `server` on a free port; on another one if it dies or does not store."""
    starts = 0
    while True:
        port = free_ports(1)[0]
        placed = replace(server, endpoint=f"http://{HOST}:{port}")
        starts += 1
        try:
            return _started(placed, commands(port), folder / f"{server.name}-{port}.txt", ending)
        except ServerDied:
            if starts == _STARTS_MAX:
                raise


def _started(server: S3Server, commands: Commands, printed: Path, ending: contextlib.ExitStack) -> S3Server:
    """Start the processes of `server`, to be ended with `ending`, and wait for it; end them now if it fails."""
    begun = time.monotonic()
    with contextlib.ExitStack() as failing:
        processes = tuple(
            failing.enter_context(process_of(command, settings, printed)) for command, settings in commands
        )
        _wait_until_it_stores(server, processes, printed)
        ending.push(failing.pop_all())
    return replace(server, start_s=time.monotonic() - begun, processes=processes)


@contextlib.contextmanager
def process_of(command: Sequence[str], settings: Mapping[str, str], printed: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to the file `printed`, and is killed and waited for at the end of the block."""
    wrapper = shutil.which("setpriv")
    dying_with_us = [wrapper, "--pdeathsig", "KILL", "--"] if wrapper else []
    own = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))}
    with printed.open("ab") as output:
        process = subprocess.Popen(
            [*dying_with_us, *command],
            env={**own, **settings},
            cwd=printed.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_until_it_stores(server: S3Server, processes: Sequence[subprocess.Popen[bytes]], printed: Path) -> None:
    """Return when a bucket was made and an object stored in it; some servers answer before they can store."""
    last: object = None
    until = time.monotonic() + READY_S
    bucket = f"/started-{secrets.token_hex(4)}"
    while time.monotonic() < until:
        dead = [process.returncode for process in processes if process.poll() is not None]
        if dead:
            raise ServerDied(f"{server.name} ended with {dead}: {_end_of(printed)}")
        try:
            client = server.client(timeout_s=2)
            last = client.put(bucket, b""), client.put(f"{bucket}/object", b"x")
            if last[-1] == 200:
                return
        except OSError as error:
            last = error
        time.sleep(0.05)
    raise ServerDied(f"{server.name} does not store ({last}): {_end_of(printed)}")


def _end_of(printed: Path) -> str:
    return printed.read_text(errors="replace")[-2000:]
