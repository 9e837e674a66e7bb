"""The significance pass: narrow the layers that pictures depend on least, down to a budget (Hybrid SD, 2408.06646)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from diffship.calibration.prompts import read_captions
from diffship.compression import ranks as by_rank
from diffship.compression.captions import CAPTIONS
from diffship.compression.chart import draw as draw_chart
from diffship.compression.interior import largest_kept, lost_norm, norms, widths_for
from diffship.compression.measure import Drawing, measure, model_calls
from diffship.compression.narrow import Kept, first, narrow_unet
from diffship.compression.outline import U_NETS, Calls, Outline
from diffship.compression.scores import ScoreTable, read_scores
from diffship.compression.ways import Ways, ways
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.job import Job
from diffship.core.lazy import need
from diffship.core.problem import Problem
from diffship.core.strict import bounded, bounds, choices
from diffship.models.pipeline import Pipeline

ALLOCATIONS = ("budget", "ranks", "random", "magnitude")
_SCORED = ("budget", "ranks")


@dataclass(frozen=True)
@bounded
class SignificancePass:
    """Narrow residual blocks and attention (and feed-forward layers if asked) by how little each changes the pictures.

    parameters, macs: what is to be left of the U-Net's present figure, between 0 and 1; one of them, and neither with
    `ranks`. MACs are those of one row at the model's default size, attention's products included.
    allocation, ranks: `budget` finds the widths with the least sum of scores within the budget, exactly; `ranks` is
    Hybrid SD's (`ranks` a,b: the a least significant layers keep a quarter, up to b a half, others three quarters);
    `random` (by `seed`) and `magnitude` (least share of weight norm lost) are there to compare with, at one budget.
    released_quirks: `ranks` as the released code has it, faults included, first heads instead of largest.
    keeps: ratios that a layer may be narrowed to. feedforward: narrow these layers, too.
    prompts: a text file, one a line (default: fifty built-in captions); count: only the first of them.
    steps, guidance, size: of the pictures that scores are measured with (default: the model's); size is in pixels.
    seed: of their noise. batch: prompts a model call. precision: of their model; a GPU is used if torch finds one.
    scores: a score table to use instead of measuring. scores_out: file (JSON) for the one that is measured.
    chart: file (PNG) for a bar chart of the scores.
    """

    kind: ClassVar[str] = "significance"
    networks: ClassVar[tuple[str, ...]] = U_NETS
    kept: ClassVar[bool] = False  # made in seconds, once there are scores, and those are kept one by one

    parameters: float | None = field(default=None, metadata=bounds(0.001, 1))
    macs: float | None = field(default=None, metadata=bounds(0.001, 1))
    allocation: str = field(default="budget", metadata=choices(*ALLOCATIONS))
    ranks: tuple[int, int] = field(default=(19, 21), metadata=bounds(0, 10_000))
    released_quirks: bool = False
    keeps: tuple[float, ...] = field(default=by_rank.RATIOS, metadata=bounds(0.01, 0.99))
    feedforward: bool = False
    prompts: str | None = None
    count: int | None = field(default=None, metadata=bounds(2, 10_000))
    steps: int | None = field(default=None, metadata=bounds(1, 150))
    guidance: float | None = field(default=None, metadata=bounds(0, 35))
    size: int | None = field(default=None, metadata=bounds(64, 1536))
    seed: int = field(default=0, metadata=bounds(0, 2**53))
    batch: int = field(default=8, metadata=bounds(1, 1024))
    precision: str = field(default="float32", metadata=choices("float32", "float16", "bfloat16"))
    scores: str | None = None
    scores_out: str | None = field(default=None, metadata={"output": True})
    chart: str | None = field(default=None, metadata={"output": True})

    def __post_init__(self) -> None:
        self._check_target()
        if self.released_quirks and (self.allocation != "ranks" or self.feedforward):
            raise ConfigError("released_quirks goes with allocation = 'ranks', and without feedforward")
        if not self.keeps or len(set(self.keeps)) != len(self.keeps):
            raise ConfigError(f"keeps are {list(self.keeps)}; give one or more ratios, each once")
        if self.allocation == "ranks" and by_rank.SCORED not in self.keeps:
            raise ConfigError(f"ranks go by the score at {by_rank.SCORED}; keeps are {list(self.keeps)}")
        asked = [name for name in ("scores", "scores_out", "chart") if getattr(self, name) is not None]
        if asked and self.allocation not in _SCORED:
            raise ConfigError(f"{self.allocation} measures no scores; leave {', '.join(asked)} out")
        if self.scores is not None and self.scores_out is not None:
            raise ConfigError("scores are read, so nothing is measured; leave scores_out out")

    def _check_target(self) -> None:
        targets = [name for name in ("parameters", "macs") if getattr(self, name) is not None]
        if self.allocation == "ranks" and targets:
            raise ConfigError(f"ranks have no budget; leave {targets[0]} out, or choose allocation = 'budget'")
        if self.allocation != "ranks" and len(targets) != 1:
            raise ConfigError("give one budget: parameters or macs, as a share of what the U-Net has now (0 to 1)")

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """Everything that would stop `run`, found from configs and small files alone."""
        try:
            found = self.ways(pipeline)
            self._check_allocation(found)
            if self.allocation in _SCORED:
                self._check_scoring(pipeline, found)
        except DiffshipError as fault:
            return [Problem.of(pipeline.family.kind.denoiser, fault, f"{self.kind}: ")]
        return []

    def ways(self, pipeline: Pipeline) -> Ways:
        """The layers that may be narrowed, their widths and costs, and the budget."""
        figure, share = ("MACs", self.macs) if self.macs is not None else ("parameters", self.parameters)
        return ways(pipeline, self.keeps, figure, 1.0 if share is None else share, self.feedforward)

    def _check_allocation(self, found: Ways) -> None:
        if not found.layers:
            raise ConfigError("no layer of this U-Net can be made narrower")
        if self.allocation == "ranks":
            by_rank.check_ranks(self.ranks, len(found.layers) + self.released_quirks)
        elif found.least > found.capacity:
            raise ConfigError(
                f"a budget of {found.capacity:,} {found.figure} ({found.capacity / found.total:.3f} of what there is) "
                f"cannot be met; with keep {min(self.keeps)} everywhere {found.least:,} "
                f"({found.least / found.total:.3f}) are left. Begin with a layout, or narrow more"
            )

    def scored(self, found: Ways) -> dict[str, tuple[int, ...]]:
        """{layer: the widths whose scores are needed}: all narrower ones, or half alone if ranks decide."""
        if self.allocation == "ranks":
            return {layer.name: (layer.kept(by_rank.SCORED),) for layer in found.layers}
        return {name: widths[1:] for name, widths in found.widths.items()}

    def _check_scoring(self, pipeline: Pipeline, found: Ways) -> None:
        if self.chart is not None:
            need("matplotlib")
        for name in ("scores_out", "chart"):
            place = getattr(self, name)
            if place is not None and not Path(place).absolute().parent.is_dir():
                raise ConfigError(f"{name}: the folder of {place} does not exist")
        if self.scores is None:
            if pipeline.family.unet_channels != pipeline.family.latent_channels:
                raise ConfigError(
                    "this model fills masks, which prompts alone cannot score; choose magnitude or random"
                )
            self.drawing().settled(pipeline)
        else:
            self._known(self.scores, pipeline, found)

    def _known(self, file: str, pipeline: Pipeline, found: Ways) -> ScoreTable:
        """The table in `file`, which has every score that is needed.

        Raises:
            ConfigError: it has not, since it is of another U-Net, or was measured with other `keeps`.
        """
        table = read_scores(file)
        try:
            for name, widths in self.scored(found).items():
                for width in widths:
                    table.score(name, width)
        except ConfigError:
            self._check_owner(table, pipeline)
            raise
        return table

    def _check_owner(self, table: ScoreTable, pipeline: Pipeline) -> None:
        if table.unet != pipeline.denoiser.digest:
            raise ConfigError(
                f"scores: {self.scores} is of another U-Net: its tensors are not those of this one. Measure this one, "
                "with scores_out=FILE in place of scores"
            )

    def drawing(self) -> Drawing:
        """What is drawn to measure scores.

        Raises:
            ConfigError: the prompts cannot be read, or are fewer than asked for.
        """
        prompts = CAPTIONS if self.prompts is None else read_captions(self.prompts)
        if len(prompts) < (self.count or 2):
            raise ConfigError(f"there are {len(prompts)} prompts; {self.count or 2} are needed")
        settings = (self.steps, self.guidance, self.size, self.seed, self.batch, self.precision)
        return Drawing(prompts[: self.count], *settings)

    def outline(self, pipeline: Pipeline) -> Outline:
        """Shapes that meet the budget; those that come out hang on scores, unless these are in a file already."""
        found, made_up = self.ways(pipeline), ""
        self._check_allocation(found)
        if self.scores is not None:
            counts = self._scored(found, self._known(self.scores, pipeline, found))
        elif self.allocation == "random":
            counts = found.drawn(self.seed)
        elif self.allocation == "ranks":
            counts = by_rank.published(found.layers, dict.fromkeys(found.widths, 0.0), self.ranks)
            made_up = "how much becomes narrower hangs on the scores; told for layers that rank in the model's order"
        else:
            counts = found.within(lambda layer, width: 1 - width / layer.size)
            made_up = "which layers become narrower hangs on the scores; the budget is met"
        made = narrow_unet(pipeline, first(widths_for(found.layers, counts)), {"pass": self.kind})
        return Outline(made, self._calls(pipeline, found), made_up)

    def _calls(self, pipeline: Pipeline, found: Ways) -> tuple[Calls, ...]:
        if self.scores is not None or self.allocation not in _SCORED:
            return ()
        rows = model_calls(pipeline, self.drawing(), self.scored(found))[1]
        side = self.drawing().settled(pipeline).size[0] / pipeline.family.default_size
        return (Calls(pipeline.denoiser, rows * side**2),)

    def table(self, pipeline: Pipeline, job: Job) -> ScoreTable:
        """The scores: read from `scores`, or measured, then written to `scores_out`; the chart if one is asked for.

        Raises:
            ConfigError: the scores in the file are of another U-Net.
        """
        if self.scores is None:
            found = self.ways(pipeline)
            table = measure(pipeline, found.layers, self.scored(found), self.drawing(), job)
        else:
            table = read_scores(self.scores)
            self._check_owner(table, pipeline)
        if self.scores_out is not None:
            table.write(self.scores_out)
        if self.chart is not None:
            draw_chart(table, self.chart)
        return table

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with its U-Net narrowed; tensors are cut when they are read."""
        found = self.ways(pipeline)
        table = self.table(pipeline, job) if self.allocation in _SCORED else None
        counts = self._unscored(pipeline, found) if table is None else self._scored(found, table)
        kept = largest_kept(pipeline.denoiser.weights, found.layers, counts)
        if self.released_quirks:
            kept = Kept(kept.inner, first(kept.widths).heads)
        narrowed = sum(counts[layer.name] < layer.size for layer in found.layers)
        entry = {**self._said(), "layers": len(found.layers), "narrowed": narrowed}
        return narrow_unet(pipeline, kept, entry if table is None else {**entry, "scores": table.digest})

    def _said(self) -> dict[str, Any]:
        """What the history says of the options: those that decided."""
        told: dict[str, Any] = {"pass": self.kind, "allocation": self.allocation, "keeps": list(self.keeps)}
        if self.allocation == "ranks":
            told |= {"ranks": list(self.ranks), "released_quirks": self.released_quirks}
        else:
            told["budget"] = {"macs": self.macs} if self.macs is not None else {"parameters": self.parameters}
        return {**told, "seed": self.seed} if self.allocation == "random" else told

    def _scored(self, found: Ways, table: ScoreTable) -> dict[str, int]:
        """{layer: channels or heads that stay} by measured scores."""
        if self.allocation == "budget":
            return found.within(lambda layer, width: table.score(layer.name, width))
        half = {layer.name: table.score(layer.name, layer.kept(by_rank.SCORED)) for layer in found.layers}
        if self.released_quirks:
            return by_rank.released(found.layers, half, table.noise, self.ranks)
        return by_rank.published(found.layers, half, self.ranks)

    def _unscored(self, pipeline: Pipeline, found: Ways) -> dict[str, int]:
        """{layer: channels or heads that stay} by chance or by weights."""
        if self.allocation == "random":
            return found.drawn(self.seed)
        weights = pipeline.denoiser.weights
        sizes = {layer.name: norms(weights, layer) for layer in found.layers}
        return found.within(lambda layer, width: lost_norm(sizes[layer.name], width))
