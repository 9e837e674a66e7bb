"""Teachers that people have: a source with another U-Net config, its weights drawn from a seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from diffship.core.weights import SeededWeights
from diffship.models.assemble import assemble
from diffship.models.parts.component import weight_metas
from diffship.models.parts.unet import UNet
from diffship.models.pipeline import Pipeline
from diffship.models.sources.arch import arch_material


def teacher_with(source: str, **changes: Any) -> Pipeline:
    """`source` (arch:NAME) with keys of its U-Net's config changed."""
    material = arch_material(source)
    unet = material.modules["unet"]
    config = {**unet.config, **changes}
    with torch.device("meta"):
        metas = weight_metas(UNet(config))
    changed = replace(unet, config=config, weights=SeededWeights(metas, 3))
    return assemble(replace(material, modules={**material.modules, "unet": changed}))
