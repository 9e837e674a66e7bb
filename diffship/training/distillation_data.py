"""What a distillation step is made of: latents of pictures, encoded once or when needed, and encoded captions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffship import __version__
from diffship.core.errors import PeerError
from diffship.core.job import Job, digest_of
from diffship.core.lazy import lazy
from diffship.core.limits import GIB
from diffship.core.strict import plain
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.sampling.tokenizer import Tokenizer
from diffship.training.paired import PairedPictures
from diffship.training.saving import read_tensors, save_tensors

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from safetensors import torch as tensor_file
    from torch import Tensor, nn
else:
    torch, tensor_file = lazy("torch"), lazy("safetensors.torch")

_AT_ONCE = 8  # pictures encoded together
_WAIT_SECONDS = 24 * 3600


class Latents(Protocol):
    """Posteriors of encoded pictures, times the scaling factor."""

    def take(self, rows: Sequence[int], flips: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (n, channels, height, width) float32, of mirrored pictures if `flips`."""
        ...


class Encoder:
    """Pictures to posteriors, as they are asked for; a tiny auto-encoder's have no deviation."""

    def __init__(self, pipeline: Pipeline, pictures: PairedPictures, device: torch.device) -> None:
        self.pictures = pictures
        self.family = pipeline.family
        self.module = pipeline.encoder.module(str(device))
        self.device = device

    def take(self, rows: Sequence[int], flips: Sequence[bool]) -> tuple[Tensor, Tensor]:
        parts = [
            self._encode(rows[at : at + _AT_ONCE], flips[at : at + _AT_ONCE]) for at in range(0, len(rows), _AT_ONCE)
        ]
        return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])

    def _encode(self, rows: Sequence[int], flips: Sequence[bool]) -> tuple[Tensor, Tensor]:
        return self.encode(signed(self.pictures.pixels(rows, flips)).to(self.device))

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posteriors of pictures (n, 3, height, width) in [-1, 1]."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            parameters = self.module(pixels)[0]
        mean, deviation = parameters, torch.zeros_like(parameters)
        if parameters.shape[1] == 2 * self.family.latent_channels:
            mean, log_variance = parameters.chunk(2, dim=1)
            deviation = (0.5 * log_variance.clamp(-30, 20)).exp()
        scale = self.family.scaling_factor
        return (mean - self.family.shift_factor) * scale, deviation * scale


def signed(pixels: NDArray[np.uint8]) -> Tensor:
    """(n, height, width, 3) uint8 as (n, 3, height, width) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class HeldLatents:
    """Posteriors of every picture, in memory; behind them those of the mirrored pictures, if they are wanted."""

    def __init__(self, mean: Tensor, std: Tensor, count: int) -> None:
        self.mean, self.std, self.count = mean, std, count

    def take(self, rows: Sequence[int], flips: Sequence[bool]) -> tuple[Tensor, Tensor]:
        places = torch.tensor([row + self.count * flip for row, flip in zip(rows, flips, strict=True)])
        return self.mean[places], self.std[places]


def make_latents(
    pipeline: Pipeline,
    pictures: PairedPictures,
    flip: bool,
    most_gib: float,
    job: Job,
    device: torch.device,
    main: bool,
) -> Latents:
    """Latents of `pictures`: encoded once and kept in the job's folder if they take at most `most_gib`.

    The file is named by the digests of pictures and auto-encoder, and by this version. Of several processes the one
    that is `main` encodes.

    Raises:
        SourceError: a picture is damaged; it is named.
        PeerError: the main process has not encoded them within a day.
    """
    encoder = Encoder(pipeline, pictures, device)
    side = pictures.size // pipeline.family.vae_factor
    count = len(pictures) * (2 if flip else 1)
    if 8 * count * pipeline.family.latent_channels * side**2 > most_gib * GIB:
        _decode_all(pictures, job)
        return encoder
    vae, family = pipeline.encoder, pipeline.family
    facts = (__version__, vae.digest, plain(vae.config), family.scaling_factor, family.shift_factor)
    name = f"latents-{digest_of([pictures.digest, pictures.size, flip, *facts])[:40]}"
    if main:
        job.once(name, lambda path: _encode_all(encoder, flip, job, path))
    remedy = "Remove it, and the same command encodes the pictures anew"
    held = read_tensors(_awaited(job.folder / name), ("mean", "std"), remedy)
    return HeldLatents(held["mean"], held["std"], len(pictures))


def _encode_all(encoder: Encoder, flip: bool, job: Job, path: Path) -> None:
    count = len(encoder.pictures)
    parts = []
    for mirrored in (False, True)[: 1 + flip]:
        for at in range(0, count, _AT_ONCE):
            rows = range(at, min(at + _AT_ONCE, count))
            parts.append([tensor.cpu() for tensor in encoder.take(rows, [mirrored] * len(rows))])
            job.progress("encode pictures", rows.stop + count * mirrored, count * (1 + flip))
    mean, std = (torch.cat([part[i] for part in parts]).contiguous() for i in (0, 1))
    save_tensors(tensor_file.save_file, {"mean": mean, "std": std}, path)


def _decode_all(pictures: PairedPictures, job: Job) -> None:
    """A damaged picture is found now, and not after hours of training."""
    for row in range(len(pictures)):
        pictures.pixels([row])
        job.progress("look at pictures", row + 1, len(pictures))


def _awaited(path: Path) -> Path:
    until = time.monotonic() + _WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise PeerError(f"{path} was not written within {_WAIT_SECONDS} s; did the first process stop?")
        time.sleep(0.2)
    return path


class Captions:
    """Captions to what a U-Net takes beside picture and timestep; the encoders are frozen."""

    def __init__(self, pipeline: Pipeline, size: int, device: torch.device) -> None:
        self.family, self.size, self.device = pipeline.family, size, device
        self.parts = [
            (component, component.module(str(device)), _tokenizer(pipeline, name))
            for name, component in pipeline.texts.items()
        ]

    def __call__(self, captions: Sequence[str | None]) -> tuple[Tensor, ...]:
        """encoder_hidden_states (n, 77, width) and, for SDXL, text_embeds (n, pooled) and time_ids (n, 6), float32.

        None is a dropped caption: the empty prompt, or zeros if the family has those in its place. The size
        conditioning is that of a picture that was neither scaled nor cropped.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            states, pooled = zip(*(self._encode(*part, captions) for part in self.parts), strict=True)
        tensors = [torch.cat(states, dim=-1)]
        sizes = self.family.kind.size_conditions((self.size, self.size))
        if sizes:
            tensors.append(pooled[-1])
        if self.family.force_zeros_for_empty_prompt:
            empty = torch.tensor([caption is None for caption in captions], device=self.device)
            tensors = [tensor.masked_fill(empty.view(-1, *[1] * (tensor.dim() - 1)), 0) for tensor in tensors]
        ids = (torch.from_numpy(array).to(self.device) for array in sizes.values())
        return (*tensors, *(array.expand(len(captions), -1) for array in ids))

    def _encode(
        self, component: Component, module: nn.Module, tokenizer: Tokenizer, captions: Sequence[str | None]
    ) -> tuple[Tensor, Any]:
        ids = torch.from_numpy(tokenizer([caption or "" for caption in captions]).ids).to(self.device)
        made = dict(zip((spec.name for spec in component.outputs), module(ids), strict=True))
        if self.family.pooled_width is None:
            return made["last_hidden_state"], None
        layers = sum(name.startswith("hidden_states.") for name in made)
        return made[f"hidden_states.{layers - 2}"], made.get("text_embeds")


def _tokenizer(pipeline: Pipeline, part: str) -> Tokenizer:
    kind = pipeline.family.kind
    name = kind.tokenizer_of(part)
    return kind.tokenizer(name, pipeline.tokenizers[name])
