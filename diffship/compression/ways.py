"""The widths that each layer of a U-Net may take, and what they cost: what a budget is spent on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffship.calibration.budget import Option, Solution, draw, isotonic, solve
from diffship.compression.interior import Layer, layers, unit_macs
from diffship.models.pipeline import Pipeline
from diffship.models.walks.cost import cost


@dataclass(frozen=True)
class Ways:
    """widths: of each layer by its name, descending, its present size first. figure: what the budget counts,
    `parameters` or `MACs`. units: of it, what one channel or head of each layer costs. total: of the whole U-Net now.
    capacity: what may be left of that."""

    layers: tuple[Layer, ...]
    widths: Mapping[str, tuple[int, ...]]
    figure: str
    units: Mapping[str, int]
    total: int
    capacity: int

    @property
    def fixed(self) -> int:
        """The cost of everything that is never narrowed."""
        return self.total - sum(layer.size * self.units[layer.name] for layer in self.layers)

    @property
    def least(self) -> int:
        """The cost of the U-Net with every layer at its least width."""
        return self.fixed + sum(self.widths[layer.name][-1] * self.units[layer.name] for layer in self.layers)

    def within(self, score: Callable[[Layer, int], float]) -> dict[str, int]:
        """{layer: width} with the least sum of scores that fits the capacity; `score(layer, width)` of narrower ones.

        Measured scores are noisy. A wider layer is made never to score worse than a narrower one (the nearest such
        scores, in least squares), or the solver would take noise for a gain.

        Raises:
            ConfigError: the least cost is above the capacity.
        """
        options = []
        for layer in self.layers:
            widths = self.widths[layer.name]
            scores = isotonic([0.0, *(score(layer, width) for width in widths[1:])])
            options.append([Option(w * self.units[layer.name], s) for w, s in zip(widths, scores, strict=True)])
        return self._named(solve(options, self.capacity - self.fixed))

    def drawn(self, seed: int) -> dict[str, int]:
        """{layer: width} by chance, within the capacity. Raises as `within`."""
        options = [[Option(w * self.units[layer.name], 0.0) for w in self.widths[layer.name]] for layer in self.layers]
        return self._named(draw(options, self.capacity - self.fixed, seed))

    def _named(self, found: Solution) -> dict[str, int]:
        pairs = zip(self.layers, found.chosen, strict=True)
        return {layer.name: self.widths[layer.name][index] for layer, index in pairs}


def ways(pipeline: Pipeline, keeps: Sequence[float], figure: str, share: float, feedforward: bool) -> Ways:
    """The ways to narrow the U-Net of `pipeline` to the ratios `keeps`, with `share` of its present cost as capacity.

    MACs are those of one row at the model's default size, attention's two products included.
    """
    component = pipeline.denoiser
    side = pipeline.family.default_size // pipeline.family.vae_factor
    sizes = {"height": side, "width": side}
    found = layers(component, feedforward)
    widths = {
        layer.name: tuple(sorted({layer.size, *(layer.kept(keep) for keep in keeps)}, reverse=True)) for layer in found
    }
    if figure == "MACs":
        units, total = unit_macs(component, found, sizes), cost(component, sizes).macs
    else:
        units, total = {layer.name: layer.parameters for layer in found}, component.parameters
    return Ways(found, widths, figure, units, total, int(total * share))
