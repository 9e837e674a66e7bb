"""A bar chart of layer scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffship.compression.interior import KINDS
from diffship.compression.scores import LayerScores, ScoreTable
from diffship.core.lazy import lazy

figures = lazy("matplotlib.figure")
_GREYS = dict(zip(KINDS, ("0.15", "0.45", "0.7", "0.9"), strict=True))  # readable in print


def draw(scores: ScoreTable, path: str | Path) -> None:
    """Write a PNG: a bar a layer, as long as its score at about half its width, in ascending order from the top.

    A thin line reaches from the score of the widest to that of the narrowest cut; the dashed line is the score of other
    noise.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    layers = sorted(scores.layers, key=lambda layer: middle(layer).score)
    figure = figures.Figure(figsize=(8.0, 1.4 + 0.2 * len(layers)), layout="constrained")
    axes: Any = figure.subplots()
    for place, layer in enumerate(layers):
        axes.barh(place, middle(layer).score, color=_GREYS[layer.kind], edgecolor="black", linewidth=0.5)
        reach = [shift.score for shift in layer.shifts]
        axes.plot([min(reach), max(reach)], [place, place], color="black", linewidth=0.8)
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=5)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    line = axes.axvline(scores.noise, color="black", linestyle="--", linewidth=0.8, label="other noise")
    axes.set_xlabel("shift of mean + shift of std of the final latents")
    known = scores.settings
    axes.set_title(f"{known.count} prompts, {known.steps} steps, guidance {known.guidance:g}", fontsize=8)
    shown = [kind for kind in KINDS if any(layer.kind == kind for layer in layers)]
    handles = [axes.barh([0], [0], color=_GREYS[kind], edgecolor="black", label=kind) for kind in shown]
    axes.legend(handles=[*handles, line], fontsize=7, loc="upper right")
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None, "Description": scores.digest})


def middle(layer: LayerScores) -> Any:
    """The shift whose width is nearest to half the layer's."""
    return min(layer.shifts, key=lambda shift: abs(shift.kept - layer.size / 2))
