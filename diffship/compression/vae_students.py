"""What the vae pass trains: a tiny auto-encoder, the teacher with a narrower decoder, or one that is there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffship.compression.swap_vae import latents_digest
from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.core.weights import SeededWeights, Weights, cast, joined, renamed, subset
from diffship.models.parts.autoencoder import KL, TINY, Decoder, Encoder, autoencoder, check_narrow, narrower
from diffship.models.parts.component import weight_metas
from diffship.models.pipeline import OWN, Module, Pipeline
from diffship.models.reduced.widths import KEY
from diffship.models.sources.arch_configs import tiny_vae
from diffship.models.sources.opening import vae_of
from diffship.training.vae_task import averages_of

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

NEW, SMALL = "tiny", "small"


def student_vae(kind: str, teacher: Pipeline, width: int, decoder: Sequence[int], seed: int) -> Module:
    """A student of the auto-encoder of `teacher`: class, config and first weights. `kind` is tiny, small or a source.

    New weights are drawn from `seed`, the same on every machine. Its config notes under `_diffship` whose latents it
    takes; stock diffusers passes over that.

    Raises:
        ConfigError: a source whose auto-encoder is a KL one with another encoder than the teacher.
        SourceError, UnsupportedError: the source cannot be read.
    """
    if kind == NEW:
        found = _new(TINY, _tiny_config(teacher, width), seed)
    elif kind == SMALL:
        found = _small(teacher, tuple(decoder), seed)
    else:
        found = _with_encoder_of(teacher, vae_of(kind, teacher.family.kind), kind)
    return Module(found.class_name, {**found.config, OWN: {"latents": latents_digest(teacher)}}, found.weights)


def _tiny_config(teacher: Pipeline, width: int) -> dict[str, Any]:
    family = teacher.family
    return tiny_vae(width, family.vae_factor.bit_length(), family.latent_channels)


def _small(teacher: Pipeline, decoder: tuple[int, ...], seed: int) -> Module:
    own = teacher.decoder.config
    config = {**own, KEY: {"decoder": list(decoder or narrower(own))}}
    check_narrow(KL, config)
    return Module(KL, config, joined(_encoder_of(teacher), _drawn(KL, config, seed, (Decoder,))))


def _with_encoder_of(teacher: Pipeline, given: Module, name: str) -> Module:
    """`given` as it is, if it is a tiny one; the decoder of a KL one behind the teacher's encoder."""
    if given.class_name == TINY:
        return Module(TINY, given.config, cast(given.weights, "float32"))
    own = teacher.encoder.config
    if _sizes(given.config) != _sizes(own):
        raise ConfigError(f"student {name} is an {KL} whose encoder is not like the teacher's, which it would keep")
    half = autoencoder(KL, given.config, given.weights)[1]
    config = {**given.config, "scaling_factor": teacher.family.scaling_factor}
    return Module(KL, config, joined(_encoder_of(teacher), cast(half.weights, "float32")))


def _sizes(config: Mapping[str, Any]) -> list[Any]:
    keys = ("block_out_channels", "layers_per_block", "latent_channels", "use_quant_conv", "norm_num_groups")
    return [list(value) if isinstance(value := config.get(key), tuple) else value for key in keys]


def _encoder_of(teacher: Pipeline) -> Weights:
    return cast(teacher.encoder.weights, "float32")


def _new(class_name: str, config: dict[str, Any], seed: int) -> Module:
    return Module(class_name, config, _drawn(class_name, config, seed, (Encoder, Decoder)))


def _drawn(class_name: str, config: Mapping[str, Any], seed: int, halves: Sequence[type]) -> Weights:
    metas = {}
    with torch.device("meta"):
        for half in halves:
            metas.update(weight_metas(half(class_name, config)))
    return SeededWeights(metas, seed)


def trained_vae(student: Module, state: Weights) -> Module:
    """The student with the averaged weights of a checkpoint; what was not trained is its teacher's."""
    averages = averages_of(state)
    kept = [name for name in student.weights.names() if name not in averages]
    if student.class_name == TINY:
        return Module(TINY, student.config, renamed(state, averages))
    return Module(KL, student.config, joined(subset(student.weights, kept), renamed(state, averages)))
