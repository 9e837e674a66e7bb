"""A trained LoRA in the three forms that people load: diffusers', peft's and kohya's.

The three hold the same tensors under other names. Alpha is folded into the up matrices, and what each form says of
alpha is the rank: programs that look for it in another place, or not at all, then add the same change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.compression.lora_file import Delta
from diffship.compression.lora_scale import ADAPTER, PEFT
from diffship.core.atomic import replacing, write_file
from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.core.weights import Weights
from diffship.training.adapters import DOWN, TARGETS, UP

if TYPE_CHECKING:
    import peft
    from safetensors import numpy as tensor_file
else:
    peft, tensor_file = lazy("peft"), lazy("safetensors.numpy")

DIFFUSERS = "pytorch_lora_weights.safetensors"
KOHYA = "kohya.safetensors"
FOLDER_OF_PEFT = "peft"
FORMS = f"{DIFFUSERS}, {FOLDER_OF_PEFT}/adapter_model.safetensors with {ADAPTER}, kohya/{KOHYA}"


@dataclass(frozen=True)
class TrainedLora:
    """LoRA layers of a U-Net: `weights` holds tensors as peft names them, `alpha` is what they were trained with.

    targets: how the names of the changed layers end. header: what the headers of its files say beside their format.
    """

    weights: Weights
    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    header: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Names of the changed layers."""
        return [name.removesuffix(DOWN) for name in self.weights.names() if name.endswith(DOWN)]

    def deltas(self) -> dict[str, list[Delta]]:
        """{name of a weight of the U-Net: its change}, as `lora_file.with_deltas` takes them."""
        scale = self.alpha / self.rank
        return {
            f"{layer}.weight": [Delta(self.weights, f"{layer}{DOWN}", f"{layer}{UP}", scale)] for layer in self.layers
        }

    def pairs(self) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        """{layer: (down, up)} with alpha folded into up."""
        scale = np.float32(self.alpha / self.rank)
        return {layer: (self._read(layer, DOWN), self._read(layer, UP) * scale) for layer in self.layers}

    def _read(self, layer: str, end: str) -> NDArray[np.float32]:
        return np.asarray(self.weights.read(f"{layer}{end}"), np.float32)


def require_lora_place(folder: Path) -> None:
    """Raises ConfigError unless the files can be written into `folder`, which exists or lies in one that does."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"lora_out: {folder} is a file; name a folder")
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"lora_out: the folder of {folder} does not exist")


def write_lora(lora: TrainedLora, folder: Path, dtype: str, base: str) -> None:
    """Writes the three forms into `folder`; older ones of the same names are replaced. `base` names the model.

    Raises:
        OSError: the disk is full, or the like.
    """
    pairs = {
        layer: tuple(np.ascontiguousarray(matrix, dtype) for matrix in found) for layer, found in lora.pairs().items()
    }
    for below in (FOLDER_OF_PEFT, "kohya"):
        (folder / below).mkdir(parents=True, exist_ok=True)
    _write(folder / DIFFUSERS, _named(pairs, "unet.{}.lora_A.weight", "unet.{}.lora_B.weight"), lora.header)
    _write(
        folder / FOLDER_OF_PEFT / "adapter_model.safetensors",
        _named(pairs, f"{PEFT}{{}}.lora_A.weight", f"{PEFT}{{}}.lora_B.weight"),
        lora.header,
    )
    write_file(folder / FOLDER_OF_PEFT / ADAPTER, _adapter_config(lora, base))
    _write(folder / "kohya" / KOHYA, _of_kohya(pairs, lora.rank), lora.header)


def _named(pairs: Mapping[str, tuple[NDArray[Any], ...]], down: str, up: str) -> dict[str, NDArray[Any]]:
    named = {}
    for layer, (first, second) in pairs.items():
        named[down.format(layer)], named[up.format(layer)] = first, second
    return named


def _of_kohya(pairs: Mapping[str, tuple[NDArray[Any], ...]], rank: int) -> dict[str, NDArray[Any]]:
    flat = {f"lora_unet_{layer.replace('.', '_')}": pair for layer, pair in pairs.items()}
    named = _named(flat, "{}.lora_down.weight", "{}.lora_up.weight")
    return named | {f"{layer}.alpha": np.array(rank, down.dtype) for layer, (down, _) in flat.items()}


def _adapter_config(lora: TrainedLora, base: str) -> str:
    rank, layers = lora.rank, list(lora.targets)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=layers, base_model_name_or_path=base, inference_mode=True
    )
    facts = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return json.dumps(facts, indent=2, sort_keys=True, default=str) + "\n"


def _write(path: Path, tensors: Mapping[str, NDArray[Any]], header: Mapping[str, str]) -> None:
    with replacing(path) as file:
        file.write(tensor_file.save(dict(tensors), {"format": "pt", **header}))
