"""compare: does a candidate compute the same as the reference, by how much not, and which tolerance would pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from diffship.core.brief import brief
from diffship.core.errors import ConfigError, ParityError
from diffship.core.lazy import lazy
from diffship.core.strict import bounded, bounds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
else:
    np = lazy("numpy")

_REL_FLOOR = 0.01  # of the peak: below it a relative error says nothing


@dataclass(frozen=True)
@bounded
class Tolerance:
    """What passes: each element meets |candidate - reference| <= atol + rtol * |reference|, and the whole output has a
    PSNR of at least `psnr_db` if that is given.

    `atol=None` leaves the element check out, so that PSNR alone decides (compressed weights).
    """

    atol: float | None = field(default=None, metadata=bounds(0.0, 1e30))
    rtol: float = field(default=0.0, metadata=bounds(0.0, 1e30))
    psnr_db: float | None = field(default=None, metadata=bounds(-300.0, 1000.0))

    def __post_init__(self) -> None:
        if self.rtol and self.atol is None:
            raise ConfigError(f"rtol {self.rtol:g} without atol checks nothing; give atol too (0 is legal)")

    @property
    def checks(self) -> bool:
        """Whether there is a limit at all; a tolerance without one never fails, and serves to get the figures alone."""
        return self.atol is not None or self.psnr_db is not None

    def text(self) -> str:
        parts = [] if self.atol is None else [f"atol {self.atol:g}", f"rtol {self.rtol:g}"]
        return ", ".join(parts + ([] if self.psnr_db is None else [f"PSNR >= {self.psnr_db:g} dB"])) or "none"


@brief
@dataclass(frozen=True)
class OutputReport:
    """Figures of one output, in float64; NaN if they could not be computed, in which case `reason` says why.

    max_rel: largest error relative to |reference|, which is taken as at least 1 % of its peak.
    psnr_db: 10 log10(peak**2 / mean squared error), peak = max |reference|; inf if both are equal.
    needed_atol: the smallest atol that would pass with the rtol given; needed_rtol likewise with the atol given.
    """

    name: str
    shape: tuple[int, ...]
    passed: bool
    max_abs: float = math.nan
    mean_abs: float = math.nan
    max_rel: float = math.nan
    psnr_db: float = math.nan
    cosine: float = math.nan
    needed_atol: float = math.nan
    needed_rtol: float = math.nan
    reason: str = ""
    tolerance: Tolerance = Tolerance()

    @property
    def margin_db(self) -> float:
        """How far PSNR and the largest error stay from their limits, in dB; negative if one misses it."""
        psnr, atol = self.tolerance.psnr_db, self.tolerance.atol
        whole = math.inf if psnr is None else self.psnr_db - psnr
        if not atol or self.tolerance.rtol:
            return whole
        return min(whole, 20 * math.log10(atol / self.max_abs) if self.max_abs > 0 else math.inf)

    def to_json(self) -> dict[str, object]:
        """Figures that JSON cannot hold (NaN, inf) become null."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "tolerance"}
        values["shape"] = list(self.shape)
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }

    def text(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        if self.reason and math.isnan(self.max_abs):
            return f"{verdict} {self.name}: {self.reason}"
        figures = f"max {self.max_abs:.3g}, mean {self.mean_abs:.3g}, rel {self.max_rel:.3g}, "
        figures += f"PSNR {self.psnr_db:.1f} dB, cosine {self.cosine:.7f}"
        advice = "" if self.passed else f"; {self.reason}"
        return f"{verdict} {self.name}: {figures}{advice}"


@brief
@dataclass(frozen=True)
class Report:
    """What `compare` found; as a truth value, whether every output passed."""

    outputs: tuple[OutputReport, ...]

    @property
    def tolerance(self) -> Tolerance:
        """That of the worst output."""
        return self.worst.tolerance if self.outputs else Tolerance()

    @property
    def passed(self) -> bool:
        return bool(self.outputs) and all(output.passed for output in self.outputs)

    def __bool__(self) -> bool:
        return self.passed

    @property
    def worst(self) -> OutputReport:
        """The output that failed, or else the one with the least PSNR."""
        return min(self.outputs, key=lambda output: (output.passed, not math.isnan(output.psnr_db), output.psnr_db))

    @property
    def closest(self) -> OutputReport:
        """The output that failed, or else the one with the least margin to its tolerance."""
        return min(self.outputs, key=lambda output: (output.passed, not math.isnan(output.psnr_db), output.margin_db))

    def text(self) -> str:
        return "\n".join(output.text() for output in self.outputs) or "nothing to compare"

    def to_json(self) -> dict[str, object]:
        tolerance = {"atol": self.tolerance.atol, "rtol": self.tolerance.rtol, "psnr_db": self.tolerance.psnr_db}
        outputs = [output.to_json() for output in self.outputs]
        return {"passed": self.passed, "tolerance": tolerance, "outputs": outputs}

    def require(self, what: str) -> None:
        """Raises ParityError, with the figures of the worst output, unless all passed."""
        if not self.outputs:
            raise ParityError(f"{what}: there is no output to compare")
        if not self.passed:
            raise ParityError(f"{what} does not compute the same ({self.tolerance.text()}): {self.worst.text()}")


def compare(
    reference: Mapping[str, ArrayLike],
    candidate: Mapping[str, ArrayLike],
    tolerance: Tolerance | Mapping[str, Tolerance],
) -> Report:
    """Figures per output name; a missing or extra output, another shape, NaN or infinity fail.

    tolerance: of all outputs, or by output; an output that it leaves out fails.
    """
    names = dict.fromkeys([*reference, *candidate])
    limits = dict.fromkeys(names, tolerance) if isinstance(tolerance, Tolerance) else tolerance
    found = (
        _compare_one(name, reference, candidate, limits[name])
        if name in limits
        else OutputReport(name, (), False, reason="no tolerance is known for it")
        for name in names
    )
    return Report(tuple(replace(one, tolerance=limits.get(one.name, one.tolerance)) for one in found))


def _compare_one(
    name: str, reference: Mapping[str, ArrayLike], candidate: Mapping[str, ArrayLike], tolerance: Tolerance
) -> OutputReport:
    if name not in reference or name not in candidate:
        side = "reference" if name not in reference else "candidate"
        return OutputReport(name, (), False, reason=f"the {side} has no such output")
    expected, actual = (np.asarray(side[name]).astype(np.float64) for side in (reference, candidate))
    if expected.shape != actual.shape:
        return OutputReport(name, actual.shape, False, reason=f"shape {actual.shape}, expected {expected.shape}")
    for side, array in (("reference", expected), ("candidate", actual)):
        bad = int(array.size - np.isfinite(array).sum())
        if bad:
            reason = f"{bad} of {array.size} values of the {side} are NaN or infinite"
            return OutputReport(name, expected.shape, False, reason=reason)
    return _figures(name, expected, actual, tolerance)


def _figures(
    name: str, expected: NDArray[np.float64], actual: NDArray[np.float64], tolerance: Tolerance
) -> OutputReport:
    error, size = np.abs(actual - expected), np.abs(expected)
    atol, rtol = tolerance.atol or 0.0, tolerance.rtol
    peak = float(size.max(initial=0.0))
    psnr = _psnr(peak, float(np.square(error).mean()) if error.size else 0.0)
    needed_atol = float((error - rtol * size).max(initial=0.0))
    needed_rtol = _ratio((error - atol).clip(min=0.0), size)
    reason = ""
    if tolerance.atol is not None and bool((error > atol + rtol * size).any()):
        reason = (
            f"atol {needed_atol:.3g} (with rtol {rtol:g}) or rtol {needed_rtol:.3g} (with atol {atol:g}) would pass"
        )
    elif tolerance.psnr_db is not None and psnr < tolerance.psnr_db:
        reason = f"PSNR {psnr:.1f} dB is less than {tolerance.psnr_db:g} dB"
    return OutputReport(
        name,
        expected.shape,
        not reason,
        max_abs=float(error.max(initial=0.0)),
        mean_abs=float(error.mean()) if error.size else 0.0,
        max_rel=_ratio(error, np.maximum(size, _REL_FLOOR * peak)),
        psnr_db=psnr,
        cosine=_cosine(expected, actual),
        needed_atol=needed_atol,
        needed_rtol=needed_rtol,
        reason=reason,
    )


def _ratio(error: NDArray[np.float64], size: NDArray[np.float64]) -> float:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return float(np.where(error > 0, error / size, 0.0).max(initial=0.0))


def _psnr(peak: float, mean_square: float) -> float:
    if mean_square == 0:
        return math.inf
    return 20 * math.log10(peak) - 10 * math.log10(mean_square) if peak > 0 else -math.inf


def _cosine(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    first, second = expected.ravel(), actual.ravel()
    norms = math.sqrt(float(first @ first)) * math.sqrt(float(second @ second))
    if norms == 0:
        return 1.0 if not first.any() and not second.any() else 0.0
    return max(-1.0, min(1.0, float(first @ second) / norms))


def picture_psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """PSNR in dB of two uint8 pictures, peak 255; inf if they are equal."""
    error = float(np.square(first.astype(np.float64) - second.astype(np.float64)).mean())
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))
