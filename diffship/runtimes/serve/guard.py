"""What stands before every route: hosts, origins, tokens, lengths, one log line and one id per request. Plain ASGI."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from diffship.runtimes.serve.answers import Refusal, error_body
from diffship.runtimes.serve.log import REQUESTS
from diffship.runtimes.serve.metrics import Metrics
from diffship.runtimes.serve.options import ServeOptions

LOG, REST = logging.getLogger("diffship.serve"), logging.getLogger(REQUESTS)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN = ("/live", "/ready")  # what a load balancer asks without a token
_SAFE = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


@dataclass(frozen=True)
class Guard:
    """`app` behind the checks. `token` None: no one is asked for one. `routes`: paths that metrics may name."""

    app: Application
    options: ServeOptions
    metrics: Metrics
    token: str | None = None
    routes: frozenset[str] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, name = time.perf_counter(), uuid.uuid4().hex[:16]
        scope.setdefault("state", {})["request_id"] = name
        seen = {"status": 499}  # the client left before an answer began

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode()), *_SAFE]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self.app(scope, receive, sending)
            else:
                await _refuse(refusal, name, sending)
        finally:
            self._record(scope, name, seen["status"], time.perf_counter() - begin)

    def _refusal(self, scope: Scope) -> Refusal | None:
        """Why the request is turned away before anything of its body is read."""
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        size = sum(len(key) + len(value) + 4 for key, value in scope["headers"])
        if size > self.options.header_bytes:
            return Refusal(431, "headers_too_large", f"headers have {size} bytes; at most {self.options.header_bytes}")
        nameless = "host" not in headers and scope["path"] in OPEN  # HTTP/1.0, as health checks of proxies speak it
        if not nameless and not allowed_host(headers.get("host", ""), self.options.allow_hosts):
            return Refusal(403, "host_not_allowed", "this Host is not served; see --allow-host")
        if "origin" in headers and not same_origin(headers["origin"], headers.get("host", "")):
            return Refusal(403, "origin_not_allowed", "requests from other web origins are refused")
        if not self._authorised(scope["path"], headers.get("authorization", "")):
            fields = (("WWW-Authenticate", "Bearer"),)
            return Refusal(401, "unauthorized", "a valid bearer token is needed: Authorization: Bearer TOKEN", fields)
        return self._length_refusal(scope["method"], headers)

    def _authorised(self, path: str, given: str) -> bool:
        if self.token is None or path in OPEN:
            return True
        scheme, _, word = given.partition(" ")
        same = hmac.compare_digest(word.strip().encode("latin-1"), self.token.encode("utf-8"))
        return scheme.lower() == "bearer" and same

    def _length_refusal(self, method: str, headers: Mapping[str, str]) -> Refusal | None:
        length = headers.get("content-length")
        if "transfer-encoding" in headers or (method == "POST" and length is None):
            return Refusal(411, "length_required", "send the body with a Content-Length, not in chunks")
        if length is not None and not (length.isascii() and length.isdecimal()):
            return Refusal(400, "bad_length", "Content-Length is not a number")
        if length is not None and int(length[:20]) > self.options.body_bytes:
            limit = self.options.body_bytes
            return Refusal(413, "body_too_large", f"the body has {length[:20]} bytes; at most {limit} are read")
        return None

    def _record(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        route = scope["path"] if scope["path"] in self.routes else "other"
        self.metrics.count("diffship_requests_total", route=route, status=str(status))
        self.metrics.observe("diffship_request_seconds", seconds, route=route)
        log = LOG if scope["method"] == "POST" and status == 200 else REST
        log.info("%s %s %s %d %.3f s", name, scope["method"][:16], route, status, seconds)


async def _refuse(refusal: Refusal, name: str, send: Send) -> None:
    """Answer and hang up: the body, if there is one, is not read."""
    body = error_body(refusal, name)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(key.lower().encode(), value.encode()) for key, value in refusal.headers]
    start = {"type": "http.response.start", "status": refusal.status, "headers": [*headers, (b"connection", b"close")]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def allowed_host(host: str, names: tuple[str, ...]) -> bool:
    """Whether a Host header is a plain address, localhost, or one of `names`; the port does not matter.

    DNS rebinding needs a name of the attacker's own, so addresses are harmless.
    """
    name = host.lower()
    if name.startswith("["):
        name, closed, port = name[1:].partition("]")
        if not closed or (port and not _is_port(port[1:])):
            return False
    elif ":" in name:
        name, _, port = name.partition(":")
        if not _is_port(port):
            return False
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name.removesuffix(".") in ("localhost", *names)


def same_origin(origin: str, host: str) -> bool:
    """Whether a browser's Origin is this server itself."""
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and place.lower() == host.lower()


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5
