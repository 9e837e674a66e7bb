"""The HTTP application over a Service. It starts no process, opens no port and loads no model: `server` does."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.core.strict import unknown
from diffship.runtimes.handoff.pair import ModelFacts
from diffship.runtimes.serve.answers import (
    TRAJECTORY,
    Refusal,
    error_body,
    event,
    headers_of,
    json_bytes,
    openai_document,
    progress_event,
    refusal_of,
    result_document,
)
from diffship.runtimes.serve.bodies import Bodies, client_left
from diffship.runtimes.serve.forms import GenerateForm, HandoffForm, ImagesForm, ResumeForm, read_body, read_query
from diffship.runtimes.serve.guard import Guard
from diffship.runtimes.serve.jobs import Generation, Progress
from diffship.runtimes.serve.openapi import openapi_document
from diffship.runtimes.serve.order import Drawn, Order, generate_order, handoff_order, resume_order
from diffship.runtimes.serve.service import Service
from diffship.runtimes.serve.worker import Worker

if TYPE_CHECKING:
    import fastapi
    import fastapi.responses
    from fastapi import FastAPI, Request, Response
else:
    fastapi = lazy("fastapi")

Asked = tuple[Worker, Order, str]
LOG = logging.getLogger("diffship.serve")
_KEY_CHARS = 128
_HEARTBEAT = 15.0  # seconds of silence after which a stream says that it is alive


def application(service: Service, token: str | None = None) -> FastAPI:
    """The FastAPI application of a service, guarded by `token` if there is one.

    Raises:
        MissingExtra: fastapi is not installed.
    """
    routes = Routes(service)
    app = fastapi.FastAPI(title="diffship", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    document = json_bytes(openapi_document(service.options, token is not None))

    async def openapi(request: Request) -> Response:
        return fastapi.Response(document, media_type="application/json")

    table = {**routes.table(), "/openapi.json": ("GET", openapi)}
    for path, (method, handler) in table.items():
        app.add_route(path, _answered(handler), methods=[method])
    app.add_exception_handler(404, _no_route)
    app.add_exception_handler(405, _no_route)
    app.add_middleware(
        Guard,
        options=service.options,
        metrics=service.metrics,
        token=token,
        routes=frozenset(table),
    )
    return app


@dataclass(frozen=True)
class Accepted:
    """A request in the queue, who follows it, and the form of its answer."""

    generation: Generation
    follower: Follower
    response: str


class Routes:
    """Handlers by path."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.bodies = Bodies(service.options)

    def table(self) -> dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]]:
        return {
            "/live": ("GET", self.live),
            "/ready": ("GET", self.ready),
            "/metrics": ("GET", self.metrics),
            "/v1/models": ("GET", self.models),
            "/v1/models/{name}": ("GET", self.model),
            "/v1/generate": ("POST", self.generate),
            "/v1/handoff": ("POST", self.handoff),
            "/v1/resume": ("POST", self.resume),
            "/v1/images/generations": ("POST", self.images),
        }

    async def live(self, request: Request) -> Response:
        return fastapi.Response("live\n", media_type="text/plain")

    async def ready(self, request: Request) -> Response:
        ready = await asyncio.to_thread(self.service.ready)  # it looks at files
        content = {"ready": ready, "models": self.service.states()}
        return _json(content, 200 if ready else 503, {} if ready else {"Retry-After": "1"})

    async def metrics(self, request: Request) -> Response:
        return fastapi.Response(self.service.page(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [model_facts(worker) for worker in self.service.workers.values()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.service.workers:
            raise Refusal(404, "not_found", unknown("model", name, self.service.workers))
        return _json(model_facts(self.service.workers[name]))

    async def generate(self, request: Request) -> Response:
        return await self._reply(request, await self._accepted(request, self._generate))

    async def handoff(self, request: Request) -> Response:
        return await self._reply(request, await self._accepted(request, self._handoff))

    async def resume(self, request: Request) -> Response:
        return await self._reply(request, await self._accepted(request, self._resume, TRAJECTORY))

    async def images(self, request: Request) -> Response:
        accepted = await self._accepted(request, self._images, short=True)
        drawn = await ended(request, accepted.generation, accepted.follower)
        document = await asyncio.to_thread(openai_document, accepted.generation, drawn)
        return _json(document, 200, headers_of(accepted.generation, drawn))

    # what a body asks for: the worker, the order, the form of the answer

    def _generate(self, request: Request, body: bytes) -> Asked:
        form = read_body(GenerateForm, body)
        worker = self.service.worker(form.model)
        _check_previews(form.previews, worker)
        return worker, generate_order(form, worker.served.model), form.response

    def _handoff(self, request: Request, body: bytes) -> Asked:
        form = read_body(HandoffForm, body)
        worker = self.service.worker(form.model)
        return worker, handoff_order(form, worker.served.model), form.response

    def _resume(self, request: Request, body: bytes) -> Asked:
        form = read_query(ResumeForm, request.query_params.multi_items())
        worker = self.service.worker(form.model)
        _check_previews(form.previews, worker)
        return worker, resume_order(body, form, worker.served.model), form.response

    def _images(self, request: Request, body: bytes) -> Asked:
        form = read_body(ImagesForm, body)
        worker = self.service.worker(form.model)
        order = generate_order(form.drawing(), worker.served.model)
        return worker, replace(order, warnings=(*order.warnings, *form.warnings())), "json"

    async def _reply(self, request: Request, accepted: Accepted) -> Response:
        generation, follower = accepted.generation, accepted.follower
        if accepted.response == "events":
            return Stream(generation, follower, request.state.request_id)  # type: ignore[return-value]
        drawn = await ended(request, generation, follower)
        if drawn.trajectory:
            return _trajectory(generation, drawn)
        return await (_png if accepted.response == "png" else _document)(generation, drawn)

    async def _accepted(
        self,
        request: Request,
        ask: Callable[[Request, bytes], Asked],
        media: str = "application/json",
        short: bool = False,
    ) -> Accepted:
        """The body read, understood and put in the queue; none of it is held any longer then.

        Raises:
            Refusal: another content type, more bytes than the limit, or slower than the limit.
            BusyError: no capacity now.
            DiffshipError: what is asked for is not legal.
        """
        key = request.headers.get("idempotency-key")
        if key is not None and not (0 < len(key) <= _KEY_CHARS and key.isascii() and key.isprintable()):
            raise ConfigError(f"Idempotency-Key has {len(key)} characters; legal is 1 to {_KEY_CHARS} of plain ASCII")
        _check_content(request, media)
        async with self.bodies.reading(request, short) as body:
            # megabytes are hashed, pictures decoded, schedules computed: not on the event loop
            worker, order, response = await asyncio.to_thread(ask, request, body)
            content = b"\n".join((request.url.path.encode(), str(request.url.query).encode(), body))
            follower = Follower()
            return Accepted(self.service.submit(worker, order, key, content, follower), follower, response)


async def ended(request: Request, generation: Generation, follower: Follower) -> Drawn:
    """What the generation gave; a client that leaves takes its interest with it.

    Raises:
        DeadlineError: the deadline is over.
        Refusal: the client left.
    """
    end, gone = asyncio.ensure_future(follower.end()), asyncio.ensure_future(_disconnect(request))
    try:
        left = max(generation.seconds_left(), 0)
        await asyncio.wait({end, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not generation.ended:
            raise client_left()
        generation.expire()  # unless it has ended
        return generation.result(0)
    finally:
        end.cancel()
        gone.cancel()
        generation.leave(follower)


async def events(generation: Generation, follower: Follower, name: str) -> AsyncIterator[bytes]:
    """Server-sent events: `accepted`, a `progress` after every model call, then `result` or `error`."""
    yield event("accepted", {"request_id": name, "model": generation.name})
    made: Progress | None = Progress(0, 0)
    while made is not None:
        left = max(generation.seconds_left(), 0)
        try:
            made = await asyncio.wait_for(follower.queue.get(), min(left, _HEARTBEAT))
        except TimeoutError:
            if left <= _HEARTBEAT:
                generation.expire()  # the result below raises DeadlineError; an earlier end stays what it was
                break
            yield b": still here\n\n"
            continue
        if made is not None:
            yield await asyncio.to_thread(progress_event, made) if made.previews else progress_event(made)
    try:
        drawn = generation.result(0)
    except Exception as fault:
        yield event("error", json.loads(error_body(refusal_of(fault), name)))
        return
    yield event("result", await asyncio.to_thread(result_document, generation, drawn))


class Follower:
    """What a generation says, as a queue of the event loop that made this; None is its end."""

    def __init__(self) -> None:
        self.queue = asyncio.Queue[Progress | None]()
        self._loop = asyncio.get_running_loop()

    def __call__(self, made: Progress | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self.queue.put_nowait, made)

    async def end(self) -> None:
        # no timeout: a generation ends at its deadline, and who waits for it has one
        while await self.queue.get() is not None:
            continue


@dataclass(frozen=True)
class Stream:
    """A response of server-sent events. Whether it ends, breaks or never begins, the follower leaves."""

    generation: Generation
    follower: Follower
    name: str

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {"X-Accel-Buffering": "no"}  # proxies such as nginx would collect it
        said = events(self.generation, self.follower, self.name)
        try:
            await fastapi.responses.StreamingResponse(said, 200, headers, "text/event-stream")(scope, receive, send)
        finally:
            self.generation.leave(self.follower)


def model_facts(worker: Worker) -> dict[str, Any]:
    """One entry of `/v1/models`: what a client needs to ask for legal things and to check a pair (`facts`)."""
    served, model = worker.served, worker.served.model
    return {
        "id": served.name,
        "object": "model",
        "owned_by": "diffship",
        "state": worker.state,
        "digest": model.digest,
        "facts": replace(ModelFacts.of(model), name=served.name).to_json(),
        "previews": served.previews,
        "paces": worker.paces(),
        "engine": served.engine,
    }


def _answered(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The handler, with every fault as an answer."""

    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as fault:
            refusal = refusal_of(fault)
            if refusal.status == 500:
                LOG.error("%s failed", request.state.request_id, exc_info=fault)
            return _error(request, refusal)

    return run


async def _no_route(request: Request, fault: Exception) -> Response:
    status = getattr(fault, "status_code", 404)
    headers = tuple((getattr(fault, "headers", None) or {}).items())
    message = "there is no such route; see /openapi.json" if status == 404 else "this route has another method"
    return _error(request, Refusal(status, "not_found" if status == 404 else "method_not_allowed", message, headers))


def _check_previews(previews: int, worker: Worker) -> None:
    if previews and not worker.served.previews:
        raise ConfigError(f"model {worker.served.name} has no tiny decoder, so that previews are off: previews is 0")


def _check_content(request: Request, media: str) -> None:
    """Raises Refusal: another content type, or a compressed body."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != media:  # a page of another origin cannot send ours without asking first
        raise Refusal(415, "unsupported_media_type", f"Content-Type is {given[:60]!a}; it must be {media}")
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        message = f"Content-Encoding is {coding[:60]!a}; send the body as it is"
        raise Refusal(415, "unsupported_content_encoding", message, (("Connection", "close"),))


async def _disconnect(request: Request) -> None:
    # no timeout: given up when the generation ends, or its deadline is over
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _png(generation: Generation, drawn: Drawn) -> Response:
    pictures = await asyncio.to_thread(lambda: drawn.pictures)
    return fastapi.Response(pictures[0][0], 200, headers_of(generation, drawn), "image/png")


def _trajectory(generation: Generation, drawn: Drawn) -> Response:
    return fastapi.Response(drawn.trajectory, 200, headers_of(generation, drawn), TRAJECTORY)


async def _document(generation: Generation, drawn: Drawn) -> Response:
    content = await asyncio.to_thread(result_document, generation, drawn)
    return _json(content, 200, headers_of(generation, drawn))


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return fastapi.Response(json_bytes(content), status, headers, "application/json")


def _error(request: Request, refusal: Refusal) -> Response:
    body = error_body(refusal, request.state.request_id)
    return fastapi.Response(body, refusal.status, dict(refusal.headers), "application/json")
