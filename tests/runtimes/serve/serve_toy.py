"""A served toy model whose U-Net can be slow, held, or made to fail; and ways to ask for things."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
from sampling_toy import ToyModel

from diffship.runtimes.serve.app import application
from diffship.runtimes.serve.connections import bind
from diffship.runtimes.serve.forms import GenerateForm
from diffship.runtimes.serve.jobs import Generation
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.order import Order, generate_order
from diffship.runtimes.serve.server import HttpServer
from diffship.runtimes.serve.service import Service
from diffship.runtimes.serve.worker import Served, Worker
from diffship.sampling.generate import Request, generate

POISON = "poison"  # a prompt whose rows come out of the text encoder as NaN-makers


class HeldModel(ToyModel):
    """`delay` seconds a model call; while `gate` is clear, calls wait; rows with huge embeddings make the call fail."""

    def __init__(self, kind: str = "sd", delay: float = 0.0) -> None:
        super().__init__(kind)
        self.gate = threading.Event()
        self.gate.set()
        self.delay = delay
        self.batches: list[int] = []  # rows of each U-Net call
        self.in_call = threading.Event()
        unet, text = self.runners["unet"], self.runners["text_encoder"]
        plain_unet, plain_text = unet.function, text.function

        def held(feeds: Any) -> Any:
            self.in_call.set()
            self.batches.append(len(feeds["sample"]))
            time.sleep(self.delay)
            assert self.gate.wait(30)
            made = plain_unet(feeds)
            poisoned = np.abs(feeds["encoder_hidden_states"]).max(axis=(1, 2)) > 100
            made["out_sample"][poisoned] = np.nan
            return made

        def encode(feeds: Any) -> Any:
            made = plain_text(feeds)
            start = [ord(letter) for letter in POISON]
            bad = (feeds["input_ids"][:, : len(start)] == start).all(1)
            made["last_hidden_state"][bad] *= 1000
            return made

        unet.function, text.function = held, encode


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A loaded worker without a thread, and a clock."""

    def __init__(self, model: ToyModel | None = None, **options: Any) -> None:
        self.clock = Clock()
        self.model = model or ToyModel()
        self.worker = Worker(Served("toy", self.model), ServeOptions(**options), clock=self.clock)
        self.worker.load()
        self.model.runners["unet"].calls.clear()

    def put(self, prompt: str = "cat", deadline: float = 60.0, **words: Any) -> Generation:
        form = GenerateForm(prompt=prompt, response="json", **words)
        return self.submit(generate_order(form, self.model), deadline)

    def submit(self, order: Order, deadline: float = 60.0) -> Generation:
        generation = Generation("toy", order, self.clock.now + deadline, self.clock)
        self.worker.submit(generation)
        return generation

    def finish(self) -> int:
        turns = 0
        while self.worker.turn():
            turns += 1
        return turns

    def rows(self) -> list[int]:
        return [call["sample"][0] for call in self.model.runners["unet"].calls]


@contextmanager
def toy_service(
    model: ToyModel | None = None, name: str = "toy", previews: bool = False, **options: Any
) -> Iterator[Service]:
    """A ready service of one model, stopped afterwards."""
    service = Service([Served(name, model or HeldModel(), previews=previews)], ServeOptions(**options))
    ready = threading.Event()
    service.start(ready.set)
    assert ready.wait(10)
    if isinstance(model, HeldModel):
        model.batches.clear()
        model.in_call.clear()
    try:
        yield service
    finally:
        if isinstance(model, HeldModel):
            model.gate.set()
        service.close()


@contextmanager
def toy_server(
    model: ToyModel | None = None, token: str | None = None, **options: Any
) -> Iterator[tuple[str, Service]]:
    """The same behind a real port of this machine: its URL, and the service."""
    with toy_service(model, **options) as service, bind("127.0.0.1", 0) as listener:
        with HttpServer(listener, application(service, token), service.options) as server:
            yield server.url, service


def ask(service: Service, method: str, path: str, token: str | None = None, **words: Any) -> httpx.Response:
    """One request to the application, without a network."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(application(service, token))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
            return await client.request(method, path, **words)

    return asyncio.run(run())


def drawn_alone(prompt: str, kind: str = "sd", **words: Any) -> list[bytes]:
    """The PNG files that `generate` gives without any server."""
    return [picture.png() for picture in generate(ToyModel(kind), Request(prompt, **words))]


def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for a condition, and fail when it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.002)
