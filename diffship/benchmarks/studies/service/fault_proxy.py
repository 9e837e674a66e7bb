"""A proxy that hands requests to a server and spoils its answers: `with fault_proxy(url, "none", "hang") as proxy`.

Each handoff takes the next fault, the last one again and again; other requests pass, unless `everything`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from diffship.core.errors import ConfigError, RunnerError
from diffship.core.strict import unknown

FAULTS = (
    "none",
    "refuse",
    "503",
    "hang",
    "reset",
    "garbage",
    "slow",
    "drip",
    "huge",
    "twice",
    "old",
    "flipped",
    "date",
)
_SECONDS = 600.0  # that one exchange may take, the server's drawing included


class FaultProxy:
    """What stands between client and server. `seen` has path and fault of every request, `keys` and `bodies` those of
    the handoffs."""

    def __init__(self, server: str, faults: tuple[str, ...], everything: bool) -> None:
        self.server, self.faults, self.everything = urlsplit(server), list(faults), everything
        self.seen: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.keys: list[str] = []
        self.kept = b""  # the first good answer, for `old`
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                await self.exchange(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or took too long, or the proxy closes while it hangs
        finally:
            writer.close()

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A request and its spoilt answer; no timeout: `serve` has one."""
        head = await reader.readuntil(b"\r\n\r\n")
        lines = [line.partition(":") for line in head.decode("latin-1").split("\r\n")]
        fields = {name.lower(): value.strip() for name, _, value in lines}
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        path = head.split(b" ")[1].decode()
        fault = "none"
        if self.everything or path == "/v1/handoff":
            fault = self.faults.pop(0) if len(self.faults) > 1 else self.faults[0]
            self.bodies.append(body)
            self.keys.append(fields.get("idempotency-key", ""))
        self.seen.append((path, fault))
        await self.spoil(fault, writer, b"" if fault == "hang" else await self.answer(head, body))

    async def answer(self, head: bytes, body: bytes) -> bytes:
        """What the server says; no timeout: `serve` has one."""
        reader, writer = await asyncio.open_connection(self.server.hostname, self.server.port)
        try:
            line, _, rest = head.partition(b"\r\n")
            rest = b"\r\n".join(field for field in rest.split(b"\r\n") if not field.lower().startswith(b"connection:"))
            writer.write(line + b"\r\nConnection: close\r\n" + rest + body)
            whole = await reader.read(-1)
        finally:
            writer.close()
        if head.startswith(b"POST /v1/handoff "):
            self.kept = self.kept or whole
        return whole

    async def spoil(self, fault: str, writer: asyncio.StreamWriter, whole: bytes) -> None:
        """Write what becomes of the answer; no timeout: `serve` has one."""
        head, _, body = whole.partition(b"\r\n\r\n")
        if fault == "hang":
            await asyncio.sleep(60)
        elif fault == "refuse":
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        elif fault in ("503", "date"):
            after = b"0" if fault == "503" else b"Fri, 31 Dec 2199 23:59:59 GMT"
            writer.write(b"HTTP/1.1 503 No\r\nRetry-After: " + after + b"\r\nContent-Length: 0\r\n\r\n")
        elif fault == "reset":
            writer.write(whole[: len(whole) // 2])
            await writer.drain()
            writer.transport.abort()
        elif fault == "garbage":
            writer.write(head + b"\r\n\r\n" + bytes(range(256)) * (len(body) // 256) + bytes(len(body) % 256))
        elif fault == "flipped":
            writer.write(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        elif fault == "huge":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n" + body)
        elif fault in ("slow", "drip"):  # 10 kB/s
            for place in range(0, len(whole), 500):
                writer.write(whole[place : place + 500] if fault == "slow" else whole[place // 500 : place // 500 + 1])
                await writer.drain()
                await asyncio.sleep(0.05)
        else:
            writer.write(whole * 2 if fault == "twice" else self.kept if fault == "old" else whole)
        with suppress(OSError):
            await writer.drain()


@contextmanager
def fault_proxy(server: str, *faults: str, everything: bool = False) -> Iterator[FaultProxy]:
    """A running proxy in front of `server`, on a port of its own, for a `with` block.

    Raises:
        ConfigError: a fault that is none of FAULTS.
    """
    for fault in faults:
        if fault not in FAULTS:
            raise ConfigError(unknown("fault", fault, FAULTS))
    proxy, opened = FaultProxy(server, faults, everything), threading.Event()
    over: list[Callable[[], object]] = []

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        over.append(lambda: loop.call_soon_threadsafe(stop.set))
        listening = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        proxy.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        opened.set()
        await stop.wait()  # no timeout: set at the end of the block, whose thread is waited for no longer than 10 s
        listening.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    if not opened.wait(10):
        raise RunnerError("the proxy did not open")
    try:
        yield proxy
    finally:
        over[0]()
        thread.join(10)
