"""What the pipeline classes of diffusers do beside scheduler, tokenizer and network: their defaults and repairs.

`docs/stock.md` lists all of it. Source: `__init__` and `__call__` of the classes in diffusers 0.42.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
INDEX = "model_index.json"
_DATED = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True)
class Stock:
    """What one class draws with if its caller says nothing, and which old configs it repairs.

    `scheduler` holds the keys that the class overwrites in scheduler_config.json. `sample_size` says whether it reads a
    `sample_size` below 64 of a U-Net from before diffusers 0.9 as 64. `upcasts` says whether it asks the VAE for
    `force_upcast`.
    """

    guidance: float
    steps: int
    strength: float = 1.0
    scheduler: tuple[tuple[str, Any], ...] = ()
    sample_size: bool = False
    upcasts: bool = False


def repaired_scheduler(stock: Stock, scheduler: Config) -> dict[str, Any]:
    """`scheduler` with the keys that the class overwrites, also for the samplers that are made of it later."""
    return {**scheduler, **dict(stock.scheduler)} if scheduler else {}


def repaired_unet(stock: Stock, unet: Config) -> dict[str, Any]:
    """`unet` with `sample_size` 64 if the class does not believe the one of a config before diffusers 0.9."""
    size, dated = unet.get("sample_size"), _DATED.match(str(unet.get("_diffusers_version", "")))
    old = dated is not None and (int(dated[1]), int(dated[2])) < (0, 9)
    small = isinstance(size, int) and size < 64
    return {**unet, "sample_size": 64} if stock.sample_size and old and small else dict(unet)


def repaired_vae(stock: Stock, vae: Config, given: Config) -> dict[str, Any]:
    """`vae` with `force_upcast` off if it was not `given` and the class never asks for it."""
    return dict(vae) if stock.upcasts or "force_upcast" in given else {**vae, "force_upcast": False}


def notes(index: Config, name: str, from_text: Collection[str] = ()) -> list[str]:
    """What the folder asks for and is not done here, a sentence each, for the reader of the log and the card.

    name: the class as which it is drawn. from_text: classes that take more than a prompt, and are drawn without it.
    """
    from diffship.models.pipeline import listed

    told = []
    named = index.get("_class_name")
    if named in from_text and named != name:
        told.append(f"{INDEX} names {named}, which takes an image or a control: drawn as {name}, from the prompt alone")
    for part, what in _LEFT_OUT.items():
        if listed(index, part):
            told.append(f"left out: {part} of {INDEX}; {what}")
    if index.get("add_watermarker"):
        told.append(f"left out: add_watermarker of {INDEX}; pictures get no invisible watermark")
    return told


_LEFT_OUT = {
    "safety_checker": "pictures are not looked at before they are saved",
    "controlnet": "its conditions are not drawn",
    "adapter": "its conditions are not drawn",
    "image_encoder": "pictures are no prompts here (IP-Adapter)",
}
