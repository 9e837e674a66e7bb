"""FLUX.2-klein: a transformer of double and single streams by flow matching, Qwen3 for the text, a VAE of 32 channels.

Source: diffusers' Flux2KleinPipeline (Black Forest Labs 2026), of which it draws from text alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.family import Family
from diffship.core.kind import Shape, Slot
from diffship.core.reading import PLAIN, Reading
from diffship.kinds.facts import require_rgb
from diffship.kinds.stock import Stock
from diffship.kinds.transformer import TransformerKind
from diffship.sampling.encode import require_text, run_encoder
from diffship.sampling.qwen_tokenizer import QwenTokenizer, require_fast
from diffship.sampling.solvers.flow import FlowSampler
from diffship.sampling.tokenizer import Tokenizer

if TYPE_CHECKING:
    from diffship.core.spec import TensorSpec
    from diffship.models.parts.component import Component
    from diffship.models.pipeline import Material, Module
    from diffship.sampling.model import Model
    from diffship.sampling.sampler import Sampler

Config = Mapping[str, Any]
Floats = NDArray[np.float32]
_CLASS, _DISTILLED = "Flux2Transformer2DModel", "is_distilled"
_TEXT = Slot("text_encoder", ("Qwen3ForCausalLM",), "transformers", tokenizer="tokenizer")
_TRANSFORMER = Slot("transformer", (_CLASS,), shared=False)
_VAE = Slot("vae", ("AutoencoderKLFlux2",), parts=("vae_encoder", "vae_decoder"))
_SIDE = 2  # latents of the VAE a side of one token
_THETA = 2000.0


class Flux2Klein(TransformerKind):
    """The latents of a picture are (4 channels of the VAE, height / 16, width / 16): two by two of the VAE's, each
    channel normalised by the statistics of its batch norm. One such place is one token of the transformer."""

    name = "flux2"
    slots = (_TEXT, _TRANSFORMER, _VAE)
    denoiser = _TRANSFORMER.folder
    encoder, decoder = _VAE.parts
    begins_with_images = False
    patch = 1
    foreign = ("unet", "prior", "text_encoder_2")
    plain_class: ClassVar[str] = "Flux2KleinPipeline"
    classes: ClassVar[Mapping[str, Stock]] = {plain_class: Stock(4.0, 50)}
    distilled: ClassVar[Stock] = Stock(1.0, 4)  # what its card draws with; the class has defaults for the other alone
    from_text: ClassVar[tuple[str, ...]] = ("Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline")

    # ---- drawing

    def sized(self, sampler: Sampler, latent_shape: Sequence[int], steps: int) -> Sampler:
        if not isinstance(sampler, FlowSampler):
            return super().sized(sampler, latent_shape, steps)
        made = replace(sampler, last_level=1.0 / steps)
        if not made.use_dynamic_shifting:
            return made
        return replace(made, mu=empirical_shift(self.tokens(latent_shape), steps))

    def pack_latents(self, latents: Any) -> Any:
        return latents.reshape(latents.shape[0], -1).swapaxes(0, 1)

    def unpack_output(self, rows: Any, latent_shape: Sequence[int]) -> Any:
        return rows.swapaxes(1, 2).reshape(-1, *latent_shape)

    def decoder_factor(self, family: Family) -> int:
        return family.vae_factor // _SIDE

    def decoder_latents(self, family: Family, latents: Floats) -> Floats:
        mean, deviation = (_by_channel(numbers) for numbers in (family.latents_mean, family.latents_std))
        samples, channels, height, width = latents.shape
        parts = (latents * deviation + mean).reshape(samples, -1, _SIDE, _SIDE, height, width)
        placed = parts.transpose(0, 1, 4, 2, 5, 3)
        return placed.reshape(samples, channels // _SIDE**2, height * _SIDE, width * _SIDE)

    def axis_sizes(self, family: Family, width: int, height: int) -> dict[str, int]:
        return {"image_tokens": self.tokens(self.latent_shape(family, width, height))}

    def picture_size(self, family: Family, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Of the pictures with so many tokens, the one nearest to a square that is not higher than wide."""
        tokens = sizes["image_tokens"]
        height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
        return tokens // height * family.vae_factor, height * family.vae_factor

    def axis_steps(self, family: Family) -> dict[str, int]:
        return {}

    def conditions(self, family: Family) -> dict[str, Shape]:
        return {"encoder_hidden_states": (None, family.text_width)}

    def encode(
        self,
        model: Model,
        prompt: str,
        size: tuple[int, int],
        negative: bool = False,
        reading: Reading = PLAIN,
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        (part,) = require_text(model)
        if reading != PLAIN:
            raise UnsupportedError(
                f"prompt syntax and clip-skip are for text encoders of CLIP, and that of {model.name} is Qwen3: "
                "write the prompt without weights, and leave --clip-skip out"
            )
        made = run_encoder(model, part, prompt, output="prompt_embeds")
        return {"encoder_hidden_states": made.states}, made.warnings

    def position_inputs(
        self, inputs: Sequence[TensorSpec], latent_shape: Sequence[int], condition: Mapping[str, Any]
    ) -> dict[str, Floats]:
        """Cosines and sines of the rotary embeddings, for the tokens of the picture and for those of the text."""
        found: dict[str, Floats] = {}
        for spec in inputs:
            side, _, wave = spec.name.partition("_rope_")
            if wave:
                texts = side == "text"
                places = (
                    text_places(condition["encoder_hidden_states"].shape[0]) if texts else image_places(latent_shape)
                )
                turns = rope_angles(places, int(spec.shape[-1]))
                found[spec.name] = (np.cos(turns) if wave == "cos" else np.sin(turns)).astype(np.float32)
        return found

    def tokenizer(self, folder: str, files: Mapping[str, bytes]) -> Tokenizer:
        return QwenTokenizer.from_files(files, folder)

    # ---- reading and building

    def complete_tokenizer(self, slot: Slot, files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
        from diffship.models.sources.qwen_files import require_template

        require_fast(files, where)
        require_template(files, where)
        return dict(files)

    def new_index(self, modules: Mapping[str, Module]) -> dict[str, Any]:
        return {"_class_name": self.plain_class, _DISTILLED: True}

    def family(self, material: Material) -> Family:
        from diffship.models.parts.autoencoder import latent_statistics, vae_factor
        from diffship.models.parts.component import reading
        from diffship.models.pipeline import own_facts
        from diffship.sampling.samplers import require_noise

        configs = {name: module.config for name, module in material.modules.items()}
        distilled = material.index.get(_DISTILLED, False)
        own, usual = own_facts(material.index), self.distilled if distilled else self.classes[self.plain_class]
        transformer, vae = configs[self.denoiser], material.modules[_VAE.folder]
        with reading("transformer, VAE and text encoder", "pipeline"):
            require_noise(material.scheduler or {}, "flow")
            require_rgb(vae.config)
            factor = vae_factor(vae.class_name, vae.config) * _SIDE
            text = _text_width(configs[_TEXT.folder])
            _check_widths(transformer, vae.config, text)
            mean, deviation = latent_statistics(vae.config, vae.weights)
            channels = int(transformer["in_channels"])
            return Family(
                name=self.name,
                latent_channels=channels,
                unet_channels=channels,
                vae_factor=factor,
                size_step=factor,
                default_size=min(int(vae.config["sample_size"]), 1024),
                scaling_factor=1.0,
                prediction_type="flow",
                text_width=text,
                guidance_default=float(own.get("guidance_default", usual.guidance)),
                steps_default=int(own.get("steps_default", usual.steps)),
                guided=not distilled,
                latents_mean=mean,
                latents_std=deviation,
            )

    def build(self, slot: Slot, module: Module, family: Family) -> tuple[Component, ...]:
        from diffship.models.parts.autoencoder import autoencoder
        from diffship.models.parts.component import reading
        from diffship.models.parts.flux2 import flux2_transformer
        from diffship.models.parts.qwen3 import qwen3_encoder

        least = self.least_side(family)
        with reading(slot.folder, module.class_name):
            if slot == _TRANSFORMER:
                return (
                    flux2_transformer(slot.folder, module.config, module.weights, (least // family.vae_factor) ** 2),
                )
            if slot == _VAE:
                return autoencoder(module.class_name, module.config, module.weights, least)
            return (qwen3_encoder(slot.folder, module.config, module.weights),)

    def index(self, material: Material, family: Family) -> dict[str, Any]:
        index = {key: value for key, value in material.index.items() if not isinstance(value, list)}
        index |= {"_class_name": self.plain_class, _DISTILLED: not family.guided}
        for slot in self.slots:
            index[slot.folder] = [slot.library, slot.classes[0]]
            if slot.tokenizer:
                index[slot.tokenizer] = [slot.library, "Qwen2TokenizerFast"]
        index["scheduler"] = ["diffusers", (material.scheduler or {})["_class_name"]]
        return index


def empirical_shift(tokens: int, steps: int) -> float:
    """The logarithm of the shift towards noise for a picture of so many tokens, as diffusers' `compute_empirical_mu`.

    Two lines over the tokens were fitted, for 10 steps and for 200; other numbers of steps lie on the line between, and
    from 4300 tokens on the second line holds for all.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190.0 * (steps - 200)


def image_places(latent_shape: Sequence[int]) -> NDArray[np.float64]:
    """Where each token of a picture stands, row by row: (tokens, 4), as time, row, column and place in a text."""
    _, height, width = latent_shape
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    nothing = np.zeros(height * width)
    return np.stack([nothing, rows.ravel(), columns.ravel(), nothing], axis=1).astype(np.float64)


def text_places(tokens: int) -> NDArray[np.float64]:
    """As `image_places`, of the tokens of a text."""
    places = np.zeros((tokens, 4))
    places[:, 3] = np.arange(tokens)
    return places


def rope_angles(places: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """By how much each value of a head is turned, radians, (tokens, width): Su et al. 2021, equation 15, theta 2000.

    A quarter of the head belongs to each of the four coordinates; neighbouring values are turned together.
    """
    each = width // places.shape[1]
    frequencies = 1.0 / _THETA ** (np.arange(0, each, 2, dtype=np.float64) / each)
    turns = places[:, :, None] * frequencies
    return np.repeat(turns.reshape(len(places), -1), 2, axis=1)


def _by_channel(numbers: tuple[float, ...] | None) -> Floats:
    if numbers is None:
        raise SourceError("the model has no statistics of its latents (latents_mean, latents_std): export it again")
    return np.array(numbers, np.float32)[None, :, None, None]


def _text_width(config: Config) -> int:
    from diffship.models.parts.qwen3 import Taps

    return len(Taps.of(config).layers) * int(config["hidden_size"])


def _check_widths(transformer: Config, vae: Config, text: int) -> None:
    if int(transformer["joint_attention_dim"]) != text:
        raise SourceError(
            f"the transformer takes text {transformer['joint_attention_dim']} wide, three layers of text_encoder are "
            f"{text}: not one family"
        )
    if list(vae.get("patch_size") or ()) != [_SIDE, _SIDE]:
        raise UnsupportedError(f"vae/config.json: patch_size is {str(vae.get('patch_size'))[:40]}; legal is [2, 2]")
    wanted = _SIDE**2 * int(vae["latent_channels"])
    for key in ("in_channels", "out_channels"):
        if (transformer.get(key) or transformer["in_channels"]) != wanted:
            raise SourceError(
                f"transformer/config.json: {key} is {str(transformer[key])[:40]}; legal is {wanted}, four times the "
                "latent_channels of vae/config.json"
            )
