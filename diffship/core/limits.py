"""Every bound of the product, checked before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from diffship.core.errors import ConfigError

Number = TypeVar("Number", int, float)
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Bounds of requests (per image), of bundles and of weight files; ranges are inclusive."""

    prompt_chars: int = 2000
    prompt_chunks: int = 32  # of 77 tokens
    prompt_weight: float = 100.0
    clip_skip: tuple[int, int] = (0, 31)
    steps: tuple[int, int] = (1, 150)
    guidance: tuple[float, float] = (0.0, 35.0)
    strength: tuple[float, float] = (0.0, 1.0)
    control_scale: tuple[float, float] = (0.0, 10.0)
    controls: int = 4
    hires: tuple[float, float] = (1.0, 4.0)
    eta: tuple[float, float] = (0.0, 1.0)
    images: tuple[int, int] = (1, 4)
    size_px: tuple[int, int] = (64, 1536)
    pixels: int = 2_400_000
    decoded_pixels: int = 16_800_000
    seed: tuple[int, int] = (0, 2**63 - 1)

    manifest_bytes: int = 4 * MIB
    bundle_files: int = 4096
    bundle_parts: int = 256
    beside_files: int = 2 * 4096 + 64  # a download keeps two notes of each file
    beside_bytes: int = 16 * MIB
    file_bytes: int = 1 << 40
    name_chars: int = 128
    path_chars: int = 240
    path_depth: int = 8

    safetensors_header_bytes: int = 16 * MIB
    tensors: int = 100_000
    tensor_name_chars: int = 512
    tensor_rank: int = 8

    onnx_messages: int = 4_000_000
    onnx_depth: int = 16
    mil_bytes: int = 256 * MIB  # a program without its weights
    mil_operations: int = 1_000_000
    tensor_elements: int = 1 << 31
    recipe_bytes: int = 1 * MIB
    trajectory_bytes: int = 64 * MIB


LIMITS = Limits()


def check_range(name: str, value: Number, low: Number, high: Number) -> Number:
    """`value`, if it is a number in [low, high]; an int range takes ints only, and never a bool.

    Raises:
        ConfigError: anything else, with the legal range.
    """
    whole = isinstance(low, int) and isinstance(high, int)
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right_type or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} is {_short(value)}; legal is {kind} from {low} to {high}")
    return value


def _short(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
