"""Textual inversions (Gal et al. 2022, arXiv 2208.01618): words whose vectors come from files, put into a pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.dtype import TensorMeta, convert, to_float32
from diffship.core.errors import ConfigError, SourceError
from diffship.core.lazy import lazy
from diffship.core.limits import LIMITS
from diffship.core.sniff import also
from diffship.core.weights import Derived, SafetensorsWeights, Weights
from diffship.models.clip_skip import with_clip_skip
from diffship.models.parts.clip import CLIP_TYPE
from diffship.models.parts.component import Component
from diffship.models.pipeline import Module, Pipeline, recorded
from diffship.models.sources.tokenizer_files import vocabulary_in, with_added
from diffship.sampling.tokenizer import Added, added_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

TABLE = "text_model.embeddings.token_embedding.weight"
_OF_FILE = ("emb_params", *(f"clip_{size}" for size in "lg"))  # keys that are no words: the file's name is the word
_MOST_VECTORS = 75  # what one chunk of a prompt holds


@dataclass(frozen=True)
class Inversion:
    """The word of one file, and its vectors, float32 (vectors, width), by the width of the encoder that they are of."""

    word: str
    vectors: Mapping[int, NDArray[np.float32]] = field(repr=False)

    @property
    def words(self) -> list[str]:
        """A word for each vector: `<toy>`, `<toy>_1`, `<toy>_2`."""
        count = max(map(len, self.vectors.values()))
        return [self.word, *(f"{self.word}_{i}" for i in range(1, count))]


def read_inversion(text: str) -> Inversion:
    """The file `FILE`, or `WORD=FILE` to call it otherwise; its forms are A1111's and diffusers'.

    `emb_params` (SD1, SD2) or `clip_l` with `clip_g` (SDXL), and the file's name is the word; or one tensor whose name
    is the word.

    Raises:
        ConfigError: no such file, or a word that is not legal.
        SourceError: not safetensors, or of another form.
    """
    word, equals, name = text.partition("=")
    path = Path(name if equals and not Path(text).is_file() else text)
    if not path.is_file():
        raise ConfigError(f"--embedding {text!r}: {path} is not a file; give FILE.safetensors or WORD=FILE{also(path)}")
    weights = SafetensorsWeights(path)
    names = weights.names()
    whole = set(names) <= set(_OF_FILE)
    if not names or not (whole or len(names) == 1):
        raise SourceError(
            f"{path}: holds {', '.join(names)[:120]!r}; a textual inversion has emb_params, clip_l with clip_g, or one "
            "tensor that is called as its word"
        )
    given = word if equals and path != Path(text) else ""
    vectors = [_vectors(path, weights, tensor) for tensor in names]
    return Inversion(_word(given or (path.stem if whole else names[0])), {one.shape[1]: one for one in vectors})


def with_inversions(pipeline: Pipeline, inversions: Sequence[Inversion]) -> Pipeline:
    """The pipeline whose CLIP tokenizers know the words, and whose text encoders have their vectors.

    Raises:
        ConfigError: a word that is there already, or vectors that are made for other models.
    """
    if not inversions:
        return pipeline
    clips = [part for part in pipeline.texts.values() if part.text_type == CLIP_TYPE]
    kind, tokenizers, made = pipeline.family.kind, dict(pipeline.tokenizers), list[Component]()
    for part in clips:
        folder = kind.tokenizer_of(part.name)
        rows = np.concatenate([_rows(inversion, part) for inversion in inversions])
        tokenizers[folder], start = _with_words(tokenizers[folder], inversions)
        made.append(_with_rows(pipeline, part, rows, start))
    for inversion in inversions:
        for width in inversion.vectors:
            if width not in {_width(part) for part in clips}:
                legal = " and ".join(str(_width(part)) for part in clips) or "no CLIP text encoder"
                raise ConfigError(f"embedding {inversion.word!r} has vectors {width} wide; this model has {legal}")
    entry = {"pass": "embedding", "words": [inversion.word for inversion in inversions]}
    return recorded(replace(pipeline, tokenizers=tokenizers).having(*made), entry)


def with_texts(pipeline: Pipeline, embeddings: Sequence[str], clip_skip: int | None = None) -> Pipeline:
    """The pipeline with the words of `embeddings` (FILE or WORD=FILE) and, unless it is None, with `clip_skip`.

    Raises as `read_inversion`, `with_inversions` and `with_clip_skip`.
    """
    made = with_inversions(pipeline, [read_inversion(text) for text in embeddings])
    return made if clip_skip is None else with_clip_skip(made, clip_skip)


def _with_words(files: Mapping[str, bytes], inversions: Sequence[Inversion]) -> tuple[dict[str, bytes], int]:
    """Tokenizer files with all words, and the id of the first one."""
    words = [word for inversion in inversions for word in inversion.words]
    known, start = _known(files)
    taken = [word for place, word in enumerate(words) if word in known or word in words[:place]]
    if taken:
        raise ConfigError(
            f"embedding {taken[0]!r}: the tokenizer has this word; call it otherwise: --embedding WORD=FILE"
        )
    return with_added(files, [Added(word, start + place) for place, word in enumerate(words)]), start


def _known(files: Mapping[str, bytes]) -> tuple[set[str], int]:
    vocabulary, added = vocabulary_in(files), added_tokens(files)
    known = {*vocabulary, *(token.content for token in added)}
    return known, 1 + max([*vocabulary.values(), *(token.id for token in added)])


def _with_rows(pipeline: Pipeline, part: Component, rows: NDArray[np.float32], start: int) -> Component:
    weights = _Extended(part.weights, rows, start)
    config = {**part.config, "vocab_size": weights.meta(TABLE).shape[0]}
    slot = pipeline.family.kind.slot_of(part.name)
    (made,) = pipeline.family.kind.build(slot, Module(part.class_name, config, weights), pipeline.family)
    return made


class _Extended(Derived):
    """Weights whose table of token embeddings has `rows` from `start` on; it grows if it is shorter than that."""

    def __init__(self, weights: Weights, rows: NDArray[np.float32], start: int) -> None:
        super().__init__(weights)
        self._new, self._start = rows, start

    def meta(self, name: str) -> TensorMeta:
        meta = self._weights.meta(name)
        if name != TABLE:
            return meta
        return TensorMeta(meta.dtype, (max(meta.shape[0], self._start + len(self._new)), meta.shape[1]))

    def read(self, name: str) -> NDArray[Any]:
        array = self._weights.read(name)
        if name != TABLE:
            return array
        meta = self._weights.meta(name)
        table = np.zeros(self.meta(name).shape, array.dtype)
        table[: len(array)] = array
        table[self._start : self._start + len(self._new)] = convert(self._new, "float32", meta.dtype)
        return table


def _rows(inversion: Inversion, part: Component) -> NDArray[np.float32]:
    found = inversion.vectors.get(_width(part))
    if found is None:
        widths = " and ".join(map(str, inversion.vectors))
        raise ConfigError(
            f"embedding {inversion.word!r} has vectors {widths} wide, and {part.name} needs {_width(part)}: it is made "
            "for another kind of model"
        )
    return found


def _width(part: Component) -> int:
    return next(int(spec.shape[-1]) for spec in part.outputs if spec.name == "last_hidden_state")


def _vectors(path: Path, weights: Weights, name: str) -> NDArray[np.float32]:
    meta = weights.meta(name)
    shape = meta.shape if len(meta.shape) == 2 else (1, *meta.shape)
    if len(shape) != 2 or not 1 <= shape[0] <= _MOST_VECTORS:
        raise SourceError(f"{path}: {name} has shape {meta.shape}; legal is (width,) or (1 to {_MOST_VECTORS}, width)")
    array = to_float32(weights.read(name), meta.dtype).reshape(shape)
    if not np.isfinite(array).all():
        raise SourceError(f"{path}: {name} holds NaN or infinity")
    return array


def _word(text: str) -> str:
    if not 1 <= len(text) <= LIMITS.name_chars or re.search(r"[\x00-\x1f]", text) or not text.strip():
        raise ConfigError(f"embedding word {text[:40]!r}: legal are 1 to {LIMITS.name_chars} characters in one line")
    return text
