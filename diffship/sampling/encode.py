"""Prompts to conditioning: this file says which prompts are encoded, and how; the kind of model says what becomes of
the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.brief import brief
from diffship.core.errors import ConfigError, RunnerError, UnsupportedError
from diffship.core.reading import PLAIN, Reading
from diffship.core.runner import Runner
from diffship.sampling.model import Model
from diffship.sampling.text import a1111, compel
from diffship.sampling.text.chunks import a1111_chunks
from diffship.sampling.text.weigh import a1111_states, compel_states, filled
from diffship.sampling.tokenizer import ClipTokenizer, Tokenizer
from diffship.sampling.trajectory import Conditioning, as_numpy

Floats = NDArray[np.float32]
_LAYER, LAST = "hidden_states.", "last_hidden_state"


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
    """What one text encoder gave for one prompt.

    states: float32 (tokens, width), of the layer that was asked for; 77 tokens for each chunk. outputs: all outputs by
    name, with a batch axis of 1, of the prompt's first chunk without weights.
    """

    part: str
    states: Floats
    outputs: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def __getitem__(self, output: str) -> Floats:
        """An output of the first chunk as float32, without batch axis; RunnerError if it is not finite."""
        return finite(self.part, as_numpy(self.outputs[output])[0])


def encode(
    model: Model,
    prompt: str,
    negative: str | None,
    size: tuple[int, int],
    guidance: float,
    reading: Reading = PLAIN,
) -> Encoded:
    """Conditioning of a prompt and, if guidance needs it, of its negative; `size` is (width, height) in pixels.

    Both have equally many tokens: the shorter one is filled up with the states of the empty prompt.

    Raises:
        UnsupportedError: the model has no text encoder or tokenizer, or none that the reading needs.
        ConfigError: a prompt that its syntax does not allow.
        RunnerError: an encoder's output is not finite.
    """
    kind = model.family.kind
    arrays, warnings = kind.encode(model, prompt, size, reading=reading)
    if guidance <= 1.0 or model.family.takes_guidance:
        return Encoded(Conditioning(arrays), None, warnings)
    absent = kind.without_prompt(model, arrays, size) if negative is None else None
    if absent is not None:
        return Encoded(Conditioning(arrays), Conditioning(absent), warnings)
    away, more = kind.encode(model, negative or "", size, negative=True, reading=reading.of_negative)
    length = max(_length(model, arrays), _length(model, away))
    arrays = _as_long(model, arrays, length, size, reading)
    away = _as_long(model, away, length, size, reading.of_negative)
    told = warnings + tuple(f"negative: {warning}" for warning in more)
    return Encoded(Conditioning(arrays), Conditioning(away), told)


def _length(model: Model, arrays: Mapping[str, Any]) -> int:
    return len(arrays[model.family.kind.condition_names[0]])


def _as_long(
    model: Model, arrays: Mapping[str, Any], length: int, size: tuple[int, int], reading: Reading
) -> Mapping[str, Any]:
    """A conditioning with `length` tokens: those that it lacks are of empty prompts."""
    if _length(model, arrays) == length:
        return arrays
    kind = model.family.kind
    text = kind.condition_names[0]
    empty = kind.encode(model, "", size, reading=reading)[0][text]
    return {**arrays, text: filled(arrays[text], empty, length)}


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


def run_encoder(
    model: Model,
    part: str,
    prompt: str,
    reading: Reading = PLAIN,
    penultimate: bool = False,
    output: str = LAST,
) -> Encoding:
    """What the text encoder `part` gives for one prompt, the states from `output`; `penultimate` as in `states_output`.

    Raises:
        UnsupportedError: the model has no tokenizer for it, or the encoder not the layer that the reading wants.
        ConfigError: a prompt that its syntax does not allow.
    """
    name = model.family.kind.tokenizer_of(part)
    if name not in model.tokenizers:
        raise UnsupportedError(f"{model.name} has no {name}, which {part} needs")
    tokenizer, runner = model.tokenizers[name], model.use(part)
    layer = states_output(model, part, reading.clip_skip, penultimate, output)
    if reading.syntax != PLAIN.syntax:
        return _weighted(part, _clip(model, tokenizer, part, reading), runner, prompt, layer, reading)
    tokens = tokenizer([prompt])
    outputs = dict(runner.run(tokens.feeds()))
    return Encoding(part, finite(part, as_numpy(outputs[layer])[0]), outputs, tuple(tokens.warnings))


def _weighted(
    part: str, tokenizer: ClipTokenizer, runner: Runner, prompt: str, layer: str, reading: Reading
) -> Encoding:
    """The encoding of a prompt with weights. Pooled states come from the first chunk in A1111's reading; in compel's,
    from the text as it stands, signs included, cut behind 75 tokens: so does that library."""

    def states(ids: NDArray[np.int64]) -> Floats:
        return finite(part, as_numpy(runner.run({"input_ids": ids[None]})[layer])[0])

    if reading.syntax == "a1111":
        chunks = a1111_chunks(tokenizer, a1111.parse(prompt))
        made, first = a1111_states(tokenizer, chunks, states), chunks[0].rows(tokenizer)[0][None]
    else:
        made, first = compel_states(tokenizer, compel.parse(prompt), states), tokenizer([prompt]).ids
    return Encoding(part, finite(part, made), dict(runner.run({"input_ids": first})))


def _clip(model: Model, tokenizer: Tokenizer, part: str, reading: Reading) -> ClipTokenizer:
    if not isinstance(tokenizer, ClipTokenizer):
        raise UnsupportedError(
            f"prompt syntax {reading.syntax} is for models whose text encoders are all CLIP; {part} of {model.name} "
            "is none. Write the prompt without weights: --prompt-syntax plain"
        )
    return tokenizer


def states_output(model: Model, part: str, clip_skip: int = 0, penultimate: bool = False, output: str = LAST) -> str:
    """The output of a text encoder that holds the states of a prompt: `output`, but of CLIP where layers are left out.

    clip_skip: how many of the last layers are left out. penultimate: the model takes the states before the last layer
    (SDXL, SD3), so that one more is left out, and the final norm with it.

    Raises:
        UnsupportedError: it was exported without that output; the message has the command that adds it.
        ConfigError: it has not so many layers.
    """
    names = {spec.name for spec in model.use(part).outputs}
    if not penultimate:
        return output if clip_skip == 0 else _skipped(model, part, names, clip_skip)
    layers = sorted(int(name[len(_LAYER) :]) for name in names if name.startswith(_LAYER))
    if len(layers) < 2:
        raise UnsupportedError("this text encoder gives no hidden_states, which the model needs: export it again")
    if clip_skip > len(layers) - 2:
        raise ConfigError(
            f"clip_skip is {clip_skip}; {part} of {model.name} has {len(layers) - 1} layers, of which the last is left "
            f"out anyway: legal is from 0 to {len(layers) - 2}"
        )
    return f"{_LAYER}{layers[-2 - clip_skip]}"


def _skipped(model: Model, part: str, names: set[str], clip_skip: int) -> str:
    wanted = f"{LAST}.{clip_skip}"
    if wanted in names:
        return wanted
    most = max((int(name[len(LAST) + 1 :]) for name in names if name.startswith(f"{LAST}.")), default=0)
    has = f"its outputs go to clip_skip {most}" if most else "it was exported without the states of earlier layers"
    raise UnsupportedError(
        f"clip_skip is {clip_skip}, and {part} of {model.name} cannot: {has}. Export the model again with --clip-skip "
        f"{clip_skip} (diffship export {model.name} --clip-skip {clip_skip} -o DIR), or run the source itself in torch"
    )


def finite(part: str, array: Floats) -> Floats:
    """`array`, or RunnerError naming `part` if it holds NaN or infinity."""
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise RunnerError(
            f"{part}: {bad} of {array.size} values are NaN or infinite. Run diffship verify, or use precision fp32"
        )
    return array
