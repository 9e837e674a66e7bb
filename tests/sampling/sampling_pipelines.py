"""Tiny random diffusers pipelines, and the least Model that wraps one: torch runs, numpy goes in and out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffship.core.family import Family
from diffship.core.runner import Handle
from diffship.core.spec import TensorSpec
from diffship.models.sources.tokenizer_files import clip_files
from diffship.sampling.tokenizer import ClipTokenizer

SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
}
WIDTH = 16


class Runs:
    """A function of torch tensors as a Runner."""

    def __init__(self, inputs: list[str], outputs: list[str], function: Callable[..., Mapping[str, Any]]) -> None:
        width = {"timestep_cond": 256}
        self.inputs = tuple(TensorSpec(name, "float32", ("batch_size", width.get(name, "n"))) for name in inputs)
        self.outputs = tuple(TensorSpec(name, "float32", ("batch_size",)) for name in outputs)
        self._function = function

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        plain = {name: feed.value if isinstance(feed, Handle) else feed for name, feed in feeds.items()}
        with torch.no_grad():
            made = self._function(**{name: torch.from_numpy(np.asarray(array)) for name, array in plain.items()})
        return {name: tensor.numpy() for name, tensor in made.items()}

    def put(self, array: Any) -> Handle:
        return Handle(array, tuple(array.shape))

    def close(self) -> None:
        pass


class PipelineModel:
    """The Model of a diffusers pipeline."""

    def __init__(self, pipe: Any, folder: Path) -> None:
        xl, config = hasattr(pipe, "text_encoder_2"), pipe.unet.config
        self.name, self.digest = "tiny", "0" * 64
        self.family = Family(
            name="sdxl" if xl else "sd",
            size_step=16,
            default_size=64,
            scaling_factor=pipe.vae.config.scaling_factor,
            prediction_type=pipe.scheduler.config.prediction_type,
            text_width=2 * WIDTH if xl else WIDTH,
            pooled_width=WIDTH if xl else None,
            time_ids=6 if xl else None,
            time_cond_dim=config.time_cond_proj_dim,
            unet_channels=config.in_channels,
            force_zeros_for_empty_prompt=bool(getattr(pipe.config, "force_zeros_for_empty_prompt", False)),
        )
        self.scheduler = {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config}
        self.tokenizers = {"tokenizer": ClipTokenizer.from_folder(folder)}
        self.tokenizers["tokenizer_2"] = self.tokenizers["tokenizer"]
        self._runners = runners(pipe, xl)
        self.parts = frozenset(self._runners)
        self.digests = dict.fromkeys(self.parts, "0" * 64)

    def use(self, part: str) -> Runs:
        return self._runners[part]

    def release(self, part: str) -> None:
        pass

    def close(self) -> None:
        pass


def runners(pipe: Any, xl: bool) -> dict[str, Runs]:
    extra = ["text_embeds", "time_ids"] if xl else []
    extra += ["timestep_cond"] if pipe.unet.config.time_cond_proj_dim else []
    layers = ["last_hidden_state", *(f"hidden_states.{i}" for i in range(3))]

    def unet(sample: Any, timestep: Any, encoder_hidden_states: Any, timestep_cond: Any = None, **added: Any) -> Any:
        out = pipe.unet(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, added_cond_kwargs=added or None
        )
        return {"out_sample": out.sample}

    def text(encoder: Any) -> Callable[..., Any]:
        def run(input_ids: Any) -> Any:
            out = encoder(input_ids, output_hidden_states=True)
            states = {f"hidden_states.{i}": state for i, state in enumerate(out.hidden_states)}
            pooled = {"text_embeds": out.text_embeds} if hasattr(out, "text_embeds") else {}
            return {**pooled, "last_hidden_state": out.last_hidden_state, **states}

        return run

    found = {
        "unet": Runs(["sample", "timestep", "encoder_hidden_states", *extra], ["out_sample"], unet),
        "vae_decoder": Runs(
            ["latent_sample"], ["sample"], lambda latent_sample: {"sample": pipe.vae.decode(latent_sample).sample}
        ),
        "vae_encoder": Runs(
            ["sample"],
            ["latent_parameters"],
            lambda sample: {"latent_parameters": pipe.vae.encode(sample).latent_dist.parameters},
        ),
        "text_encoder": Runs(["input_ids"], layers, text(pipe.text_encoder)),
    }
    if xl:
        found["text_encoder_2"] = Runs(["input_ids"], ["text_embeds", *layers], text(pipe.text_encoder_2))
    return found


def tokenizer_folder(folder: Path) -> Path:
    for name, content in clip_files(1000).items():
        (folder / name).write_bytes(content)
    return folder


def make_pipe(kind: str, folder: Path, prediction: str = "epsilon") -> Any:
    """`kind` is sd, lcm, inpaint, sdxl or sdxl-inpaint; random weights, fixed by a seed."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = diffusers.DDIMScheduler.from_config({**SD, "prediction_type": prediction})
        parts = {
            "vae": make_vae(),
            "unet": make_unet(kind),
            "tokenizer": CLIPTokenizer.from_pretrained(folder),
            "text_encoder": make_text(CLIPTextModel),
            "scheduler": scheduler,
        }
        if kind.startswith("sdxl"):
            second = {"text_encoder_2": make_text(CLIPTextModelWithProjection), "tokenizer_2": parts["tokenizer"]}
            xl = (
                diffusers.StableDiffusionXLInpaintPipeline if "inpaint" in kind else diffusers.StableDiffusionXLPipeline
            )
            pipe = xl(**parts, **second, add_watermarker=False)
        else:
            safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            kinds = {
                "inpaint": diffusers.StableDiffusionInpaintPipeline,
                "lcm": diffusers.LatentConsistencyModelPipeline,
            }
            pipe = kinds.get(kind, diffusers.StableDiffusionPipeline)(**parts, **safety)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_unet(kind: str) -> Any:
    xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=9 if "inpaint" in kind else 4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * WIDTH if kind.startswith("sdxl") else WIDTH,
        time_cond_proj_dim=256 if kind == "lcm" else None,
        **(xl if kind.startswith("sdxl") else {}),
    ).eval()


def make_vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
    ).eval()


def make_text(kind: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=998,
        eos_token_id=999,
        pad_token_id=999,
    )
    return kind(config).eval()
