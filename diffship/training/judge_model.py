"""The judge of `emoji`: a small image tower and caption tower trained on real pictures only.

A contrastive pair of encoders in the sense of CLIP (Radford et al. 2021, fig. 3), small enough for a CPU. It never sees
a generated picture while it is trained. What it is used for lives in `diffship.benchmarks.studies.quality.scores`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from diffship.core.lazy import lazy, lazy_base
from diffship.core.strict import load

if TYPE_CHECKING:
    import torch
    from safetensors import torch as tensors
    from torch import Tensor, nn
    from torch.nn import Module
    from torch.nn import functional as F
else:
    torch, nn, F = lazy("torch"), lazy("torch.nn"), lazy("torch.nn.functional")
    tensors, Module = lazy("safetensors.torch"), lazy_base("torch.nn", "Module")


@dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the two towers; `input_size` is the side in pixels that pictures are reduced to."""

    vocabulary: int = 4300
    widths: tuple[int, ...] = (32, 64, 128, 192)
    caption_width: int = 192
    embedding: int = 128
    input_size: int = 64


class Residual(Module):
    """(b, i, h, w) -> (b, o, h/2, w/2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x)))))
        return F.silu(inner + self.skip(x))


class Judge(Module):
    """Scores how well a picture fits a caption: cosine of two unit vectors."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        self.stages = nn.ModuleList(Residual(a, b) for a, b in pairwise(widths))
        self.image_out = nn.Linear(widths[-1] * 2, config.embedding)
        self.words = nn.Embedding(config.vocabulary, config.caption_width)
        self.caption_in = nn.Linear(config.caption_width, config.caption_width)
        self.caption_out = nn.Linear(config.caption_width, config.embedding)
        self.log_scale = nn.Parameter(torch.tensor(2.6))

    def features(self, pictures: Tensor) -> Tensor:
        """(b, 3, size, size) float32 in [-1, 1] -> (b, 2 * widths[-1]): mean and maximum over places."""
        x = F.silu(self.stem(F.adaptive_avg_pool2d(pictures, self.config.input_size)))
        for stage in self.stages:
            x = stage(x)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)

    def see(self, pictures: Tensor) -> Tensor:
        """Unit vectors (b, embedding) of pictures (b, 3, size, size) in [-1, 1]."""
        return F.normalize(self.image_out(self.features(pictures)), dim=-1)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors (b, embedding) of captions: ids (b, n) int64, mask (b, n) 1 where a token counts."""
        weights = mask.to(self.words.weight.dtype).unsqueeze(-1)
        mean = (self.words(ids) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return F.normalize(self.caption_out(F.silu(self.caption_in(mean)) + mean), dim=-1)


def save_judge(judge: Judge, folder: Path) -> None:
    """Write `config.json` and fp16 `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(judge.config), indent=2) + "\n", encoding="utf-8")
    tensors.save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, folder / "model.safetensors")


def load_judge(folder: Path) -> Judge:
    """Read a judge written by `save_judge`, in float32, ready for use; raises ConfigError for another config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    judge = Judge(load(JudgeConfig, config, str(folder / "config.json")))
    judge.load_state_dict({k: v.float() for k, v in tensors.load_file(folder / "model.safetensors").items()})
    return judge.eval().requires_grad_(False)
