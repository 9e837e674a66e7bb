"""The swap-vae pass: another auto-encoder for the same latents, TAESD say; latents of another family are refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffship.compression.outline import Outline
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.job import Job
from diffship.core.lazy import lazy
from diffship.core.problem import Problem
from diffship.core.strict import bounded, plain
from diffship.models.assemble import with_vae
from diffship.models.digests import remembered_digest
from diffship.models.pipeline import OWN, Module, Pipeline, recorded
from diffship.models.sources.opening import vae_of
from diffship.training.vae_report import Sides, VaeReport, compare
from diffship.training.vae_task import halves_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

_SIDE, _PICTURES = 128, 2


@dataclass(frozen=True)
@bounded
class SwapVaePass:
    """Draw with the auto-encoder of another source, for the latents that the U-Net has.

    vae: a source that has one: a folder, a file, a hub id (madebyollin/taesd, say), what the pass `vae` wrote. force:
    put it in though it makes other pictures of the same latents than the model's own one.
    """

    kind: ClassVar[str] = "swap-vae"
    kept: ClassVar[bool] = False  # made in seconds
    role: ClassVar[str] = "decoder"  # whose cost a dry run tells

    vae: str
    force: bool = False

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """What configs alone tell: a source without one, latents of another shape."""
        try:
            with_vae(pipeline, vae_of(self.vae, pipeline.family.kind))
        except DiffshipError as fault:
            return [Problem.of("vae", fault)]
        return []

    def outline(self, pipeline: Pipeline) -> Outline:
        """The shapes of the other auto-encoder; a few pictures are decoded to try it, which is not counted."""
        return Outline(with_vae(pipeline, vae_of(self.vae, pipeline.family.kind)))

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with the other auto-encoder and its scale of latents; what is odd about it is told.

        Raises:
            ConfigError: it makes other pictures of the same latents, and is not forced.
        """
        job.progress("try the VAE", 0, 1)
        made, report = swap_vae(pipeline, vae_of(self.vae, pipeline.family.kind), self.force)
        for fault in () if report is None else report.found:
            job.progress(f"warning: {fault}", 1, 1)
        job.progress("try the VAE", 1, 1)
        entry = {"pass": self.kind, **asdict(self), "report": None if report is None else plain(report)}
        return recorded(made, entry)


def swap_vae(pipeline: Pipeline, vae: Module, force: bool = False) -> tuple[Pipeline, VaeReport | None]:
    """`pipeline` with `vae`, and how the two auto-encoders compare; None if the pipeline's weights are random.

    Raises:
        ConfigError: latents of another shape; or it makes other pictures of the same latents, and `force` is not set.
    """
    made = with_vae(pipeline, vae)
    if pipeline.source.get("kind") == "arch":
        return made, None
    report = tried(pipeline, made)
    if report.foreign and not force and not _says_so(pipeline, vae):
        raise ConfigError(_refusal(report, "set force=true to put it in all the same"))
    return made, report


def require_same_latents(pipeline: Pipeline, other: Pipeline) -> None:
    """Raises ConfigError if the auto-encoder of `other` makes other pictures of the latents of `pipeline`."""
    if "arch" not in (pipeline.source.get("kind"), other.source.get("kind")):
        report = tried(pipeline, other)
        if report.foreign:
            raise ConfigError(_refusal(report, "name one of the same family"))


def tried(pipeline: Pipeline, other: Pipeline) -> VaeReport:
    """Both auto-encoders on pictures of soft colours and sharp edges; needs no data."""
    theirs, ours = (
        Sides(decoder.decode, encoder.encode)
        for encoder, decoder in (halves_of(one, "cpu") for one in (pipeline, other))
    )
    return compare(theirs, ours, drawn_pictures(_PICTURES, _SIDE))


def drawn_pictures(count: int, side: int) -> Tensor:
    """(count, 3, side, side) in [-1, 1]: a disc and a bar before soft colours, on white in every other picture."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(count, 3, 3, 3, generator=generator) * 1.6 - 0.8
    coarse[::2] = 1
    pictures = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True).clamp(-1, 1)
    place = torch.linspace(-1, 1, side)
    disc = (place[:, None] + 0.3).square() + (place[None, :] - 0.2).square() < 0.2
    bar = ((place[:, None] - 0.5).abs() < 0.15).expand(side, side)
    for shape in (disc, bar):
        colours = torch.rand(count, 3, 1, generator=generator) * 1.8 - 0.9
        pictures[:, :, shape] = colours
    return pictures


def latents_digest(pipeline: Pipeline) -> str:
    """Whose latents a pipeline has: what its auto-encoder says of itself, or else the digest of its encoder."""
    own = pipeline.encoder.config.get(OWN)
    said = own.get("latents") if isinstance(own, dict) else None
    return str(said) if said else remembered_digest(pipeline.encoder.weights)


def _says_so(pipeline: Pipeline, vae: Module) -> bool:
    own: Any = vae.config.get(OWN)
    return isinstance(own, dict) and own.get("latents") == latents_digest(pipeline)


def _refusal(report: VaeReport, remedy: str) -> str:
    return f"the VAE does not fit the model's latents: {'; '.join(report.found)}. {remedy[0].upper()}{remedy[1:]}"
