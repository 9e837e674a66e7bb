"""A pipeline on torch that never holds more than a stated part of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffship.core.precision import FP32, Precision
from diffship.core.runner import Handle, Runner
from diffship.exporters import golden
from diffship.models.model import PipelineModel
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline


class GatedModel(PipelineModel):
    """A Model in float32 whose parts are run stage by stage if they have more than `max_bytes` of weights.

    precision, moved: which format is simulated in the denoiser, and how (`golden.simulated`).
    """

    def __init__(self, pipeline: Pipeline, max_bytes: int, precision: Precision = FP32, moved: bool = False) -> None:
        super().__init__(pipeline)
        self.digests = {}  # nobody asks here, and reading every weight takes long
        self.digest = ""
        self._max_bytes = max_bytes
        self._precision = precision
        self._moved = moved

    def use(self, part: str) -> Runner:
        component = self.pipeline.components[part]
        if part == self.family.kind.denoiser and (self._moved or not self._precision.lossless):
            return _Staged(component, self._max_bytes, self._precision, self._moved)
        return super().use(part) if 4 * component.parameters <= self._max_bytes else _Staged(component, self._max_bytes)


class _Staged:
    """A part run stage by stage: each call reads its weights again."""

    def __init__(self, component: Component, max_bytes: int, precision: Precision = FP32, moved: bool = False) -> None:
        self.inputs = component.inputs
        self.outputs = component.outputs
        self._component = component
        self._max_bytes = max_bytes
        self._precision = precision
        self._moved = moved

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {name: np.asarray(feed.value if isinstance(feed, Handle) else feed) for name, feed in feeds.items()}
        if self._precision.lossless and not self._moved:
            return dict(golden.reference(self._component, arrays, self._max_bytes))
        return dict(golden.simulated(self._component, arrays, self._max_bytes, self._precision, self._moved))

    def put(self, array: Any) -> Handle:
        return Handle(np.asarray(array), tuple(np.shape(array)))

    def close(self) -> None:
        """Nothing stays open between calls."""
