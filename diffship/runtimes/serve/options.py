"""What an operator may set, and the bounds that hold whoever asks. No import here costs `--help` anything."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from diffship.core.errors import ConfigError
from diffship.core.limits import KIB, MIB
from diffship.core.strict import bounded, bounds

_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62})?(\.[a-z0-9_]([a-z0-9_-]{0,62})?)*\Z")
DEADLINE_SECONDS = (1.0, 600.0)  # what a request may ask for


def _setting(low: float, high: float, text: str) -> dict[str, Any]:
    return {**bounds(low, high), "help": text}


@dataclass(frozen=True)
@bounded
class ServeOptions:
    """Bounds of one server; sizes in bytes, times in seconds.

    queue: requests that may wait, per model, beside those being drawn; the next one is refused with 503.
    batch: images that share a model call, and images of one size under way at a time.
    deadline: of requests that name none; one that cannot be kept is refused, one that is missed is a 504.
    restarts: how often in a minute a model's engine process that died is started anew.
    grace: how long a stopping server lets running requests finish.
    keep_alive: how long a connection without a request stays open; longer than the proxy in front of it keeps it.
    allow_hosts: names, beside localhost and plain addresses, that a Host header may hold.
    body_bytes, json_bytes, header_bytes, header_seconds, body_seconds, connections: what one client can take up.
    bodies_bytes: of all bodies that are being read. write_seconds: for a client that reads next to nothing.
    kept_results, kept_bytes, kept_seconds: finished results that a retry with the same Idempotency-Key still gets.
    """

    queue: int = field(default=32, metadata=_setting(1, 4096, "requests that may wait, per bundle"))
    batch: int = field(default=8, metadata=_setting(1, 64, "images that share a model call"))
    deadline: float = field(default=120.0, metadata=_setting(0.01, 600, "seconds for requests that name no deadline"))
    grace: float = field(default=30.0, metadata=_setting(0, 600, "seconds to finish what runs when stopped"))
    restarts: int = field(default=5, metadata=_setting(1, 60, "times a minute that an engine that died is restarted"))
    keep_alive: float = field(default=75.0, metadata=_setting(1, 3600, "seconds an idle connection stays open"))
    allow_hosts: tuple[str, ...] = ()
    body_bytes: int = field(default=8 * MIB, metadata=bounds(KIB, 64 * MIB))
    json_bytes: int = field(default=64 * KIB, metadata=bounds(KIB, 64 * MIB))
    bodies_bytes: int = field(default=64 * MIB, metadata=bounds(KIB, 4096 * MIB))
    header_bytes: int = field(default=16 * KIB, metadata=bounds(KIB, 64 * KIB))
    header_seconds: float = field(default=10.0, metadata=bounds(0.1, 60))
    body_seconds: float = field(default=30.0, metadata=bounds(0.1, 600))
    write_seconds: float = field(default=30.0, metadata=bounds(0.1, 600))
    connections: int = field(default=256, metadata=bounds(8, 4096))
    kept_results: int = field(default=64, metadata=bounds(0, 4096))
    kept_bytes: int = field(default=128 * MIB, metadata=bounds(0, 4096 * MIB))
    kept_seconds: float = field(default=600.0, metadata=bounds(0, 86400))

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow_hosts", tuple(map(host_name, self.allow_hosts)))


def host_name(given: str) -> str:
    """A name as it stands in Host headers: lower case, without a dot at its end, letters beyond ASCII as IDNA has them.

    Raises:
        ConfigError: what no Host header can hold: a URL, a port, a pattern, spaces, nothing.
    """
    try:
        name = given.encode("idna").decode("ascii").lower().removesuffix(".")
    except UnicodeError:
        name = ""
    if not _HOST.match(name):
        raise ConfigError(
            f"--allow-host {given[:80]!a}: it is one name as Host headers have it, such as art.example.org, without "
            "https:// and port; there are no patterns, so give every name"
        )
    return name
