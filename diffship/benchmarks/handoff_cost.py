"""What a split of the steps costs each side, in multiply-accumulates counted from configs: nothing is run.

The cost curve of Hybrid SD (Yan et al. 2024, arXiv 2408.06646). As in that literature, MACs are those of convolutions
and linear layers; the two matrix products of attention, which fused kernels hide from its counters, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS
from diffship.models.cost import cost
from diffship.models.pipeline import Pipeline

TERA = 1e12


@dataclass(frozen=True)
class SplitCost:
    """MACs of one picture at one split: U-Net calls on each side, and the one decode, which either side can do."""

    split: tuple[int, int]  # steps of the cloud, then of the edge
    cloud: int
    edge: int
    whole: int  # U-Net calls of all steps on the cloud
    decode: int

    @property
    def saving(self) -> float:
        """Share of the cloud's U-Net work that leaves it."""
        return 1 - self.cloud / self.whole

    @property
    def saving_with_decode(self) -> float:
        """Share of the cloud's whole work that leaves it, where the edge decodes too."""
        return 1 - self.cloud / (self.whole + self.decode)


def cost_curve(
    cloud: Pipeline, edge: Pipeline, splits: Sequence[tuple[int, int]], size: int = 512, guided: bool | None = None
) -> list[SplitCost]:
    """Costs of one `size` x `size` picture for every split (calls of `cloud`, calls of `edge`).

    A `guided` call computes two samples (classifier-free guidance); by default models without a time condition are
    guided and consistency models are not. The decoder is that of `cloud`.

    Raises:
        ConfigError: a split that is not two numbers from 0 on with a legal sum, or a size that a model cannot draw.
    """
    checked = [_checked(split) for split in splits]
    rows = 1 + int(cloud.family.time_cond_dim is None if guided is None else guided)
    large, small = (rows * _macs(pipeline, "unet", size) for pipeline in (cloud, edge))
    decode = _macs(cloud, "vae_decoder", size)
    return [
        SplitCost((first, last), first * large, last * small, (first + last) * large, decode) for first, last in checked
    ]


def cost_table(curve: Sequence[SplitCost]) -> str:
    """The curve as Markdown, in TMAC (1e12) and percent."""
    lines = [
        "| split | cloud TMAC | edge TMAC | saving, U-Net | saving, the edge decodes too |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {','.join(map(str, point.split))} | {point.cloud / TERA:.2f} | {point.edge / TERA:.2f} "
        f"| {point.saving:.0%} | {point.saving_with_decode:.0%} |"
        for point in curve
    ]
    return "\n".join(lines)


def _macs(pipeline: Pipeline, part: str, size: int) -> int:
    height, width = pipeline.family.latent_size(size, size)
    return cost(pipeline.components[part], {"height": height, "width": width}).conv_linear_macs


def _checked(split: Sequence[int]) -> tuple[int, int]:
    low, high = LIMITS.steps
    if len(split) != 2 or min(split) < 0 or not low <= sum(split) <= high:
        raise ConfigError(f"split {tuple(split)} is not two numbers from 0 on that make {low} to {high} steps")
    return split[0], split[1]
