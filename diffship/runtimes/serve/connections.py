"""Connections of the server: how many, and for how long a client that does nothing, or reads nothing, may hold one."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from diffship.core.errors import ConfigError
from diffship.runtimes.serve.log import Throttle
from diffship.runtimes.serve.options import ServeOptions

LOG = logging.getLogger("diffship.serve.connections")
LOG.addFilter(Throttle(rate=0.1, burst=3))
_BACKLOG = 128
_TRIES = 5  # for a port that is free on every address of a name
_SPARE_FILES = 32  # for what is no connection: files, pipes of engines that are started anew
_FEWEST = 8
_AT_ONCE = 8  # connections that come in before any is closed for them; much fewer than the spare descriptors
_LOOK_SECONDS = 1.0
_STILL_SECONDS = 2.0  # after which whoever reads nothing may have to go for somebody else
_SLOWEST = 1024  # bytes a second that a client must read
_AHEAD = 1  # requests that a client may have sent before it has read the answer to the one before


class Door(socket.socket):
    """A listening socket that gives asyncio a few connections at a time, and that lives through a lack of descriptors.

    asyncio takes all that wait at once: those that it would have closed for them are still open then. And if no
    descriptor is left, it logs that for each of them, again and again. This one has a descriptor in reserve, with which
    it takes such a connection and hangs up on it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reserve: int | None = os.open(os.devnull, os.O_RDONLY)
        self._taken = 0

    def accept(self) -> tuple[socket.socket, Any]:
        if self._taken == _AT_ONCE:
            self._taken = 0
            raise BlockingIOError(errno.EAGAIN, "the rest in the loop's next round")
        try:
            taken = super().accept()  # no timeout: asyncio asks when there is one, and the socket does not block
        except OSError as fault:
            self._taken = 0
            if fault.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._turn_away()
            raise BlockingIOError(errno.EAGAIN, "turned away") from None
        self._taken += 1
        return taken

    def close(self) -> None:
        super().close()
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None

    def _turn_away(self) -> None:
        LOG.warning("no file descriptor is left for another connection; it is hung up on (see ulimit -n)")
        if self._reserve is None:
            time.sleep(0.05)  # somebody else took that one too; without a pause this would be asked at once again
        else:
            os.close(self._reserve)
            self._reserve = None
            with suppress(OSError):
                super().accept()[0].close()  # no timeout: likewise
        with suppress(OSError):
            self._reserve = os.open(os.devnull, os.O_RDONLY)


class Doors(list[Door]):
    """Listening sockets of one port, closed at the end of a `with` block."""

    @property
    def port(self) -> int:
        return int(self[0].getsockname()[1])

    @property
    def urls(self) -> list[str]:
        hosts = [str(door.getsockname()[0]) for door in self]
        return [f"http://{f'[{host}]' if ':' in host else host}:{self.port}" for host in hosts]

    def __enter__(self) -> Doors:
        return self

    def __exit__(self, *error: object) -> None:
        for door in self:
            door.close()


def bind(host: str, port: int) -> Doors:
    """Listening sockets on every address of `host` that this machine has; `localhost` has two, as a rule.

    Raises:
        ConfigError: the port is in use or not ours to take, or no address is of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as fault:  # IDNA has no form of an empty label, or of one of 64 letters
        reason = getattr(fault, "strerror", None) or "not a host's name"
        raise ConfigError(f"--host {host[:80]!a}: {reason}; give an address of this machine, or localhost") from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for tries in range(_TRIES, 0, -1):
        try:
            return _bound(addresses, port)
        except OSError as fault:
            taken = fault.errno == errno.EADDRINUSE and port == 0 and len(addresses) > 1
            if not taken or tries == 1:
                raise ConfigError(f"{host} port {port}: {fault.strerror}; --port 0 takes a free one") from None
    raise AssertionError("the last try returns or raises")


def _bound(addresses: Sequence[tuple[socket.AddressFamily, Any]], port: int) -> Doors:
    """Raises OSError: of an address that is in use, or of the last one if none is of this machine."""
    doors, foreign = Doors(), None
    try:
        for family, address in addresses:
            try:
                doors.append(_listening(family, (address[0], port or (doors.port if doors else 0), *address[2:])))
            except OSError as fault:
                if fault.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                foreign = fault
        if not doors and foreign is not None:
            raise foreign
        return doors
    except BaseException:
        doors.__exit__()
        raise


def _listening(family: socket.AddressFamily, address: Any) -> Door:
    door = Door(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        door.bind(address)
        door.listen(_BACKLOG)
        return door
    except BaseException:
        door.close()
        raise


def affordable(wanted: int) -> int:
    """How many connections of `wanted` this process has descriptors for; its own limit is raised first, if it may.

    macOS gives 256 unless it is asked for more.
    """
    try:
        import resource
    except ImportError:  # Windows counts otherwise, and has room
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = _open_files() + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted + others:
        return wanted
    more = wanted + others if hard == resource.RLIM_INFINITY else min(hard, wanted + others)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        soft = more
    return max(min(wanted, soft - others), _FEWEST)


def _open_files() -> int:
    with suppress(OSError):
        return len(os.listdir("/dev/fd"))
    return 64


class _Counted:
    """A transport that knows how much was written to it."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.count = 0

    def write(self, data: bytes) -> None:
        self.count += len(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@cache
def protocol(options: ServeOptions, connections: int) -> Any:
    """uvicorn's HTTP over h11, and what it lacks: clocks for headers that come byte by byte and for answers that nobody
    reads, an end to requests that come in advance, and a place for newcomers beside whoever does nothing."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            self._counted = _Counted(transport)
            super().connection_made(self._counted)  # type: ignore[arg-type]
            self._late = self.loop.call_later(options.header_seconds, self._hang_up)
            self._asked = self.loop.time()  # or, before the first request, when it came
            self._ahead = 0
            self._unread_since: float | None = None
            self._mark = (self._asked, 0)  # when this much had been read of its answers
            self._last = 0
            self._look = self.loop.call_later(_LOOK_SECONDS, self._look_at_reader)
            self._make_place()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._late.cancel()
                self._asked = self.loop.time()
            elif self._late.cancelled():  # the first bytes of the connection's next request
                self._late = self.loop.call_later(options.header_seconds, self._hang_up)

        def on_response_complete(self) -> None:
            self._ahead = self._ahead + 1 if self.conn.trailing_data[0] else 0
            if self._ahead > _AHEAD:
                self._hang_up()
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            """Refuse what is no HTTP. If that is the body of a request that is answered already, its answer has no
            place any more: uvicorn would log the attempt to send it with a traceback."""
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            self._hang_up()

        def connection_lost(self, exc: Exception | None) -> None:
            self._late.cancel()
            self._look.cancel()
            super().connection_lost(exc)

        def _look_at_reader(self) -> None:
            """Hang up on a client that has read next to nothing of what has long been sent to it."""
            self._look = self.loop.call_later(_LOOK_SECONDS, self._look_at_reader)
            now, read = self.loop.time(), self._read()
            if not self._unread():
                self._unread_since = None
                return
            if self._unread_since is None or read - self._mark[1] >= _SLOWEST * options.write_seconds:
                self._unread_since = self._unread_since or now
                self._mark = (now, read)
            if now - self._mark[0] >= options.write_seconds:
                self.transport.abort()
            self._last = read

        def _unread(self) -> int:
            """Bytes of answers that the system has not taken, as the client reads none."""
            return int(self._counted.get_write_buffer_size())

        def _read(self) -> int:
            return self._counted.count - self._unread()

        def _make_place(self) -> None:
            """If all places are taken, hang up on whoever does least: nobody may keep the others out."""
            if len(self.connections) < connections:
                return
            others: list[Any] = [other for other in self.connections if other is not self]
            places = [(place, other) for other in others if (place := other.place()) is not None]
            if places:
                min(places, key=lambda entry: entry[0])[1]._hang_up(at_once=True)

        def place(self) -> tuple[int, float] | None:
            """How soon it may have to go, the least first; None: not while it is like this.

            First whoever has asked for nothing for longest, then whoever does not read, then whoever reads slowly.
            """
            if self._unread():
                if self._unread_since is None or self.loop.time() - self._unread_since < _STILL_SECONDS:
                    return None
                return (1 if self._read() == self._last else 2), self._unread_since
            unused = self.cycle is None or self.cycle.response_complete
            return (0, self._asked) if unused and not self.transport.is_closing() else None

        def _hang_up(self, at_once: bool = False) -> None:
            """Send what is left and close; `at_once` what is left is not sent."""
            if at_once and self._unread():
                self.transport.abort()
            elif not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol
