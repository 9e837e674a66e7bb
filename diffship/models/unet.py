"""The `unet` part: UNet2DConditionModel of SD, SDXL, LCM and inpainting, whole or reduced, with canonical tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.spec import TensorSpec
from diffship.core.weights import Weights
from diffship.models.component import Component
from diffship.models.widths import KEY, narrow_module, widths_of

if TYPE_CHECKING:
    import diffusers
    import torch
    from torch.nn import Module
else:
    diffusers, Module = lazy("diffusers"), lazy_base("torch.nn", "Module")

CLASS = "UNet2DConditionModel"
_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
_MID = (None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
_UNSUPPORTED = {
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_embedding_act_fn": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "center_input_sample": False,
    "dual_cross_attention": False,
    "class_embeddings_concat": False,
    "attention_type": "default",
}


class UNet(Module):
    """(sample, timestep, encoder_hidden_states[, text_embeds, time_ids][, timestep_cond]) -> (out_sample,)."""

    inner: Any

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = diffusers.UNet2DConditionModel.from_config(_constructor_config(config))
        narrow_module(self.inner, widths_of(config))
        self.conditions = condition_names(config)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        condition_1: torch.Tensor | None = None,
        condition_2: torch.Tensor | None = None,
        condition_3: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        given = dict(zip(self.conditions, (condition_1, condition_2, condition_3), strict=False))
        cond = given.pop("timestep_cond", None)
        (out,) = self.inner(
            sample,
            timestep.reshape([-1]),
            encoder_hidden_states,
            timestep_cond=cond,
            added_cond_kwargs=given or None,
            return_dict=False,
        )
        return (out,)


def unet(config: Mapping[str, Any], weights: Weights, latent_size: int = 0) -> Component:
    """The U-Net of `config`; `latent_size` is the smallest latent side, 2**(levels - 1) where it is 0.

    Raises:
        UnsupportedError: the config asks for conditioning or blocks outside the SD families.
        SourceError: the config is not that of a UNet2DConditionModel.
    """
    check_config(config)
    step = 2 ** (len(config["block_out_channels"]) - 1)
    side = latent_size or step
    sizes = {"batch_size": 1, "height": side, "width": side, "sequence_length": 77}
    inputs, outputs = _specs(config)
    return Component("unet", CLASS, dict(config), partial(UNet, dict(config)), weights, inputs, outputs, sizes)


def condition_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the conditions after the first three inputs, in canonical order."""
    names: tuple[str, ...] = ()
    if config.get("addition_embed_type") == "text_time":
        names += ("text_embeds", "time_ids")
    return (*names, "timestep_cond") if config.get("time_cond_proj_dim") else names


def text_width(config: Mapping[str, Any]) -> int:
    """Width of the text embeddings; some configs list it for each block."""
    width = config.get("cross_attention_dim", 1280)
    return int(width if isinstance(width, int) else width[0])


def text_time_widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """(width of text_embeds, number of time ids) of an SDXL U-Net: 1280 and 6, or 5 for the refiner.

    The config states only their sum, pooled + ids * addition_time_embed_dim: 6 ids are assumed unless the refiner's
    cross-attention width equals what 5 ids leave.
    """
    total = int(config["projection_class_embeddings_input_dim"])
    each = int(config["addition_time_embed_dim"])
    width = config.get("cross_attention_dim")
    ids = 5 if total - 5 * each == width else 6
    if total - ids * each < 1:
        raise SourceError(f"unet: projection_class_embeddings_input_dim {total} leaves nothing for the pooled text")
    return total - ids * each, ids


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError where the U-Net is of no family that is known here."""
    for key, legal in _UNSUPPORTED.items():
        if config.get(key, legal) not in (legal, None):
            raise UnsupportedError(f"unet: {key} = {config[key]!r} is not supported; legal is {legal}")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise UnsupportedError(
            f"unet: addition_embed_type = {config['addition_embed_type']!r}; legal: text_time or none"
        )
    blocks = [*config.get("down_block_types", _DOWN[:1]), *config.get("up_block_types", _UP[:1])]
    odd = [block for block in blocks if block not in _DOWN + _UP]
    if odd or config.get("mid_block_type", _MID[1]) not in _MID:
        raise UnsupportedError(f"unet: block type {odd[0] if odd else config['mid_block_type']!r} is not supported")
    if not isinstance(config.get("block_out_channels"), (list, tuple)):
        raise SourceError("unet: its config has no block_out_channels; is it a UNet2DConditionModel?")
    widths_of(config)


def _constructor_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != KEY}


def _specs(config: Mapping[str, Any]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    width = text_width(config)
    inputs = [
        TensorSpec("sample", "float32", ("batch_size", int(config.get("in_channels", 4)), "height", "width")),
        TensorSpec("timestep", "float32", ("batch_size",), exact=True),
        TensorSpec("encoder_hidden_states", "float32", ("batch_size", "sequence_length", width)),
    ]
    conditions = condition_names(config)
    if "time_ids" in conditions:
        pooled, ids = text_time_widths(config)
        inputs.append(TensorSpec("text_embeds", "float32", ("batch_size", pooled)))
        inputs.append(TensorSpec("time_ids", "float32", ("batch_size", ids), exact=True, whole=True))
    if "timestep_cond" in conditions:
        inputs.append(TensorSpec("timestep_cond", "float32", ("batch_size", int(config["time_cond_proj_dim"]))))
    out = TensorSpec("out_sample", "float32", ("batch_size", int(config.get("out_channels", 4)), "height", "width"))
    return tuple(inputs), (out,)
