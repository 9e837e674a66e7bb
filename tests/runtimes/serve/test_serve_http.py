"""Over a real port of this machine: slow, broken and hostile clients; clients that leave; load."""

from __future__ import annotations

import errno
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from serve_toy import HeldModel, drawn_alone, toy_server, toy_service, until

from diffship.core.errors import ConfigError
from diffship.runtimes.serve import connections
from diffship.runtimes.serve.app import application
from diffship.runtimes.serve.connections import bind
from diffship.runtimes.serve.log import Throttle
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.server import HttpServer, check_exposure

TOKEN = "a-token-of-twenty-ch"
CHUNKS = b"1\r\na\r\n" * 9999


def connect(url: str) -> socket.socket:
    place = urlsplit(url)
    return socket.create_connection((place.hostname or "", place.port or 0), timeout=10)


def post(body: dict[str, object], path: str = "/v1/generate", length: int | None = None) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data) if length is None else length}\r\n\r\n".encode() + data


def answer_of(client: socket.socket) -> bytes:
    """Everything until the server hangs up."""
    data = b""
    try:
        while part := client.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


@pytest.mark.slow
def test_requests_over_a_real_port_and_keep_alive() -> None:
    with toy_server() as (url, _), httpx.Client(base_url=url) as client:
        for seed in range(3):
            answer = client.post("/v1/generate", json={"prompt": "cat", "steps": 2, "seed": seed})
            assert answer.content == drawn_alone("cat", steps=2, seed=seed)[0]
        assert client.get("/ready").json()["ready"] is True


@pytest.mark.slow
def test_events_arrive_while_it_is_drawn() -> None:
    model = HeldModel(delay=0.05)
    with toy_server(model) as (url, _), httpx.Client(base_url=url) as client:
        seen = []
        body = {"prompt": "cat", "steps": 4, "response": "events"}
        with client.stream("POST", "/v1/generate", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("event: progress"):
                    seen.append(time.monotonic())
        assert len(seen) == 5 and seen[-1] - seen[1] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("response", ["png", "events"])
def test_case_28_a_client_that_leaves_stops_its_job_at_the_next_step(response: str) -> None:
    model = HeldModel(delay=0.02)
    with toy_server(model) as (url, service):
        client = connect(url)
        client.sendall(post({"prompt": "cat", "steps": 100, "response": response}))
        until(lambda: len(model.batches) > 2)
        client.close()
        until(lambda: service.metrics.value("diffship_generations_total", model="toy", outcome="cancelled") == 1)
        until(lambda: service.worker(None).running() == 0, 1.0)
        time.sleep(0.1)
        calls = len(model.batches)
        time.sleep(0.1)
        assert len(model.batches) == calls < 60


def test_case_28_a_client_that_crashes_after_half_a_body_starts_nothing() -> None:
    model = HeldModel()
    with toy_server(model) as (url, service):
        client = connect(url)
        client.sendall(post({"prompt": "cat"}, length=1000))
        time.sleep(0.05)
        client.close()
        assert httpx.get(f"{url}/live").status_code == 200
        until(lambda: service.metrics.value("diffship_requests_total", route="/v1/generate", status="499") == 1)
    assert model.batches == []


@pytest.mark.slow
def test_case_29_headers_that_come_byte_by_byte_are_cut_off() -> None:
    with toy_server(header_seconds=0.3) as (url, _), connect(url) as slow:
        begin = time.monotonic()
        slow.sendall(b"GET /live HTTP/1.1\r\nHost: local")
        assert answer_of(slow) == b"" and 0.2 < time.monotonic() - begin < 3
        with connect(url) as second:  # also on the second request of a connection, however often bytes come
            second.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in second.recv(65536)
            begin = time.monotonic()
            with suppress(OSError):
                for _ in range(100):
                    second.sendall(b"G")
                    time.sleep(0.05)
            assert time.monotonic() - begin < 3
        assert httpx.get(f"{url}/live").status_code == 200


@pytest.mark.slow
def test_case_29_a_body_that_comes_too_slowly_is_408() -> None:
    with toy_server(body_seconds=0.3) as (url, _), connect(url) as slow:
        slow.sendall(post({"prompt": "cat"}, length=1000))
        assert b" 408 " in answer_of(slow)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /live\r\n\r\n", b" 400 "),
        (b"\x00\xff\xfe garbage\r\n\r\n", b" 400 "),
        (b"GET /live HTTP/1.1\r\n\r\n", b" 400 "),  # no Host
        (b"GET /live HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", b" 403 "),
        (b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * (1 << 20) + b"\r\n\r\n", b" 4"),
        (b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n", b" 413 "),
        (b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", b" 400 "),
        (b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 411 "),
        (b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS, b" 411 "),
    ],
    ids=["http09", "garbage", "no-host", "bad-host", "huge-header", "huge-body", "length", "no-length", "chunks"],
)  # fmt: skip
def test_case_29_broken_requests_are_refused_and_hung_up_on(sent: bytes, status: bytes) -> None:
    with toy_server() as (url, _):
        with connect(url) as client:
            with suppress(OSError):  # it may have hung up already
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
            heard = answer_of(client)
        # a server that hangs up on unread bytes may reset the connection before its answer is read
        assert status in heard[:20] or (heard == b"" and len(sent) > 50_000)
        assert httpx.get(f"{url}/live").status_code == 200


@pytest.mark.parametrize("body", [b"zz\r\n", b"5\r\nabcdeX\r\n", b"f" * 100 + b"\r\n"])
def test_a_body_that_breaks_while_its_request_is_answered_fills_no_log(
    body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    sent = b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    with toy_server() as (url, _):
        for _ in range(3):
            with connect(url) as client:
                client.sendall(sent)
                assert answer_of(client)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 411")
        assert httpx.get(f"{url}/live").status_code == 200
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


@pytest.mark.slow
def test_case_29_other_clients_go_on_beside_slow_ones() -> None:
    with toy_server(header_seconds=5) as (url, _), httpx.Client(base_url=url) as client:
        slow = [connect(url) for _ in range(30)]
        for other in slow:
            other.sendall(b"GET /live HTTP/1.1\r\nHo")
        begin = time.monotonic()
        for _ in range(20):
            assert client.post("/v1/generate", json={"prompt": "cat", "steps": 1}).status_code == 200
        assert time.monotonic() - begin < 4
        for other in slow:
            other.close()


def test_case_29_idle_connections_do_not_keep_the_others_out() -> None:
    model = HeldModel()
    with toy_server(model, connections=8) as (url, _), ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        model.gate.clear()
        job = pool.submit(httpx.post, f"{url}/v1/generate", json={"prompt": "cat", "steps": 1}, timeout=30)
        assert model.in_call.wait(10)
        idle = [stack.enter_context(connect(url)) for _ in range(20)]
        idle[-1].sendall(b"GET /live HTTP/1.1\r\nHost: lo")
        answer = httpx.get(f"{url}/live")
        assert answer.status_code == 200 and answer.headers["x-request-id"]
        assert answer_of(idle[0]) == b"", "whoever has been idle for longest had to go"
        idle[-1].sendall(b"calhost\r\n\r\n")
        assert b" 200 " in idle[-1].recv(65536)
        model.gate.set()
        assert job.result().status_code == 200, "and not who is being answered"


def unread(url: str, path: str = "/openapi.json", times: int = 1) -> socket.socket:
    """A client that asks and reads nothing; its own buffer holds next to nothing either."""
    place = urlsplit(url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect((place.hostname, place.port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * times)
    return client


def gone(client: socket.socket, within: float) -> bool:
    """Whether the server hangs up in time, by a client that looks without reading."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            client.send(b"x")
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes four kilobytes of an answer, not megabytes, so that little is enough to fill it."""
    accept = connections.Door.accept

    def small(door: connections.Door) -> tuple[socket.socket, object]:
        client, address = accept(door)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return client, address

    monkeypatch.setattr(connections.Door, "accept", small)


@pytest.mark.slow
@pytest.mark.usefixtures("small_buffers")
def test_case_29_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(connections, "_SLOWEST", 4096)
    with toy_server(write_seconds=0.5) as (url, _), unread(url) as client, connect(url) as slow:
        assert not gone(client, 0.2) and gone(client, 5)
        slow.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        whole, begin = b"", time.monotonic()
        while part := slow.recv(1024):  # slower than all at once, yet it reads
            whole += part
            time.sleep(0.02)
        head, _, body = whole.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head.lower() and time.monotonic() - begin > 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("small_buffers")
def test_case_29_clients_that_read_nothing_do_not_keep_the_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_STILL_SECONDS", 0.2)
    monkeypatch.setattr(connections, "_LOOK_SECONDS", 0.05)
    with toy_server(connections=8) as (url, _), ExitStack() as stack:
        held = [stack.enter_context(unread(url, times=1 + number % 2)) for number in range(12)]
        time.sleep(0.5)
        for _ in range(3):
            assert httpx.get(f"{url}/live", timeout=10).status_code == 200
            answer = httpx.post(f"{url}/v1/generate", json={"prompt": "cat", "steps": 1}, timeout=10)
            assert answer.status_code == 200
        assert sum(gone(client, 0.1) for client in held) >= 5


def test_case_29_requests_in_advance_are_few() -> None:
    """One may follow at once; whoever sends thousands keeps the server busy for nobody."""
    with toy_server() as (url, _), connect(url) as client:
        with suppress(OSError):
            client.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        assert 1 <= answer_of(client).count(b"200 OK") <= 3
        assert httpx.get(f"{url}/live").status_code == 200


@pytest.mark.skipif(os.name != "posix", reason="counts descriptors")
def test_a_lack_of_descriptors_closes_idle_connections_and_fills_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where none is left at all, whoever comes is hung up on; others go on, and a line or two says so."""
    accept, empty = socket.socket.accept, [True]
    first = Throttle(0.1, 3)
    monkeypatch.setattr(connections.LOG, "filters", [first])

    def lacking(door: socket.socket) -> tuple[socket.socket, object]:
        if empty and os.path.exists(f"/dev/fd/{door._reserve}"):  # type: ignore[attr-defined]
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(door)

    with toy_server() as (url, _), httpx.Client(base_url=url) as known:
        assert known.get("/live").status_code == 200
        monkeypatch.setattr(socket.socket, "accept", lacking)
        for _ in range(20):
            with connect(url) as client:
                assert answer_of(client) == b""
        assert known.get("/live").status_code == 200
        empty.clear()
        assert httpx.get(f"{url}/live").status_code == 200
    said = [record.getMessage() for record in caplog.records if "descriptor" in record.getMessage()]
    assert 1 <= len(said) <= 3


def test_connections_are_as_many_as_the_limit_of_open_files_allows(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    script = (
        "import resource, sys; from diffship.runtimes.serve.connections import affordable\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))\n"
        "print(affordable(256), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = 1024 if hard == resource.RLIM_INFINITY else min(hard, 1024)

    def told(soft: int, hard: int) -> list[int]:
        done = subprocess.run([sys.executable, "-c", script, str(soft), str(hard)], capture_output=True, check=True)
        return [int(word) for word in done.stdout.split()]

    assert told(100, most)[0] == 256 and told(100, most)[1] >= 256 + 32, "the own limit is raised"
    allowed, limit = told(64, 64)
    assert limit == 64 and 8 <= allowed <= 64 - 32


def test_localhost_is_both_of_its_addresses() -> None:
    try:
        bind("::1", 0).__exit__()
    except ConfigError:
        pytest.skip("no IPv6 here")
    addresses = {entry[4][0] for entry in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    with toy_service() as service, bind("localhost", 0) as doors:
        assert {door.getsockname()[0] for door in doors} == addresses
        with HttpServer(doors, application(service), service.options) as server:
            for url in server.urls:
                assert httpx.get(f"{url}/live").status_code == 200


def test_an_address_that_this_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("203.0.113.7", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with bind("gpu.lan", 0) as doors:
        assert [door.getsockname()[0] for door in doors] == ["127.0.0.1"]


@pytest.mark.slow
def test_an_idle_connection_stays_as_long_as_it_is_told_to() -> None:
    with toy_server(keep_alive=1.0) as (url, _), connect(url) as client:
        client.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        begin = time.monotonic()
        answer_of(client)
        assert 0.5 < time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "name", ["", " ", "*", "*.example.org", "https://art.example.org", "art.example.org:8443", "a b", "a..b", "-a/"]
)
def test_names_that_no_host_header_can_hold_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--allow-host"):
        ServeOptions(allow_hosts=(name,))


def test_names_are_kept_as_host_headers_have_them() -> None:
    given = ("ART.Example.org.", "b\xfccher.example", "gpu_1.lan", "10.0.0.7")
    expected = ("art.example.org", "xn--bcher-kva.example", "gpu_1.lan", "10.0.0.7")
    assert ServeOptions(allow_hosts=given).allow_hosts == expected


def test_a_token_over_the_wire() -> None:
    with toy_server(token=TOKEN) as (url, _):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_case_36_a_port_in_use_is_a_clear_message() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.port
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use; --port 0"):
            bind("127.0.0.1", port)


def test_case_36_addresses_that_are_not_ours() -> None:
    with pytest.raises(ConfigError, match="Cannot assign requested address"):
        bind("203.0.113.7", 0)
    with pytest.raises(ConfigError, match="give an address of this machine"):
        bind("no-such-host.invalid", 0)


def test_case_36_ipv6_loopback() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        listener = bind("::1", 0)
    except ConfigError:
        pytest.skip("no IPv6 here")
    with listener:
        assert [door.family for door in listener] == [socket.AF_INET6]


@pytest.mark.parametrize("host", ["", "unix:./x.sock", "./x.sock", "localhost:80", "http://127.0.0.1", "[::1]", " ::1"])
def test_what_is_no_address_is_told_as_such(host: str) -> None:
    for token in (None, TOKEN):
        with pytest.raises(ConfigError, match="is no address; legal is an IP address or a name"):
            check_exposure(host, token)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org", "my_host.local.", "0"])
def test_case_36_what_others_can_reach_needs_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="DIFFSHIP_TOKEN"):
        check_exposure(host, None)
    check_exposure(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_case_36_loopback_may_be_open(host: str) -> None:
    check_exposure(host, None)


@pytest.mark.parametrize("token", ["", "short", "x" * 513, "with a space in it!!", "ümlauts-are-not-plain"])
def test_tokens_have_a_legal_form(token: str) -> None:
    with pytest.raises(ConfigError, match="legal is 16 to 512"):
        check_exposure("127.0.0.1", token)


@pytest.mark.slow
def test_case_24_eight_clients_in_a_closed_loop() -> None:
    model = HeldModel(delay=0.01)
    seconds: list[float] = []

    def client(url: str, end: float) -> int:
        done = 0
        with httpx.Client(base_url=url, timeout=30) as session:
            while time.monotonic() < end:
                begin = time.monotonic()
                assert session.post("/v1/generate", json={"prompt": "cat", "steps": 5}).status_code == 200
                seconds.append(time.monotonic() - begin)
                done += 1
        return done

    with toy_server(model) as (url, _), ThreadPoolExecutor(8) as pool:
        end = time.monotonic() + 4
        done = list(pool.map(lambda _: client(url, end), range(8)))
    seconds.sort()
    assert min(done) >= 0.5 * max(done)  # nobody is starved
    # 3 x p50 x queue depth; other tests run beside this one, and a stall of theirs is not the server's
    assert seconds[int(0.99 * len(seconds))] <= 3 * 8 * statistics.median(seconds)
    assert sum(model.batches) / len(model.batches) > 6  # of 16 rows: calls are shared


@pytest.mark.slow
def test_case_25_overload_keeps_the_goodput_and_refuses_fast() -> None:
    model = HeldModel(delay=0.02)
    body = {"prompt": "cat", "steps": 5, "deadline_seconds": 2}
    most = [0]
    with toy_server(model, batch=2, queue=4) as (url, service), ThreadPoolExecutor(96) as pool:

        def once(_: int) -> tuple[int, float]:
            begin = time.monotonic()
            with closing(HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
                connection.request("POST", "/v1/generate", json.dumps(body), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
            most[0] = max(most[0], service.worker(None).waiting() + service.worker(None).running())
            assert answer.status == 200 or (answer.status == 503 and int(answer.headers["retry-after"]) >= 1)
            return answer.status, time.monotonic() - begin

        begin = time.monotonic()
        capacity = sum(status == 200 for status, _ in ThreadPoolExecutor(4).map(once, range(40)))
        rate = capacity / (time.monotonic() - begin)
        begin, span, jobs = time.monotonic(), 4.0, []
        while (now := time.monotonic() - begin) < span:
            jobs.append(pool.submit(once, 0))
            time.sleep(max(len(jobs) / (5 * rate) - now, 0))
        made = [job.result() for job in jobs]
        goodput = sum(status == 200 for status, _ in made) / (time.monotonic() - begin)
    refused = sorted(seconds for status, seconds in made if status == 503)
    # loose, as clients and other tests share the cores with the server; the study `serving` has the figures
    assert goodput >= 0.5 * rate and len(refused) > len(made) / 3
    assert refused[len(refused) // 2] < 0.5
    assert max(seconds for status, seconds in made if status == 200) < 2 + 1.5  # the deadline, and the way back
    assert most[0] <= 4 + 2


@pytest.mark.slow
def test_threads_and_connections_do_not_pile_up() -> None:
    with toy_server() as (url, service), httpx.Client(base_url=url) as client:
        for turn in range(200):
            if turn == 20:
                before = threading.active_count()
            client.post("/v1/generate", json={"prompt": "cat", "steps": 1}, headers={"Idempotency-Key": str(turn)})
        assert threading.active_count() <= before + 4
        assert service.worker(None).running() == service.worker(None).waiting() == 0
