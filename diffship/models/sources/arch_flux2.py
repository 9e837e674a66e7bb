"""Configs of FLUX.2-klein 4B (as on the hub) and of its test size, by part; `arch_configs` has them in its tables."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_KLEIN: Config = {
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-6,
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
_TINY = {
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 4, 4, 4],
    "in_channels": 16,
    "joint_attention_dim": 48,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_single_layers": 2,
    "timestep_guidance_channels": 32,
}
TRANSFORMERS: dict[str, Config] = {"flux2-klein-4b": _KLEIN, "tiny-flux2": {**_KLEIN, **_TINY}}

QWEN3 = "Qwen3ForCausalLM"
_QWEN3_4B: Config = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
_TINY_QWEN3 = {
    **_QWEN3_4B,
    "bos_token_id": 0,
    "diffship": {"layers": [1, 2, 4]},
    "eos_token_id": 0,
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 512,
    "num_attention_heads": 2,
    "num_hidden_layers": 5,  # one more than are read
    "num_key_value_heads": 1,
    "vocab_size": 512,
}
TEXTS: dict[str, tuple[str, Config]] = {"flux2-klein-4b": (QWEN3, _QWEN3_4B), "tiny-flux2": (QWEN3, _TINY_QWEN3)}

_VAE: Config = {
    "act_fn": "silu",
    "batch_norm_eps": 1e-4,
    "batch_norm_momentum": 0.1,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 32,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "patch_size": [2, 2],
    "sample_size": 1024,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_TINY_VAE = {
    "block_out_channels": [8, 12, 16, 16],
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}
VAES: dict[str, Config] = {"flux2-klein-4b": _VAE, "tiny-flux2": {**_VAE, **_TINY_VAE}}

SCHEDULER: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
