"""Prompts to conditioning: SD (last hidden state), SDXL (two encoders, penultimate states, pooled, time ids)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffship.core.brief import brief
from diffship.core.errors import RunnerError, UnsupportedError
from diffship.core.family import Family
from diffship.core.runner import Runner
from diffship.sampling.kernel import Array
from diffship.sampling.model import Model
from diffship.sampling.trajectory import Conditioning, as_numpy

_AESTHETIC = (6.0, 2.5)  # the refiner's score for the positive and the negative prompt, as diffusers has them


@brief
@dataclass(frozen=True, eq=False)
class Encoded:
    """Conditioning of both prompts; `negative` is None where guidance takes no second row."""

    positive: Conditioning
    negative: Conditioning | None
    warnings: tuple[str, ...] = ()


def encode(model: Model, prompt: str, negative: str | None, size: tuple[int, int], guidance: float) -> Encoded:
    """Conditioning of a prompt and, if guidance needs it, of its negative.

    Raises:
        UnsupportedError: the model has no text encoder or tokenizer.
        RunnerError: an encoder's output is not finite.
    """
    family = model.family
    wanted = guidance > 1.0 and family.time_cond_dim is None
    embeddings, pooled, warnings = _text(model, prompt)
    positive = Conditioning(embeddings, pooled, time_ids(family, size, _AESTHETIC[0]))
    if not wanted:
        return Encoded(positive, None, warnings)
    ids = time_ids(family, size, _AESTHETIC[1])
    if negative is None and family.force_zeros_for_empty_prompt:
        zeros = None if pooled is None else np.zeros_like(pooled)
        return Encoded(positive, Conditioning(np.zeros_like(embeddings), zeros, ids), warnings)
    away, away_pooled, more = _text(model, negative or "")
    return Encoded(positive, Conditioning(away, away_pooled, ids), warnings + tuple(f"negative: {w}" for w in more))


def time_ids(family: Family, size: tuple[int, int], aesthetic: float) -> NDArray[np.float32] | None:
    """SDXL's size conditioning: (height, width, crop top, left, height, width), the refiner's ends with a score."""
    width, height = size
    if family.time_ids is None:
        return None
    tail = (aesthetic,) if family.time_ids == 5 else (height, width)
    return np.array([height, width, 0, 0, *tail], np.float32)


def text_parts(model: Model) -> tuple[str, ...]:
    """The model's text encoders, in order."""
    return tuple(part for part in ("text_encoder", "text_encoder_2") if part in model.parts)


def _text(model: Model, prompt: str) -> tuple[Array, Array | None, tuple[str, ...]]:
    parts = text_parts(model)
    if not parts:
        raise UnsupportedError(f"{model.name} has no text encoder; export it with --parts text_encoder, or pass --base")
    embeddings, pooled, warnings = [], None, []
    for part in parts:
        states, summary, lost = _encode_part(model, part, prompt)
        embeddings.append(states)
        pooled = summary if summary is not None else pooled
        warnings += [warning for warning in lost if warning not in warnings]
    return np.concatenate(embeddings, -1), pooled, tuple(warnings)


def _encode_part(model: Model, part: str, prompt: str) -> tuple[Array, Array | None, Sequence[str]]:
    name = part.replace("text_encoder", "tokenizer")
    if name not in model.tokenizers:
        raise UnsupportedError(f"{model.name} has no {name}, which {part} needs")
    tokens = model.tokenizers[name]([prompt])
    runner = model.use(part)
    wide = model.family.pooled_width is not None
    output = _penultimate(runner) if wide else "last_hidden_state"
    made = runner.run({"input_ids": tokens.ids})
    states = finite(part, as_numpy(made[output])[0])
    summary = finite(part, as_numpy(made["text_embeds"])[0]) if wide and "text_embeds" in made else None
    return states, summary, tokens.warnings


def _penultimate(runner: Runner) -> str:
    layers = sorted(int(spec.name[14:]) for spec in runner.outputs if spec.name.startswith("hidden_states."))
    if len(layers) < 2:
        raise UnsupportedError("this text encoder gives no hidden_states, which SDXL needs: export it again")
    return f"hidden_states.{layers[-2]}"


def finite(part: str, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """`array`, or RunnerError naming `part` if it holds NaN or infinity."""
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise RunnerError(
            f"{part}: {bad} of {array.size} values are NaN or infinite. Run diffship verify, or use precision fp32"
        )
    return array
