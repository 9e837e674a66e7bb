"""What the pipeline classes of diffusers do beside scheduler, tokenizer and network: their defaults and repairs.

`docs/stock.md` lists all of it. Source: `__init__` and `__call__` of the classes in diffusers 0.42.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffship.core.errors import UnsupportedError
from diffship.models.parts.unet import text_time_widths

Config = Mapping[str, Any]
INDEX = "model_index.json"


@dataclass(frozen=True)
class Stock:
    """What one class draws with where its caller says nothing, and which old configs it repairs.

    `scheduler` holds the keys that the class overwrites in scheduler_config.json. `sample_size` says whether it reads a
    `sample_size` below 64 of a U-Net from before diffusers 0.9 as 64.
    """

    guidance: float
    steps: int
    strength: float = 1.0
    scheduler: tuple[tuple[str, Any], ...] = ()
    sample_size: bool = False


_OFFSET = ("steps_offset", 1)
CLASSES = {
    "StableDiffusionPipeline": Stock(7.5, 50, scheduler=(_OFFSET, ("clip_sample", False)), sample_size=True),
    "StableDiffusionInpaintPipeline": Stock(7.5, 50, scheduler=(_OFFSET, ("skip_prk_steps", True)), sample_size=True),
    "StableDiffusionXLPipeline": Stock(5.0, 50),
    "StableDiffusionXLInpaintPipeline": Stock(7.5, 50, strength=0.9999),
    "StableDiffusionXLImg2ImgPipeline": Stock(5.0, 50),
    "LatentConsistencyModelPipeline": Stock(8.5, 4),
}
# These take an image or a control beside the prompt. Their networks can be drawn from the prompt alone.
_FROM_TEXT = (
    *("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline", "LatentConsistencyModelImg2ImgPipeline"),
    *("StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline"),
    *("StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetImg2ImgPipeline"),
    *("StableDiffusionControlNetInpaintPipeline", "StableDiffusionXLControlNetInpaintPipeline"),
    *("StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"),
)
_LCM_STEPS = 4
_DATED = re.compile(r"(\d+)\.(\d+)")


def stock_class(index: Config, unet: Config) -> str:
    """The diffusers class, one of CLASSES, whose pictures are drawn here for this model_index and U-Net.

    Raises:
        UnsupportedError: the model_index names a class that does more, or that fills masks with a four-channel U-Net.
    """
    named, fitting = index.get("_class_name"), _fitting(unet)
    if named is None or named == fitting or named in _FROM_TEXT:
        return fitting
    if named not in CLASSES:
        raise UnsupportedError(
            f"{INDEX}: _class_name is {str(named)[:80]!r}, which is not drawn here; legal: {', '.join(CLASSES)}. "
            f"If its U-Net draws as {fitting} does, write that name there"
        )
    if named.endswith("InpaintPipeline"):
        raise UnsupportedError(
            f"{INDEX}: _class_name is {named!r}, and in_channels of unet/config.json is {unet.get('in_channels', 4)}: "
            f"masks are filled by U-Nets of 9 channels. To draw from text alone, write {fitting!r} there"
        )
    both_sd = fitting in _SAME and named in _SAME
    return str(named) if both_sd else fitting


_SAME = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")  # one kind of network


def _fitting(unet: Config) -> str:
    masks = unet.get("in_channels", 4) == 9
    if unet.get("addition_embed_type") == "text_time":
        if text_time_widths(unet)[1] == 5:
            return "StableDiffusionXLImg2ImgPipeline"
        return "StableDiffusionXLInpaintPipeline" if masks else "StableDiffusionXLPipeline"
    if masks:
        return "StableDiffusionInpaintPipeline"
    return "LatentConsistencyModelPipeline" if unet.get("time_cond_proj_dim") else "StableDiffusionPipeline"


def default_steps(name: str, unet: Config) -> int:
    """Steps of the class; 4 for every U-Net that takes guidance as an embedding (LCM), whatever its class says."""
    return _LCM_STEPS if unet.get("time_cond_proj_dim") else CLASSES[name].steps


def repaired_scheduler(name: str, scheduler: Config) -> dict[str, Any]:
    """`scheduler` with the keys that the class `name` overwrites, also for the samplers that are made of it later."""
    return {**scheduler, **dict(CLASSES[name].scheduler)} if scheduler else {}


def repaired_unet(name: str, unet: Config) -> dict[str, Any]:
    """`unet` with `sample_size` 64 where the class `name` does not believe the one of a config before diffusers 0.9."""
    size, dated = unet.get("sample_size"), _DATED.match(str(unet.get("_diffusers_version", "")))
    old = dated is not None and (int(dated[1]), int(dated[2])) < (0, 9)
    small = isinstance(size, int) and size < 64
    return {**unet, "sample_size": 64} if CLASSES[name].sample_size and old and small else dict(unet)


def repaired_vae(name: str, vae: Config, given: Config) -> dict[str, Any]:
    """`vae` with `force_upcast` off where it was not `given`: the SD pipelines never ask for it, those of SDXL do."""
    return dict(vae) if "XL" in name or "force_upcast" in given else {**vae, "force_upcast": False}


def notes(index: Config, name: str) -> list[str]:
    """What the folder asks for and is not done here, a sentence each, for the reader of the log and the card."""
    told = []
    named = index.get("_class_name")
    if named in _FROM_TEXT and named != name:
        told.append(f"{INDEX} names {named}, which takes an image or a control: drawn as {name}, from the prompt alone")
    for part, what in _LEFT_OUT.items():
        if listed(index, part):
            told.append(f"left out: {part} of {INDEX}; {what}")
    if index.get("add_watermarker"):
        told.append(f"left out: add_watermarker of {INDEX}; pictures get no invisible watermark")
    return told


def listed(index: Config, name: str) -> bool:
    """Whether a model_index has a component of this name."""
    entry = index.get(name)
    return isinstance(entry, list) and entry != [None, None]


_LEFT_OUT = {
    "safety_checker": "pictures are not looked at before they are saved",
    "controlnet": "its conditions are not drawn",
    "adapter": "its conditions are not drawn",
    "image_encoder": "pictures are no prompts here (IP-Adapter)",
}
