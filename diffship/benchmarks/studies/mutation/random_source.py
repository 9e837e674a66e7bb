"""Random tiny pipelines: any of them must be exported without a false alarm, in every precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from diffship.core.lazy import lazy
from diffship.core.seeded import SeededWeights
from diffship.models.assemble import assemble
from diffship.models.parts.autoencoder import KL, TINY, Decoder, Encoder
from diffship.models.parts.clip import PLAIN, PROJECTED, TextEncoder
from diffship.models.parts.component import weight_metas
from diffship.models.parts.unet import CLASS, UNet
from diffship.models.pipeline import Material, Module, Pipeline
from diffship.models.sources import arch_configs as configs
from diffship.models.sources.tokenizer_files import clip_files

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy("torch")

PREFIX = "random:"
_CROSS, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"
_VOCABULARY = 1000
Config = dict[str, Any]


def random_pipeline(seed: int) -> Pipeline:
    """SD, SDXL, LCM or inpainting: widths, levels, heads, layers, groups and encoders are drawn from `seed`."""
    rng = np.random.Generator(np.random.PCG64(seed))
    xl = bool(rng.random() < 0.35)
    texts = _texts(rng, xl)
    unet, vae_class, vae = _unet(rng, texts, xl), *_vae(rng)
    modules = {
        "unet": _module(CLASS, unet, [partial(UNet, unet)], seed),
        "vae": _module(vae_class, vae, [partial(half, vae_class, vae) for half in (Encoder, Decoder)], seed + 1),
    }
    for index, (part, (name, config)) in enumerate(texts.items()):
        modules[part] = _module(
            name, config, [partial(TextEncoder, config, name == PROJECTED, False)], seed + 2 + index
        )
    tokenizers = {part.replace("text_encoder", "tokenizer"): clip_files(_VOCABULARY) for part in texts}
    source = {"id": f"{PREFIX}{seed}", "revision": None, "kind": "arch"}
    licence = {"id": "", "name": "none (random weights)", "link": "", "restrictions": "", "notices": []}
    return assemble(Material(source, modules, tokenizers, _scheduler(rng, unet, xl), _index(unet, xl), licence))


def _module(name: str, config: Config, builds: list[Callable[[], nn.Module]], seed: int) -> Module:
    with torch.device("meta"):
        metas = {key: meta for build in builds for key, meta in weight_metas(build()).items()}
    return Module(name, {**config, "_class_name": name, "architectures": [name]}, SeededWeights(metas, seed))


def _pick(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def _texts(rng: np.random.Generator, xl: bool) -> dict[str, tuple[str, Config]]:
    first = _clip(rng, _pick(rng, ("quick_gelu", "gelu")))
    if not xl:
        return {"text_encoder": (PLAIN, first)}
    return {"text_encoder": (PLAIN, first), "text_encoder_2": (PROJECTED, _clip(rng, "gelu"))}


def _clip(rng: np.random.Generator, act: str) -> Config:
    heads = _pick(rng, (1, 2, 3))
    width = heads * _pick(rng, (8, 16, 24))
    base = configs.TEXTS["tiny-sd"]["text_encoder"][1]
    more = {"hidden_size": width, "intermediate_size": width * _pick(rng, (2, 4)), "num_attention_heads": heads}
    layers = {"num_hidden_layers": _pick(rng, (1, 2, 3)), "projection_dim": width, "vocab_size": _VOCABULARY}
    return {**base, **more, **layers, "hidden_act": act}


def _unet(rng: np.random.Generator, texts: Mapping[str, tuple[str, Config]], xl: bool) -> Config:
    levels, groups = _pick(rng, (2, 3, 4)), _pick(rng, (2, 4, 8))
    widths = sorted(groups * int(rng.integers(2, 6)) for _ in range(levels))
    heads = [_pick(rng, [n for n in (1, 2, 3, 4) if width % n == 0 and width // n >= 4]) for width in widths]
    plain = [level > 0 and bool(rng.random() < 0.3) for level in range(levels)]
    linear = bool(rng.random() < 0.5)
    text = sum(int(config["hidden_size"]) for _, config in texts.values())
    unet = {
        **configs.UNETS["tiny-sd"],
        "attention_head_dim": heads,
        "block_out_channels": widths,
        "cross_attention_dim": text,
        "down_block_types": [_DOWN if alone else _CROSS for alone in plain],
        "up_block_types": [_UP if alone else _CROSS_UP for alone in reversed(plain)],
        "in_channels": 9 if not xl and rng.random() < 0.2 else 4,
        "layers_per_block": _pick(rng, (1, 2)),
        "norm_eps": _pick(rng, (1e-5, 1e-6)),
        "norm_num_groups": groups,
        "transformer_layers_per_block": _pick(rng, (1, 1, 2)),
        "use_linear_projection": linear,
    }
    if rng.random() < 0.25:
        unet["time_cond_proj_dim"] = 16
    return {**unet, **(_added(rng, texts) if xl else {})}


def _added(rng: np.random.Generator, texts: Mapping[str, tuple[str, Config]]) -> Config:
    """SDXL's embedding of pooled text and six sizes."""
    pooled = int(texts["text_encoder_2"][1]["projection_dim"])
    text = sum(int(config["hidden_size"]) for _, config in texts.values())
    # six sizes that leave as much as the text is wide after five would be a refiner's
    each = _pick(rng, [size for size in (4, 8) if pooled + size != text])
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": pooled + 6 * each,
    }


def _vae(rng: np.random.Generator) -> tuple[str, Config]:
    if rng.random() < 0.35:
        width = _pick(rng, (4, 8, 12))
        sides = {f"{side}_block_out_channels": [width] * 4 for side in ("encoder", "decoder")}
        return TINY, {**configs.TAESD["tiny"], **sides}
    levels, groups = _pick(rng, (3, 4)), _pick(rng, (2, 4))
    widths = sorted(groups * int(rng.integers(2, 5)) for _ in range(levels))
    more = {"block_out_channels": widths, "layers_per_block": _pick(rng, (1, 2)), "norm_num_groups": groups}
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return KL, {**configs.VAES["tiny-sd"], **more, **types}


def _scheduler(rng: np.random.Generator, unet: Config, xl: bool) -> Config:
    own = dict(configs.SCHEDULERS["sdxl" if xl else "sd15"])
    own["prediction_type"] = _pick(rng, ("epsilon", "v_prediction"))
    return configs.lcm_scheduler(own) if unet.get("time_cond_proj_dim") else own


def _index(unet: Config, xl: bool) -> Config:
    if xl:
        return {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    inpaint = unet["in_channels"] == 9
    return {"_class_name": "StableDiffusionInpaintPipeline" if inpaint else "StableDiffusionPipeline"}
