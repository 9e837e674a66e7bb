"""HTTP to a cloud server: bounded in time and bytes, and every fault sorted by whether asking again is right.

One event loop in a thread of its own keeps the connections, so that a wait can be given up at any moment: the socket is
then closed, and the server stops drawing. `httpx` is of the extra `edge`.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from diffship.core.errors import ConfigError, PeerError
from diffship.core.lazy import lazy
from diffship.core.limits import LIMITS, MIB
from diffship.core.strict import unknown
from diffship.runtimes.handoff.pair import ModelFacts

if TYPE_CHECKING:
    import httpx
else:
    httpx = lazy("httpx")

T = TypeVar("T")
RETRIES = 2
CONNECT_SECONDS = 5.0
WRITE_SECONDS = 10.0
PAUSE_SECONDS = 0.1  # before the first retry; twice that before the second
TRAJECTORY = "application/octet-stream"
_MODELS_BYTES = 4 * MIB
_ERROR_BYTES = 64 << 10
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_DIGEST = re.compile(r"([0-9a-f]{64})?\Z")
_TIMING = re.compile(r"\b(queue|run);dur=([0-9]{1,9}(?:\.[0-9]{1,6})?)")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# status -> kind of fault, whether the same request may succeed a moment later; all others are "refused"
_STATUSES = {
    408: ("slow", True),
    429: ("busy", True),
    500: ("failed", False),
    502: ("failed", True),
    503: ("busy", True),
    504: ("slow", False),
}


class CloudError(PeerError):
    """The cloud gave no answer, or none of use. The message begins with one word of docs/handoff.md and a colon.

    `again`: a retry may help, no sooner than after `after` seconds.
    """

    def __init__(self, message: str, again: bool = False, after: float = 0.0) -> None:
        super().__init__(message)
        self.again = again
        self.after = after

    @property
    def kind(self) -> str:
        return str(self).partition(":")[0]


@dataclass(frozen=True, eq=False)
class Answer:
    """A body of an answer and what it cost: bytes of both bodies, seconds seen here, and milliseconds that the server
    says it queued and drew (None if it does not say)."""

    body: bytes
    bytes_up: int
    seconds: float
    queue_ms: float | None = None
    run_ms: float | None = None


@dataclass(frozen=True)
class CloudModel:
    """One entry of the server's `/v1/models`."""

    name: str
    digest: str
    engine: str
    facts: ModelFacts


class Cloud:
    """A server at `url`, reached from a loop in a daemon thread; `close` ends both."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """Nothing is opened yet.

        Raises:
            ConfigError: not an http(s) URL, one with a name and password in it, or a token that no header can hold.
            MissingExtra: httpx is not installed.
        """
        self.url, self.warnings = _checked(url, token)
        self._token = token
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: httpx.AsyncClient | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `work`, made of the methods below, in the loop; cancelling the future gives the wait up."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="cloud", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        if self._loop is None or self._thread is None:
            return
        wait([self.submit(self._shut())], CONNECT_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CONNECT_SECONDS)
        self._loop.close()
        self._loop = self._thread = None

    async def models(self, left: float) -> dict[str, CloudModel]:
        """By name, the server's first one first. Raises CloudError."""
        answer = await self._send("GET", "/v1/models", left, most=_MODELS_BYTES, media="application/json")
        try:
            entries = [_model(entry) for entry in json.loads(answer.body)["data"]]
        except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as fault:
            raise CloudError(f"garbage: /v1/models is not what a server says: {_short(fault)}") from None
        if not entries:
            raise CloudError("garbage: /v1/models names no model")
        return {entry.name: entry for entry in entries}

    async def live(self, left: float) -> float:
        """Seconds of the smallest exchange there is. Raises CloudError."""
        return (await self._send("GET", "/live", left, most=_ERROR_BYTES, media="text/plain")).seconds

    async def handoff(self, body: bytes, key: str, left: float) -> Answer:
        """The trajectory that `body` asks for; the same `key` with the same body is the same generation.

        Raises CloudError.
        """
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        return await self._send("POST", "/v1/handoff", left, body, headers, LIMITS.trajectory_bytes, TRAJECTORY)

    async def _send(
        self,
        method: str,
        path: str,
        left: float,
        content: bytes = b"",
        headers: dict[str, str] | None = None,
        most: int = _ERROR_BYTES,
        media: str = "",
    ) -> Answer:
        begin = time.perf_counter()
        timeout = httpx.Timeout(left, connect=min(CONNECT_SECONDS, left), write=min(WRITE_SECONDS, left))
        try:
            async with asyncio.timeout(left):  # over the whole exchange: a drip of bytes restarts every other clock
                request = self._opened().stream(
                    method, self.url + path, content=content or None, headers=headers, timeout=timeout
                )
                async with request as response:
                    body = await _body(response, most if response.status_code == 200 else _ERROR_BYTES)
        except (TimeoutError, httpx.TimeoutException) as fault:
            down = isinstance(fault, httpx.ConnectTimeout)
            raise CloudError(f"{'down' if down else 'slow'}: no answer within {left:.1f} s", again=down) from None
        except (httpx.ConnectError, OSError, UnicodeError) as fault:  # the latter two of resolvers, past httpx
            raise CloudError(f"down: {_short(fault) or 'no connection'}", again=True) from None
        except httpx.TransportError as fault:
            raise CloudError(f"broken: {_short(fault) or 'the connection was lost'}", again=True) from None
        if response.status_code != 200:
            raise _refusal(response, body)
        _require_media(response, media)
        timing = dict(_TIMING.findall(response.headers.get("server-timing", "")[:200]))
        told = [float(timing[name]) if name in timing else None for name in ("queue", "run")]
        return Answer(body, len(content), time.perf_counter() - begin, *told)

    def _opened(self) -> httpx.AsyncClient:
        if self._client is None:
            headers = {"Accept-Encoding": "identity", "User-Agent": "diffship"}
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token}"
            # no proxies and no .netrc of the environment: the token goes to `url` and nowhere else
            context = ssl.create_default_context()
            # no timeout: every request has its own
            self._client = httpx.AsyncClient(headers=headers, verify=context, trust_env=False, follow_redirects=False)
        return self._client

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        # no timeout: `close` waits for this no longer than CONNECT_SECONDS
        await asyncio.gather(*others, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()  # no timeout: likewise
        self._client = None


async def retried(
    ask: Callable[[], Awaitable[T]],
    left: Callable[[], float],
    on_retry: Callable[[CloudError], None] = lambda fault: None,
    draw: Callable[[], float] = random.random,
) -> T:
    """`ask`, and up to RETRIES times again if its fault says that this may help and `left` seconds allow it.

    Only for what may be asked twice. `draw` gives the jitter, in [0, 1).

    Raises:
        CloudError: the last fault.
    """
    for number in range(RETRIES + 1):
        try:
            return await ask()
        except CloudError as fault:
            seconds = pause(number, fault.after, draw())
            if not fault.again or number == RETRIES or seconds >= left():
                raise
            on_retry(fault)
            await asyncio.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


def pause(number: int, after: float, jitter: float) -> float:
    """Seconds before retry `number` (from 0): what the server asked for, then half to all of a growing pause."""
    return after + PAUSE_SECONDS * float(2**number) * (0.5 + 0.5 * jitter)


async def _body(response: httpx.Response, most: int) -> bytes:
    claimed = response.headers.get("content-length", "")
    if claimed.isdecimal() and int(claimed[:20]) > most:
        raise CloudError(f"garbage: an answer of {claimed[:20]} bytes; at most {most} are read")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > most:
            raise CloudError(f"garbage: an answer of more than {most} bytes")
    return bytes(body)


def _refusal(response: httpx.Response, body: bytes) -> CloudError:
    kind, again = _STATUSES.get(response.status_code, ("refused", False))
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = "no reason given"
    after = response.headers.get("retry-after", "")
    # whole seconds only: a date would make the pause depend on two clocks
    seconds = float(after) if re.fullmatch(r"[0-9]{1,6}", after) else 0.0
    return CloudError(f"{kind}: HTTP {response.status_code}, {_short(message)}", again, seconds)


def _require_media(response: httpx.Response, media: str) -> None:
    given = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != media or response.headers.get("content-encoding", "identity") != "identity":
        raise CloudError(f"garbage: Content-Type is {given[:60]!a}, not {media}", again=True)


def _model(entry: Any) -> CloudModel:
    made = CloudModel(entry["id"], entry["digest"], entry["engine"], ModelFacts.from_json(entry["facts"]))
    for value, form in ((made.name, _NAME), (made.digest, _DIGEST), (made.engine, re.compile(r"[a-z0-9_-]{0,32}\Z"))):
        if not form.match(value):
            raise ConfigError(f"{value[:80]!a} is no name, digest or engine")
    return made


def _checked(url: str, token: str | None) -> tuple[str, tuple[str, ...]]:
    try:
        parsed = httpx.URL(url)
        host = parsed.host  # which is decoded here: "xn--a" has no letters to decode to
    except (httpx.InvalidURL, UnicodeError) as fault:
        raise ConfigError(f"cloud {url[:80]!a} is not a URL: {_short(fault)}") from None
    if parsed.scheme not in ("http", "https") or not host or parsed.query or parsed.fragment:
        raise ConfigError(f"cloud {url[:80]!a} is not such as https://host or http://127.0.0.1:8765")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise ConfigError(f"cloud {url[:80]!a} has port {parsed.port}; legal is 1 to 65535")
    if parsed.userinfo:
        raise ConfigError("the cloud's URL holds a name or password; give the token apart, in a file or DIFFSHIP_TOKEN")
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ConfigError("the token is not plain ASCII without spaces")
    open_wire = token is not None and parsed.scheme == "http" and host not in _LOOPBACK
    warnings = ("the token and the prompts travel unencrypted: use https",) if open_wire else ()
    return url.rstrip("/"), warnings


def choose_model(models: dict[str, CloudModel], name: str | None) -> CloudModel:
    """The one called `name`, or the first. Raises ConfigError, with the nearest legal name."""
    if name is not None and name not in models:
        raise ConfigError(f"the cloud: {unknown('model', name, models)}")
    return next(iter(models.values())) if name is None else models[name]


def _short(value: object) -> str:
    """One printable line, whatever the other side wrote."""
    text = " ".join(str(value).split())
    return text[:200].encode("ascii", "backslashreplace").decode()
