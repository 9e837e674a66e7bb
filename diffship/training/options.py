"""The flags of `diffship train`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainOptions:
    """Flags of `diffship train`. `None` takes the stage's own default.

    Attributes:
        data: folder of images with `metadata.jsonl` (`emoji-data`: where the npm archives lie; `emoji-pack`: the runs;
            `emoji-unpack`: the packed family).
        out: folder of the runs; every stage keeps its checkpoint in `out/<stage>/` and continues from it. `emoji-data`
            and `emoji-pack` write their result there.
        minutes: stop (and save) after this long; the same command goes on.
        decay: the rate falls to zero over the last `decay` steps before `steps`.
    """

    data: Path
    out: Path
    steps: int | None = None
    batch: int | None = None
    rate: float | None = None
    decay: int | None = None
    minutes: float = math.inf
    threads: int | None = None
    precision: str = "no"
    seed: int = 0
