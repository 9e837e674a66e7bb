"""The process that serves: a port, uvicorn in a thread, signals, an exit code. The application knows none of it."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from diffship.core.errors import ConfigError, DeadlineError, DiffshipError, RunnerError
from diffship.core.lazy import lazy
from diffship.runtimes.serve.app import application
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.service import Service

if TYPE_CHECKING:
    import uvicorn
else:
    uvicorn = lazy("uvicorn")

TOKEN_CHARS = (16, 512)
_BACKLOG = 128
_START_SECONDS = 30.0
_POLL_SECONDS = 0.2


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is in use or not ours to take, or the address is not of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as fault:  # IDNA has no form of an empty label, or of one of 64 letters
        reason = getattr(fault, "strerror", None) or "not a host's name"
        raise ConfigError(f"--host {host[:80]!a}: {reason}; give an address of this machine, or localhost") from None
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as fault:
        listener.close()
        raise ConfigError(f"{host} port {port}: {fault.strerror}; --port 0 takes a free one") from None
    return listener


def check_exposure(host: str, token: str | None) -> None:
    """Loopback may be open to its own machine; anything else needs a token.

    Raises:
        ConfigError: another address without one, or a token that is too short or not plain ASCII.
    """
    if token is None:
        if not _loopback(host):
            raise ConfigError(f"--host {host} is open to others and needs a token: --token, or DIFFSHIP_TOKEN")
        return
    low, high = TOKEN_CHARS
    if not (low <= len(token) <= high and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(f"the token has {len(token)} characters; legal is {low} to {high} of plain ASCII, no spaces")


class HttpServer:
    """uvicorn over an application, in a thread, for a `with` block; `url` is where it answers."""

    def __init__(self, listener: socket.socket, app: Any, options: ServeOptions) -> None:
        self._listener = listener
        config = uvicorn.Config(
            app,
            http=_protocol(options.header_seconds, options.connections),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=options.connections,
            h11_max_incomplete_event_size=options.header_bytes,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        # not the main thread, so that uvicorn leaves the signals alone
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="http", daemon=True)
        host, port = listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

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
    listener: socket.socket,
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
        server = stack.enter_context(HttpServer(listener, application(service, token), service.options))
        stack.callback(service.close)  # first, so that what is cut off gets its answer
        said(f"listening on {server.url}, loading {', '.join(service.workers)}")
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
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@cache
def _protocol(header_seconds: float, connections: int) -> Any:
    """uvicorn's HTTP over h11, and what it lacks: a clock for headers that come byte by byte, a place beside idlers."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._late = self.loop.call_later(header_seconds, self._hang_up)
            self._asked = self.loop.time()  # or, before the first request, when it came
            self._make_place()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._late.cancel()
                self._asked = self.loop.time()
            elif self._late.cancelled():  # the first bytes of the connection's next request
                self._late = self.loop.call_later(header_seconds, self._hang_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._late.cancel()
            super().connection_lost(exc)

        def _make_place(self) -> None:
            """Hang up on whoever has asked for nothing for longest: idle clients must not keep the others out."""
            others: list[Any] = [other for other in self.connections if not other.transport.is_closing()]
            idle = [other for other in others if other is not self and other.unused()]
            if idle and len(others) >= connections:
                min(idle, key=lambda other: other._asked)._hang_up()

        def unused(self) -> bool:
            """No request of it is being read or answered."""
            return self.cycle is None or self.cycle.response_complete

        def _hang_up(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol
