"""Configs of the published architectures (as on the hub) and of their test sizes, by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffship.models.sources import arch_flux2 as flux2

Config = dict[str, Any]
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"

_SD_UNET: Config = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [_CROSS, _CROSS, _CROSS, _PLAIN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [_PLAIN_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP],
}
_SD2_UNET = {
    **_SD_UNET,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
_XL_UNET = {
    **_SD_UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": [_PLAIN, _CROSS, _CROSS],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [_CROSS_UP, _CROSS_UP, _PLAIN_UP],
    "use_linear_projection": True,
}
_REFINER_UNET = {
    **_XL_UNET,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": [_PLAIN, _CROSS, _CROSS, _PLAIN],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": [_PLAIN_UP, _CROSS_UP, _CROSS_UP, _PLAIN_UP],
}
# widths that grow where the big ones grow, so that the tensors have the same names; heads are 8 wide
_TINY = {
    "attention_head_dim": [2, 3, 4, 4],
    "block_out_channels": [16, 24, 32, 32],
    "norm_num_groups": 8,
    "sample_size": 8,
}
_TINY_XL = {
    "attention_head_dim": [2, 3, 4],
    "block_out_channels": [16, 24, 32],
    "norm_num_groups": 8,
    "sample_size": 8,
    "cross_attention_dim": 80,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 96,
    "transformer_layers_per_block": [1, 1, 2],
}
_TINY_REFINER = {
    **_TINY_XL,
    "attention_head_dim": [2, 3, 4, 4],
    "block_out_channels": [16, 24, 32, 32],
    "cross_attention_dim": 48,
    "projection_class_embeddings_input_dim": 88,
    "transformer_layers_per_block": 1,
}

UNETS: dict[str, Config] = {
    "sd15": _SD_UNET,
    "sd21": _SD2_UNET,
    "sd21-base": {**_SD2_UNET, "sample_size": 64, "upcast_attention": False},
    "sdxl": _XL_UNET,
    "sdxl-refiner": _REFINER_UNET,
    "lcm-sd15": {**_SD_UNET, "time_cond_proj_dim": 256},
    "lcm-sdxl": {**_XL_UNET, "time_cond_proj_dim": 256},
    "sd15-inpaint": {**_SD_UNET, "in_channels": 9},
    "tiny-sd": {**_SD_UNET, **_TINY, "cross_attention_dim": 32},
    "tiny-sdxl": {**_XL_UNET, **_TINY_XL},
    "tiny-lcm": {**_SD_UNET, **_TINY, "cross_attention_dim": 32, "time_cond_proj_dim": 32},
    "tiny-inpaint": {**_SD_UNET, **_TINY, "cross_attention_dim": 32, "in_channels": 9},
    "tiny-refiner": {**_REFINER_UNET, **_TINY_REFINER},
}

# SD3 medium's and 3.5's, as on the hub; one test size, with the whole table of positions
_SD3: Config = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
_TINY_SD3 = {
    "attention_head_dim": 8,
    "caption_projection_dim": 32,
    "joint_attention_dim": 96,
    "num_attention_heads": 4,
    "num_layers": 2,
    "pooled_projection_dim": 80,
    "sample_size": 8,
}
_SD35_MEDIUM = {**_SD3, "dual_attention_layers": list(range(13)), "pos_embed_max_size": 384, "qk_norm": "rms_norm"}
_SD35_LARGE = {
    **_SD3,
    "caption_projection_dim": 2432,
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
TRANSFORMERS: dict[str, Config] = {
    "sd3-medium": _SD3,
    "sd35-medium": _SD35_MEDIUM,
    "sd35-large": _SD35_LARGE,
    "tiny-sd3": {**_SD3, **_TINY_SD3},
}


def _clip(width: int, layers: int, heads: int, act: str, projection: int, **more: Any) -> Config:
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": act,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": projection,
        "vocab_size": 49408,
        **more,
    }


_CLIP_L = _clip(768, 12, 12, "quick_gelu", 768)
_CLIP_G = _clip(1280, 32, 20, "gelu", 1280)
_TINY_L = _clip(32, 2, 2, "quick_gelu", 32, vocab_size=1000)
# the test size of the second encoder has the ids that checkpoints made after 2023 carry
_TINY_G = _clip(48, 3, 3, "gelu", 48, vocab_size=1000, bos_token_id=998, eos_token_id=999)

PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
T5 = "T5EncoderModel"
_T5_XXL: Config = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "model_type": "t5",
    "num_heads": 64,
    "num_layers": 24,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}
_TINY_T5 = {**_T5_XXL, "d_ff": 64, "d_kv": 8, "d_model": 96, "num_heads": 4, "num_layers": 2, "vocab_size": 512}
_XL_TEXT = {"text_encoder": (PLAIN, _CLIP_L), "text_encoder_2": (PROJECTED, _CLIP_G)}
_TINY_XL_TEXT = {"text_encoder": (PLAIN, _TINY_L), "text_encoder_2": (PROJECTED, _TINY_G)}

TEXTS: dict[str, dict[str, tuple[str, Config]]] = {
    "sd15": {"text_encoder": (PLAIN, _CLIP_L)},
    "sd21": {"text_encoder": (PLAIN, _clip(1024, 23, 16, "gelu", 512))},
    "sdxl": _XL_TEXT,
    "sdxl-refiner": {"text_encoder_2": _XL_TEXT["text_encoder_2"]},
    "tiny-sd": {"text_encoder": (PLAIN, _TINY_L)},
    "tiny-sdxl": _TINY_XL_TEXT,
    "tiny-refiner": {"text_encoder_2": _TINY_XL_TEXT["text_encoder_2"]},
    "sd3-medium": {
        "text_encoder": (PROJECTED, _CLIP_L),
        "text_encoder_2": (PROJECTED, _CLIP_G),
        "text_encoder_3": (T5, _T5_XXL),
    },
    "tiny-sd3": {
        "text_encoder": (PROJECTED, _TINY_L),
        "text_encoder_2": (PROJECTED, _TINY_G),
        "text_encoder_3": (T5, _TINY_T5),
    },
    **{name: {"text_encoder": made} for name, made in flux2.TEXTS.items()},
}
SEEDS = {"text_encoder": 1, "text_encoder_2": 2, "text_encoder_3": 5, "unet": 3, "transformer": 3, "vae": 4}

_KL: Config = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_TINY_KL = {
    **_KL,
    "block_out_channels": [8, 12, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}
_SD3_LATENTS = {
    "force_upcast": True,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
VAES: dict[str, Config] = {
    "sd15": _KL,
    "sd21": {**_KL, "sample_size": 768},
    "sdxl": {**_KL, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "tiny-sd": _TINY_KL,
    "tiny-sdxl": {**_TINY_KL, "scaling_factor": 0.13025},
    "sd3-medium": {**_KL, **_SD3_LATENTS, "sample_size": 1024},
    "tiny-sd3": {**_TINY_KL, **_SD3_LATENTS},
    **flux2.VAES,
}


def tiny_vae(width: int, levels: int = 4, latents: int = 4) -> Config:
    """The config of TAESD with other widths; a latent is 2 ** (levels - 1) pixels wide."""
    return {
        "act_fn": "relu",
        "decoder_block_out_channels": [width] * levels,
        "encoder_block_out_channels": [width] * levels,
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": latents,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": [3] * (levels - 1) + [1],
        "num_encoder_blocks": [1] + [3] * (levels - 1),
        "out_channels": 3,
        "scaling_factor": 1.0,
        "upsampling_scaling_factor": 2,
    }


TAESD = {"full": tiny_vae(64), "tiny": tiny_vae(8)}

_BETAS: Config = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SCHEDULERS: dict[str, Config] = {
    "sd15": {**_BETAS, "_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "sd21": {**_BETAS, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sd21-base": {**_BETAS, "_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "sdxl": _EULER,
    "sd3-medium": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    "flux2-klein-4b": flux2.SCHEDULER,
}
LCM_SCHEDULER: Config = {
    **_BETAS,
    "_class_name": "LCMScheduler",
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "original_inference_steps": 50,
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
}


def lcm_scheduler(own: Mapping[str, Any]) -> Config:
    """The LCM scheduler with the betas and prediction type of `own`.

    `steps_offset` stays, too, which LCM has no use for: diffusers' StableDiffusionPipeline warns if it is not 1.
    """
    return {**LCM_SCHEDULER, **{key: own[key] for key in _KEPT_KEYS if key in own}}


_KEPT_KEYS = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "steps_offset",
    "trained_betas",
)
