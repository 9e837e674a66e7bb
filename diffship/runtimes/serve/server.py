"""The process that serves: a port, uvicorn in a thread, signals, an exit code. The application knows none of it."""

from __future__ import annotations

import ipaddress
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from diffship.core.errors import ConfigError, DeadlineError, DiffshipError, RunnerError
from diffship.core.lazy import lazy
from diffship.runtimes.serve.app import application
from diffship.runtimes.serve.connections import Doors, affordable, protocol
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.service import Service

if TYPE_CHECKING:
    import uvicorn
else:
    uvicorn = lazy("uvicorn")

TOKEN_CHARS = (16, 512)
_HOST = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,252}[a-z0-9.])?\Z", re.IGNORECASE)
_START_SECONDS = 30.0
_POLL_SECONDS = 0.2


def check_exposure(host: str, token: str | None) -> None:
    """Loopback may be open to its own machine; anything else needs a token.

    Raises:
        ConfigError: no address at all, another one without a token, or a token that is too short or not plain ASCII.
    """
    if not (_HOST.match(host) or _is_address(host)):
        raise ConfigError(
            f"--host {host[:80]!r} is no address; legal is an IP address or a name, and --port has the port"
        )
    if token is None:
        if not _loopback(host):
            raise ConfigError(f"--host {host} is open to others and needs a token: --token, or DIFFSHIP_TOKEN")
        return
    low, high = TOKEN_CHARS
    if not (low <= len(token) <= high and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(
            f"the token has {len(token)} characters; legal is {low} to {high} of plain ASCII, no spaces or line ends"
        )


class HttpServer:
    """uvicorn over an application, in a thread, for a `with` block; `urls` are where it answers, `url` the first.

    `connections` are those that this process has descriptors for.
    """

    def __init__(self, doors: Doors, app: Any, options: ServeOptions) -> None:
        self.connections = affordable(options.connections)
        config = uvicorn.Config(
            app,
            http=protocol(options, self.connections),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=self.connections,
            h11_max_incomplete_event_size=options.header_bytes,
            timeout_keep_alive=math.ceil(options.keep_alive),
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        # not the main thread, so that uvicorn leaves the signals alone
        self._thread = threading.Thread(target=self._server.run, args=(list(doors),), name="http", daemon=True)
        self.urls = doors.urls
        self.url = self.urls[0]

    def __enter__(self) -> HttpServer:
        self._thread.start()
        end = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise RunnerError("the HTTP server did not start")
            time.sleep(0.01)
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join(_START_SECONDS)


class Signals:
    """The first SIGTERM or SIGINT asks to stop, the second ends the process at once (143, 130)."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._heard) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked.is_set():
            os._exit(128 + number)
        self.asked.set()


def serve_until_asked(
    service: Service,
    doors: Doors,
    token: str | None = None,
    said: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> None:
    """Serve until a signal comes, then let what runs finish; the main thread's work.

    Raises:
        DiffshipError: a model did not load, or broke down.
        DeadlineError: what ran was not done within the grace time.
    """
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        server = stack.enter_context(HttpServer(doors, application(service, token), service.options))
        stack.callback(service.close)  # first, so that what is cut off gets its answer
        if server.connections < service.options.connections:
            said(f"at most {server.connections} connections: the limit of open files allows no more (ulimit -n)")
        said(f"listening on {' and '.join(server.urls)}, loading {', '.join(service.workers)}")
        service.start(on_ready=lambda: said(f"ready on {server.url}"))
        while not signals.asked.wait(_POLL_SECONDS):
            if service.broken.is_set():
                raise _broken(service)
        said(f"stopping; what runs has {service.options.grace:g} s to finish")
        if not service.drain(service.options.grace):
            raise DeadlineError(
                f"stopped with work undone: it took more than the {service.options.grace:g} s of --grace"
            )


def _broken(service: Service) -> DiffshipError:
    fault = service.fault()
    return fault if isinstance(fault, DiffshipError) else RunnerError(f"a model broke down: {type(fault).__name__}")


def _loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return False
