"""Tolerances that are measured: the error of the number format itself, and a stated margin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.compare import Tolerance, compare
from diffship.core.precision import Precision

MARGIN_DB = 6.0  # an engine may err twice as much (root mean square) as the format does in torch
ELEMENT_MARGIN = 4.0  # and four times as much in one element, since a maximum varies more than a mean
# Between two float32 engines only the order of sums differs. Measured on the test models and `emoji`, block by block:
# at least 115 dB, and 2e-5 of the peak in one element.
EXACT_DB = 100.0
EXACT_ELEMENT = 1e-4  # of the peak
# However much a part enlarges rounding errors, a proof must be able to fail.
LOOSEST_DB = 40.0
LOOSEST_ELEMENT = 0.1  # of the peak
_CONDITIONED = "it enlarges rounding errors: torch in float32, the result of every operator rounded to 3 bits fewer"
_ANY = Tolerance(atol=1e30)


def exact(reference: NDArray[np.generic]) -> Tolerance:
    """The tolerance of an engine that computes `reference` in float32."""
    return _tolerance(EXACT_DB, EXACT_ELEMENT * float(np.abs(reference).max(initial=0.0)))


def conditioned(reference: NDArray[np.generic], coarse: NDArray[np.generic]) -> Tolerance:
    """The tolerance of an engine that computes `reference` in float32, of a part that may enlarge rounding errors.

    coarse: torch's outputs where every result was rounded to 3 bits fewer (`exporters.formats.coarse`). Of most
    parts they are at least 115 dB from `reference`, and the tolerance is that of `exact`. A part that normalises nearly
    equal numbers, say, makes large errors of small ones: no engine can be nearer to torch than its rounding lets it.
    """
    found = compare({"": reference}, {"": coarse}, _ANY).outputs[0]
    peak = float(np.abs(reference).max(initial=0.0))
    element = min(max(EXACT_ELEMENT * peak, found.max_abs), LOOSEST_ELEMENT * peak)
    return _tolerance(max(min(EXACT_DB, found.psnr_db), LOOSEST_DB), element)


def measured(reference: NDArray[np.generic], formatted: NDArray[np.generic]) -> Tolerance:
    """The tolerance of an engine in a number format, whose simulation in torch gave `formatted` for `reference`.

    It is never tighter than that of float32. Both arrays are finite.
    """
    found = compare({"": reference}, {"": formatted}, _ANY).outputs[0]
    least = exact(reference)
    assert least.psnr_db is not None and least.atol is not None
    return _tolerance(min(least.psnr_db, found.psnr_db - MARGIN_DB), max(least.atol, ELEMENT_MARGIN * found.max_abs))


def limit(precision: Precision, reference: NDArray[np.generic], formatted: NDArray[np.generic]) -> Tolerance:
    """The tolerance of an engine in `precision`, for which torch gave `formatted`: simulated, moved if it is exact."""
    return conditioned(reference, formatted) if precision.exact else measured(reference, formatted)


def loosest(tolerances: Iterable[Tolerance]) -> Tolerance:
    """A tolerance that passes whatever one of `tolerances` passes."""
    listed = list(tolerances)
    return Tolerance(
        atol=max(tolerance.atol or 0.0 for tolerance in listed),
        psnr_db=min(tolerance.psnr_db or 0.0 for tolerance in listed),
    )


def method(precision: Precision, loosened: bool) -> Mapping[str, Any]:
    """How the tolerances of a part were found, for the manifest. loosened: they are `conditioned`."""
    if precision.exact:
        found = {"format": precision.name, "psnr_db": EXACT_DB, "element_of_peak": EXACT_ELEMENT}
        return {**found, "measured": _CONDITIONED} if loosened else found
    if precision.simulated:
        how = "torch simulates the codes, once more with the inputs of coded layers moved as engines move them"
        return {
            "format": precision.name,
            "measured": how,
            "margin_db": MARGIN_DB,
            "element_margin": ELEMENT_MARGIN,
        }
    return {
        "format": precision.name,
        "measured": "torch in float32 on rounded weights, the result of every operator rounded",
        "margin_db": MARGIN_DB,
        "element_margin": ELEMENT_MARGIN,
    }


def _tolerance(psnr_db: float, atol: float) -> Tolerance:
    """Rounded outwards to what a manifest shows."""
    digits = 3 - math.floor(math.log10(atol)) if atol > 0 else 0
    return Tolerance(atol=math.ceil(atol * 10**digits) / 10**digits if atol > 0 else 0.0, psnr_db=_down(psnr_db))


def _down(value: float) -> float:
    return math.floor(value * 100) / 100
