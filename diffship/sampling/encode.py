"""Prompts to conditioning: this file says which prompts are encoded; the kind of model says what becomes of the
outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.brief import brief
from diffship.core.errors import RunnerError, UnsupportedError
from diffship.core.runner import Runner
from diffship.sampling.model import Model
from diffship.sampling.trajectory import Conditioning, as_numpy

Floats = NDArray[np.float32]
_LAYER = "hidden_states."


@brief
@dataclass(frozen=True, eq=False)
class Encoded:
    """Conditioning of both prompts; `negative` is None if guidance takes no second row."""

    positive: Conditioning
    negative: Conditioning | None
    warnings: tuple[str, ...] = ()


@brief
@dataclass(frozen=True, eq=False)
class Encoding:
    """What one text encoder gave for one prompt: its outputs by name, without batch axis, and warnings."""

    part: str
    outputs: dict[str, Any]
    warnings: tuple[str, ...] = ()

    def __getitem__(self, output: str) -> Floats:
        """An output as float32; RunnerError if it is not finite."""
        return finite(self.part, as_numpy(self.outputs[output])[0])


def encode(model: Model, prompt: str, negative: str | None, size: tuple[int, int], guidance: float) -> Encoded:
    """Conditioning of a prompt and, if guidance needs it, of its negative; `size` is (width, height) in pixels.

    Raises:
        UnsupportedError: the model has no text encoder or tokenizer.
        RunnerError: an encoder's output is not finite.
    """
    kind = model.family.kind
    arrays, warnings = kind.encode(model, prompt, size)
    positive = Conditioning(arrays)
    if guidance <= 1.0 or model.family.takes_guidance:
        return Encoded(positive, None, warnings)
    absent = kind.without_prompt(model, arrays, size) if negative is None else None
    if absent is not None:
        return Encoded(positive, Conditioning(absent), warnings)
    away, more = kind.encode(model, negative or "", size, negative=True)
    return Encoded(positive, Conditioning(away), warnings + tuple(f"negative: {warning}" for warning in more))


def text_parts(model: Model) -> tuple[str, ...]:
    """The model's text encoders, in order."""
    return tuple(part for part in model.family.kind.text_parts if part in model.parts)


def require_text(model: Model) -> tuple[str, ...]:
    """As `text_parts`; raises UnsupportedError if there are none."""
    parts = text_parts(model)
    if not parts:
        named = model.family.kind.text_parts[0]
        raise UnsupportedError(f"{model.name} has no text encoder; export it with --parts {named}, or pass --base")
    return parts


def run_encoder(model: Model, part: str, prompt: str) -> Encoding:
    """What the text encoder `part` gives for one prompt.

    Raises:
        UnsupportedError: the model has no tokenizer for it.
    """
    name = model.family.kind.tokenizer_of(part)
    if name not in model.tokenizers:
        raise UnsupportedError(f"{model.name} has no {name}, which {part} needs")
    tokens = model.tokenizers[name]([prompt])
    return Encoding(part, dict(model.use(part).run(tokens.feeds())), tuple(tokens.warnings))


def penultimate(runner: Runner) -> str:
    """The output of a CLIP text encoder that holds the states before its last layer.

    Raises:
        UnsupportedError: it was exported without them.
    """
    layers = sorted(int(spec.name[len(_LAYER) :]) for spec in runner.outputs if spec.name.startswith(_LAYER))
    if len(layers) < 2:
        raise UnsupportedError("this text encoder gives no hidden_states, which the model needs: export it again")
    return f"{_LAYER}{layers[-2]}"


def finite(part: str, array: Floats) -> Floats:
    """`array`, or RunnerError naming `part` if it holds NaN or infinity."""
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise RunnerError(
            f"{part}: {bad} of {array.size} values are NaN or infinite. Run diffship verify, or use precision fp32"
        )
    return array
