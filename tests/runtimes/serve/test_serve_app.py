"""The application without a network: every endpoint, what it refuses, what it promises."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from sampling_toy import ToyModel
from serve_toy import POISON, HeldModel, ask, drawn_alone, toy_service, until

from diffship.runtimes.handoff.pair import ModelFacts, check_pair
from diffship.runtimes.serve.answers import event, headers_of, json_bytes
from diffship.runtimes.serve.app import Follower, application, events
from diffship.runtimes.serve.jobs import Generation
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.order import Drawn, Order
from diffship.runtimes.serve.service import Service
from diffship.runtimes.serve.worker import Served
from diffship.sampling.generate import Request, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.picture import Picture
from diffship.sampling.wire import pack, unpack

BYTES = {"content-type": "application/octet-stream"}
PATHS = re.compile(r"(?:/(?:tmp|home|usr|work|root|var|opt|lib)/|[A-Z]:\\|\.py\b|Traceback|object at 0x)")


def error_of(answer: httpx.Response, status: int, code: str) -> str:
    """The message of an error answer, which must have this form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code and error["request_id"] == answer.headers["x-request-id"]
    assert not PATHS.search(answer.text)
    return str(error["message"])


def events_of(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in answer.text.split("\n\n") if block.startswith("event: ")]
    return [(block.split("\n")[0][7:], json.loads(block.split("\n")[1][6:])) for block in blocks]


def together(service: Service, requests: list[dict[str, Any]], path: str = "/v1/generate") -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(application(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
            return list(await asyncio.gather(*(client.post(path, **words) for words in requests)))

    return asyncio.run(run())


def test_generate_gives_the_bytes_of_generate() -> None:
    with toy_service() as service:
        answer = ask(service, "POST", "/v1/generate", json={"prompt": "red cat", "steps": 3, "seed": 7})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    assert answer.content == drawn_alone("red cat", steps=3, seed=7)[0]
    assert re.fullmatch(r"queue;dur=[\d.]+, run;dur=[\d.]+", answer.headers["server-timing"])
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_warnings_that_no_header_holds_are_whole_json_still() -> None:
    settings = {"warnings": [f"{i}: " + "\xe9" * 100 for i in range(20)]}
    drawn = Drawn([Picture(np.zeros((8, 8, 3), np.uint8), settings)])
    made = SimpleNamespace(
        name="toy", created=0.0, started=0.0, ended_at=1.0, order=SimpleNamespace(warnings=("first",))
    )
    text = headers_of(made, drawn)["X-Warnings"]  # type: ignore[arg-type]
    kept = json.loads(text)
    assert kept[0] == "first" and 2 <= len(kept) < 21 and len(text) <= 4096 and text.isascii()


def test_several_images_come_as_json_with_their_settings() -> None:
    with toy_service() as service:
        body = {"prompt": "cat", "steps": 2, "images": 3, "response": "json", "sampler": "euler", "guidance": 3}
        document = ask(service, "POST", "/v1/generate", json=body).json()
    expected = drawn_alone("cat", steps=2, images=3, sampler="euler", guidance=3.0)
    assert [base64.b64decode(image["png"]) for image in document["images"]] == expected
    assert [image["settings"]["seed"] for image in document["images"]] == [0, 1, 2]
    assert document["model"] == "toy" and document["seconds"]["run"] >= 0


def test_eight_clients_share_model_calls_and_get_what_they_would_alone() -> None:
    model = HeldModel()
    with toy_service(model, batch=8) as service:
        model.gate.clear()
        timer = threading.Timer(0.3, model.gate.set)
        timer.start()
        answers = together(service, [{"json": {"prompt": f"cat {i}", "steps": 4, "seed": i}} for i in range(8)])
        timer.join()
    assert [answer.content for answer in answers] == [drawn_alone(f"cat {i}", steps=4, seed=i)[0] for i in range(8)]
    assert max(model.batches) == 16 and len(model.batches) <= 12  # 32 calls if each were drawn alone


def test_handoff_and_resume_equal_the_unsplit_run() -> None:
    words = {"prompt": "red cat", "steps": 5, "seed": 3, "sampler": "dpmpp-2m"}
    with toy_service() as service:
        for split in (0, 2, 5):
            sent = ask(service, "POST", "/v1/handoff", json={**words, "split": split})
            assert sent.status_code == 200 and unpack(sent.content).step == split
            picture = ask(service, "POST", "/v1/resume", content=sent.content, headers=BYTES)
            assert picture.content == drawn_alone("red cat", steps=5, seed=3, sampler="dpmpp-2m")[0]


def test_handoff_without_embeddings_is_small_and_encoded_again() -> None:
    words = {"prompt": "red cat", "steps": 4, "split": 2}
    with toy_service() as service:
        whole = ask(service, "POST", "/v1/handoff", json=words).content
        bare = ask(service, "POST", "/v1/handoff", json={**words, "embeddings": False}).content
        assert len(bare) < len(whole) and unpack(bare).positive is None
        pictures = [ask(service, "POST", "/v1/resume", content=data, headers=BYTES).content for data in (whole, bare)]
    assert pictures[0] == pictures[1] == drawn_alone("red cat", steps=4)[0]


def test_a_handoff_in_sixteen_bits_is_half_as_long_and_close() -> None:
    words = {"prompt": "red cat", "steps": 4, "split": 2}
    with toy_service() as service:
        whole, half = (
            ask(service, "POST", "/v1/handoff", json={**words, "dtype": dtype}).content
            for dtype in ("float32", "float16")
        )
        assert len(half) < 0.8 * len(whole)
        np.testing.assert_allclose(unpack(half).latents, unpack(whole).latents, atol=1e-2)
        again = ask(service, "POST", "/v1/resume?until=3&dtype=float16&embeddings=false", content=whole, headers=BYTES)
    assert unpack(again.content).step == 3 and len(again.content) < len(half)


def test_a_trajectory_of_another_vae_is_refused_unless_the_sender_vouches_for_it() -> None:
    begun = start(ToyModel(), Request("cat", steps=3))[0]
    assert begun.origin is not None
    digests = {**begun.origin.digests, "vae_decoder": "1" * 64, "vae_encoder": "2" * 64, "text_encoder": "3" * 64}
    other = pack(replace(begun, origin=replace(begun.origin, digests=digests)))
    with toy_service() as service:
        assert error_of(ask(service, "POST", "/v1/resume", content=other, headers=BYTES), 422, "invalid_trajectory")
        answer = ask(service, "POST", "/v1/resume?shared_latents=true", content=other, headers=BYTES)
    assert answer.content[:4] == b"\x89PNG"
    warnings = json.loads(answer.headers["x-warnings"])
    assert len(warnings) == 1 and "text_encoder" in warnings[0]


def test_resume_until_gives_the_trajectory_that_the_loop_gives() -> None:
    model = ToyModel()
    begun = start(model, Request("cat", steps=5))
    two = denoise(begun, denoiser_of(model), until=2)[0]
    four = denoise([two], denoiser_of(model), until=4)[0]
    with toy_service() as service:
        answer = ask(service, "POST", "/v1/resume?until=4", content=pack(two), headers=BYTES)
    assert answer.headers["content-type"] == "application/octet-stream"
    np.testing.assert_array_equal(unpack(answer.content).latents, four.latents)
    assert unpack(answer.content).step == 4


def test_events_tell_every_step_and_end_with_the_result() -> None:
    with toy_service(previews=True) as service:
        body = {"prompt": "cat", "steps": 4, "response": "events", "previews": 2}
        heard = events_of(ask(service, "POST", "/v1/generate", json=body))
    assert [name for name, _ in heard] == ["accepted", *["progress"] * 5, "result"]
    steps = [content for name, content in heard if name == "progress"]
    assert [(content["step"], content["calls"]) for content in steps] == [(step, 4) for step in range(5)]
    assert ["previews" in content for content in steps] == [False, False, True, False, False]
    preview = Image.open(io.BytesIO(base64.b64decode(steps[2]["previews"][0])))
    assert preview.size == (64, 64)
    assert base64.b64decode(heard[-1][1]["images"][0]["png"]) == drawn_alone("cat", steps=4)[0]


def test_events_of_a_handoff_end_with_the_trajectory() -> None:
    with toy_service() as service:
        body = {"prompt": "cat", "steps": 4, "split": 3, "response": "events"}
        name, content = events_of(ask(service, "POST", "/v1/handoff", json=body))[-1]
    assert name == "result" and unpack(base64.b64decode(content["trajectory"])).step == 3


def test_a_failure_in_a_stream_is_an_event() -> None:
    with toy_service(HeldModel()) as service:
        body = {"prompt": POISON, "steps": 2, "response": "events"}
        name, content = events_of(ask(service, "POST", "/v1/generate", json=body))[-1]
    assert name == "error" and content["error"]["code"] == "failed"


def test_a_deadline_ends_a_stream_with_its_error() -> None:
    """Nobody works on it: the stream itself has to see that time is up, and must not fill the time with comments."""

    async def heard() -> list[bytes]:
        generation = Generation("m", Order(None, None, 1, 1, (4, 8, 8)), time.monotonic() + 0.2)
        follower = Follower()
        generation.listen(follower)
        return [chunk async for chunk in events(generation, follower, "id")]

    chunks = asyncio.run(asyncio.wait_for(heard(), 10))
    assert [chunk.split(b"\n")[0] for chunk in chunks] == [b"event: accepted", b"event: error"]
    assert b"deadline_exceeded" in chunks[-1]


def test_how_prompts_are_read_is_asked_by_name_and_refused_in_words() -> None:
    body = {"prompt": "a (red:1.3) cat", "steps": 2}
    with toy_service() as service:
        plain = ask(service, "POST", "/v1/generate", json={**body, "prompt_syntax": "plain", "clip_skip": 0})
        assert plain.content == drawn_alone("a (red:1.3) cat", steps=2)[0]
        unread = ask(service, "POST", "/v1/generate", json={**body, "prompt_syntax": "b1111"})
        assert "a1111" in error_of(unread, 422, "invalid_request")
        for field, said in (({"clip_skip": 1}, "clip_skip is 1"), ({"prompt_syntax": "a1111"}, "all CLIP")):
            for route in ("/v1/generate", "/v1/handoff"):
                more = {"split": 1} if route.endswith("handoff") else {}
                answer = ask(service, "POST", route, json={**body, **field, **more})
                assert said in error_of(answer, 422, "invalid_request")


def test_openai_form() -> None:
    with toy_service() as service:
        body = {"prompt": "cat", "n": 2, "size": "128x64", "seed": 3}
        answer = ask(service, "POST", "/v1/images/generations", json=body)
    document = answer.json()
    assert answer.status_code == 200 and document["created"] > 1_600_000_000
    pictures = [base64.b64decode(entry["b64_json"]) for entry in document["data"]]
    assert pictures == drawn_alone("cat", images=2, size=(128, 64), seed=3)


def test_openai_form_takes_what_its_clients_send_and_names_what_it_does_not_use() -> None:
    harmless = {
        "n": None,
        "size": "auto",
        "quality": "standard",
        "style": "vivid",
        "user": "u1",
        "moderation": "low",
        "background": "auto",
        "output_format": "png",
        "response_format": None,
        "stream": False,
        "partial_images": 0,
    }
    with toy_service() as service:
        answer = ask(service, "POST", "/v1/images/generations", json={"prompt": "cat", **harmless})
        assert answer.json()["warnings"] == ["not used here: quality, style, moderation, user"]
        assert json.loads(answer.headers["x-warnings"]) == answer.json()["warnings"]
        for refused in ({"response_format": "url"}, {"stream": True}, {"background": "transparent"}, {"mask": "x"}):
            message = ask(service, "POST", "/v1/images/generations", json={"prompt": "cat", **refused})
            assert next(iter(refused)) in error_of(message, 422, "invalid_request")


def test_openai_form_draws_a_seed_and_tells_it() -> None:
    with toy_service() as service:
        first, second = (
            ask(service, "POST", "/v1/images/generations", json={"prompt": "cat"}).json()["data"][0] for _ in range(2)
        )
        again = {"prompt": "cat", "seed": first["settings"]["seed"]}
        third = ask(service, "POST", "/v1/images/generations", json=again).json()["data"][0]
        retries = [
            ask(service, "POST", "/v1/images/generations", json={"prompt": "cat"}, headers={"idempotency-key": "k"})
            for _ in range(2)
        ]
    assert first["b64_json"] != second["b64_json"] and first["b64_json"] == third["b64_json"]
    assert retries[0].json()["data"] == retries[1].json()["data"], "a retry draws no other picture"


def test_one_model_by_its_name() -> None:
    with toy_service() as service:
        assert ask(service, "GET", "/v1/models/toy").json() == ask(service, "GET", "/v1/models").json()["data"][0]
        assert "toy" in error_of(ask(service, "GET", "/v1/models/tow"), 404, "not_found")


def test_a_compressed_body_is_told_as_such() -> None:
    body = gzip.compress(b'{"prompt": "cat"}')
    kind = {"content-type": "application/json", "content-encoding": "gzip"}
    with toy_service() as service:
        answer = ask(service, "POST", "/v1/generate", content=body, headers=kind)
        assert "Content-Encoding is 'gzip'" in error_of(answer, 415, "unsupported_content_encoding")
        plain_body = {"content": b'{"prompt": "cat", "steps": 1}', "headers": {**kind, "content-encoding": "identity"}}
        assert ask(service, "POST", "/v1/generate", **plain_body).status_code == 200


def test_json_has_a_limit_of_its_own() -> None:
    """A prompt of 2000 characters takes 24 kB at most; megabytes are for pictures and trajectories."""
    with toy_service() as service:
        fits = {"prompt": "\U0001f60a" * 2000, "negative_prompt": "\U0001f60a" * 2000, "steps": 1}
        assert len(json.dumps(fits)) > 48_000
        assert ask(service, "POST", "/v1/generate", json=fits).status_code == 200
        kind = {"headers": {"content-type": "application/json"}}
        long = ask(service, "POST", "/v1/images/generations", content=b" " * 70_000, **kind)
        assert "at most 65536" in error_of(long, 413, "body_too_large")
        much = ask(service, "POST", "/v1/generate", content=b" " * (8 << 20) + b" ", **kind)
        assert f"at most {8 << 20}" in error_of(much, 413, "body_too_large")


def test_bodies_of_all_requests_together_are_bounded() -> None:
    """One is held back with three quarters of what may be read; a second of half as much finds no room."""
    held = asyncio.Event()

    async def slowly() -> Any:
        yield bytes(1536)
        await held.wait()
        yield bytes(512)

    async def run(service: Service) -> list[httpx.Response]:
        transport = httpx.ASGITransport(application(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
            headers = {**BYTES, "content-length": "2048"}
            first = asyncio.ensure_future(client.post("/v1/resume", content=slowly(), headers=headers))
            await asyncio.sleep(0.1)
            second = await client.post("/v1/resume", content=bytes(1024), headers=BYTES)
            held.set()
            return [await first, second, await client.post("/v1/resume", content=bytes(1024), headers=BYTES)]

    with toy_service(bodies_bytes=2048) as service:
        first, second, third = asyncio.run(run(service))
    assert "ask again" in error_of(second, 503, "busy") and second.headers["retry-after"] == "1"
    assert error_of(first, 422, "invalid_trajectory") and error_of(third, 422, "invalid_trajectory")


def test_health_checks_without_a_host_line_are_answered_and_nothing_else() -> None:
    async def asked(path: str) -> int:
        seen: list[int] = []

        async def send(message: Any) -> None:
            seen.extend([message["status"]] if message["type"] == "http.response.start" else [])

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        with toy_service() as service:
            scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "state": {}}
            await application(service)({**scope, "http_version": "1.0", "root_path": ""}, receive, send)
        return seen[0]

    statuses = {path: asyncio.run(asked(path)) for path in ("/live", "/ready", "/v1/models", "/metrics")}
    assert statuses == {"/live": 200, "/ready": 200, "/v1/models": 403, "/metrics": 403}


def test_models_say_what_is_legal() -> None:
    with toy_service() as service:
        (entry,) = ask(service, "GET", "/v1/models").json()["data"]
    assert entry["id"] == "toy" and entry["state"] == "ready" and entry["digest"] == "0123456789abcdef" * 4
    facts = ModelFacts.from_json(entry["facts"])
    assert facts.family == ToyModel().family and facts.scheduler["_class_name"] == "DDIMScheduler"
    assert check_pair([facts, ToyModel()]) == ()


def strict(text: str | bytes) -> Any:
    """Raises ValueError where it holds what JSON has no word for."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_what_json_cannot_hold_is_left_out_of_the_facts() -> None:
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": float("-inf")}
    model = ToyModel(**scheduler, odd={"a": [1.0, float("nan")]})
    with toy_service(model) as service:
        answer = ask(service, "GET", "/v1/models")
    assert answer.status_code == 200
    facts = ModelFacts.from_json(strict(answer.content)["data"][0]["facts"])
    assert "lambda_min_clipped" not in facts.scheduler and facts.scheduler["odd"] == {"a": [1.0, None]}
    assert check_pair([facts, model]) == () == check_pair([model, facts])


def test_events_and_errors_are_strict_json() -> None:
    strict(event("result", {"settings": {"guidance": float("inf")}}).split(b"data: ")[1])
    assert (
        json_bytes({"a": float("inf"), "b": [float("nan"), (1.5, "x")], "c": None})
        == b'{"b": [null, [1.5, "x"]], "c": null}'
    )


def test_several_models_by_name() -> None:
    service = Service([Served("one", ToyModel()), Served("two", ToyModel("lcm"))], ServeOptions())
    ready = threading.Event()
    service.start(ready.set)
    assert ready.wait(10)
    for name, kind in (("one", "sd"), ("two", "lcm")):
        answer = ask(service, "POST", "/v1/generate", json={"prompt": "cat", "model": name, "steps": 2})
        assert answer.content == drawn_alone("cat", kind, steps=2)[0] and answer.headers["x-model"] == name
    answer = ask(service, "POST", "/v1/generate", json={"prompt": "cat", "model": "twoo"})
    assert "did you mean 'two'?" in error_of(answer, 422, "invalid_request")
    service.close()


def test_metrics_are_prometheus_text() -> None:
    with toy_service() as service:
        ask(service, "POST", "/v1/generate", json={"prompt": "cat", "steps": 3})
        ask(service, "GET", "/nowhere/of/mine")
        answer = ask(service, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    form = re.compile(r'(# (HELP|TYPE) \w+ .+|\w+(\{(\w+="[^"]*",?)+\})? [-+\d.e]+(Inf)?)')
    assert all(form.fullmatch(line) for line in lines), [line for line in lines if not form.fullmatch(line)]
    assert 'diffship_generations_total{model="toy",outcome="done"} 1' in lines
    assert 'diffship_requests_total{route="/v1/generate",status="200"} 1' in lines
    assert 'diffship_requests_total{route="other",status="404"} 1' in lines
    assert 'diffship_model_call_images_count{model="toy"} 3' in lines
    assert 'diffship_ready{model="toy"} 1' in lines
    buckets = [float(line.split()[-1]) for line in lines if line.startswith("diffship_model_call_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == 3


JSON = {"content-type": "application/json"}
BAD = {
    "steps": ("POST", "/v1/generate", {"json": {"prompt": "cat", "steps": 151}}, 422, "invalid_request"),
    "size": ("POST", "/v1/generate", {"json": {"prompt": "cat", "width": 100, "height": 100}}, 422, "invalid_request"),
    "no json": ("POST", "/v1/generate", {"content": b"{", "headers": JSON}, 422, "invalid_request"),
    "text": ("POST", "/v1/generate", {"content": b"{}"}, 415, "unsupported_media_type"),
    "previews": (
        "POST",
        "/v1/generate",
        {"json": {"prompt": "cat", "response": "events", "previews": 1}},
        422,
        "invalid_request",
    ),
    "split": ("POST", "/v1/handoff", {"json": {"prompt": "cat", "steps": 4, "split": 5}}, 422, "invalid_request"),
    "no split": ("POST", "/v1/handoff", {"json": {"prompt": "cat"}}, 422, "invalid_request"),
    "no bytes": ("POST", "/v1/resume", {"content": b"", "headers": BYTES}, 422, "invalid_trajectory"),
    "zeros": ("POST", "/v1/resume", {"content": bytes(1000), "headers": BYTES}, 422, "invalid_trajectory"),
    "query": ("POST", "/v1/resume?until=3&until=4", {"content": b"", "headers": BYTES}, 422, "invalid_request"),
    "url": (
        "POST",
        "/v1/images/generations",
        {"json": {"prompt": "a", "response_format": "url"}},
        422,
        "invalid_request",
    ),
    "method": ("GET", "/v1/generate", {}, 405, "method_not_allowed"),
    "delete": ("DELETE", "/v1/models", {}, 405, "method_not_allowed"),
    "root": ("GET", "/", {}, 404, "not_found"),
    "up": ("GET", "/v1/../etc/passwd", {}, 404, "not_found"),
    "docs": ("GET", "/docs", {}, 404, "not_found"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name: str) -> None:
    method, path, words, status, code = BAD[name]
    with toy_service() as service:
        assert error_of(ask(service, method, path, **words), status, code)


def test_trajectories_that_do_not_fit_are_refused_before_any_call() -> None:
    model = HeldModel()
    wide, whole = start(ToyModel("sdxl"), Request("cat"))[0], start(ToyModel(), Request("cat", steps=3))[0]
    odd = replace(whole, facts={"model": "\ud800"})
    with toy_service(model) as service:
        for trajectory, path, code in (
            (wide, "/v1/resume", "invalid_trajectory"),
            (odd, "/v1/resume", "invalid_trajectory"),
            (whole, "/v1/resume?until=4", "invalid_request"),
        ):
            answer = ask(service, "POST", path, content=pack(trajectory), headers=BYTES)
            assert error_of(answer, 422, code)
    assert model.batches == []


def test_our_own_faults_tell_nothing_but_an_id(caplog: pytest.LogCaptureFixture) -> None:
    with toy_service(HeldModel()) as service:
        message = error_of(ask(service, "POST", "/v1/generate", json={"prompt": POISON, "steps": 2}), 500, "failed")
        assert "log" in message and "unet" not in message
        assert ask(service, "POST", "/v1/generate", json={"prompt": "cat", "steps": 2}).status_code == 200
    assert "not finite" in caplog.text


def test_case_25_a_full_queue_is_503_with_a_time_to_ask_again() -> None:
    model = HeldModel()
    with toy_service(model, queue=1, batch=1) as service, ThreadPoolExecutor(4) as pool:
        model.gate.clear()
        jobs = [pool.submit(ask, service, "POST", "/v1/generate", json={"prompt": "cat", "steps": 2}) for _ in range(2)]
        worker = service.worker(None)
        until(lambda: worker.waiting() == 1 and worker.running() == 1)
        answer = ask(service, "POST", "/v1/generate", json={"prompt": "cat", "steps": 2})
        assert "1 requests wait" in error_of(answer, 503, "busy") and int(answer.headers["retry-after"]) >= 1
        model.gate.set()
        assert [job.result().status_code for job in jobs] == [200, 200]


def test_case_27_a_deadline_is_504_on_time_though_the_call_goes_on() -> None:
    model = HeldModel()
    with toy_service(model, deadline=0.1) as service:
        model.gate.clear()
        timer = threading.Timer(2.0, model.gate.set)
        timer.start()
        answer = ask(service, "POST", "/v1/generate", json={"prompt": "cat", "steps": 2})
        assert "deadline of 0.1 s" in error_of(answer, 504, "deadline_exceeded")
        assert answer.elapsed.total_seconds() < 1.5  # and not the two seconds of the call
        model.gate.set()
        timer.cancel()
        until(lambda: service.worker(None).running() == 0)
        assert service.metrics.value("diffship_generations_total", model="toy", outcome="expired") == 1


def test_case_38_a_retry_with_the_same_key_draws_once_and_gets_identical_bytes() -> None:
    model = HeldModel(delay=0.02)
    with toy_service(model) as service:
        same = {"json": {"prompt": "cat", "steps": 4}, "headers": {"Idempotency-Key": "abc-1"}}
        answers = together(service, [same, same, same])
        answers.append(ask(service, "POST", "/v1/generate", **same))
        assert len({answer.content for answer in answers}) == 1 and answers[0].status_code == 200
        assert len(model.batches) == 4
        other = {"json": {"prompt": "dog", "steps": 4}, "headers": {"Idempotency-Key": "abc-1"}}
        assert error_of(ask(service, "POST", "/v1/generate", **other), 409, "conflict")
        elsewhere = ask(service, "POST", "/v1/handoff", json={"prompt": "cat", "split": 1}, headers=same["headers"])
        assert error_of(elsewhere, 409, "conflict")
        bad = ask(service, "POST", "/v1/generate", json={"prompt": "cat"}, headers={"Idempotency-Key": "x" * 129})
        assert error_of(bad, 422, "invalid_request")


def test_case_35_live_at_once_and_ready_only_after_the_warm_up_and_while_files_are_there() -> None:
    model, lost = HeldModel(), [""]
    model.gate.clear()
    service = Service([Served("toy", model, lost=lambda: lost[0])], ServeOptions())
    assert ask(service, "GET", "/live").status_code == 200
    service.start()
    until(model.in_call.is_set)  # warming up
    answer = ask(service, "GET", "/ready")
    assert answer.status_code == 503 and answer.json() == {"ready": False, "models": {"toy": "loading"}}
    assert answer.headers["retry-after"] == "1", "clients that obey it wait no longer than they must"
    early = ask(service, "POST", "/v1/generate", json={"prompt": "cat"})
    assert "loading" in error_of(early, 503, "busy") and early.headers["retry-after"] == "5"
    model.gate.set()
    until(service.ready)
    assert ask(service, "GET", "/ready").json() == {"ready": True, "models": {"toy": "ready"}}
    lost[0] = "missing"
    assert ask(service, "GET", "/ready").json() == {"ready": False, "models": {"toy": "missing"}}
    lost[0] = "replaced"  # the engine has read the old ones, and draws what it says that it draws
    assert ask(service, "GET", "/ready").json() == {"ready": True, "models": {"toy": "replaced"}}
    assert ask(service, "GET", "/live").status_code == 200
    service.close()


def test_a_model_that_does_not_load_is_not_ready_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = ToyModel("inpaint")
    service = Service([Served("fill", model)], ServeOptions())
    service.start()
    assert service.broken.wait(10)
    assert ask(service, "GET", "/ready").json()["models"] == {"fill": "broken"}
    assert "fills masks" in str(service.fault()) and "fills masks" in caplog.text
    assert "Traceback" not in caplog.text
    service.close()


def test_tokens_guard_everything_but_health() -> None:
    token = "a-token-of-twenty-ch"
    good = {"Authorization": f"Bearer {token}"}
    with toy_service() as service:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": token},
                {"Authorization": "Bearer ü"},
            ):
                answer = ask(
                    service,
                    "GET",
                    path,
                    token,
                    headers={key: value.encode("latin-1") for key, value in headers.items()},
                )
                assert error_of(answer, 401, "unauthorized") and answer.headers["www-authenticate"] == "Bearer"
        assert ask(service, "GET", "/v1/models", token, headers=good).status_code == 200
        assert (
            ask(service, "GET", "/live", token).status_code == ask(service, "GET", "/ready", token).status_code == 200
        )


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "a:b:c"]
)
def test_case_37_a_host_from_elsewhere_is_403(host: str) -> None:
    with toy_service() as service:
        answer = ask(service, "GET", "/v1/models", headers={"Host": host})
        assert error_of(answer, 403, "host_not_allowed")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8765", "127.0.0.1:1", "[::1]:8765", "10.0.0.7", "gpu.lan:80", "GPU.lan."]
)
def test_case_37_addresses_and_named_hosts_are_served(host: str) -> None:
    with toy_service(allow_hosts=("GPU.Lan.",)) as service:
        assert ask(service, "GET", "/v1/models", headers={"Host": host}).status_code == 200


def test_case_37_other_origins_are_403_and_there_is_no_cors() -> None:
    with toy_service() as service:
        for origin in ("http://evil.example", "null", "http://localhost:1", "file://localhost"):
            answer = ask(service, "GET", "/v1/models", headers={"Origin": origin})
            assert error_of(answer, 403, "origin_not_allowed")
            preflight = ask(service, "OPTIONS", "/v1/generate", headers={"Origin": origin})
            assert error_of(preflight, 403, "origin_not_allowed")
        answer = ask(service, "GET", "/v1/models", headers={"Origin": "http://localhost"})
        assert answer.status_code == 200
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_lengths_are_refused_before_the_body_is_read() -> None:
    async def chunks() -> Any:
        yield b'{"prompt": "cat"}'

    kind = {"content-type": "application/json"}
    with toy_service(body_bytes=2048, header_bytes=4096) as service:
        long = ask(service, "POST", "/v1/generate", content=b"x" * 2049, headers=kind)
        assert "at most 2048" in error_of(long, 413, "body_too_large") and long.headers["connection"] == "close"
        assert error_of(ask(service, "POST", "/v1/generate", content=chunks(), headers=kind), 411, "length_required")
        fat = ask(service, "GET", "/v1/models", headers={"x-fat": "y" * 5000})
        assert error_of(fat, 431, "headers_too_large")
        odd = ask(service, "POST", "/v1/generate", content=b"{}", headers={**kind, "content-length": "-1"})
        assert error_of(odd, 400, "bad_length")


def test_the_document_is_served() -> None:
    with toy_service() as service:
        document = ask(service, "GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1") and "/v1/generate" in document["paths"]


@pytest.mark.parametrize(
    "scheduler", [{"_class_name": "LMSDiscreteScheduler"}, {"_class_name": "PNDMScheduler", "skip_prk_steps": False}]
)
def test_a_model_whose_scheduler_takes_no_single_step_is_served(scheduler: dict[str, Any]) -> None:
    """One that is not built, and one that needs four steps: whoever names another sampler is drawn for."""
    with toy_service(ToyModel(**scheduler)) as service:
        answer = ask(service, "POST", "/v1/generate", json={"prompt": "cat", "steps": 2, "sampler": "euler"})
        assert answer.status_code == 200 and answer.content == drawn_alone("cat", steps=2, sampler="euler")[0]
        assert (
            ask(service, "GET", "/v1/models").json()["data"][0]["facts"]["scheduler"]
            == service.workers["toy"].served.model.scheduler
        )
        error_of(ask(service, "POST", "/v1/generate", json={"prompt": "cat", "steps": 2}), 422, "invalid_request")


@pytest.mark.parametrize("lacks", ["vae_decoder", "text_encoder"])
def test_half_a_model_serves_what_it_can(lacks: str) -> None:
    """Without a decoder it hands over, without a text encoder it goes on from what others encoded."""
    whole, half = ToyModel(), ToyModel()
    half.runners.pop(lacks)
    half.parts = frozenset(half.runners)
    begun = pack(start(whole, Request("cat", steps=3))[0])
    expected = denoise([unpack(begun)], denoiser_of(whole))[0].latents
    with toy_service(half) as service:
        given = ask(service, "POST", "/v1/resume?until=3", content=begun, headers=BYTES)
        np.testing.assert_array_equal(unpack(given.content).latents, expected)
        message = error_of(ask(service, "POST", "/v1/generate", json={"prompt": "cat"}), 422, "invalid_request")
        assert lacks.replace("_", " ") in message.replace("_", " ")
        handed = ask(service, "POST", "/v1/handoff", json={"prompt": "cat", "steps": 3, "split": 3})
        resumed = ask(service, "POST", "/v1/resume", content=begun, headers=BYTES)
        assert (handed.status_code, resumed.status_code) == ((200, 422) if lacks == "vae_decoder" else (422, 200))


def test_png_files_are_made_by_no_thread_that_others_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the one that drives the engine nor by the one that answers connections."""
    made: list[str] = []
    plain_png = Picture.png

    def noted(picture: Picture) -> bytes:
        made.append(threading.current_thread().name)
        return plain_png(picture)

    monkeypatch.setattr(Picture, "png", noted)
    body = {"prompt": "cat", "steps": 2, "seed": 1}
    with toy_service(previews=True) as service:
        here = threading.current_thread().name
        for more in ({}, {"response": "json"}, {"response": "events", "previews": 1}):
            assert ask(service, "POST", "/v1/generate", json={**body, **more}).status_code == 200
        asked = {"prompt": "cat", "size": "64x64", "n": 2}
        assert ask(service, "POST", "/v1/images/generations", json=asked).status_code == 200
    assert len(made) == 6 and not [name for name in made if name == here or name.startswith("worker-")]


def test_a_result_is_encoded_once_and_its_pixels_are_let_go() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    drawn = Drawn([Picture(pixels, {"seed": 1})])
    assert drawn.size_bytes == pixels.nbytes
    (file, settings), again = drawn.pictures[0], drawn.pictures
    assert again[0][0] is file and settings == {"seed": 1} and drawn.size_bytes == len(file)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), pixels)
