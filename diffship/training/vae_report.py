"""What a cheap auto-encoder does to pictures and latents, beside the one whose latents it takes; faults by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from diffship.core.atomic import write_file
from diffship.core.brief import brief
from diffship.core.lazy import lazy
from diffship.core.strict import plain
from diffship.training.distillation_report import grid, picture_bytes, write_curve
from diffship.training.perceptual import Features, distance

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

Map: TypeAlias = "Callable[[Tensor], Tensor]"

_SCALES = tuple(2.0 ** (half / 2) for half in range(-6, 7))  # that latents may be off by
_AT_ONCE = 2
_BETTER = 0.8  # of the error at scale 1: another scale is the right one
_NEAR, _LIMIT = 0.9, 0.98  # what is inside, and what lies at an end of the range of pictures
# what is found to be a fault
MOST_SATURATED, MOST_SHIFT, MOST_GAIN, MOST_SLOPE, MOST_LEFT = 0.02, 0.05, 1.2, 1.25, 0.5


@dataclass(frozen=True)
class Sides:
    """An auto-encoder as a pipeline uses it: `decode` makes pictures in [-1, 1], not clamped, of latents as the U-Net
    has them; `encode` is the way back, None if it is the reference's own."""

    decode: Map
    encode: Map | None


@brief
@dataclass(frozen=True)
class VaeReport:
    """Figures over some pictures, of latents that the reference made of them.

    psnr, reference_psnr: of the pictures that come back, in dB. between: of ours against the reference's. perceptual:
    distance of ours from the pictures in the features of the run, None without. gain, shift: of red, green and blue,
    the slope by which ours follow the reference's, and the difference of the means (1 and 0 are right). saturated:
    share of values that ours drives to an end of the range and the reference does not. scale: the factor of the latents
    at which ours comes nearest the reference; 1 is right. slope: by which our latents follow the reference's, None
    without an encoder. unexplained: squared error over the variance of the reference's pictures: 1 is a picture that
    has nothing of them. found: faults in words.
    """

    pictures: int
    psnr: float
    reference_psnr: float
    between: float
    perceptual: float | None
    gain: tuple[float, ...]
    shift: tuple[float, ...]
    saturated: float
    scale: float
    slope: float | None
    unexplained: float
    found: tuple[str, ...] = ()

    @property
    def foreign(self) -> bool:
        """Whether ours takes latents of another family, or at another scale."""
        return self.unexplained > MOST_LEFT or self.scale != 1


def compare(reference: Sides, ours: Sides, pictures: Tensor, features: Features | None = None) -> VaeReport:
    """Both auto-encoders on `pictures` (n, 3, height, width) in [-1, 1]; the reference has an encoder."""
    assert reference.encode is not None  # what latents would be compared otherwise
    with torch.no_grad():
        latents = in_parts(reference.encode, pictures)
        theirs, drawn = (in_parts(one.decode, latents) for one in (reference, ours))
        slope = None if ours.encode is None else _slope(latents, in_parts(ours.encode, pictures))
        gain, shift = _lines(theirs.clamp(-1, 1), drawn.clamp(-1, 1))
        figures = VaeReport(
            pictures=len(pictures),
            psnr=_psnr(drawn, pictures),
            reference_psnr=_psnr(theirs, pictures),
            between=_psnr(drawn, theirs.clamp(-1, 1)),
            perceptual=None if features is None else _distance(features, drawn, pictures),
            gain=gain,
            shift=shift,
            saturated=((drawn.abs() >= _LIMIT) & (theirs.abs() < _NEAR)).float().mean().item(),
            scale=_scale(ours.decode, latents[:_AT_ONCE], theirs[:_AT_ONCE]),
            slope=slope,
            unexplained=_unexplained(drawn.clamp(-1, 1), theirs.clamp(-1, 1)),
        )
    return replace(figures, found=tuple(faults(figures)))


def in_parts(made: Map, given: Tensor) -> Tensor:
    """`made` of a few of `given` at a time: a KL decoder takes gigabytes for eight pictures of 512 px."""
    return torch.cat([made(part) for part in torch.split(given, _AT_ONCE)])


def faults(report: VaeReport) -> list[str]:
    """What is wrong, in words; empty if nothing is."""
    found = []
    if report.scale != 1:
        found.append(f"wrong scale: the decoder comes nearest with latents times {report.scale:.3g}")
    if report.slope is not None and not 1 / MOST_SLOPE <= report.slope <= MOST_SLOPE:
        found.append(f"wrong scale: the encoder's latents are {report.slope:.3g} times as large as the model's")
    if max(map(abs, report.shift)) > MOST_SHIFT or not all(1 / MOST_GAIN <= one <= MOST_GAIN for one in report.gain):
        lines = "; ".join(
            f"{name} {gain:.2f} x {shift:+.2f}"
            for name, gain, shift in zip(("red", "green", "blue"), report.gain, report.shift, strict=True)
        )
        found.append(f"shifted colours, in [-1, 1]: {lines}")
    if report.saturated > MOST_SATURATED:
        found.append(f"saturates: {100 * report.saturated:.1f} % of the values lie at an end of the range")
    if report.unexplained > MOST_LEFT:
        found.append(
            f"other pictures: {100 * report.unexplained:.0f} % of their variance is error; it takes latents of "
            "another family, or has not learnt yet"
        )
    return found


def _distance(features: Features, ours: Tensor, pictures: Tensor) -> float:
    pairs = zip(torch.split(ours, _AT_ONCE), torch.split(pictures, _AT_ONCE), strict=True)
    return torch.cat([distance(features, a, b) for a, b in pairs]).mean().item()


def _psnr(ours: Tensor, pictures: Tensor) -> float:
    error = (ours.clamp(-1, 1) - pictures).square().mean().item()
    return float(10 * np.log10(4 / max(error, 1e-12)))


def _lines(theirs: Tensor, ours: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(slopes of the least-squares lines of ours over theirs, differences of the means), channel by channel."""
    x, y = (side.double().transpose(0, 1).flatten(1) for side in (theirs, ours))
    means = (x.mean(1), y.mean(1))
    varying = (x - means[0][:, None]).square().mean(1).clamp(min=1e-12)
    gain = ((x - means[0][:, None]) * (y - means[1][:, None])).mean(1) / varying
    return tuple(gain.tolist()), tuple((means[1] - means[0]).tolist())


def _slope(theirs: Tensor, ours: Tensor) -> float:
    return ((theirs * ours).sum() / theirs.square().sum().clamp(min=1e-12)).item()


def _scale(decode: Map, latents: Tensor, theirs: Tensor) -> float:
    errors = {scale: (decode(latents * scale).clamp(-1, 1) - theirs.clamp(-1, 1)).square().mean() for scale in _SCALES}
    best = min(errors, key=lambda scale: float(errors[scale]))
    return best if errors[best] < _BETTER * errors[1.0] else 1.0


def _unexplained(ours: Tensor, theirs: Tensor) -> float:
    varying = (theirs - theirs.mean((2, 3), keepdim=True)).square().mean()
    return ((ours - theirs).square().mean() / varying.clamp(min=1e-12)).item()


class Report:
    """Called with a step: writes `curve.png`, `report.json` and `validation-STEP.png` into the run's folder.

    A column of the pictures is one of `pictures`; its rows are the picture itself, the reference's and ours.
    """

    def __init__(
        self,
        reference: Sides,
        ours: Sides,
        pictures: Tensor,
        features: Features | None,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        self.reference, self.ours, self.pictures, self.features = reference, ours, pictures, features
        self.folder, self.note = folder, note

    def __call__(self, step: int) -> None:
        write_curve(self.folder / "curve.jsonl", self.folder / "curve.png")
        found = compare(self.reference, self.ours, self.pictures, self.features)
        write_file(self.folder / "report.json", json.dumps({"step": step, **plain(found)}, indent=1) + "\n")
        write_file(self.folder / f"validation-{step:06d}.png", self._drawn())
        told = "; ".join(found.found)
        self.note(f"step {step}: {found.psnr:.1f} dB, the teacher {found.reference_psnr:.1f} dB. {told}".strip())

    def _drawn(self) -> bytes:
        assert self.reference.encode is not None
        with torch.no_grad():
            latents = in_parts(self.reference.encode, self.pictures)
            rows = [self.pictures, *(in_parts(one.decode, latents) for one in (self.reference, self.ours))]
        return picture_bytes(grid([_pixels(one) for row in rows for one in row], len(self.pictures)))


def _pixels(picture: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rounded = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.asarray(rounded.permute(1, 2, 0).cpu().numpy())


def read_report(folder: Path) -> dict[str, object]:
    """What the last `report.json` of a run says; empty if there is none."""
    file = folder / "report.json"
    if not file.is_file():
        return {}
    found: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    return found
