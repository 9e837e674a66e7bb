"""Stable Diffusion 3 and 3.5: an MMDiT by flow matching, two CLIP encoders with projection, and a T5 that may lack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.family import Family
from diffship.core.kind import Shape, Slot
from diffship.core.limits import LIMITS
from diffship.core.reading import PLAIN, Reading
from diffship.kinds.facts import require_rgb
from diffship.kinds.stock import Stock
from diffship.kinds.transformer import TransformerKind
from diffship.kinds.unet import VAE_SLOT
from diffship.sampling.encode import run_encoder
from diffship.sampling.t5_tokenizer import LENGTH, T5Tokenizer, require_fast
from diffship.sampling.tokenizer import ClipTokenizer, Tokenizer

if TYPE_CHECKING:
    from diffship.models.parts.component import Component
    from diffship.models.pipeline import Material, Module
    from diffship.sampling.model import Model

Config = Mapping[str, Any]
_CLASS, _PROJECTED = "SD3Transformer2DModel", ("CLIPTextModelWithProjection",)
_CLIP = Slot("text_encoder", _PROJECTED, "transformers", tokenizer="tokenizer")
_CLIP_2 = replace(_CLIP, folder="text_encoder_2", tokenizer="tokenizer_2")
_T5 = Slot("text_encoder_3", ("T5EncoderModel",), "transformers", tokenizer="tokenizer_3")
_TRANSFORMER = Slot("transformer", (_CLASS,), shared=False)
_CLIPS = (_CLIP, _CLIP_2)
_TOKENIZERS = {_T5.folder: "T5TokenizerFast"}


class StableDiffusion3(TransformerKind):
    """Esser et al. 2024 (arXiv 2403.03206), with the conditioning of diffusers' StableDiffusion3Pipeline.

    The text is 77 tokens of both CLIP encoders side by side (the states before their last layers), filled up with
    zeros to the width of T5's states, and then 256 tokens of T5. A model without T5 reads zeros in place of those 256.
    The pooled text is that of both CLIP encoders side by side.
    """

    name = "sd3"
    slots = (_CLIP, _CLIP_2, _T5, _TRANSFORMER, VAE_SLOT)
    denoiser = _TRANSFORMER.folder
    encoder, decoder = VAE_SLOT.parts
    condition_names = ("encoder_hidden_states", "pooled_projections")
    image_strength, mask_strength = 0.6, 0.6
    foreign = ("unet", "prior")
    vae_facts: ClassVar[Mapping[str, Any]] = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True}
    plain_class: ClassVar[str] = "StableDiffusion3Pipeline"
    classes: ClassVar[Mapping[str, Stock]] = {plain_class: Stock(7.0, 28)}
    from_text: ClassVar[tuple[str, ...]] = (
        *("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        *("StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetInpaintingPipeline"),
    )

    other_class = f". If its transformer draws as {plain_class} does, write that name there"

    # ---- drawing

    def conditions(self, family: Family) -> dict[str, Shape]:
        return {"encoder_hidden_states": (None, family.text_width), "pooled_projections": (family.pooled_width,)}

    def encode(
        self,
        model: Model,
        prompt: str,
        size: tuple[int, int],
        negative: bool = False,
        reading: Reading = PLAIN,
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        _require_clips(model)
        _require_plain(reading)
        states, pooled, told = [], [], {}
        for slot in _CLIPS:
            made = run_encoder(model, slot.folder, prompt, reading, penultimate=True)
            states.append(made.states)
            pooled.append(made["text_embeds"])
            told[slot.folder] = made.warnings
        short = np.concatenate(states, -1)
        room = model.family.text_width - short.shape[-1]
        long, told[_T5.folder] = _long_text(model, prompt)
        text = np.concatenate([np.pad(short, ((0, 0), (0, room))), long])
        return {"encoder_hidden_states": text, "pooled_projections": np.concatenate(pooled, -1)}, _joined(told)

    def tokenizer(self, folder: str, files: Mapping[str, bytes]) -> Tokenizer:
        reader: Any = T5Tokenizer if folder == _T5.tokenizer else ClipTokenizer
        made: Tokenizer = reader.from_files(files, folder)
        return made

    # ---- reading and building

    def needed(self, material: Material) -> list[Slot]:
        """All but T5; that too if the model_index has it, for the picture would silently be another one."""
        from diffship.models.pipeline import listed

        return [slot for slot in self.slots if slot != _T5 or listed(material.index, slot.folder)]

    def texts_fit(self, modules: Mapping[str, Module]) -> bool:
        """Whether both CLIP encoders are there: a model that has them and no T5 is meant so."""
        return all(slot.folder in modules for slot in _CLIPS)

    def complete_tokenizer(self, slot: Slot, files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
        from diffship.models.sources.tokenizer_files import completed

        if slot != _T5:
            return completed(dict(files), where)
        require_fast(files, where)
        return dict(files)

    def new_index(self, modules: Mapping[str, Module]) -> dict[str, Any]:
        return {"_class_name": self.plain_class}

    def family(self, material: Material) -> Family:
        from diffship.models.parts.autoencoder import scaling_factor, vae_factor
        from diffship.models.parts.component import reading
        from diffship.models.pipeline import own_facts

        configs = {name: module.config for name, module in material.modules.items()}
        own, usual = own_facts(material.index), self.classes[self.plain_class]
        transformer, vae, vae_class = configs[self.denoiser], configs["vae"], material.modules["vae"].class_name
        with reading("transformer, VAE and text encoders", "pipeline"):
            factor, patch = vae_factor(vae_class, vae), int(transformer["patch_size"])
            _check_scheduler(material.scheduler or {})
            _check_latents(transformer, vae)
            _check_texts(transformer, configs)
            _check_places(transformer, factor)
            return Family(
                name=self.name,
                latent_channels=int(vae["latent_channels"]),
                unet_channels=int(transformer["in_channels"]),
                vae_factor=factor,
                size_step=factor * patch,
                default_size=int(transformer["sample_size"]) * factor,
                scaling_factor=scaling_factor(vae_class, vae),
                shift_factor=float(vae.get("shift_factor") or 0.0),
                prediction_type="flow",
                text_width=int(transformer["joint_attention_dim"]),
                pooled_width=int(transformer["pooled_projection_dim"]),
                guidance_default=float(own.get("guidance_default", usual.guidance)),
                steps_default=int(own.get("steps_default", usual.steps)),
            )

    def build(self, slot: Slot, module: Module, family: Family) -> tuple[Component, ...]:
        from diffship.models.parts.autoencoder import autoencoder
        from diffship.models.parts.clip import text_encoder
        from diffship.models.parts.component import reading
        from diffship.models.parts.sd3 import sd3_transformer
        from diffship.models.parts.t5 import t5_encoder

        least = self.least_side(family)
        with reading(slot.folder, module.class_name):
            if slot == _TRANSFORMER:
                return (sd3_transformer(module.config, module.weights, least // family.vae_factor),)
            if slot == VAE_SLOT:
                return autoencoder(module.class_name, module.config, module.weights, least)
            if slot == _T5:
                return (t5_encoder(slot.folder, module.config, module.weights),)
            return (text_encoder(slot.folder, module.class_name, module.config, module.weights, hidden_states=True),)

    def index(self, material: Material, family: Family) -> dict[str, Any]:
        index = {key: value for key, value in material.index.items() if not isinstance(value, list)}
        index["_class_name"] = self.plain_class  # the others would miss what is left out
        for slot in self.slots:
            module = material.modules.get(slot.folder)
            index[slot.folder] = [slot.library, module.class_name] if module else [None, None]
            if slot.tokenizer:
                named = _TOKENIZERS.get(slot.folder, "CLIPTokenizer")
                index[slot.tokenizer] = ["transformers", named] if module else [None, None]
        index["scheduler"] = ["diffusers", (material.scheduler or {})["_class_name"]]
        return index


def _require_clips(model: Model) -> None:
    lacking = [slot.folder for slot in _CLIPS if slot.folder not in model.parts]
    if lacking:
        raise UnsupportedError(
            f"{model.name} has no {' and no '.join(lacking)}; export it with --parts {','.join(lacking)}, "
            "or pass --base"
        )


def _require_plain(reading: Reading) -> None:
    """Weights scale the states of CLIP; of a text that T5 reads beside it, nobody has said what they should do."""
    if reading.syntax != PLAIN.syntax:
        raise UnsupportedError(
            f"prompt syntax {reading.syntax} is for models whose text encoders are all CLIP (SD1, SD2, SDXL), and this "
            "is Stable Diffusion 3. Write the prompt without weights: --prompt-syntax plain"
        )


def _long_text(model: Model, prompt: str) -> tuple[Any, tuple[str, ...]]:
    """T5's states of a prompt, float32 (256, text width), or zeros of this shape; and warnings."""
    if _T5.folder in model.parts:
        made = run_encoder(model, _T5.folder, prompt)
        return made.states, made.warnings
    left_out = (f"the model has a tokenizer for it and not the part: drawn without {_T5.folder}",)
    told = left_out if _T5.tokenizer in model.tokenizers else ()
    return np.zeros((LENGTH, model.family.text_width), np.float32), told


def _joined(told: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Each warning once, after the encoders that it is for."""
    of: dict[str, list[str]] = {}
    for part, warnings in told.items():
        for warning in warnings:
            of.setdefault(warning, []).append(part)
    return tuple(f"{', '.join(parts)}: {warning}" for warning, parts in of.items())


def _check_scheduler(scheduler: Config) -> None:
    from diffship.sampling.samplers import require_noise

    require_noise(scheduler, "flow")


def _check_latents(transformer: Config, vae: Config) -> None:
    for key in ("latents_mean", "latents_std"):
        if vae.get(key):
            raise UnsupportedError(
                f"vae/config.json: {key} is {str(vae[key])[:60]}; only latents that are scaled and shifted by one "
                "number each (scaling_factor, shift_factor) are drawn with"
            )
    require_rgb(vae)
    for key in ("in_channels", "out_channels"):
        if (transformer.get(key) or transformer["in_channels"]) != vae["latent_channels"]:
            raise SourceError(
                f"transformer/config.json: {key} is {str(transformer[key])[:60]}; legal is {vae['latent_channels']}, "
                "the latent_channels of vae/config.json"
            )


def _check_texts(transformer: Config, configs: Mapping[str, Config]) -> None:
    clips = [configs[slot.folder] for slot in _CLIPS]
    wide, pooled = (sum(int(config[key]) for config in clips) for key in ("hidden_size", "projection_dim"))
    text, wanted = int(transformer["joint_attention_dim"]), int(transformer["pooled_projection_dim"])
    if wide > text:
        raise SourceError(f"the transformer takes text {text} wide, the CLIP encoders give {wide}: not one family")
    if pooled != wanted:
        raise SourceError(f"the transformer takes pooled text {wanted} wide, the CLIP encoders give {pooled}")
    given = int(configs[_T5.folder]["d_model"]) if _T5.folder in configs else text
    if given != text:
        raise SourceError(f"the transformer takes text {text} wide, {_T5.folder} gives {given}: not one family")


def _check_places(transformer: Config, factor: int) -> None:
    """Every picture that may be asked for reads a window of the table of positions, so the table has to be as large."""
    most, patch = LIMITS.size_px[1], int(transformer["patch_size"])
    if int(transformer["pos_embed_max_size"]) * patch * factor < most:
        raise UnsupportedError(
            f"transformer/config.json: pos_embed_max_size is {transformer['pos_embed_max_size']}; legal is "
            f"{-(-most // (patch * factor))} or more, for pictures of up to {most} pixels a side"
        )
