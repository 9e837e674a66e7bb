"""Files of tensors that are no model: what they are, by the names of their tensors, and what to do with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from diffship.core.errors import SourceError, UnsupportedError

_FOLDER = "pass the diffusers folder of the model"
# the first pattern that a name matches says what the file is
_KINDS = {
    r"lora_(unet|te\d?|transformer)_|.*\.lora_(A|B|up|down)\b|.*\.lora\.(up|down)\.|.*\.(hada_w1|lokr_w1|oft_)": (
        "is a LoRA, a change of another model; fuse it into its model: diffship compress MODEL --pass lora "
        "--set files={path} -o DIR"
    ),
    r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.": "is a ControlNet, which draws beside a model",
    r"(ip_adapter|image_proj)\.": "is an IP-Adapter, which draws beside a model",
    r"(adapter\.)?body\.\d+\.(block1|in_conv)\.": "is a T2I-Adapter, which draws beside a model",
    r"emb_params\Z|string_to_param|clip_[lg]\Z": "is a textual inversion: words for a text encoder, and no model",
    r".*motion_modules\.": "is an AnimateDiff motion module; video is not drawn here",
    r"(model\.diffusion_model\.)?joint_blocks\.": f"is a Stable Diffusion 3 transformer in one file; {_FOLDER}",
    r"(model\.diffusion_model\.)?double_(blocks|layers)\.": "is a Flux or AuraFlow transformer; neither is drawn here",
    r"(model\.)?(conv_first|RRDB_trunk|body\.0\.rdb1)|model\.1\.sub\.": "is an upscaler of pictures, and draws none",
    r"(model\.diffusion_model\.)?label_emb\.weight\Z": "is an upscaler that is driven by a picture; it is not drawn",
}
# how quantised weights that no numpy type holds go by
_QUANTISED = {
    r".*\.(quant_state\.bitsandbytes__\w+|absmax|quant_map)\Z": "bitsandbytes (NF4, FP4)",
    r".*\.(SCB|weight_format)\Z": "bitsandbytes (int8)",
    r"scaled_fp8\Z|.*\.(scale_weight|weight_scale|scale_input|input_scale)\Z": "float8 or integers beside scales",
    r".*\.(qweight|qzeros|g_idx|wscales|comfy_quant)\Z": "GPTQ, AWQ, SVDQuant or another packed form",
}


def refuse_foreign(path: Path, names: Iterable[str]) -> None:
    """Do nothing for a file of plain tensors that may be a model; `names` are those of its tensors.

    Raises:
        SourceError: it is something else, such as a LoRA; the message says what and where it belongs.
        UnsupportedError: its weights are quantised in a form that is not read.
    """
    known = list(names)
    if not known:
        raise SourceError(f"{path}: holds no tensors")
    if form := _first(_QUANTISED, known):
        raise UnsupportedError(
            f"{path}: its weights are quantised ({form[0]}, tensor {form[1][:80]!r}), which is not read; get the "
            "float16 or float32 file of the model, or a GGUF file of F32, F16, BF16, Q8_0 or Q4_0"
        )
    if found := _first(_KINDS, known):
        raise SourceError(f"{path}: {found[0].format(path=path)} (tensor {found[1][:80]!r})")


def _first(patterns: dict[str, str], names: Iterable[str]) -> tuple[str, str] | None:
    known = list(names)
    for pattern, told in patterns.items():
        matching = re.compile(pattern)
        for name in known:
            if matching.match(name):
                return told, name
    return None
