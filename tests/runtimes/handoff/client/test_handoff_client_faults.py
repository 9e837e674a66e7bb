"""Cases 42 and 43: whatever the network or the cloud does, the picture is finished here, in time, and it says why."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from sampling_toy import ToyModel
from serve_toy import HeldModel, toy_server, until

from diffship.benchmarks.studies.service.fault_proxy import fault_proxy
from diffship.runtimes.handoff.breaker import Breaker
from diffship.runtimes.handoff.client import HybridClient
from diffship.runtimes.handoff.report import Hybrid
from diffship.sampling.generate import Request, generate

REQUEST = Request("a red äpfel", seed=7, guidance=5.0, sampler="dpmpp-2m")
SPLIT = (2, 4)


def whole(**changes: object) -> np.ndarray:
    return generate(ToyModel(), replace(REQUEST, steps=6, **changes))[0].pixels


def right(made: Hybrid) -> bool:
    return np.array_equal(made.picture.pixels, whole())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def test_case_42_down() -> None:
    small = ToyModel()
    with HybridClient(small, f"http://127.0.0.1:{free_port()}", deadline=5) as client:
        made = client.generate(REQUEST, SPLIT)
    assert len(small.runners["unet"].calls) == 6  # the call that warmed the engine up was no waste
    assert right(made) and (made.report.fallback or "").startswith("down: ")
    assert (made.report.retries, made.report.requests, made.report.cloud_calls, made.report.edge_calls) == (2, 0, 0, 6)
    assert made.report.total_ms < 2000 and "split" not in made.picture.settings


FALLS = {  # fault -> kind, handoffs sent
    "refuse": ("refused", 1),
    "503": ("busy", 3),
    "date": ("busy", 3),
    "hang": ("slow", 1),
    "reset": ("broken", 3),
    "garbage": ("garbage", 3),
    "flipped": ("garbage", 3),
    "huge": ("garbage", 1),
    "slow": ("slow", 1),
    "drip": ("slow", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FALLS)
def test_case_42_finishes_alone_inside_the_deadline_and_says_why(fault: str) -> None:
    kind, sent = FALLS[fault]
    deadline = 0.6 if kind == "slow" else 30
    with toy_server(ToyModel()) as (url, _), fault_proxy(url, fault) as proxy:
        with HybridClient(ToyModel(), proxy.url, deadline=deadline) as client:
            client.facts()
            begin = time.monotonic()
            made = client.generate(REQUEST, SPLIT)
            seconds = time.monotonic() - begin
    report = made.report
    assert right(made) and (report.fallback or "").startswith(f"{kind}: "), report
    assert seconds < min(deadline, 5) + 1.5 and (report.cloud_calls, report.edge_calls) == (0, 6)
    assert report.requests == sent and report.retries == sent - 1
    assert len(set(proxy.keys)) == 1 and len(set(proxy.bodies)) == 1  # each retry is the same request, by its id
    assert report.ignored == {"slow": 1, "garbage": sent}.get(kind, 0)


@pytest.mark.parametrize("fault", ["503", "reset", "garbage", "flipped"])
def test_one_fault_is_survived_by_a_retry_that_draws_nothing_twice(fault: str) -> None:
    with toy_server(ToyModel()) as (url, service), fault_proxy(url, fault, "none") as proxy:
        with HybridClient(ToyModel(), proxy.url, deadline=20) as client:
            made = client.generate(REQUEST, SPLIT)
        assert service.metrics.value("diffship_generations_total", model="toy", outcome="done") == 1
    assert right(made) and made.report.fallback is None
    assert (made.report.requests, made.report.retries, made.report.cloud_calls) == (2, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang", "503", "garbage", "refuse"])
def test_a_cloud_that_does_not_even_say_what_it_serves(fault: str) -> None:
    deadline = 0.6 if fault == "hang" else 30
    with toy_server(ToyModel()) as (url, _), fault_proxy(url, fault, everything=True) as proxy:
        with HybridClient(ToyModel(), proxy.url, deadline=deadline) as client:
            made = client.generate(REQUEST, SPLIT)
    assert right(made) and made.report.fallback and made.report.requests == 0 and made.report.model is None
    assert made.report.total_ms < 1000 * min(deadline, 5) + 500


def test_the_circuit_opens_after_three_and_closes_after_a_good_trial() -> None:
    now = [0.0]
    with toy_server(ToyModel()) as (url, _), fault_proxy(url, *["refuse"] * 4, "none") as proxy:
        with HybridClient(ToyModel(), proxy.url, breaker=Breaker(3, 30, lambda: now[0])) as client:
            kinds = [(client.generate(REQUEST, SPLIT).report.fallback or "").partition(":")[0] for _ in range(5)]
            assert kinds == ["refused"] * 3 + ["open"] * 2
            assert [fault for path, fault in proxy.seen if path == "/v1/handoff"] == ["refuse"] * 3
            now[0] = 31
            assert (client.generate(REQUEST, SPLIT).report.fallback or "").startswith("refused")
            assert (client.generate(REQUEST, SPLIT).report.fallback or "").startswith("open")
            now[0] = 62
            made = client.generate(REQUEST, SPLIT)
            assert right(made) and made.report.fallback is None and client.breaker.state == "closed"


@pytest.mark.slow
def test_the_deadline_leaves_room_for_drawing_alone() -> None:
    """A call takes 50 ms here; of 1 s the cloud, which hangs, gets what six of them and a decode leave."""
    small = HeldModel(delay=0.05)
    with toy_server(ToyModel()) as (url, _), fault_proxy(url, "none", "hang") as proxy:
        with HybridClient(small, proxy.url, deadline=1.0) as client:
            client.generate(REQUEST, SPLIT)
            report = client.generate(REQUEST, SPLIT).report
    assert report.fallback is not None and report.fallback.startswith("slow")
    assert report.late_ms < 200 and 100 < report.cloud_ms < 720


@pytest.mark.slow
def test_a_cloud_that_is_given_up_is_told_so_at_once() -> None:
    """The first call tells that alone takes 1.4 of 2 s, when the request has been sent for 1 s."""
    model, small = HeldModel(), HeldModel(delay=0.2)
    cancelled: list[float] = []
    with toy_server(model) as (url, service), HybridClient(small, url, deadline=2.0) as client:
        client.facts()
        model.gate.clear()
        labels = {"model": "toy", "outcome": "cancelled"}
        count = partial(service.metrics.value, "diffship_generations_total", **labels)
        made = client.generate(REQUEST, SPLIT, on_step=lambda batch: cancelled.append(count()))
        model.gate.set()
    assert right(made) and made.report.cloud_ms < 900
    assert cancelled[1] == 1  # and not only when the exchange's own clock was over


@pytest.mark.slow
def test_a_deadline_that_is_too_short_for_anything_is_reported_as_missed() -> None:
    small = HeldModel(delay=0.05)
    with toy_server(ToyModel()) as (url, _), fault_proxy(url, "none", "hang") as proxy:
        with HybridClient(small, proxy.url, deadline=0.1) as client:
            client.generate(REQUEST, SPLIT)
            made = client.generate(REQUEST, SPLIT)
    assert right(made) and made.report.late_ms > 100 and "past the deadline" in made.report.line()
    assert made.report.cloud_ms < 300  # no longer than the two calls would take here


@pytest.mark.slow
def test_an_answer_of_another_family_is_not_used_and_the_facts_are_asked_again() -> None:
    """The server behind the address changes between two pictures."""
    wide = ToyModel()
    wide.family = replace(wide.family, scaling_factor=0.5)
    wide.digests = {part: "9" * 64 for part in wide.digests}
    with toy_server(ToyModel()) as (url, _), toy_server(wide) as (other, _), fault_proxy(url, "none") as proxy:
        with HybridClient(ToyModel(), proxy.url) as client:
            assert client.generate(REQUEST, SPLIT).report.fallback is None
            proxy.server = type(proxy.server)("http", other.removeprefix("http://"), "", "", "")
            made = client.generate(REQUEST, SPLIT)
            assert client.known is None
            later = client.generate(REQUEST, SPLIT)  # which a fresh client refuses: here pictures were drawn before
    assert right(later) and (later.report.fallback or "").startswith("wrong: the cloud serves something else by now")
    assert later.report.requests == 0
    assert right(made) and (made.report.fallback or "").startswith("wrong: the trajectory does not fit toy-sd")
    assert made.report.ignored == 1 and made.report.retries == 0 and made.report.cloud_calls == 0


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"prompt": "a cat"}, {"guidance": 4.0}], ids=["seed", "prompt", "guidance"]
)
def test_case_43_an_old_answer_is_not_used(change: dict[str, object]) -> None:
    with toy_server(ToyModel()) as (url, _), fault_proxy(url, "none", "old") as proxy:
        with HybridClient(ToyModel(), proxy.url) as client:
            client.generate(replace(REQUEST, **change), SPLIT)
            made = client.generate(REQUEST, SPLIT)
    assert right(made) and (made.report.fallback or "").startswith("wrong: this trajectory answers something else")
    assert made.report.ignored == 1 and made.report.requests == 1


def test_case_43_a_duplicate_answer_reaches_no_later_picture() -> None:
    with toy_server(ToyModel()) as (url, _), fault_proxy(url, "twice") as proxy:
        with HybridClient(ToyModel(), proxy.url) as client:
            for seed in (7, 8, 9):
                made = client.generate(replace(REQUEST, seed=seed), SPLIT)
                assert np.array_equal(made.picture.pixels, whole(seed=seed))
                assert made.report.fallback is None and made.report.cloud_calls == 2


@pytest.mark.slow
def test_case_43_an_answer_after_the_local_finish_is_given_up_and_counted() -> None:
    model = HeldModel()
    with toy_server(model) as (url, service):
        with HybridClient(ToyModel(), url, deadline=0.5) as client:
            client.facts()
            model.gate.clear()
            made = client.generate(REQUEST, SPLIT)
            assert right(made) and (made.report.fallback or "").startswith("slow") and made.report.ignored == 1
            before = made.picture.pixels.copy()
            # the client has left, and the server knows: what it would answer now is for nobody
            until(lambda: service.metrics.value("diffship_generations_total", model="toy", outcome="cancelled") == 1)
            model.gate.set()
        with HybridClient(ToyModel(), url) as client:
            later = client.generate(replace(REQUEST, seed=8), SPLIT)
        assert np.array_equal(made.picture.pixels, before)
        assert np.array_equal(later.picture.pixels, whole(seed=8)) and later.report.fallback is None


@pytest.mark.slow
def test_case_43_no_wall_clock_has_a_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock on the wall jumps by years, back and forth, with every look at it."""
    looks = [0]

    def wall() -> float:
        looks[0] += 1
        return 4e9 if looks[0] % 2 else 1.0

    with toy_server(ToyModel()) as (url, _), HybridClient(ToyModel(), url, deadline=20) as client:
        monkeypatch.setattr(time, "time", wall)
        made = [client.generate(REQUEST, SPLIT) for _ in range(3)]
        monkeypatch.undo()
    assert all(right(one) and one.report.fallback is None and one.report.late_ms == 0 for one in made)


def test_prompts_and_times_are_told_as_the_server_takes_them() -> None:
    with toy_server(ToyModel()) as (url, _), fault_proxy(url, "none") as proxy:
        with HybridClient(ToyModel(), proxy.url, deadline=3600) as client:
            assert client.generate(replace(REQUEST, negative=""), SPLIT).report.fallback is None
    body = json.loads(proxy.bodies[0])
    assert body["prompt"] == REQUEST.prompt and body["negative_prompt"] == "" and body["deadline_seconds"] == 600
    assert (body["split"], body["steps"], body["embeddings"]) == (2, 6, False)


@pytest.mark.slow
def test_threads_and_connections_do_not_pile_up() -> None:
    with toy_server(ToyModel()) as (url, _), fault_proxy(url, "refuse", "reset", "garbage", "none") as proxy:
        for _ in range(3):
            with HybridClient(ToyModel(), proxy.url) as client:
                client.generate(REQUEST, SPLIT)
        before = threading.active_count()
        for _ in range(5):
            with HybridClient(ToyModel(), proxy.url) as client:
                client.generate(REQUEST, SPLIT)
        assert threading.active_count() <= before
