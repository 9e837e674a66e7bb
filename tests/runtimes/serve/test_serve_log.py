"""The log: lines that clients cause are bounded, and none of them moves a terminal's cursor."""

from __future__ import annotations

import asyncio
import io
import logging

import httpx
import pytest
from serve_toy import Clock, toy_service

from diffship.runtimes.serve import log
from diffship.runtimes.serve.app import application
from diffship.runtimes.serve.log import Throttle, log_to_stderr
from diffship.runtimes.serve.service import Service


def test_a_burst_goes_through_and_the_rest_is_counted() -> None:
    clock = Clock()
    throttle = Throttle(rate=2.0, burst=3, clock=clock)

    def sent(count: int) -> list[str]:
        records = [logging.LogRecord("x", logging.INFO, "", 0, "line %d", (number,), None) for number in range(count)]
        return [record.getMessage() for record in records if throttle.filter(record)]

    assert sent(10) == ["line 0", "line 1", "line 2"]
    clock.now += 1.0
    assert sent(5) == ["line 0 (7 more such lines are left out)", "line 1"]
    clock.now += 1000.0
    assert len(sent(9)) == 3


async def asked(service: Service) -> None:
    """Four hundred requests for nothing, five for a picture."""
    transport = httpx.ASGITransport(application(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
        for _ in range(400):
            await client.get("/nowhere")
        for seed in range(5):
            await client.post("/v1/generate", json={"prompt": "cat", "steps": 1, "seed": seed})


def test_what_draws_is_logged_whole_and_the_rest_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(log.sys, "stderr", stream)
    names = ("diffship.serve", "uvicorn.error", log.REQUESTS)
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).filters) for name in names}
    try:
        log_to_stderr(quiet=False)
        with toy_service() as service:
            asyncio.run(asked(service))
        logging.getLogger("diffship.serve").error("a prompt: \x1b]0;owned\x07\x1b[2J \u202egnp.exe")
    finally:
        for name, (handlers, filters) in before.items():
            logging.getLogger(name).handlers, logging.getLogger(name).filters = handlers, filters
            logging.getLogger(name).propagate = True
            logging.getLogger(name).setLevel(logging.NOTSET)
    text = stream.getvalue()
    assert text.count(" other 404 ") < 300 and text.count("POST /v1/generate 200") == 5
    assert "\x1b" not in text and "\u202e" not in text and r"\x1b]0;owned\x07\x1b[2J \u202egnp.exe" in text
