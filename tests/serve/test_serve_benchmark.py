"""The load generator of the benchmark, held against numpy and against a server whose pace is known."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import numpy as np
import pytest
from serve_toy import HeldModel, toy_server

from diffship.benchmarks.serving import Answer, Server, _fairness, closed_loop, open_loop, quantile, slope


@pytest.mark.parametrize("share", [0.0, 0.37, 0.5, 0.99, 1.0])
def test_quantiles_are_those_of_numpy(share: float) -> None:
    values = list(np.random.default_rng(0).random(23))
    assert quantile(values, share) == pytest.approx(np.quantile(values, share))
    assert quantile([4.0], share) == 4.0


def test_the_slope_is_that_of_least_squares() -> None:
    draw = np.random.default_rng(1)
    times, values = draw.random(40), draw.random(40)
    assert slope(list(times), list(values)) == pytest.approx(np.polyfit(times, values, 1)[0])


def test_fairness_is_the_slowest_mean_over_the_fastest() -> None:
    answers = [Answer(200, 1.0, 0), Answer(200, 3.0, 0), Answer(200, 1.0, 1), Answer(200, 4.0, 2)]
    assert _fairness(answers) == 4.0


def test_a_closed_loop_has_as_many_requests_under_way_as_clients() -> None:
    model = HeldModel(delay=0.01)
    with toy_server(model) as (url, service):
        served = Server(urlsplit(url).netloc, os.getpid())
        answers, seconds = closed_loop(served, 4, 3, 0.4)
        assert service.metrics.value("diffship_generations_total", model="toy", outcome="done") == len(answers)
    assert {answer.client for answer in answers} == {0, 1, 2, 3}
    assert all(answer.status == 200 and 0.03 <= answer.seconds <= seconds for answer in answers)
    assert max(model.batches) == 8  # two rows an image


def test_an_open_loop_asks_at_its_own_pace_whatever_the_server_does() -> None:
    model = HeldModel(delay=0.02)
    with toy_server(model, batch=1, queue=1) as (url, _):
        served = Server(urlsplit(url).netloc, os.getpid())
        answers, _ = open_loop(served, 100, 4, 0.5, 5, seed=3)
        assert served.resident_bytes() > 1 << 20
    assert 25 <= len(answers) <= 80  # 50 expected of a Poisson process
    assert {answer.status for answer in answers} == {200, 503}
