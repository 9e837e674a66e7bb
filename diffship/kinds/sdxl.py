"""SDXL and its refiner, with their LCM and inpainting variants: two CLIP text encoders, pooled text, sizes as input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffship.core.kind import Shape, Slot
from diffship.core.reading import PLAIN, Reading
from diffship.kinds.stock import Stock
from diffship.kinds.unet import FIRST_TEXT, TEXT_TIME, UNET_SLOT, VAE_SLOT, UNetKind
from diffship.sampling.encode import require_text, run_encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diffship.core.family import Family
    from diffship.models.pipeline import Module
    from diffship.sampling.model import Model

_SECOND_TEXT = Slot(
    "text_encoder_2",
    ("CLIPTextModelWithProjection",),
    "transformers",
    tokenizer="tokenizer_2",
    aliases=("CLIPTextModel",),  # training scripts save it under its base class
)
_EMBEDDERS = "conditioner.embedders."  # of generative-models, in the order in which it lists them
_IMAGE_CLASS = "StableDiffusionXLImg2ImgPipeline"
_AESTHETIC = (6.0, 2.5)  # the refiner's score for the positive and the negative prompt, as diffusers has them


class StableDiffusionXl(UNetKind):
    """Podell et al. 2023 (arXiv 2307.01952). The U-Net takes the states before the encoders' last layer side by side,
    the pooled states of the second encoder, and the picture's size, crop and target size as numbers."""

    name = "sdxl"
    slots = (FIRST_TEXT, _SECOND_TEXT, UNET_SLOT, VAE_SLOT)
    condition_names = ("encoder_hidden_states", "text_embeds", "time_ids")
    exact_conditions = ("time_ids",)
    penultimate, zeros, pooled_part = True, True, _SECOND_TEXT.folder
    plain_class, masks_class = "StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"
    classes: ClassVar[Mapping[str, Stock]] = {
        plain_class: Stock(5.0, 50, upcasts=True),
        masks_class: Stock(7.5, 50, strength=0.9999, upcasts=True),
    }
    from_text: ClassVar[tuple[str, ...]] = (
        *(_IMAGE_CLASS, "StableDiffusionXLAdapterPipeline"),
        *("StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetImg2ImgPipeline"),
        "StableDiffusionXLControlNetInpaintPipeline",
    )
    file_texts: ClassVar[Mapping[str, str]] = {
        FIRST_TEXT.folder: f"{_EMBEDDERS}0.",
        _SECOND_TEXT.folder: f"{_EMBEDDERS}1.",
    }
    file_schedules: ClassVar[Mapping[str, str]] = {"": "sdxl"}
    vae_facts: ClassVar[Mapping[str, Any]] = {"scaling_factor": 0.13025, "force_upcast": True}
    image_strength, mask_strength = 0.3, 0.9999
    time_ids: ClassVar[int] = 6
    options: ClassVar[Mapping[str, Any]] = {"force_zeros_for_empty_prompt": True}

    def conditions(self, family: Family) -> dict[str, Shape]:
        return {
            "encoder_hidden_states": (None, family.text_width),
            "text_embeds": (family.pooled_width,),
            "time_ids": (family.time_ids,),
        }

    def encode(
        self,
        model: Model,
        prompt: str,
        size: tuple[int, int],
        negative: bool = False,
        reading: Reading = PLAIN,
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        states, pooled, warnings = [], None, []
        for part in require_text(model):
            made = run_encoder(model, part, prompt, reading, penultimate=True)
            states.append(made.states)
            pooled = made["text_embeds"] if "text_embeds" in made.outputs else pooled
            warnings += [warning for warning in made.warnings if warning not in warnings]
        arrays = {"encoder_hidden_states": np.concatenate(states, -1)}
        if pooled is not None:
            arrays["text_embeds"] = pooled
        return {**arrays, **self.size_conditions(size, negative)}, tuple(warnings)

    def without_prompt(
        self, model: Model, positive: Mapping[str, Any], size: tuple[int, int]
    ) -> Mapping[str, Any] | None:
        """Zeros, of the text and not of the sizes, if the family says so."""
        if not model.family.force_zeros_for_empty_prompt:
            return None
        zeros = {name: np.zeros_like(array) for name, array in positive.items()}
        return {**zeros, **self.size_conditions(size, negative=True)}

    def size_conditions(self, size: tuple[int, int], negative: bool = False) -> dict[str, NDArray[np.float32]]:
        """`time_ids`: (height, width, crop top, crop left, target height, target width) of a whole picture."""
        width, height = size
        return {"time_ids": np.array([height, width, 0, 0, height, width], np.float32)}

    def draws(self, unet: Mapping[str, Any]) -> bool:
        from diffship.models.parts.unet import text_time_widths

        return unet.get("addition_embed_type") == TEXT_TIME and text_time_widths(unet)[1] == self.time_ids

    def new_index(self, modules: Mapping[str, Module]) -> dict[str, Any]:
        return {**super().new_index(modules), **self.options}


class Refiner(StableDiffusionXl):
    """SDXL's refiner: the second text encoder alone, and an aesthetic score in place of the target size."""

    name = "sdxl-refiner"
    plain_class = masks_class = _IMAGE_CLASS
    classes: ClassVar[Mapping[str, Stock]] = {_IMAGE_CLASS: Stock(5.0, 50, upcasts=True)}
    from_text: ClassVar[tuple[str, ...]] = ()
    file_texts: ClassVar[Mapping[str, str]] = {_SECOND_TEXT.folder: f"{_EMBEDDERS}0."}
    time_ids: ClassVar[int] = 5
    options: ClassVar[Mapping[str, Any]] = {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}

    def size_conditions(self, size: tuple[int, int], negative: bool = False) -> dict[str, NDArray[np.float32]]:
        """`time_ids`: (height, width, crop top, crop left, aesthetic score)."""
        width, height = size
        return {"time_ids": np.array([height, width, 0, 0, _AESTHETIC[negative]], np.float32)}
