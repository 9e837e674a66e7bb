"""HTTP: what may be asked again and when, what a URL may be, what a server may say of its models."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from sampling_toy import ToyModel

from diffship.core.errors import ConfigError
from diffship.runtimes.handoff.pair import ModelFacts
from diffship.runtimes.handoff.transport import Cloud, CloudError, choose_model, pause, retried


@contextmanager
def answering(status: int = 200, headers: dict[str, str] | None = None, body: bytes = b"") -> Iterator[str]:
    """A server that gives everyone the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def models_of(url: str, token: str | None = None) -> Any:
    cloud = Cloud(url, token)
    try:
        return cloud.submit(cloud.models(5)).result(10)
    finally:
        cloud.close()


def entry(**changes: Any) -> dict[str, Any]:
    model = ToyModel()
    facts = ModelFacts.of(model).to_json()
    return {"id": "toy", "digest": model.digest, "engine": "onnxruntime", "facts": facts, **changes}


def told(**changes: Any) -> bytes:
    return json.dumps({"object": "list", "data": [entry(**changes), entry(id="second")]}).encode()


def test_models_come_by_name_and_in_order() -> None:
    with answering(body=told()) as url:
        models = models_of(url)
    assert list(models) == ["toy", "second"]
    assert choose_model(models, None).name == "toy" and choose_model(models, "second").name == "second"
    assert models["toy"].facts.family == ToyModel().family
    with pytest.raises(ConfigError, match="did you mean 'second'"):
        choose_model(models, "secnd")


@pytest.mark.parametrize("url", ["http://xn--a", "http://256.1.1.1", "http://" + "\xe9" * 70, "http://\x00"])
def test_a_url_whose_host_cannot_be_read_is_refused_when_it_is_given(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL"):
        Cloud(url)


@pytest.mark.parametrize("fault", [OSError(97, "Address family not supported"), UnicodeError("label too long")])
def test_what_a_resolver_raises_past_httpx_is_a_cloud_that_is_down(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def stream(self, *_: Any, **__: Any) -> Any:
            raise fault

    monkeypatch.setattr(Cloud, "_opened", lambda cloud: Failing())
    with pytest.raises(CloudError, match=r"^down: ") as caught:
        models_of("http://somewhere")
    assert caught.value.again


GARBAGE = {
    "not JSON": b"<html>",
    "no models": b'{"data": []}',
    "another form": b'{"models": 1}',
    "deep": b"[" * 100_000,
    "a name that is none": told(id="../x"),
    "half a surrogate": told(id="\ud800"),
    "a digest that is none": told(digest="xyz"),
    "an engine that is a number": told(engine=3),
    "facts without family": told(facts={"name": "x", "scheduler": {}}),
    "facts with more": told(facts={**entry()["facts"], "more": 1}),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_other_words_of_models_are_garbage(name: str) -> None:
    with answering(body=GARBAGE[name]) as url, pytest.raises(CloudError, match="garbage: /v1/models"):
        models_of(url)


@pytest.mark.parametrize(
    ("status", "headers", "kind", "again", "after"),
    [
        (503, {"Retry-After": "7"}, "busy", True, 7.0),
        (503, {"Retry-After": "Fri, 31 Dec 2199 23:59:59 GMT"}, "busy", True, 0.0),  # no wall clock is read
        (503, {"Retry-After": "-1"}, "busy", True, 0.0),
        (429, {}, "busy", True, 0.0),
        (502, {}, "failed", True, 0.0),
        (500, {}, "failed", False, 0.0),
        (504, {}, "slow", False, 0.0),
        (401, {}, "refused", False, 0.0),
        (422, {}, "refused", False, 0.0),
        (302, {"Location": "http://127.0.0.1:1/"}, "refused", False, 0.0),
        (204, {}, "refused", False, 0.0),
    ],
)
def test_statuses(status: int, headers: dict[str, str], kind: str, again: bool, after: float) -> None:
    body = b"" if status == 204 else json.dumps({"error": {"message": "why\n\u00e4" + "x" * 999}}).encode()
    with answering(status, headers, body) as url, pytest.raises(CloudError) as caught:
        models_of(url)
    assert (caught.value.kind, caught.value.again, caught.value.after) == (kind, again, after)
    assert len(str(caught.value)) < 260 and str(caught.value).isascii() and "\n" not in str(caught.value)


@pytest.mark.parametrize("headers", [{"Content-Type": "text/html"}, {"Content-Encoding": "gzip"}], ids=["type", "gzip"])
def test_another_content_type_is_garbage(headers: dict[str, str]) -> None:
    with answering(200, headers, told()) as url, pytest.raises(CloudError, match="garbage: Content-Type"):
        models_of(url)


def test_an_answer_longer_than_it_may_be_is_not_read() -> None:
    with answering(body=b" " * ((4 << 20) + 1)) as url, pytest.raises(CloudError, match="garbage: an answer of"):
        models_of(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8765",
        "ftp://host",
        "http://",
        "http://name:word@host",
        "http://host/?x=1",
        "http://host/#x",
        "http://[::1",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Cloud(url)
    assert "word" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize("token", ["", "a b", "line\nbreak", "ümlaut"])
def test_tokens_that_no_header_holds(token: str) -> None:
    with pytest.raises(ConfigError, match="plain ASCII"):
        Cloud("https://host", token)


def test_a_token_in_the_open_is_warned_of() -> None:
    assert Cloud("http://10.1.2.3", "t" * 20).warnings and not Cloud("https://10.1.2.3", "t" * 20).warnings
    assert not Cloud("http://127.0.0.1:1", "t" * 20).warnings and not Cloud("http://10.1.2.3").warnings


def test_the_token_goes_along_and_a_base_path_is_kept() -> None:
    heard: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append((self.path, self.headers["Authorization"]))
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(CloudError, match="refused: HTTP 404"):
            models_of(f"http://127.0.0.1:{server.server_port}/draw/", "t" * 20)
        thread.join()
    assert heard == [("/draw/v1/models", "Bearer " + "t" * 20)]


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
    with answering(body=told()) as url:
        assert list(models_of(url, "t" * 20)) == ["toy", "second"]


def attempts(*faults: CloudError | None, left: float = 10.0) -> tuple[int, list[float], CloudError | None]:
    """How often was asked, how long was paused, and the fault that came out."""
    made, paused, todo = [0], [], list(faults)

    async def ask() -> None:
        made[0] += 1
        fault = todo.pop(0)
        if fault is not None:
            raise fault

    async def run() -> CloudError | None:
        try:
            await retried(ask, lambda: left, draw=lambda: 0.0)
        except CloudError as fault:
            return fault
        return None

    async def sleep(seconds: float) -> None:
        paused.append(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffship.runtimes.handoff.transport.asyncio.sleep", sleep)
        fault = asyncio.run(run())
    return made[0], paused, fault


def again(after: float = 0.0) -> CloudError:
    return CloudError("busy: x", again=True, after=after)


def test_at_most_two_retries_and_only_where_they_may_help() -> None:
    assert attempts(None)[0] == 1
    assert attempts(again(), again(), None)[0] == 3
    made, paused, fault = attempts(again(), again(), again(), None)
    assert made == 3 and fault is not None and paused == [0.05, 0.1]
    made, paused, fault = attempts(CloudError("refused: x"), None)
    assert made == 1 and fault is not None and paused == []


def test_retry_after_is_kept_within_the_time_that_is_left() -> None:
    assert attempts(again(3), None)[1] == [3.05]
    made, paused, fault = attempts(again(30), None)
    assert made == 1 and paused == [] and fault is not None


def test_pauses_are_jittered_and_grow() -> None:
    first, second = ([pause(number, 0, j / 10) for j in range(10)] for number in (0, 1))
    assert len(set(first)) == 10 and min(first) == 0.05 and max(first) < 0.1
    assert [2 * value for value in first] == second
    assert pause(0, 4, 0) == 4.05
