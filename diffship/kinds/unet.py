"""What Stable Diffusion and SDXL have in common: a U-Net over pictures' latents, CLIP text encoders, one VAE.

LCM (guidance as an input of the U-Net) and inpainting (a mask beside the latents) are variants of both: which one a
model is, its U-Net's config says.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import UnsupportedError
from diffship.core.family import Family
from diffship.core.kind import Kind, Shape, Slot
from diffship.core.registry import kinds
from diffship.core.spec import TensorSpec
from diffship.kinds import stock
from diffship.kinds.stock import INDEX, Stock
from diffship.sampling.guidance import guidance_embedding
from diffship.sampling.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from diffship.models.parts.component import Component
    from diffship.models.pipeline import Material, Module
    from diffship.models.sources.ldm.checkpoint import Checkpoint

Config = Mapping[str, Any]
UNET = "UNet2DConditionModel"
LCM_CLASS, LCM_STEPS = "LatentConsistencyModelPipeline", 4
TEXT_TIME = "text_time"  # `addition_embed_type` of SDXL's U-Nets
FIRST_TEXT = Slot("text_encoder", ("CLIPTextModel",), "transformers", tokenizer="tokenizer")
UNET_SLOT = Slot("unet", (UNET,), shared=False)
VAE_SLOT = Slot("vae", ("AutoencoderKL", "AutoencoderTiny"), parts=("vae_encoder", "vae_decoder"))
_OPTIONAL = {"safety_checker", "feature_extractor", "image_encoder"}


class UNetKind(Kind):
    """A kind whose denoiser is a UNet2DConditionModel.

    classes: with their defaults and repairs. from_text: pipelines that take more than a prompt, and whose networks can
    be drawn from the prompt alone. plain_class, masks_class: what diffusers calls the pipeline of such a U-Net, and of
    one that fills masks. penultimate: whether text embeddings are the states before the encoders' last layer. zeros:
    whether a negative prompt that was not given is zeros, unless the model_index says otherwise. pooled_part: the
    encoder whose pooled states the U-Net takes. file_schedules: the published architecture whose scheduler a checkpoint
    in one file gets, by what its U-Net predicts; `""` of the rest.
    """

    denoiser, controlled = "unet", "unet_controlled"
    foreign = ("transformer", "text_encoder_3", "prior")
    encoder, decoder = VAE_SLOT.parts
    classes: ClassVar[Mapping[str, Stock]]
    from_text: ClassVar[tuple[str, ...]]
    plain_class: ClassVar[str]
    masks_class: ClassVar[str]
    penultimate: ClassVar[bool] = False
    zeros: ClassVar[bool] = False
    pooled_part: ClassVar[str | None] = None
    file_schedules: ClassVar[Mapping[str, str]]

    def conditions(self, family: Family) -> dict[str, Shape]:
        return {"encoder_hidden_states": (None, family.text_width)}

    def guidance_inputs(
        self, inputs: Sequence[TensorSpec], guidances: Sequence[float]
    ) -> dict[str, NDArray[np.float32]]:
        """LCM's embedding of guidance - 1, if the U-Net takes one."""
        widths = {spec.name: int(spec.shape[-1]) for spec in inputs if spec.name == "timestep_cond"}
        return {
            name: np.stack([guidance_embedding(guidance - 1.0, width) for guidance in guidances])
            for name, width in widths.items()
        }

    def tokenizer(self, folder: str, files: Mapping[str, bytes]) -> ClipTokenizer:
        return ClipTokenizer.from_files(files, folder)

    # ---- reading and building

    def recognises(self, modules: Mapping[str, Module]) -> bool:
        from diffship.models.parts.component import reading
        from diffship.models.sources.defaults import completed

        found = modules.get(self.denoiser)
        if found is None or found.class_name != UNET:
            return False
        with reading(self.denoiser, UNET):
            return self.draws(completed(UNET, found.config))

    def of_checkpoint(self, checkpoint: Checkpoint) -> Material | None:
        from diffship.models.pipeline import Material
        from diffship.models.sources.arch_configs import SCHEDULERS
        from diffship.models.sources.ldm import prediction, reading

        tensors = reading.find_unet(checkpoint)
        if tensors is None:
            return None
        told, why = prediction.prediction_of(checkpoint, tensors)
        modules = {self.denoiser: reading.unet_module(tensors, told)}
        if not self.recognises(modules):
            return None
        texts = self._texts_of(checkpoint)
        vae = reading.find_vae(checkpoint, self.vae_facts)
        modules |= texts | ({VAE_SLOT.folder: vae} if vae else {})
        own = SCHEDULERS[self.file_schedules.get(told, self.file_schedules[""])]
        where = str(checkpoint.path)
        return Material(
            source={"notes": [f"the U-Net predicts {told}: {why}; --prediction says another"]} if why else {},
            modules=modules,
            tokenizers={self.tokenizer_of(name): reading.tokenizer_of(module, where) for name, module in texts.items()},
            scheduler=self.scheduler_from(prediction.schedule(checkpoint, own, told), modules),
            index=self.new_index(modules),
        )

    def _texts_of(self, checkpoint: Checkpoint) -> dict[str, Module]:
        """The text encoders that a checkpoint in one file has, by folder."""
        from diffship.models.sources.ldm.reading import find_text

        found: dict[str, Module] = {}
        for folder, prefix in self.file_texts.items():
            projected = self.slot_of(folder).classes != FIRST_TEXT.classes
            text = find_text(checkpoint, prefix, projected, not self.penultimate)
            found |= {folder: text} if text else {}
        return found

    @abstractmethod
    def draws(self, unet: Config) -> bool:
        """Whether a U-Net of this config, completed, is one of this kind."""

    def missing(self, material: Material) -> list[str]:
        missing = [name for name in (self.denoiser, VAE_SLOT.folder) if name not in material.modules]
        texts = [slot for slot in self.text_slots if slot.folder in material.modules]
        if not texts:
            missing.append(FIRST_TEXT.folder)
        missing += [slot.tokenizer or "" for slot in texts or [FIRST_TEXT] if slot.tokenizer not in material.tokenizers]
        return missing if material.scheduler else [*missing, "scheduler"]

    def texts_fit(self, modules: Mapping[str, Module]) -> bool:
        """Whether the text encoders are together as wide as the U-Net wants."""
        from diffship.models.parts.unet import text_width

        texts = [modules[slot.folder].config for slot in self.text_slots if slot.folder in modules]
        if self.denoiser not in modules:
            return bool(texts)
        wanted = text_width(modules[self.denoiser].config)
        return sum(int(config.get("hidden_size", 512)) for config in texts) == wanted

    def scheduler_from(self, scheduler: Mapping[str, Any], modules: Mapping[str, Module]) -> dict[str, Any]:
        """That of the base; for a U-Net that takes guidance as an input (LCM), the LCM scheduler over its betas."""
        from diffship.models.sources.arch_configs import lcm_scheduler

        own = dict(scheduler)
        unet = modules[self.denoiser].config if self.denoiser in modules else {}
        if not unet.get("time_cond_proj_dim") or own.get("_class_name") == "LCMScheduler":
            return own
        return lcm_scheduler(own)

    def complete_tokenizer(self, slot: Slot, files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
        from diffship.models.sources.tokenizer_files import completed

        return completed(dict(files), where)

    def stock_class(self, index: Config, unet: Config) -> str:
        """The diffusers class, one of `classes`, whose pictures are drawn for this model_index and U-Net.

        Raises:
            UnsupportedError: the model_index names a class that does more, or that fills masks with a four-channel
                U-Net.
        """
        named, fitting = index.get("_class_name"), self.fitting(unet)
        alike = [kind for kind in kinds().values() if isinstance(kind, UNetKind)]
        if named is None or named == fitting or any(named in kind.from_text for kind in alike):
            return fitting
        known = [name for kind in alike for name in kind.classes]
        if named not in known:
            raise UnsupportedError(
                f"{INDEX}: _class_name is {str(named)[:80]!r}, which is not drawn here; legal: {', '.join(known)}. "
                f"If its U-Net draws as {fitting} does, write that name there"
            )
        if named.endswith("InpaintPipeline"):
            raise UnsupportedError(
                f"{INDEX}: _class_name is {named!r}, and in_channels of unet/config.json is "
                f"{unet.get('in_channels', 4)}: masks are filled by U-Nets of 9 channels. To draw from text alone, "
                f"write {fitting!r} there"
            )
        same_network = named in self.classes and self.masks_class not in (named, fitting)
        return str(named) if same_network else fitting

    def fitting(self, unet: Config) -> str:
        """The name of the diffusers class for a U-Net of this config."""
        return self.masks_class if unet.get("in_channels", 4) == 9 else self.plain_class

    def new_index(self, modules: Mapping[str, Module]) -> dict[str, Any]:
        return {"_class_name": self.fitting(modules[self.denoiser].config)}

    def repaired(self, material: Material) -> Material:
        from diffship.models.parts.component import reading
        from diffship.models.parts.unet import check_config
        from diffship.models.sources.defaults import completed

        given = material.modules
        modules = {name: replace(one, config=completed(one.class_name, one.config)) for name, one in given.items()}
        unet, vae = modules[self.denoiser], modules[VAE_SLOT.folder]
        with reading(self.denoiser, unet.class_name):
            check_config(unet.config)
            drawn = self.classes[self.stock_class(material.index, unet.config)]
        modules[self.denoiser] = replace(unet, config=stock.repaired_unet(drawn, unet.config))
        modules[VAE_SLOT.folder] = replace(
            vae, config=stock.repaired_vae(drawn, vae.config, given[VAE_SLOT.folder].config)
        )
        scheduler = stock.repaired_scheduler(drawn, _finite(material.scheduler or {}))
        return replace(material, modules=modules, scheduler=scheduler)

    def notes(self, material: Material) -> list[str]:
        name = self.stock_class(material.index, material.modules[self.denoiser].config)
        return stock.notes(material.index, name, self.from_text_everywhere())

    def from_text_everywhere(self) -> tuple[str, ...]:
        """Classes, of any U-Net kind, that take more than a prompt."""
        return tuple(name for kind in kinds().values() if isinstance(kind, UNetKind) for name in kind.from_text)

    def family(self, material: Material) -> Family:
        from diffship.kinds.facts import family_facts
        from diffship.models.pipeline import own_facts

        unet, index = material.modules[self.denoiser].config, material.index
        facts = family_facts(self, material)
        drawn = self.stock_class(index, unet)
        own, usual = own_facts(index), self.classes[drawn]
        steps = LCM_STEPS if unet.get("time_cond_proj_dim") else usual.steps  # whatever its class says
        return Family(
            name=self.name,
            force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", self.zeros)),
            guidance_default=float(own.get("guidance_default", usual.guidance)),
            steps_default=int(own.get("steps_default", steps)),
            strength_default=usual.strength,
            **facts,
        )

    def build(self, slot: Slot, module: Module, family: Family) -> tuple[Component, ...]:
        from diffship.models.parts.autoencoder import autoencoder
        from diffship.models.parts.clip import text_encoder
        from diffship.models.parts.component import reading
        from diffship.models.parts.unet import unet

        least = self.least_side(family)
        with reading(slot.folder, module.class_name):
            if slot == UNET_SLOT:
                return (unet(module.config, module.weights, least // family.vae_factor),)
            if slot == VAE_SLOT:
                return autoencoder(module.class_name, module.config, module.weights, least)
            return (text_encoder(slot.folder, module.class_name, module.config, module.weights, self.penultimate),)

    def with_controlnets(
        self, denoiser: Component, family: Family, modules: Mapping[str, Module]
    ) -> tuple[Component, ...]:
        from diffship.core.kind import CONTROLNET
        from diffship.models.parts.component import reading
        from diffship.models.parts.controlnet import controlled_unet, controlnet
        from diffship.models.sources.defaults import completed

        parts = [controlled_unet(denoiser, self.controlled)]
        for name, module in modules.items():
            part = f"{CONTROLNET}{name}"
            with reading(part, module.class_name):
                config = completed(module.class_name, module.config)
                parts.append(controlnet(part, config, module.weights, denoiser, family.vae_factor))
        return tuple(parts)

    def index(self, material: Material, family: Family) -> dict[str, Any]:
        index = {key: value for key, value in material.index.items() if not isinstance(value, list)}
        if "_class_name" not in index or set(material.source.get("left_out", ())) - _OPTIONAL:
            # its own class would miss what is left out
            index["_class_name"] = self.masks_class if family.unet_channels == 9 else self.plain_class
        for slot in self.slots:
            module = material.modules.get(slot.folder)
            index[slot.folder] = [slot.library, module.class_name] if module else [None, None]
            if slot.tokenizer:
                there = slot.tokenizer in material.tokenizers
                index[slot.tokenizer] = ["transformers", "CLIPTokenizer"] if there else [None, None]
        if family.fills_masks:  # diffusers asks such folders which version wrote them, and trips if none is named
            from importlib.metadata import version  # not above: a tenth of what `export --help` takes

            index.setdefault("_diffusers_version", version("diffusers"))
        index["scheduler"] = ["diffusers", (material.scheduler or {}).get("_class_name", "DDIMScheduler")]
        return index


def _finite(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Without what JSON cannot hold: diffusers writes `"lambda_min_clipped": -Infinity`, its default anyway."""
    return {key: value for key, value in scheduler.items() if not (isinstance(value, float) and math.isinf(value))}
