"""The servers that the tests start do start, store and go; the proxy before them does what its rules say."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.s3_client import S3Client
from tests.s3_proxy import FaultProxy, Rule, fault_proxy
from tests.storage import s3_servers
from tests.storage.s3_servers import S3Server, ServerDied
from tests.storage.s3_swift import swift

Start = Callable[[Path], AbstractContextManager[S3Server]]
HONEST: list[Start] = [s3_servers.ministack, s3_servers.seaweedfs]
SERVERS: list[Start] = [*HONEST, s3_servers.rclone_serve, swift]
BODY = b"0123456789"
BROKEN = (OSError, http.client.HTTPException)


def address_of(endpoint: str) -> tuple[str, int]:
    parts = urlsplit(endpoint)
    return parts.hostname or "", parts.port or 0


def listens(endpoint: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address_of(endpoint)) == 0


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("start", SERVERS)
def test_a_server_stores_and_is_gone_afterwards(start: Start, tmp_path: Path) -> None:
    with start(tmp_path) as server:
        bucket = server.new_bucket()
        client = server.client()
        assert client.put(f"/{bucket}/folder/a", BODY) == 200
        assert client.get(f"/{bucket}/folder/a") == BODY
        assert client.get(f"/{bucket}/folder/b") is None
        assert client.names(bucket) == ["folder/a"]
        assert client.names(f"{bucket}/folder") == ["a"]
        assert client.names(server.new_bucket()) == []
        assert all(is_alive(process.pid) for process in server.processes)
        print(f"{server.name}: {server.start_s:.1f} s")
    assert server.processes
    assert not any(is_alive(process.pid) for process in server.processes)
    assert not listens(server.endpoint)


def test_a_server_is_gone_after_a_failure(tmp_path: Path) -> None:
    def fail_beside(started: list[S3Server]) -> None:
        with s3_servers.rclone_serve(tmp_path) as server:
            started.append(server)
            raise ServerDied("as a test may fail")

    started: list[S3Server] = []
    with pytest.raises(ServerDied, match="as a test may fail"):
        fail_beside(started)
    assert len(started) == 1
    assert not is_alive(started[0].processes[0].pid)


def test_a_server_dies_with_a_session_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from tests.storage.s3_servers import rclone_serve\n"
        "with rclone_serve(pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.endpoint, flush=True)\n"
        "    time.sleep(60)\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path)]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=root) as session:
        assert session.stdout is not None
        endpoint = session.stdout.readline().strip()
        assert listens(endpoint)
        session.kill()
    until = time.monotonic() + 10
    while listens(endpoint) and time.monotonic() < until:
        time.sleep(0.02)
    assert not listens(endpoint)


@pytest.mark.parametrize("start", HONEST)
def test_an_upload_in_parts_that_was_not_ended_is_seen(start: Start, tmp_path: Path) -> None:
    with start(tmp_path) as server:
        client, bucket = server.client(), server.new_bucket()
        assert client.request("POST", f"/{bucket}/folder/a", query={"uploads": ""}).status == 200
        assert client.uploads(bucket) == ["folder/a"]
        assert client.uploads(f"{bucket}/folder") == ["a"]
        assert client.names(bucket) == []
        with pytest.raises(OSError, match="404"):
            client.uploads("no-such-bucket")


@pytest.mark.parametrize("start", HONEST)
def test_two_of_a_kind_run_side_by_side(start: Start, tmp_path: Path) -> None:
    with start(tmp_path) as first, start(tmp_path) as second:
        bucket = first.new_bucket()
        assert first.client().put(f"/{bucket}/a", BODY) == 200
        assert second.client().get(f"/{bucket}/a") is None


def test_a_server_whose_port_is_taken_starts_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as robber:
        robber.bind((s3_servers.HOST, 0))
        robber.listen()
        taken = robber.getsockname()[1]
        free = s3_servers.free_ports(1)[0]
        offered = iter([[taken], [free]])
        monkeypatch.setattr(s3_servers, "free_ports", lambda count: next(offered))
        with s3_servers.rclone_serve(tmp_path) as server:
            assert address_of(server.endpoint) == (s3_servers.HOST, free)


def test_a_server_that_cannot_start_says_what_it_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_servers, "program", lambda name: "false")
    with pytest.raises(ServerDied, match=r"rclone ended with \[1\]"):
        s3_servers.rclone_serve(tmp_path).__enter__()


def test_servers_that_check_the_secret_refuse_a_wrong_one(tmp_path: Path) -> None:
    with s3_servers.rclone_serve(tmp_path) as server:
        bucket = server.new_bucket()
        assert S3Client(server.endpoint, key=server.key, secret="wrong").put(f"/{bucket}/a", BODY) == 403
        assert S3Client(server.endpoint, key=server.key, secret=server.secret).put(f"/{bucket}/a", BODY) == 200


@pytest.mark.parametrize(("start", "obeys"), [*((start, True) for start in HONEST), (s3_servers.rclone_serve, False)])
def test_who_obeys_the_condition_that_a_name_is_free(start: Start, obeys: bool, tmp_path: Path) -> None:
    with start(tmp_path) as server:
        path = f"/{server.new_bucket()}/a"
        assert server.client().put(path, b"first", new=True) == 200
        assert server.client().put(path, b"second", new=True) == (412 if obeys else 200)
        assert server.client().get(path) == (b"first" if obeys else b"second")


def test_swift_lets_several_writers_win_a_free_name(tmp_path: Path) -> None:
    with swift(tmp_path) as server, ThreadPoolExecutor(8) as pool:
        client, bucket = server.client(), server.new_bucket()
        assert client.put(f"/{bucket}/alone", b"first", new=True) == 200
        assert client.put(f"/{bucket}/alone", b"second", new=True) == 412
        winners = 0
        for number in range(100):
            path = f"/{bucket}/race/{number}"
            racing = [pool.submit(client.put, path, b"%d" % racer, new=True) for racer in range(8)]
            winners = sum(one.result() == 200 for one in racing)
            if winners > 1:
                break
        assert winners > 1


def test_a_given_server_keeps_the_tests_below_its_place() -> None:
    given = s3_servers.given_server("s3://bucket/some/prefix/", endpoint="http://127.0.0.1:1", key="k", secret="s")
    with given as server:
        first, second = server.new_url(), server.new_url()
        assert first != second
        assert first.startswith("s3://bucket/some/prefix/basin-")
        assert server.storage_options()["client_kwargs"]["endpoint_url"] == "http://127.0.0.1:1"
        assert server.storage_options("http://127.0.0.1:2")["client_kwargs"]["endpoint_url"] == "http://127.0.0.1:2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_servers.ministack(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server.endpoint) as started:
        yield started


@pytest.fixture
def path(server: S3Server) -> str:
    return f"/{server.new_bucket()}/folder/a"


@pytest.fixture
def through(server: S3Server, proxy: FaultProxy) -> S3Client:
    return server.client(endpoint=proxy.endpoint)


@pytest.fixture
def direct(server: S3Server) -> S3Client:
    return server.client()


class TestProxy:
    def test_without_rules_all_passes_and_is_noted(self, proxy: FaultProxy, through: S3Client, path: str) -> None:
        large = os.urandom(3 << 20)
        assert through.put(path, large, new=True) == 200
        assert through.get(path) == large
        assert through.request("GET", path, headers={"Range": "bytes=2-4"}).body == large[2:5]
        assert through.request("HEAD", path).headers["content-length"] == str(len(large))
        assert through.request("DELETE", path).status == 204
        assert through.get(path) is None
        seen = [(exchange.method, exchange.action, exchange.status) for exchange in proxy.exchanges]
        statuses = [("PUT", 200), ("GET", 200), ("GET", 206), ("HEAD", 200), ("DELETE", 204), ("GET", 404)]
        assert seen == [(method, None, status) for method, status in statuses]
        assert proxy.exchanges[0].headers["if-none-match"] == "*"
        assert {exchange.target for exchange in proxy.exchanges} == {path}

    def test_several_requests_use_one_connection(self, proxy: FaultProxy, through: S3Client, path: str) -> None:
        through.put(path, BODY)
        connection = http.client.HTTPConnection(through.host, timeout=10)
        for _ in range(3):
            connection.request("GET", path)
            assert connection.getresponse().read() == BODY
        connection.close()

    def test_who_waits_for_leave_to_send_a_body_gets_it(
        self, server: S3Server, proxy: FaultProxy, path: str, direct: S3Client
    ) -> None:
        with socket.create_connection(address_of(proxy.endpoint), timeout=10) as raw:
            head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(BODY)}\r\n\r\n"
            raw.sendall(head.encode())
            assert raw.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            raw.sendall(BODY)
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
        assert direct.get(path) == BODY

    def test_a_body_in_chunks_passes(self, proxy: FaultProxy, path: str, direct: S3Client) -> None:
        connection = http.client.HTTPConnection(*address_of(proxy.endpoint), timeout=10)
        connection.request("PUT", path, iter([BODY, BODY]), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
        assert connection.getresponse().status == 200
        connection.close()
        assert direct.get(path) == BODY + BODY

    def test_drop_before(self, proxy: FaultProxy, through: S3Client, direct: S3Client, path: str) -> None:
        proxy.add(Rule("drop_before"))
        with pytest.raises(http.client.RemoteDisconnected):
            through.put(path, BODY)
        assert direct.get(path) is None
        assert proxy.exchanges[0].status is None

    def test_drop_after_is_a_lost_reply(
        self, proxy: FaultProxy, through: S3Client, direct: S3Client, path: str
    ) -> None:
        proxy.add(Rule("drop_after"))
        with pytest.raises(BROKEN):
            through.put(path, BODY, new=True)
        assert direct.get(path) == BODY
        assert through.put(path, BODY, new=True) == 412
        assert [(exchange.action, exchange.status) for exchange in proxy.exchanges] == [
            ("drop_after", 200),
            (None, 412),
        ]

    def test_reset(self, proxy: FaultProxy, through: S3Client, direct: S3Client, path: str) -> None:
        proxy.add(Rule("reset"))
        with pytest.raises(ConnectionResetError) as caught:
            through.put(path, BODY)
        assert not isinstance(caught.value, http.client.RemoteDisconnected)  # That is what a regular end is called.
        assert direct.get(path) is None

    @pytest.mark.parametrize("action", ["delay", "delay_reply"])
    def test_delays(self, proxy: FaultProxy, through: S3Client, path: str, action: str) -> None:
        proxy.add(Rule("delay" if action == "delay" else "delay_reply", delay_s=0.3))
        begun = time.monotonic()
        assert through.put(path, BODY) == 200
        assert time.monotonic() - begun >= 0.3

    @pytest.mark.parametrize(("action", "stored"), [("delay", None), ("delay_reply", BODY)])
    def test_what_a_client_that_gave_up_has_done(
        self, server: S3Server, proxy: FaultProxy, direct: S3Client, path: str, action: str, stored: bytes | None
    ) -> None:
        proxy.add(Rule("delay" if action == "delay" else "delay_reply", delay_s=60))
        with pytest.raises(TimeoutError):
            server.client(endpoint=proxy.endpoint, timeout_s=0.5).put(path, BODY)
        assert direct.get(path) == stored

    def test_truncate(self, proxy: FaultProxy, through: S3Client, path: str) -> None:
        through.put(path, BODY)
        proxy.add(Rule("truncate"))
        with pytest.raises(http.client.IncompleteRead) as caught:
            through.get(path)
        assert caught.value.partial == BODY[:5]
        assert through.get(path) == BODY

    def test_corrupt(self, proxy: FaultProxy, through: S3Client, path: str) -> None:
        through.put(path, BODY)
        proxy.add(Rule("corrupt"))
        assert through.get(path) == bytes([BODY[0] ^ 0x80]) + BODY[1:]
        assert through.get(path) == BODY

    @pytest.mark.parametrize(("action", "stored"), [("status", None), ("status_after", BODY)])
    def test_a_status_with_a_code(
        self,
        proxy: FaultProxy,
        through: S3Client,
        direct: S3Client,
        path: str,
        action: str,
        stored: bytes | None,
    ) -> None:
        kind = Rule("status") if action == "status" else Rule("status_after")
        kind.status, kind.code = 409, "ConditionalRequestConflict"
        proxy.add(kind)
        reply = through.request("PUT", path, body=BODY)
        assert reply.status == 409
        assert b"<Code>ConditionalRequestConflict</Code>" in reply.body
        assert direct.get(path) == stored

    def test_duplicate_gives_the_second_reply(
        self, proxy: FaultProxy, through: S3Client, direct: S3Client, path: str
    ) -> None:
        proxy.add(Rule("duplicate"))
        assert through.put(path, BODY, new=True) == 412
        assert direct.get(path) == BODY

    def test_a_rule_acts_on_what_fits_and_as_often_as_it_says(
        self, proxy: FaultProxy, through: S3Client, path: str
    ) -> None:
        proxy.add(Rule("status", method="GET", match="/folder/a$", skip=1, count=2, status=500))
        assert through.put(path, BODY) == 200
        assert through.request("GET", f"{path}b").status == 404
        assert [through.request("GET", path).status for _ in range(4)] == [200, 500, 500, 200]

    def test_a_rule_without_end_ends_with_clear(self, proxy: FaultProxy, through: S3Client, path: str) -> None:
        proxy.add(Rule("status", count=None))
        assert [through.put(path, BODY) for _ in range(5)] == [503] * 5
        proxy.clear()
        assert proxy.exchanges == []
        assert through.put(path, BODY) == 200

    def test_a_rule_with_a_probability_acts_on_some(self, proxy: FaultProxy, through: S3Client, path: str) -> None:
        proxy.add(Rule("status", count=None, probability=0.5))
        statuses = {through.put(path, BODY) for _ in range(40)}
        assert statuses == {200, 503}

    def test_other_requests_pass_while_one_is_delayed(self, proxy: FaultProxy, through: S3Client, path: str) -> None:
        proxy.add(Rule("delay", method="GET", delay_s=1))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(through.get, path)
            while not proxy.exchanges:
                time.sleep(0.01)
            assert through.put(path, BODY) == 200
            assert not waiting.done()
            assert waiting.result() == BODY


def test_the_end_of_a_proxy_cuts_what_it_delays(server: S3Server, path: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        with fault_proxy(server.endpoint) as proxy:
            proxy.add(Rule("delay", delay_s=60))
            waiting = pool.submit(server.client(endpoint=proxy.endpoint).get, path)
            while not proxy.exchanges:
                time.sleep(0.01)
        with pytest.raises(BROKEN):
            waiting.result(10)
    assert not listens(proxy.endpoint)
