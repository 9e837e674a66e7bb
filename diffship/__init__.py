"""diffship: compress, compile and prove text-to-image diffusion models.

    from diffship import Request, generate, open_model
    with open_model("out/emoji") as model:
        picture = generate(model, Request("red apple"))[0]
    picture.save("apple.png")

Importing the package imports nothing else; each name is loaded when it is first used. `export` is not among them: the
module `diffship.export` has that name, so it is `from diffship.export import export`. What it does at once is to switch
the telemetry of other packages off, so import it before them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffship.core import telemetry

if TYPE_CHECKING:
    from diffship.core.compare import compare as compare
    from diffship.fleet.build import export_fleet as export_fleet
    from diffship.fleet.recipe import read_fleet as read_fleet
    from diffship.runtimes.engines.model import open_model as open_model
    from diffship.runtimes.handoff.client import HybridClient as HybridClient
    from diffship.runtimes.partition.async_denoiser import AsyncDenoiser as AsyncDenoiser
    from diffship.runtimes.proof.verify import verify as verify
    from diffship.sampling.generate import Request as Request
    from diffship.sampling.generate import generate as generate

__version__ = "0.1.0"
__all__ = [
    *("AsyncDenoiser", "HybridClient", "Request", "__version__", "compare", "export_fleet", "generate", "open_model"),
    *("read_fleet", "verify"),
]

_WHERE = {
    "AsyncDenoiser": "diffship.runtimes.partition.async_denoiser",
    "HybridClient": "diffship.runtimes.handoff.client",
    "Request": "diffship.sampling.generate",
    "compare": "diffship.core.compare",
    "export_fleet": "diffship.fleet.build",
    "generate": "diffship.sampling.generate",
    "open_model": "diffship.runtimes.engines.model",
    "read_fleet": "diffship.fleet.recipe",
    "verify": "diffship.runtimes.proof.verify",
}

telemetry.refuse()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        hint = f"; from diffship.{name} import {name}" if name in ("compress", "export") else ""
        raise AttributeError(f"module 'diffship' has no attribute {name!r}{hint}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
