"""What the output of a U-Net means (noise, or v as in Salimans and Ho 2022), as far as a file of tensors tells."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffship.core.dtype import to_float32
from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.load_options import PREDICTIONS
from diffship.core.weights import Weights
from diffship.models.sources.ldm.checkpoint import Checkpoint

NOISE, V = PREDICTIONS
_WORDS = {"epsilon": NOISE, "eps": NOISE, "v": V, "v_prediction": V, "v-prediction": V, "v_pred": V}
_MARK, _ZERO_SNR = "v_pred", "ztsnr"  # empty tensors that trainers leave in a file
_NOTE = "modelspec.prediction_type"  # github.com/Stability-AI/ModelSpec
_EDM = ("edm_mean", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# ComfyUI's figure (`supported_models.py`, class SD20): in SD 2's v-models the shift of the last layer spreads further
_SPREAD = 0.09


def prediction_of(checkpoint: Checkpoint, unet: Weights) -> tuple[str, str]:
    """(`epsilon` or `v_prediction`, how the file says it; empty if it does not, or was not asked).

    Raises:
        UnsupportedError: the model was trained on EDM's noise, whose scheduler no tensor tells.
        SourceError: the file's own note says something else than the two.
    """
    edm = [name for name in _EDM if name in checkpoint]
    if edm:
        raise UnsupportedError(
            f"{checkpoint.path}: its tensor {edm[0]} says that the model was trained on EDM's noise (Playground 2.5, "
            "CosXL), whose scheduler no single file holds; pass the diffusers folder of the model"
        )
    if checkpoint.loading.prediction is not None:
        return checkpoint.loading.prediction, ""
    if told := checkpoint.metadata.get(_NOTE):
        if told.lower() not in _WORDS:
            raise SourceError(
                f"{checkpoint.path}: {_NOTE} is {told[:60]!r}; legal: {', '.join(_WORDS)}. Say which with --prediction"
            )
        return _WORDS[told.lower()], f"its header says {_NOTE}={told}"
    if _MARK in checkpoint:
        return V, f"it has the mark {_MARK}"
    return _by_spread(unet)


def schedule(checkpoint: Checkpoint, own: dict[str, Any], prediction: str) -> dict[str, Any]:
    """`own`, a published scheduler config, for what the file says: its prediction, and noise that ends at zero SNR."""
    made = {**own, "prediction_type": prediction}
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # Lin et al. 2024 (arXiv 2305.08891)
    return {**made, **zero} if _ZERO_SNR in checkpoint else made


def _by_spread(unet: Weights) -> tuple[str, str]:
    """SD 2 has models of both kinds with equal shapes; the others predict noise unless they say otherwise."""
    name = _last_shift(unet)
    plain = unet.meta("conv_in.weight").shape[1] == unet.meta("conv_out.weight").shape[0]
    if name is None or not plain or "add_embedding.linear_1.weight" in unet.names():
        return NOISE, ""
    if len(unet.meta("mid_block.attentions.0.proj_in.weight").shape) != 2:
        return NOISE, ""
    values = to_float32(unet.read(name), unet.meta(name).dtype)
    spread = float(np.std(values))
    sign = "above" if spread > _SPREAD else "at most"
    return (V if spread > _SPREAD else NOISE), f"{name} spreads by {spread:.3f}, {sign} {_SPREAD}, as in SD 2's models"


def _last_shift(unet: Weights) -> str | None:
    """The name of the first shift of the last transformer block; None if there is none."""
    ends = "transformer_blocks.0.norm1.bias"
    found = [name for name in unet.names() if name.startswith("up_blocks.") and name.endswith(ends)]
    return max(found, default=None)
