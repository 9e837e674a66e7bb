"""Teachers that people have: a source with another U-Net config, its weights drawn from a seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from diffship.core.weights import SeededWeights
from diffship.models.arch import arch_material
from diffship.models.assemble import assemble
from diffship.models.component import weight_metas
from diffship.models.pipeline import Pipeline
from diffship.models.unet import UNet


def teacher_with(source: str, **changes: Any) -> Pipeline:
    """`source` (arch:NAME) with keys of its U-Net's config changed."""
    material = arch_material(source)
    unet = material.modules["unet"]
    config = {**unet.config, **changes}
    with torch.device("meta"):
        metas = weight_metas(UNet(config))
    changed = replace(unet, config=config, weights=SeededWeights(metas, 3))
    return assemble(replace(material, modules={**material.modules, "unet": changed}))
