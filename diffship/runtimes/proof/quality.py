"""What packed weights cost: outputs of an engine against those of torch on the true weights.

That is no proof. A proof compares with torch on the weights as they are stored, tightly; this tells how far those are
from the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from diffship.core.bundle import Bundle
from diffship.core.compare import Report, Tolerance, compare
from diffship.core.errors import BundleError
from diffship.core.manifest import Golden
from diffship.core.weights import SafetensorsWeights

FULL = "full"  # the side of a golden file that holds outputs on the true weights, `K.full.NAME`


def quality(bundle: Bundle, golden: Golden, outputs: Sequence[Mapping[str, np.ndarray]]) -> Report | None:
    """Figures of `outputs` (by call and name) against torch in float32 on the true weights; None if the bundle has no
    such references, because its weights are not packed.

    Raises:
        BundleError: the golden file has them for some calls and outputs alone.
    """
    weights = SafetensorsWeights(bundle.file(golden.file))
    marked = [name for name in weights.names() if name.split(".")[1:2] == [FULL]]
    if not marked or not golden.outputs:
        return None
    wanted = {f"{call}.{FULL}.{name}": (call, name) for call in range(golden.calls) for name in sorted(golden.outputs)}
    odd = sorted(set(wanted) ^ set(marked))
    if odd:
        raise BundleError(f"{golden.file}: {odd[0][:80]!a} is missing, or of no call or output")
    true = {label: np.asarray(weights.read(label)) for label in wanted}
    found = {label: outputs[call][name] for label, (call, name) in wanted.items()}
    return _named(compare(true, found, Tolerance()), wanted, golden.calls)


def _named(report: Report, wanted: Mapping[str, tuple[int, str]], calls: int) -> Report:
    """`report` with outputs called as in other reports: `NAME`, or `NAME, call K` of several calls."""
    names = {label: name if calls == 1 else f"{name}, call {call + 1}" for label, (call, name) in wanted.items()}
    return Report(tuple(replace(one, name=names[one.name]) for one in report.outputs))
