"""Stopping while an engine hangs: the wait is bounded, the engine is ended, and its client has an answer."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from serve_toy import HeldModel, until

from diffship.core.errors import BusyError, PeerError
from diffship.runtimes.serve import service as services
from diffship.runtimes.serve import worker as workers
from diffship.runtimes.serve.forms import GenerateForm
from diffship.runtimes.serve.jobs import Generation
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.order import generate_order
from diffship.runtimes.serve.service import Service
from diffship.runtimes.serve.worker import STOPPED, Served, Worker


class Hanging(HeldModel):
    """Its U-Net's calls wait at the gate, and raise PeerError once its engine was killed."""

    def __init__(self, name: str = "toy") -> None:
        super().__init__()
        self.kills, self.closed = 0, threading.Event()
        unet = self.runners["unet"]
        held = unet.function

        def call(feeds: Any) -> Any:
            made = held(feeds)
            if self.kills:
                raise PeerError("the engine's process was ended")
            return made

        unet.function = call
        self.served = Served(name, self, alive=lambda: not self.kills, restart=self.restart, kill=self.kill)

    def kill(self) -> None:
        self.kills += 1
        self.gate.set()

    def restart(self) -> None:
        raise AssertionError("nothing is started while it stops")

    def close(self) -> None:
        self.closed.set()


def hang(model: Hanging, worker: Worker) -> Generation:
    """A request whose first call hangs."""
    model.gate.clear()
    model.in_call.clear()
    generation = Generation("toy", generate_order(GenerateForm(prompt="cat"), model), time.monotonic() + 60)
    worker.submit(generation)
    assert model.in_call.wait(10)
    return generation


def test_a_call_that_hangs_ends_with_its_engine_when_the_worker_stops() -> None:
    model = Hanging()
    worker = Worker(model.served, ServeOptions())
    worker.start()
    until(worker.ready)
    generation = hang(model, worker)
    begun = time.monotonic()
    worker.stop(0.1)
    assert time.monotonic() - begun < 5 and model.kills == 1
    assert model.closed.wait(5) and worker.state == STOPPED
    with pytest.raises(BusyError, match="stopped before"):
        generation.result(0)


def test_a_call_that_ends_in_time_keeps_its_engine() -> None:
    model = Hanging()
    worker = Worker(model.served, ServeOptions())
    worker.start()
    until(worker.ready)
    hang(model, worker)
    threading.Timer(0.1, model.gate.set).start()
    worker.stop(5)
    assert model.kills == 0 and model.closed.is_set()


def test_a_load_that_hangs_is_ended_and_is_no_fault_of_the_model() -> None:
    model = Hanging()
    heard: list[Worker] = []
    model.gate.clear()
    worker = Worker(model.served, ServeOptions())
    worker.start(heard.append)
    assert model.in_call.wait(10)
    worker.stop(0.1)
    assert model.closed.wait(5)
    assert model.kills == 1 and heard == [] and worker.state == STOPPED and worker.fault is None


@pytest.mark.slow
def test_several_that_hang_share_the_time_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "STOP_SECONDS", 1.0)
    models = [Hanging(f"toy{i}") for i in range(4)]
    service = Service([model.served for model in models])
    service.start()
    until(service.ready)
    for model, worker in zip(models, service.workers.values(), strict=True):
        hang(model, worker)
    begun = time.monotonic()
    service.close()
    assert 0.9 < time.monotonic() - begun < 2.5
    assert [model.kills for model in models] == [1] * 4


def test_an_engine_that_cannot_be_ended_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_KILLED_SECONDS", 0.1)
    model = Hanging()
    worker = Worker(Served("toy", model), ServeOptions())  # drawn with in this process
    worker.start()
    until(worker.ready)
    hang(model, worker)
    begun = time.monotonic()
    worker.stop(0.1)
    assert time.monotonic() - begun < 2
    model.gate.set()
    assert model.closed.wait(5)
