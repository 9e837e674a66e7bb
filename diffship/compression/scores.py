"""How much each layer matters: the score table of a U-Net, and its file (docs/schema/scores/v1.json)."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from diffship.compression.interior import KINDS
from diffship.core.atomic import write_file
from diffship.core.brief import brief
from diffship.core.document import read_json
from diffship.core.errors import ConfigError, SourceError
from diffship.core.limits import LIMITS
from diffship.core.strict import bounded, bounds, choices, load, plain

SCHEMA = 1


@dataclass(frozen=True)
@bounded
class Shift:
    """What narrowing one layer to `kept` channels or heads does to the final latents of the prompts.

    mean, std: L2 norms of the change of their elementwise mean and standard deviation over the prompts.
    score: the sum of both (Hybrid SD, arXiv 2408.06646).
    """

    kept: int = field(metadata=bounds(1, 65536))
    mean: float = field(metadata=bounds(0, math.inf))
    std: float = field(metadata=bounds(0, math.inf))
    score: float = field(metadata=bounds(0, math.inf))

    def __post_init__(self) -> None:
        if not math.isclose(self.score, self.mean + self.std, rel_tol=1e-9):
            raise ConfigError(f"the score {self.score} is not the sum of its mean and std")


@dataclass(frozen=True)
@bounded
class LayerScores:
    """One layer, `size` wide before; `shifts` in descending width."""

    name: str
    kind: str = field(metadata=choices(*KINDS))
    size: int = field(metadata=bounds(1, 65536))
    shifts: tuple[Shift, ...]


@dataclass(frozen=True)
class Settings:
    """How it was measured. prompts: sha256 (hex) of them, one a line; size: side of the picture in pixels; seed: prompt
    i starts from the noise of seed + i; sampler: its name; precision: of the U-Net."""

    prompts: str
    count: int
    steps: int
    guidance: float
    size: int
    seed: int
    sampler: str
    precision: str


@brief
@dataclass(frozen=True)
@bounded
class ScoreTable:
    """Scores of the layers of the U-Net with the digest `unet` (sha256 over its tensors), in the module's order.

    noise: score of the unchanged U-Net drawn from other noise. Layers that score less change the pictures of these
    prompts less than another seed does.
    """

    unet: str
    settings: Settings
    noise: float = field(metadata=bounds(0, math.inf))
    layers: tuple[LayerScores, ...]

    def score(self, name: str, kept: int) -> float:
        """Raises ConfigError if that was not measured."""
        for layer in self.layers:
            for shift in layer.shifts if layer.name == name else ():
                if shift.kept == kept:
                    return shift.score
        raise ConfigError(f"the scores have no {name} narrowed to {kept}; measure them with these keeps")

    @property
    def digest(self) -> str:
        """sha256 (hex) of the file's bytes."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def text(self) -> str:
        """The file's content."""
        return json.dumps({"schema": SCHEMA, **plain(self)}, indent=1, allow_nan=False) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the file; it appears whole or not at all."""
        write_file(path, self.text())


@dataclass(frozen=True)
class _File(ScoreTable):
    schema: int = field(default=SCHEMA, metadata=bounds(SCHEMA, SCHEMA))


def read_scores(path: str | Path) -> ScoreTable:
    """The score table in a file that `ScoreTable.write` wrote.

    Raises:
        SourceError: no such file, or not of this form: an unknown key, a wrong type, a score that is no number.
    """
    found = read_json(path, LIMITS.manifest_bytes, SourceError)
    if "schema" not in found:
        raise SourceError(f"scores: {path} is no score table: it has no schema")
    file_ = load(_File, found, f"scores: {path}", SourceError)
    return ScoreTable(file_.unet, file_.settings, file_.noise, file_.layers)
