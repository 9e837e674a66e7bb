"""Case 30: requests made out of the OpenAPI document, legal and not: no 5xx, no path in a body, no surprise."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from sampling_toy import ToyModel

from diffship.runtimes.serve.app import application
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.service import Service
from diffship.runtimes.serve.worker import Served

schemathesis: Any = pytest.importorskip("schemathesis")
PATHS = re.compile(r"/(?:tmp|home|usr|work|root|var|opt|lib)/|\.py\b|Traceback|object at 0x")
POSTS = ["/v1/generate", "/v1/handoff", "/v1/resume", "/v1/images/generations"]
CASES = [(path, mode) for path in POSTS for mode in ("positive", "negative")]
CASES += [(path, "positive") for path in ("/v1/models", "/ready", "/live", "/metrics")]  # nothing in them can be wrong


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the tool's own
@pytest.mark.parametrize(("path", "mode"), CASES)
def test_case_30_no_request_makes_a_5xx_or_leaks_a_path(path: str, mode: str) -> None:
    service = Service([Served("toy", ToyModel(), previews=True)], ServeOptions(allow_hosts=("testserver",)))
    ready = threading.Event()
    service.start(ready.set)
    assert ready.wait(10)
    schema = schemathesis.openapi.from_asgi("/openapi.json", application(service))
    (operation,) = [found.ok() for found in schema.include(path=path).get_all_operations()]
    generation = schemathesis.GenerationMode(mode)
    statuses: dict[int, int] = {}

    @given(operation.as_strategy(generation_mode=generation))
    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(case: Any) -> None:
        answer = case.call()
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, answer.text
        assert str(answer.status_code) in operation.definition.raw["responses"]
        told = answer.status_code >= 400 or case.method == "GET"  # the others hold base64 or bytes
        assert not told or not PATHS.search(answer.text)

    try:
        check()
        assert statuses and (mode == "negative" or path == "/v1/resume" or statuses.get(200, 0) > 0), statuses
    finally:
        service.close()
