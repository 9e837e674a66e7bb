"""Bodies of requests, read in chunks: within a length, a time, and what all of them together may take up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from diffship.runtimes.serve.answers import Refusal
from diffship.runtimes.serve.options import ServeOptions

if TYPE_CHECKING:
    from fastapi import Request

_CLOSE = ("Connection", "close")


class Bodies:
    """The bodies that one server holds; the thread of its event loop alone reads them."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._held = 0

    @asynccontextmanager
    async def reading(self, request: Request, short: bool) -> AsyncIterator[bytes]:
        """The body, which counts as held until the end of an `async with` block; `short` ones hold neither a picture
        nor a trajectory.

        Raises:
            Refusal: more bytes than the limit, slower than the limit, or more than may be held of all together; the
                client left.
        """
        most = min(self._options.body_bytes, self._options.json_bytes) if short else self._options.body_bytes
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self._options.body_seconds):
                    async for chunk in _chunks(request):
                        body += chunk
                        self._held += len(chunk)
                        self._require_room(len(body), most)
            except TimeoutError:
                message = f"not here within {self._options.body_seconds:g} s"
                raise Refusal(408, "body_too_slow", message, (_CLOSE,)) from None
            yield bytes(body)
        finally:
            self._held -= len(body)

    def _require_room(self, length: int, most: int) -> None:
        if length > most:
            raise Refusal(413, "body_too_large", f"at most {most} bytes are read", (_CLOSE,))
        if self._held > self._options.bodies_bytes:
            raise Refusal(503, "busy", "other requests are being read; ask again later", (_CLOSE, ("Retry-After", "1")))


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await request.receive()  # no timeout: the whole body has one
        if message["type"] == "http.disconnect":
            raise client_left()
        yield message.get("body", b"")
        more = message.get("more_body", False)


def client_left() -> Refusal:
    """An answer that nobody reads; the log and the metrics do."""
    return Refusal(499, "client_left", "the client left")
