"""Stable Diffusion 1 and 2, with their LCM and inpainting variants: one CLIP text encoder, its last states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffship.core.reading import PLAIN, Reading
from diffship.kinds.stock import Stock
from diffship.kinds.unet import FIRST_TEXT, LCM_CLASS, LCM_STEPS, TEXT_TIME, UNET_SLOT, VAE_SLOT, UNetKind
from diffship.sampling.encode import require_text, run_encoder

if TYPE_CHECKING:
    from diffship.core.family import Family
    from diffship.models.pipeline import Material
    from diffship.sampling.model import Model

_OFFSET = ("steps_offset", 1)


class StableDiffusion(UNetKind):
    """Rombach et al. 2022 (arXiv 2112.10752); LCM: Luo et al. 2023 (arXiv 2310.04378)."""

    name = "sd"
    slots = (FIRST_TEXT, UNET_SLOT, VAE_SLOT)
    plain_class, masks_class = "StableDiffusionPipeline", "StableDiffusionInpaintPipeline"
    classes: ClassVar[Mapping[str, Stock]] = {
        plain_class: Stock(7.5, 50, scheduler=(_OFFSET, ("clip_sample", False)), sample_size=True),
        masks_class: Stock(7.5, 50, scheduler=(_OFFSET, ("skip_prk_steps", True)), sample_size=True),
        LCM_CLASS: Stock(8.5, LCM_STEPS),
    }
    file_texts: ClassVar[Mapping[str, str]] = {FIRST_TEXT.folder: "cond_stage_model."}
    file_schedules: ClassVar[Mapping[str, str]] = {"": "sd15", "v_prediction": "sd21"}
    vae_facts: ClassVar[Mapping[str, Any]] = {"scaling_factor": 0.18215}
    from_text = (
        *("StableDiffusionImg2ImgPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        *("StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline"),
        *("StableDiffusionControlNetInpaintPipeline", "StableDiffusionAdapterPipeline"),
    )

    def encode(
        self,
        model: Model,
        prompt: str,
        size: tuple[int, int],
        negative: bool = False,
        reading: Reading = PLAIN,
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        (part,) = require_text(model)
        made = run_encoder(model, part, prompt, reading)
        return {"encoder_hidden_states": made.states}, made.warnings

    def without_prompt(
        self, model: Model, positive: Mapping[str, Any], size: tuple[int, int]
    ) -> Mapping[str, Any] | None:
        if not model.family.force_zeros_for_empty_prompt:
            return None
        return {name: np.zeros_like(array) for name, array in positive.items()}

    def draws(self, unet: Mapping[str, Any]) -> bool:
        return unet.get("addition_embed_type") != TEXT_TIME

    def fitting(self, unet: Mapping[str, Any]) -> str:
        found = super().fitting(unet)
        return LCM_CLASS if found == self.plain_class and unet.get("time_cond_proj_dim") else found

    def few_steps_index(self, family: Family) -> dict[str, Any]:
        return {"_class_name": LCM_CLASS} if family.time_cond_dim else {}

    def index(self, material: Material, family: Family) -> dict[str, Any]:
        index = super().index(material, family)
        index.update(safety_checker=[None, None], feature_extractor=[None, None], requires_safety_checker=False)
        return index
