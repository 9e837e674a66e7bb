"""What one model call needs and leads to: rows of plain floats over (x, output, noise, *history)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffship.sampling.schedule import F64

X, OUTPUT, NOISE, HISTORY = 0, 1, 2, 3  # columns of the matrix
MAX_HISTORY = 5


@dataclass(frozen=True)
class Coefficients:
    """One model call: `input_scale * x` at `timestep`, then `matrix` times (x, output, noise, *history)."""

    input_scale: float
    timestep: float
    matrix: tuple[tuple[float, ...], ...]

    @property
    def noisy(self) -> bool:
        """Whether fresh noise is needed."""
        return any(row[NOISE] != 0.0 for row in self.matrix)


def unit(column: int, age: int) -> F64:
    """The row that copies one column."""
    row = np.zeros(HISTORY + age)
    row[column] = 1.0
    return row


def seen(age: int) -> tuple[F64, F64]:
    """The rows of x and of the network's output for it."""
    return unit(X, age), unit(OUTPUT, age)


def as_matrix(*rows: F64) -> tuple[tuple[float, ...], ...]:
    """Rows as plain floats."""
    return tuple(tuple(row.tolist()) for row in rows)
