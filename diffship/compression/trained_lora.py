"""What passes that train a LoRA do with it at the end: read it from the run, write its files, add it to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from diffship.compression.lora_file import with_deltas
from diffship.compression.lora_write import TrainedLora, require_lora_place, write_lora
from diffship.compression.trained import averaged_weights
from diffship.core.distributed import first_process
from diffship.core.precision import precision_of
from diffship.core.weights import SafetensorsWeights, cast, renamed
from diffship.models.pipeline import Pipeline, recorded
from diffship.training.adapters import TARGETS


class LoraOptions(Protocol):
    """The options of a LoRA, which the passes that train one have by the same names."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float | None: ...

    @property
    def lora_out(self) -> str | None: ...

    @property
    def lora_precision(self) -> str: ...


def alpha_of(options: LoraOptions) -> float:
    """The LoRA's alpha: the rank if none is given, so that changes are added as they are."""
    return float(options.rank if options.alpha is None else options.alpha)


def lora_of(
    options: LoraOptions,
    state: SafetensorsWeights,
    targets: Sequence[str] = TARGETS,
    header: Mapping[str, str] = MappingProxyType({}),
) -> TrainedLora:
    """The averaged LoRA of a checkpoint; `header` is what its files say beside their format."""
    weights = renamed(state, averaged_weights(state))
    return TrainedLora(weights, options.rank, alpha_of(options), tuple(targets), header)


def check_lora_place(options: LoraOptions) -> None:
    """Raises ConfigError if `lora_out` cannot be written."""
    if options.lora_out is not None:
        require_lora_place(Path(options.lora_out).expanduser())


def with_lora(pipeline: Pipeline, lora: TrainedLora, options: LoraOptions, entry: dict[str, Any]) -> Pipeline:
    """`pipeline` with the LoRA added to its denoiser, float32, and `entry` in its history; writes `lora_out` if asked.

    Raises:
        OSError: the disk is full, or the like.
    """
    if options.lora_out is not None and first_process():
        dtype = precision_of(options.lora_precision).weights
        write_lora(lora, Path(options.lora_out).expanduser(), dtype, str(pipeline.source.get("id")))
    unet = pipeline.denoiser
    changed = replace(unet, weights=cast(with_deltas(unet.weights, lora.deltas()), "float32"))
    return recorded(pipeline.having(changed), {**entry, "layers": len(lora.layers)})
