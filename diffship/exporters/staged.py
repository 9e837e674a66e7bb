"""A pipeline whose denoiser is cut into stages, each a part of its own, and the feeds that prove them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.staging import Staging
from diffship.exporters.golden import reference
from diffship.exporters.golden_feeds import GoldenFeeds
from diffship.exporters.protocol import Target
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.models.walks.cost import layer_costs
from diffship.models.walks.cuts import Cuts, find_cuts, partition, usual_kind
from diffship.models.walks.stages import Stage

Arrays = dict[str, NDArray[np.generic]]


def check_stages(exporter: Target, stages: int | None, cut: str | None, steps: int | None) -> None:
    """Whether a denoiser can be cut into `stages` for this target; `steps`: of the golden trajectory that is asked for.

    Raises:
        ConfigError: fewer than two, a cut without stages, or a trajectory, which takes a whole denoiser.
        UnsupportedError: the target has no stages.
    """
    if stages is None:
        if cut is not None:
            raise ConfigError(f"cut is {cut}, and no stages are asked for; add --stages N")
        return
    if stages < 2:
        raise ConfigError(f"stages is {stages}; legal: 2 or more, or leave it out for one part")
    if steps:
        raise ConfigError(
            "a bundle of stages has no golden trajectory: each stage is proved alone. Leave --trajectory out"
        )
    if exporter.name != "onnx":
        raise UnsupportedError(f"stages are not built for {exporter.name}; export them with --to onnx")


def find_staging(pipeline: Pipeline, stages: int, cut: str | None = None) -> Staging:
    """Where the denoiser of `pipeline` is cut for `stages` devices.

    cut: one of models.walks.cuts.KINDS; if None, the published one if there is one for this U-Net, else `speed`.
    Costs are counted at the model's own size with guidance's two rows.

    Raises:
        ConfigError: there is no denoiser, or no such cut. UnsupportedError: it is no U-Net.
    """
    kind, family = pipeline.family.kind, pipeline.family
    if kind.denoiser not in pipeline.components:
        raise ConfigError(f"stages are cut from {kind.denoiser}, and it is not exported; name it in --parts")
    whole = pipeline.denoiser
    sizes = {**whole.smallest_sizes(), "batch_size": 2, **kind.axis_sizes(family, *family.default_sides)}
    cuts = find_cuts(whole, stages, cut, sizes)
    made, costs = partition(whole, cuts), layer_costs(whole, sizes)
    macs = tuple(sum(costs[layer].macs for layer in stage.layers) for stage in made)
    names = tuple(stage.name for stage in made)
    return Staging(whole.name, names, cuts.homes, cut or usual_kind(whole.config, stages), cuts.at, macs)


def staged(pipeline: Pipeline, staging: Staging) -> Pipeline:
    """`pipeline` with the stages of its denoiser in the place of the denoiser."""
    made = {stage.name: stage for stage in _stages(pipeline, staging)}
    components: dict[str, Component] = {}
    for name, component in pipeline.components.items():
        components |= made if name == staging.part else {name: component}
    return replace(pipeline, components=components)


def references(
    truth: Pipeline, staging: Staging | None, max_bytes: int
) -> tuple[Mapping[str, Component], GoldenFeeds | StagedFeeds]:
    """What torch computes the references from: components by part name, and the feeds of each."""
    feeds = GoldenFeeds(truth, max_bytes)
    if staging is None:
        return truth.components, feeds
    stages = _stages(truth, staging)
    return staged(truth, staging).components, StagedFeeds(feeds, truth.denoiser, stages, max_bytes)


def _stages(pipeline: Pipeline, staging: Staging) -> list[Stage]:
    return partition(pipeline.denoiser, Cuts(staging.after, staging.homes))


@dataclass
class StagedFeeds:
    """Feeds as GoldenFeeds has them; a stage gets what the stages before it give for the feeds of the whole.

    So its tensors are those that it meets in use, and if every stage meets its references, the chain of them does.
    """

    feeds: GoldenFeeds
    whole: Component
    stages: Sequence[Stage]
    max_bytes: int
    _known: dict[tuple[tuple[str, int], ...], list[Arrays]] = field(default_factory=dict)

    def calls(self, component: Component, sizes: Mapping[str, int]) -> list[Arrays]:
        """The feeds of each golden call of `component` at `sizes` (by axis)."""
        if component.name not in [stage.name for stage in self.stages]:
            return self.feeds.calls(component, sizes)
        key = tuple(sorted(sizes.items()))
        if key not in self._known:
            self._known[key] = [self._through(feeds) for feeds in self.feeds.calls(self.whole, sizes)]
        return [{spec.name: values[spec.name] for spec in component.inputs} for values in self._known[key]]

    def inside(self, component: Component, sizes: Mapping[str, int]) -> Arrays:
        """What the blocks of `component` are proved on."""
        if component.name not in [stage.name for stage in self.stages]:
            return self.feeds.inside(component, sizes)
        return self.calls(component, sizes)[0]

    def _through(self, feeds: Arrays) -> Arrays:
        """`feeds` and every tensor that crosses between stages, in float32."""
        values = dict(feeds)
        for stage in self.stages[:-1]:
            values |= reference(stage, {spec.name: values[spec.name] for spec in stage.inputs}, self.max_bytes)
        return values
