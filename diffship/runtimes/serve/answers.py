"""Errors and results as HTTP has them: statuses, JSON bodies without paths, server-sent events."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffship.core.errors import (
    BusyError,
    Cancelled,
    ConfigError,
    DeadlineError,
    HandoffError,
    PeerError,
    UnsupportedError,
)
from diffship.runtimes.serve.jobs import ConflictError, Generation, Progress
from diffship.runtimes.serve.order import Drawn
from diffship.sampling.picture import Picture
from diffship.sampling.trajectory import warnings_in

TRAJECTORY = "application/octet-stream"
_HEADER_CHARS = 4096  # of all warnings together; what does not fit stands in the body's settings alone


@dataclass(eq=False)
class Refusal(Exception):
    """An answer that is an error; `message` is for the client, and names neither paths nor objects."""

    status: int
    code: str
    message: str
    headers: tuple[tuple[str, str], ...] = ()


_REFUSALS: tuple[tuple[tuple[type[Exception], ...], int, str], ...] = (
    ((ConflictError,), 409, "conflict"),
    ((ConfigError, UnsupportedError), 422, "invalid_request"),
    ((HandoffError,), 422, "invalid_trajectory"),
    ((BusyError, Cancelled, PeerError), 503, "busy"),
    ((DeadlineError,), 504, "deadline_exceeded"),
)


def refusal_of(fault: Exception) -> Refusal:
    """What a client is told of a fault; of our own faults only that there was one."""
    if isinstance(fault, Refusal):
        return fault
    for kinds, status, code in _REFUSALS:
        if isinstance(fault, kinds):
            after = (("Retry-After", str(getattr(fault, "after", 1))),) if status == 503 else ()
            return Refusal(status, code, str(fault), after)
    return Refusal(500, "failed", "the model failed on this request; the server's log has the reason under its id")


def json_bytes(content: object) -> bytes:
    """Strict JSON, whatever a model's files say: a field whose number is infinite or none is left out."""
    try:
        return json.dumps(content, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(content), allow_nan=False).encode()


def _finite(value: object) -> object:
    """Without such fields; within a list, whose places count, null stands for them."""
    if isinstance(value, Mapping):
        return {key: _finite(field) for key, field in value.items() if not _unwritable(field)}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if _unwritable(value) else value


def _unwritable(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def error_body(refusal: Refusal, name: str) -> bytes:
    """`name` is the request's id."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    error = {"code": refusal.code, "type": kind, "message": refusal.message, "request_id": name}
    return json_bytes({"error": error})


def result_document(generation: Generation, drawn: Drawn) -> dict[str, Any]:
    """The JSON answer: pictures as base64 PNG with their settings, or a trajectory as base64."""
    document = {
        "model": generation.name,
        "seconds": seconds_of(generation),
        "warnings": warnings_of(generation, drawn),
    }
    if drawn.trajectory:
        return {**document, "trajectory": base64.b64encode(drawn.trajectory).decode()}
    images = [{"png": base64.b64encode(png).decode(), "settings": about} for png, about in drawn.pictures]
    return {**document, "images": images}


def headers_of(generation: Generation, drawn: Drawn) -> dict[str, str]:
    """What stands beside a picture or trajectory: who made it, how long it took (ms), what to know (a JSON list)."""
    timing = ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in seconds_of(generation).items())
    headers = {"Server-Timing": timing, "X-Model": generation.name}
    warnings = warnings_of(generation, drawn)
    while warnings and len(json.dumps(warnings)) > _HEADER_CHARS:
        warnings.pop()
    return headers | {"X-Warnings": json.dumps(warnings)} if warnings else headers


def warnings_of(generation: Generation, drawn: Drawn) -> list[str]:
    """Each once: of the models that share a picture, and of prompts that were cut."""
    cut = [text for about in drawn.settings for text in warnings_in(about)]
    return list(dict.fromkeys([*generation.order.warnings, *cut]))


def openai_document(generation: Generation, drawn: Drawn) -> dict[str, Any]:
    """What OpenAI's clients read, with the settings of each picture and the warnings where they look for them."""
    data = [{"b64_json": base64.b64encode(png).decode(), "settings": about} for png, about in drawn.pictures]
    return {"created": int(time.time()), "data": data, "warnings": warnings_of(generation, drawn)}


def seconds_of(generation: Generation) -> dict[str, float]:
    """How long it waited, and how long it was drawn."""
    started = generation.created if generation.started is None else generation.started
    ended = started if generation.ended_at is None else generation.ended_at
    return {"queue": round(started - generation.created, 4), "run": round(ended - started, 4)}


def event(name: str, content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json_bytes(content).decode()}\n\n".encode()


def progress_event(made: Progress) -> bytes:
    """The event of a step; its previews become PNG files here."""
    content: dict[str, Any] = {"step": made.step, "calls": made.calls}
    if made.previews:
        content["previews"] = [base64.b64encode(Picture(pixels).png()).decode() for pixels in made.previews]
    return event("progress", content)
