"""The good path over a real port: the same picture as without a cloud, bit for bit, and an honest report."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sampling_toy import SOME, ToyModel
from serve_toy import HeldModel, toy_server, until

from diffship.core.errors import Cancelled, ConfigError, RunnerError, UnsupportedError
from diffship.runtimes.handoff.client import HybridClient
from diffship.runtimes.handoff.report import Hybrid
from diffship.sampling.control import Control
from diffship.sampling.generate import Request, generate
from diffship.sampling.picture import Picture
from diffship.sampling.wire import pack, unpack

REQUEST = Request("a red äpfel", seed=7, guidance=5.0)


def whole(request: Request, kind: str = "sd", steps: int = 6) -> Picture:
    return generate(ToyModel(kind), replace(request, steps=steps))[0]


def same(hybrid: Hybrid, picture: Picture) -> bool:
    made = hybrid.picture
    assert made.trajectory is not None and picture.trajectory is not None
    equal = np.array_equal(made.trajectory.latents, picture.trajectory.latents)
    return equal and np.array_equal(made.pixels, picture.pixels)


@pytest.mark.slow
@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize("name", SOME)
def test_any_split_of_any_sampler_changes_no_bit(name: str, rng: str) -> None:
    request = replace(REQUEST, sampler=name, rng=rng)
    expected = whole(request)
    with toy_server(ToyModel()) as (url, _), HybridClient(ToyModel(), url) as client:
        for split in ((0, 6), (1, 5), (3, 3), (5, 1), (6, 0)):
            made = client.generate(request, split)
            assert made.report.fallback is None and same(made, expected), split
            calls = expected.trajectory.calls  # type: ignore[union-attr]
            assert made.report.cloud_calls + made.report.edge_calls == calls
            assert made.report.cloud_calls == (calls if split == (6, 0) else split[0])


@pytest.mark.parametrize("kind", ["sdxl", "lcm"])
def test_other_families(kind: str) -> None:
    with toy_server(ToyModel(kind)) as (url, _), HybridClient(ToyModel(kind), url) as client:
        for negative in (None, "blue"):
            request = replace(REQUEST, negative=negative)
            assert same(client.generate(request, (2, 4)), whole(request, kind))


def test_the_report_says_who_did_what() -> None:
    with toy_server(ToyModel()) as (url, service), HybridClient(ToyModel(), url) as client:
        first = client.generate(REQUEST, (2, 4)).report
        made = client.generate(REQUEST, (2, 4))
        assert service.metrics.value("diffship_requests_total", route="/v1/models", status="200") == 1  # asked once
    report = made.report
    assert (report.model, report.asked_calls, report.cloud_calls, report.edge_calls) == ("toy", 2, 2, 4)
    assert report.fallback is None and report.requests == 1 and report.retries == report.ignored == 0
    assert report.late_ms == 0 and report.warnings == ()
    for value in (report.cloud_ms, report.cloud_run_ms, report.edge_ms, report.finish_ms, report.encode_ms):
        assert value is not None and value > 0
    assert report.cloud_queue_ms is not None
    assert report.total_ms >= report.cloud_ms + report.edge_ms + report.finish_ms
    assert report.cloud_ms >= report.cloud_run_ms  # type: ignore[operator]
    assert first.bytes_down == report.bytes_down > 4 * 4 * 8 * 8 and report.bytes_up > len(REQUEST.prompt)
    settings = made.picture.settings
    assert [(entry["model"], entry["steps"]) for entry in settings["split"]] == [("toy", 2), ("toy-sd", 4)]
    assert settings["model"] == "toy" and settings["seed"] == 7
    assert "cloud toy: 2 calls" in report.line() and "here: 4 calls" in report.line()
    assert f" ms ({report.cloud_run_ms:.0f} ms of its time), {report.bytes_down} bytes" in report.line()


@pytest.mark.slow
def test_embeddings_stay_where_both_sides_encode_alike_and_travel_where_not() -> None:
    other = ToyModel()
    other.digests = {**other.digests, "text_encoder": "f" * 64}
    with toy_server(ToyModel()) as (url, _), HybridClient(ToyModel(), url) as alike, HybridClient(other, url) as apart:
        stayed, travelled = (client.generate(REQUEST, (2, 4)) for client in (alike, apart))
    assert same(stayed, whole(REQUEST)) and same(travelled, whole(REQUEST))
    embeddings = 2 * 77 * 8 * 4
    assert travelled.report.bytes_down > stayed.report.bytes_down + embeddings
    assert [warning for warning in travelled.report.warnings if "text_encoder" in warning]


def test_the_small_model_encodes_while_the_cloud_works() -> None:
    cloud, small = HeldModel(), ToyModel()
    text = small.runners["text_encoder"]
    encoded = threading.Event()
    plain = text.function
    text.function = lambda feeds: (encoded.set(), plain(feeds))[1]
    with toy_server(cloud) as (url, _), HybridClient(small, url) as client:
        cloud.gate.clear()
        threading.Thread(target=lambda: (encoded.wait(10), cloud.gate.set())).start()
        assert same(client.generate(REQUEST, (2, 4)), whole(REQUEST))


def test_the_whole_share_of_the_cloud_still_decodes_here() -> None:
    small = ToyModel()
    with toy_server(ToyModel()) as (url, _), HybridClient(small, url) as client:
        made = client.generate(replace(REQUEST, sampler="pndm"), (6, 0))
    assert made.report.asked_calls == made.report.cloud_calls == 7 and made.report.edge_calls == 0
    assert small.runners["unet"].calls == [] and len(small.runners["vae_decoder"].calls) == 1


def test_no_share_of_the_cloud_is_no_request() -> None:
    with HybridClient(ToyModel(), "http://127.0.0.1:9") as client:
        made = client.generate(REQUEST, (0, 6))
    assert same(made, whole(REQUEST)) and made.report.fallback is None
    assert made.report.requests == made.report.bytes_down == 0 and "alone as asked" in made.report.line()


def test_size_and_guidance_are_the_small_model_s_own_and_low_memory_works() -> None:
    small = ToyModel()
    small.family = replace(small.family, default_size=128, guidance_default=3.0)
    with toy_server(ToyModel()) as (url, _), HybridClient(small, url) as client:
        made = client.generate(Request("cat", memory="low"), (2, 4))
    assert made.report.fallback is None
    assert made.picture.pixels.shape == (128, 128, 3) and made.picture.settings["guidance"] == 3.0
    assert "unet" in small.released


def test_steps_are_heard_from_the_arrival_on_and_any_of_them_goes_on_alone() -> None:
    heard: list[Any] = []
    with toy_server(ToyModel()) as (url, _), HybridClient(ToyModel(), url) as client:
        made = client.generate(REQUEST, (2, 4), on_step=lambda batch: heard.append(pack(batch[0])))
    assert [unpack(data).step for data in heard] == [2, 3, 4, 5, 6]
    from diffship.sampling.generate import draw

    for data in heard:
        assert np.array_equal(draw(ToyModel(), [unpack(data)])[0].pixels, made.picture.pixels)


def test_a_token_opens_the_door_and_a_wrong_one_is_a_fallback() -> None:
    with toy_server(ToyModel(), token="t" * 20) as (url, _):
        with HybridClient(ToyModel(), url, token="t" * 20) as client:
            assert client.generate(REQUEST, (2, 4)).report.fallback is None
        with HybridClient(ToyModel(), url, token="w" * 20) as client:
            made = client.generate(REQUEST, (2, 4))
    assert same(made, whole(REQUEST)) and "refused: HTTP 401" in (made.report.fallback or "")


@pytest.mark.parametrize(
    "change", [{"vae_factor": 4}, {"text_width": 16}, {"prediction_type": "sample"}], ids=["vae", "text", "kind"]
)
def test_a_pair_that_cannot_share_is_refused_before_work(change: dict[str, Any]) -> None:
    small = ToyModel()
    small.family = replace(small.family, **change)
    if "prediction_type" in change:
        small.scheduler = {**small.scheduler, **change}
    cloud = ToyModel()
    with toy_server(cloud) as (url, _), HybridClient(small, url) as client:
        before = len(cloud.runners["unet"].calls)
        with pytest.raises(ConfigError, match="toy and toy-sd cannot share a trajectory"):
            client.generate(Request("x", size=(64, 64)), (2, 4))
        assert len(cloud.runners["unet"].calls) == before
        assert client.breaker.state == "closed"


def test_a_size_that_the_cloud_cannot_draw_is_refused_before_work() -> None:
    cloud, small = ToyModel(), ToyModel()
    small.family = replace(small.family, size_step=8)
    with toy_server(cloud) as (url, _), HybridClient(small, url) as client:
        with pytest.raises(ConfigError, match="the nearest are 64 and 128"):
            client.generate(Request("x", size=(72, 64)), (2, 4))


def test_models_that_cannot_finish_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="fills masks"):
        HybridClient(ToyModel("inpaint"), "http://127.0.0.1:9")
    part = ToyModel()
    part.parts = frozenset({"unet", "text_encoder"})
    with pytest.raises(UnsupportedError, match="has no vae_decoder"):
        HybridClient(part, "http://127.0.0.1:9")


GREY = np.full((64, 64, 3), 128, np.uint8)


@pytest.mark.parametrize(
    ("request_", "split", "message"),
    [
        (Request("x"), (1, 2, 3), "3 entries for 2 models"),
        (Request("x"), (-1, 2), "entries are 0 or more"),
        (Request("x", steps=5), (2, 4), "makes 6 steps, asked are 5"),
        (Request("x", images=2), (2, 4), "one image"),
        (Request("x", size=(72, 64)), (2, 4), "nearest"),
        (Request("x", image=GREY), (2, 4), "no pictures travel .* has image:"),
        (Request("x", controls=(Control("edges", GREY),)), (2, 4), "no pictures travel .* has controls:"),
    ],
    ids=["three", "negative", "steps", "images", "size", "image", "controls"],
)
def test_requests_that_are_not_legal(request_: Request, split: tuple[int, ...], message: str) -> None:
    with HybridClient(ToyModel(), "http://127.0.0.1:9") as client, pytest.raises(ConfigError, match=message):
        client.generate(request_, split)


def test_an_unknown_model_of_the_cloud_is_refused() -> None:
    with toy_server(ToyModel()) as (url, _), HybridClient(ToyModel(), url, cloud_model="tony") as client:
        with pytest.raises(ConfigError, match="did you mean 'toy'"):
            client.generate(REQUEST, (2, 4))


def test_cancel_while_the_cloud_draws_frees_it_at_once() -> None:
    model = HeldModel()
    with toy_server(model) as (url, service), HybridClient(ToyModel(), url) as client:
        model.gate.clear()
        begin = time.monotonic()
        with pytest.raises(Cancelled):
            client.generate(REQUEST, (2, 4), cancel=model.in_call.is_set)
        assert time.monotonic() - begin < 5
        until(lambda: service.metrics.value("diffship_generations_total", model="toy", outcome="cancelled") == 1)
        model.gate.set()
        assert same(client.generate(REQUEST, (2, 4)), whole(REQUEST))  # the client is as good as new


def test_a_small_model_that_fails_ends_the_wait() -> None:
    model, small = HeldModel(), ToyModel()
    small.runners["text_encoder"].function = lambda feeds: {
        "last_hidden_state": np.full((1, 77, 8), np.nan, np.float32)
    }
    with toy_server(model) as (url, _), HybridClient(small, url) as client:
        model.gate.clear()
        with pytest.raises(RunnerError, match="text_encoder"):
            client.generate(REQUEST, (2, 4))
        model.gate.set()
