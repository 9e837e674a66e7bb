"""How far apart two pictures look: LPIPS over VGG or AlexNet, its shift-tolerant form, or the judge's features.

LPIPS (Zhang et al., arXiv 1801.03924): features of five depths are scaled to unit length at every place, and their
squared differences are weighed channel by channel, averaged over places and summed over depths. Shift-tolerant LPIPS
(Ghildyal and Liu, arXiv 2207.13686) takes its features from networks that blur before they leave out every other pixel.

A folder holds `config.json`, `{"network": "vgg16"}`, and `model.safetensors`: `convolutions.N.weight` and `.bias` in
the network's order, `heads.N` (channels,) for each depth. `scripts/prepare_perceptual.py` writes such folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffship.core.brief import brief
from diffship.core.document import read_json
from diffship.core.errors import SourceError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.limits import LIMITS
from diffship.core.strict import unknown
from diffship.core.weights import SafetensorsWeights, source_digest
from diffship.models.parts.component import read_tensor
from diffship.models.sources.opening import packaged
from diffship.training.judge_model import Judge, load_judge

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import Module
    from torch.nn import functional as F
else:
    torch, nn, F = lazy("torch"), lazy("torch.nn"), lazy("torch.nn.functional")
    Module = lazy_base("torch.nn", "Module")

JUDGE, NONE = "judge", "none"
_TINY = 1e-10  # of a vector's length: a dead place has no direction, and its gradient must not be infinite
# of pictures in [-1, 1]: what LPIPS was trained with
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Conv:
    """A convolution and a ReLU; if `blur`, every other pixel is left out between the two."""

    outputs: int
    kernel: int = 3
    padding: int = 1
    blur: bool = False


@dataclass(frozen=True)
class Pool:
    """Maxima of `kernel` x `kernel` pixels, every other one kept; blurred before they are left out if `blur`."""

    kernel: int = 2
    blur: bool = False


def _vgg16(blur: bool) -> tuple[tuple[Conv | Pool, ...], ...]:
    pool = Pool(2, blur)
    widths = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
    return tuple((*((pool,) if depth else ()), *map(Conv, row)) for depth, row in enumerate(widths))


_POOL3 = Pool(3, blur=True)
# by network: the layers up to each depth whose features are compared
NETWORKS: dict[str, tuple[tuple[Conv | Pool, ...], ...]] = {
    "vgg16": _vgg16(blur=False),
    "st-vgg16": _vgg16(blur=True),
    "st-alexnet": (
        (Conv(64, 11, 2, blur=True),),
        (_POOL3, Conv(192, 5, 2)),
        (_POOL3, Conv(384)),
        (Conv(256),),
        (Conv(256),),
    ),
}


class Features(Protocol):
    """What compares pictures: feature maps of several depths, and how the channels of each are weighed."""

    heads: Sequence[Tensor]

    def depths(self, pictures: Tensor) -> list[Tensor]:
        """[(n, channels, height, width)] of pictures (n, 3, height, width) in [-1, 1]."""
        ...


class Lpips(Module):
    """One of NETWORKS with its heads."""

    heads: Any  # a ParameterList
    shift: Tensor
    scale: Tensor

    def __init__(self, layers: Sequence[Sequence[Conv | Pool]]) -> None:
        super().__init__()
        self.layers = layers
        flat = [layer for depth in layers for layer in depth if isinstance(layer, Conv)]
        inputs = [3, *(layer.outputs for layer in flat)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, layer.outputs, layer.kernel, padding=layer.padding)
            for before, layer in zip(inputs, flat, strict=False)
        )
        last = [[layer for layer in depth if isinstance(layer, Conv)][-1] for depth in layers]
        self.heads = nn.ParameterList(nn.Parameter(torch.ones(layer.outputs)) for layer in last)
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def depths(self, pictures: Tensor) -> list[Tensor]:
        x, found, convolutions = (pictures - self.shift) / self.scale, [], iter(self.convolutions)
        for depth in self.layers:
            for layer in depth:
                x = _pooled(x, layer) if isinstance(layer, Pool) else _convolved(x, layer, next(convolutions))
            found.append(x)
        return found


def _convolved(x: Tensor, layer: Conv, convolution: Module) -> Tensor:
    x = convolution(x)
    return F.relu(blurred(x) if layer.blur else x)


def _pooled(x: Tensor, layer: Pool) -> Tensor:
    return blurred(F.max_pool2d(x, layer.kernel, 1)) if layer.blur else F.max_pool2d(x, layer.kernel, 2)


def blurred(x: Tensor) -> Tensor:
    """Every other pixel of `x` blurred by (1 2 1) / 4 along both sides, two pixels mirrored around it."""
    line = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device) / 4
    kernel = (line[:, None] * line[None, :]).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


class JudgeFeatures(Module):
    """The judge of `emoji`, its stem and its stages, at the pictures' own size; all channels weigh the same."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge
        self.heads = [torch.ones(1) for _ in range(1 + len(judge.stages))]

    def depths(self, pictures: Tensor) -> list[Tensor]:
        found = [F.silu(self.judge.stem(pictures))]
        for stage in self.judge.stages:
            found.append(stage(found[-1]))
        return found


def distance(features: Features, first: Tensor, second: Tensor) -> Tensor:
    """(n,) LPIPS of pictures (n, 3, height, width) in [-1, 1]."""
    pairs = zip(features.depths(first), features.depths(second), features.heads, strict=True)
    parts = [
        (head.to(a.device)[:, None, None] * (_unit(a) - _unit(b)).square()).sum(1).mean((1, 2)) for a, b, head in pairs
    ]
    return torch.stack(parts).sum(0)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + _TINY**2).sqrt()


@brief
@dataclass(frozen=True)
class Perceptual:
    """Which features a run compares pictures by: `network` as reports name it, and the digest of its weights."""

    network: str
    digest: str
    folder: Path | None = None

    @classmethod
    def find(cls, name: str) -> Perceptual:
        """`judge`, `none`, or a folder of weights; headers are checked, and no network is made.

        Raises:
            SourceError: the folder is not there, or its files are not as the module says.
        """
        if name == NONE:
            return cls(NONE, "")
        if name == JUDGE:
            home = packaged("emoji")
            if home is None:
                raise SourceError("the judge of emoji is not in this package; name a folder of LPIPS weights")
            return cls(JUDGE, source_digest(SafetensorsWeights(home / "judge" / "model.safetensors")), home / "judge")
        folder = Path(name).expanduser()
        weights = _weights(folder)
        return cls(_network(folder, weights), source_digest(weights), folder)

    def load(self, device: torch.device) -> Features | None:
        """The frozen network; None for `none`."""
        if self.folder is None:
            return None
        made = JudgeFeatures(load_judge(self.folder)) if self.network == JUDGE else self._lpips(self.folder)
        return made.eval().requires_grad_(False).to(device)  # type: ignore[return-value]

    def _lpips(self, folder: Path) -> Lpips:
        made, weights = Lpips(NETWORKS[self.network]), _weights(folder)
        made.load_state_dict({name: read_tensor(weights, name).float() for name in made.state_dict()})
        return made


def _weights(folder: Path) -> SafetensorsWeights:
    if not folder.is_dir():
        raise SourceError(
            f"perceptual={folder} is no folder; legal: {JUDGE}, {NONE}, or a folder of weights "
            "(scripts/prepare_perceptual.py)"
        )
    return SafetensorsWeights(folder / "model.safetensors")


def _network(folder: Path, weights: SafetensorsWeights) -> str:
    config: Any = read_json(folder / "config.json", LIMITS.manifest_bytes, SourceError)
    name = config.get("network") if isinstance(config, dict) else None
    if name not in NETWORKS:
        raise SourceError(f"{folder / 'config.json'}: {unknown('network', name, NETWORKS)}")
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in Lpips(NETWORKS[name]).state_dict().items()}
    found = {key: weights.meta(key).shape for key in weights.names()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise SourceError(
            f"{folder / 'model.safetensors'}: {wrong[0]} has shape {found.get(wrong[0])}; {name} takes "
            f"{expected.get(wrong[0])}"
        )
    return str(name)
