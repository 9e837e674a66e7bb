"""What every kind's bundle must do, whatever it draws: be served, and be verified."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest

from diffship.core.bundle import Bundle
from diffship.sampling.generate import Request, generate
from diffship.sampling.model import Model


def require_served(model: Model, request: Request) -> None:
    """Fails unless the server's worker draws what `generate` draws of a request with a prompt, steps and a seed."""
    from PIL import Image

    from diffship.runtimes.serve.forms import GenerateForm
    from diffship.runtimes.serve.jobs import Generation
    from diffship.runtimes.serve.options import ServeOptions
    from diffship.runtimes.serve.order import generate_order
    from diffship.runtimes.serve.worker import Served, Worker

    (alone,) = generate(model, request)
    worker = Worker(Served("served", model), ServeOptions())
    worker.load()
    asked = {"prompt": request.prompt, "negative_prompt": request.negative, "steps": request.steps}
    form = GenerateForm(**asked, seed=request.seed, response="json")  # type: ignore[arg-type]
    generation = Generation("served", generate_order(form, model), time.monotonic() + 60)
    worker.submit(generation)
    while worker.turn():
        pass
    ((png, _),) = generation.result(0).pictures
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), alone.pixels)


def require_verified(bundle: Bundle, engine: str) -> None:
    """Fails unless an engine passes every part and draws the golden trajectory again."""
    pytest.importorskip(engine)
    from diffship.runtimes.proof.verify import verify

    report = verify(bundle, engine=engine)
    assert report.passed, report.text()
    assert report.trajectory is not None and report.trajectory.status == "passed"
