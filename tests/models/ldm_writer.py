"""Writing a model as one file with the names of the original code, independently of the package's reading of them.

It walks through the levels as CompVis' UNetModel and Encoder/Decoder build them, from the config alone; the package
reads back from names alone. OpenCLIP: as open_clip's TextTransformer calls its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

Array = np.ndarray[Any, Any]
Read = Callable[[str], Array]
RES = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
CLIP = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def unet_places(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(path in LDM, path in diffusers) of each layer of the U-Net that has parameters."""
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"))
    yield from (("time_embed.cond_proj", "time_embedding.cond_proj"), ("input_blocks.0.0", "conv_in"))
    yield from (("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"))
    yield from (("out.0", "conv_norm_out"), ("out.2", "conv_out"))
    levels, layers, count = len(config["block_out_channels"]), config["layers_per_block"], 1
    for level, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            yield from _resnet(f"input_blocks.{count}.0", f"down_blocks.{level}.resnets.{layer}")
            if kind.startswith("Cross"):
                yield f"input_blocks.{count}.1", f"down_blocks.{level}.attentions.{layer}"
            count += 1
        if level < levels - 1:
            yield f"input_blocks.{count}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            count += 1
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    count = 0
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            yield from _resnet(f"output_blocks.{count}.0", f"up_blocks.{level}.resnets.{layer}")
            if kind.startswith("Cross"):
                yield f"output_blocks.{count}.1", f"up_blocks.{level}.attentions.{layer}"
            if layer == layers and level < levels - 1:
                place = 2 if kind.startswith("Cross") else 1
                yield f"output_blocks.{count}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"
            count += 1


def vae_places(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(path in LDM, path in diffusers) of each layer of the auto-encoder."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for side, theirs, ours, count, sampler in (
        ("encoder", "down", "down_blocks", layers, "downsample"),
        ("decoder", "up", "up_blocks", layers + 1, "upsample"),
    ):
        yield from ((f"{side}.{one}", f"{side}.{one}") for one in ("conv_in", "conv_out"))
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        for number in (1, 2):
            yield from _vae_resnet(f"{side}.mid.block_{number}", f"{side}.mid_block.resnets.{number - 1}")
        middle = f"{side}.mid_block.attentions.0"
        for old, new in {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
            yield f"{side}.mid.attn_1.{old}", f"{middle}.{new}"
        for level in range(levels):
            place = level if side == "encoder" else levels - 1 - level
            for layer in range(count):
                yield from _vae_resnet(
                    f"{side}.{theirs}.{place}.block.{layer}", f"{side}.{ours}.{level}.resnets.{layer}"
                )
            if level < levels - 1:
                yield f"{side}.{theirs}.{place}.{sampler}.conv", f"{side}.{ours}.{level}.{sampler}rs.0.conv"
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))


def ldm_unet(config: Mapping[str, Any], names: list[str], read: Read) -> dict[str, Array]:
    return _moved(unet_places(config), names, read)


def ldm_vae(config: Mapping[str, Any], names: list[str], read: Read) -> dict[str, Array]:
    made = _moved(vae_places(config), names, read)
    convolved = ("q.weight", "k.weight", "v.weight", "proj_out.weight")
    return {
        name: a[:, :, None, None] if ".attn_1." in name and name.endswith(convolved) else a for name, a in made.items()
    }


def open_clip(names: list[str], read: Read, extra_layer: bool = False) -> dict[str, Array]:
    """The encoder in OpenCLIP's names; `extra_layer` adds the last one, which SD 2 never runs."""
    prefix, made = "text_model.encoder.layers.", {}
    layers = 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix))
    made["positional_embedding"] = read("text_model.embeddings.position_embedding.weight")
    made["token_embedding.weight"] = read("text_model.embeddings.token_embedding.weight")
    for leaf in ("weight", "bias"):
        made[f"ln_final.{leaf}"] = read(f"text_model.final_layer_norm.{leaf}")
    if "text_projection.weight" in names:
        made["text_projection"] = read("text_projection.weight").T
    for number in range(layers + extra_layer):
        source, target = f"{prefix}{min(number, layers - 1)}", f"transformer.resblocks.{number}"
        for leaf in ("weight", "bias"):
            fused = [read(f"{source}.self_attn.{one}_proj.{leaf}") for one in "qkv"]
            made[f"{target}.attn.in_proj_{leaf}"] = _stacked(fused)
            made[f"{target}.attn.out_proj.{leaf}"] = read(f"{source}.self_attn.out_proj.{leaf}")
            made |= {f"{target}.{old}.{leaf}": read(f"{source}.{new}.{leaf}") for old, new in CLIP.items()}
    made["logit_scale"] = np.array(4.6, np.float32)
    if extra_layer:  # and the projection, which SD 2 has no use for
        made["text_projection"] = np.eye(made["positional_embedding"].shape[1], dtype=np.float32)
    return made


def checkpoint(pipeline: Any, dtype: Any = np.float32) -> dict[str, Array]:
    """The tensors of a whole U-Net pipeline as its authors would have saved them."""
    parts, family = pipeline.components, pipeline.family.name
    made = _below("model.diffusion_model.", ldm_unet(parts["unet"].config, *_of(parts["unet"])))
    vae = {**dict.fromkeys(parts["vae_encoder"].weights.names(), parts["vae_encoder"].weights.read)}
    vae |= dict.fromkeys(parts["vae_decoder"].weights.names(), parts["vae_decoder"].weights.read)
    config = parts["vae_decoder"].config
    made |= _below("first_stage_model.", ldm_vae(config, list(vae), lambda name: vae[name](name)))
    for name, part in pipeline.texts.items():
        names, read = _of(part)
        if family == "sd":
            fused = part.config["hidden_act"] == "gelu"
            text = _below("model.", open_clip(names, read, True)) if fused else _classic(names, read)
            made |= _below("cond_stage_model.", text)
        else:
            second = name.endswith("_2")
            place = 1 if second and family == "sdxl" else 0
            text = _below("model.", open_clip(names, read)) if second else _classic(names, read)
            made |= _below(f"conditioner.embedders.{place}.", text)
    made["betas"] = np.zeros(1000, np.float32)
    if dtype is None:  # as they are, though they lie in no order that can be written
        return made
    floats = {name: np.ascontiguousarray(array, dtype) for name, array in made.items() if array.dtype.kind == "f"}
    return {**made, **floats}


def _stacked(parts: list[Array]) -> Array:
    """Parts on top of each other; of arrays that take no memory, one that takes none."""
    if any(any(part.strides) for part in parts):
        return np.concatenate(parts)
    return np.broadcast_to(np.float32(0), (sum(part.shape[0] for part in parts), *parts[0].shape[1:]))


def write(path: Path, tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> Path:
    safetensors.numpy.save_file(dict(tensors), path, metadata)
    return path


def _of(part: Any) -> tuple[list[str], Read]:
    return list(part.weights.names()), part.weights.read


def _classic(names: list[str], read: Read) -> dict[str, Array]:
    made = {f"transformer.{name}": read(name) for name in names}
    length = made["transformer.text_model.embeddings.position_embedding.weight"].shape[0]
    return {**made, "transformer.text_model.embeddings.position_ids": np.arange(length)[None]}


def _below(prefix: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    return {prefix + name: array for name, array in tensors.items()}


def _resnet(old: str, new: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{old}.{theirs}", f"{new}.{ours}") for theirs, ours in RES.items())


def _vae_resnet(old: str, new: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{old}.{one}", f"{new}.{one}") for one in ("norm1", "conv1", "norm2", "conv2"))
    yield f"{old}.nin_shortcut", f"{new}.conv_shortcut"


def _moved(places: Iterator[tuple[str, str]], names: list[str], read: Read) -> dict[str, Array]:
    """The tensors below each path, which are given away once; all of them must be."""
    left, made = set(names), {}
    for old, new in places:
        for name in [name for name in left if name.startswith(f"{new}.")]:
            made[f"{old}.{name.removeprefix(f'{new}.')}"] = read(name)
            left.remove(name)
    assert not left, sorted(left)[:5]
    return made
