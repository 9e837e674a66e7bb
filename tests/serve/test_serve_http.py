"""Over a real port of this machine: slow, broken and hostile clients; clients that leave; load."""

from __future__ import annotations

import json
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx
import pytest
from serve_toy import HeldModel, drawn_alone, toy_server, until

from diffship.core.errors import ConfigError
from diffship.runtimes.serve.server import bind, check_exposure

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


def test_requests_over_a_real_port_and_keep_alive() -> None:
    with toy_server() as (url, _), httpx.Client(base_url=url) as client:
        for seed in range(3):
            answer = client.post("/v1/generate", json={"prompt": "cat", "steps": 2, "seed": seed})
            assert answer.content == drawn_alone("cat", steps=2, seed=seed)[0]
        assert client.get("/ready").json()["ready"] is True


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


def test_a_token_over_the_wire() -> None:
    with toy_server(token=TOKEN) as (url, _):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_case_36_a_port_in_use_is_a_clear_message() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
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
        assert listener.family == socket.AF_INET6


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org", ""])
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
    # loose, as clients and other tests share the cores with the server; benchmarks.serving has the figures
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
