"""Controls: pictures that ControlNets see while a picture is drawn, and on which calls they act."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffship.core.brief import brief
from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS, check_range
from diffship.sampling.kernel import Array


@brief
@dataclass(frozen=True, eq=False)
class Control:
    """One ControlNet of a request: its name in the bundle, and the picture that it sees, uint8 (height, width, 3).

    `scale` weighs what it adds. It acts on the calls between the shares `start` and `end` of all that are made.
    """

    name: str
    image: NDArray[np.uint8]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_range(f"scale of control {self.name}", self.scale, *LIMITS.control_scale)
        check_range(f"start of control {self.name}", self.start, 0.0, 1.0)
        check_range(f"end of control {self.name}", self.end, 0.0, 1.0)
        if self.start >= self.end:
            raise ConfigError(
                f"control {self.name} starts at {self.start:g} and ends at {self.end:g}: no call is between"
            )

    def acts(self, begin: int, calls: int) -> tuple[int, int]:
        """(first call on which it acts, first one after them), of a picture whose calls run from `begin` to `calls`.

        A call acts if all of it lies between start and end, as in diffusers' pipelines.
        """
        count = calls - begin
        kept = [i for i in range(count) if not (i / count < self.start or (i + 1) / count > self.end)]
        return (begin + kept[0], begin + kept[-1] + 1) if kept else (begin, begin)


@brief
@dataclass(frozen=True, eq=False)
class Controlled:
    """A control of one trajectory, which acts on the calls from `first` up to `stop`.

    image: float32 (3, height, width) from 0 to 255, in the size of the picture.

    guess: it acts on the prompt alone, not on the negative one, and less on the first residuals than on the last.
    """

    name: str
    image: Array
    scale: float = 1.0
    first: int = 0
    stop: int = 0
    guess: bool = False

    def weight(self, step: int) -> float:
        """The factor of its residuals at call `step`; 0 where it does not act."""
        return self.scale if self.first <= step < self.stop else 0.0
