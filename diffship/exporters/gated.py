"""A pipeline on torch that never holds more than a stated part of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffship.core.runner import Handle, Runner
from diffship.exporters import golden
from diffship.models.component import Component
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline


class GatedModel(PipelineModel):
    """A Model in float32 whose parts are run stage by stage where they have more than `max_bytes` of weights.

    precision: of which format the error is simulated in the denoiser (`golden.simulated`); fp32 for none.
    """

    def __init__(self, pipeline: Pipeline, max_bytes: int, precision: str = "fp32") -> None:
        super().__init__(pipeline)
        self.digests = {}  # nobody asks here, and reading every weight takes long
        self.digest = ""
        self._max_bytes = max_bytes
        self._precision = precision

    def use(self, part: str) -> Runner:
        component = self.pipeline.components[part]
        if part == self.family.kind.denoiser and self._precision != "fp32":
            return _Staged(component, self._max_bytes, self._precision)
        count = sum(component.weights.meta(name).count for name in component.weights.names())
        return super().use(part) if 4 * count <= self._max_bytes else _Staged(component, self._max_bytes)


class _Staged:
    """A part run stage by stage: each call reads its weights again."""

    def __init__(self, component: Component, max_bytes: int, precision: str = "fp32") -> None:
        self.inputs = component.inputs
        self.outputs = component.outputs
        self._component = component
        self._max_bytes = max_bytes
        self._precision = precision

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {name: np.asarray(feed.value if isinstance(feed, Handle) else feed) for name, feed in feeds.items()}
        if self._precision == "fp32":
            return dict(golden.reference(self._component, arrays, self._max_bytes))
        return dict(golden.simulated(self._component, arrays, self._max_bytes, self._precision))

    def put(self, array: Any) -> Handle:
        return Handle(np.asarray(array), tuple(np.shape(array)))

    def close(self) -> None:
        """Nothing stays open between calls."""
