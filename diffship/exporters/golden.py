"""Golden vectors: inputs and fp32 torch outputs of a few calls, so that any engine can prove a part again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffship.core.compare import compare
from diffship.core.dtype import meta_of
from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.manifest import Golden
from diffship.core.precision import Precision
from diffship.core.safetensors_file import write_safetensors
from diffship.core.spec import first_sample
from diffship.exporters.formats import simulated_forward
from diffship.exporters.tolerances import EXACT_DB, exact, limit, loosest, method
from diffship.models.parts.component import Component

SEED = 20
Arrays = dict[str, NDArray[np.generic]]


def write_golden(
    component: Component,
    calls: Sequence[Arrays],
    sizes: Mapping[str, int],
    out: Path,
    precision: Precision,
    max_bytes: int,
) -> Golden:
    """Write `golden/<part>.safetensors` below `out`: feeds and outputs of torch in float32 for each of `calls`.

    If `precision` packs weights, the outputs are those of its simulation, so that the proof is tight. The outputs on
    the true weights lie beside them, for the quality that `verify` reports.

    sizes: of one call, by axis. At most `max_bytes` of weights are loaded at once. Feeds are rounded to the type of the
    graph's inputs, so that both sides see the same ones. The tolerance of an output is what `precision` costs there in
    torch, with a margin (`exporters.tolerances`); of float32, what coarser rounding costs, if that is more than two
    engines usually differ by.

    Raises:
        SourceError: torch itself gives NaN or infinity.
        UnsupportedError: it does so in `precision` only, or what it gives one sample depends on how many there are.
    """
    calls = [precision.feeds(component.inputs, feeds) for feeds in calls]
    batched = {spec.name for spec in component.inputs if spec.batched}
    joined = {
        name: np.concatenate([feeds[name] for feeds in calls]) if name in batched else array
        for name, array in calls[0].items()
    }
    outputs = reference(component, joined, max_bytes)
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise SourceError(f"{component.name}: torch itself gives NaN or infinity in {name}; the source is damaged")
    _require_independent_samples(component, calls[0], outputs, max_bytes)
    formatted = outputs if precision.lossless else simulated(component, joined, max_bytes, precision)
    expected = formatted if precision.simulated else outputs
    if precision.inputs or precision.exact:
        formatted = simulated(component, joined, max_bytes, precision, moved=True)
    limits = {
        name: loosest(
            limit(precision, a, b)
            for a, b in zip(np.split(array, len(calls)), np.split(formatted[name], len(calls)), strict=True)
        )
        for name, array in expected.items()
    }
    loosened = any(one.psnr_db != EXACT_DB for one in limits.values())
    tensors = {f"{k}.in.{name}": array for k, feeds in enumerate(calls) for name, array in feeds.items()}
    tensors |= _by_call("out", expected, len(calls))
    tensors |= {} if expected is outputs else _by_call("full", outputs, len(calls))
    file = f"golden/{component.name}.safetensors"
    (out / "golden").mkdir(exist_ok=True)
    write_safetensors(out / file, {name: meta_of(array) for name, array in tensors.items()}, tensors.__getitem__)
    return Golden(file, dict(sizes), loosest(limits.values()), len(calls), limits, dict(method(precision, loosened)))


def _by_call(side: str, outputs: Arrays, calls: int) -> Arrays:
    return {
        f"{k}.{side}.{name}": piece for name, array in outputs.items() for k, piece in enumerate(np.split(array, calls))
    }


def _require_independent_samples(component: Component, feeds: Arrays, outputs: Arrays, max_bytes: int) -> None:
    """Runtimes batch samples as they come, and references of one number of samples must hold for any other."""
    alone = first_sample(component.inputs, feeds)
    if alone is None:
        return
    found = reference(component, alone, max_bytes)
    limits = {name: exact(array) for name, array in found.items()}
    report = compare({name: array[:1] for name, array in outputs.items()}, found, limits)
    if not report.passed:
        raise UnsupportedError(
            f"{component.name}: torch gives a sample another {report.worst.name} alone than among others; "
            "a part whose samples depend on each other cannot be batched, and is not exported"
        )


def reference(component: Component, feeds: Arrays, max_bytes: int) -> Arrays:
    """fp32 outputs of torch, stage by stage if the weights take more than `max_bytes` in fp32."""
    if 4 * component.parameters <= max_bytes:
        return _run(component, feeds)
    from diffship.models.walks.stages import stages_forward

    return stages_forward(component, feeds, max_bytes)


def simulated(component: Component, feeds: Arrays, max_bytes: int, precision: Precision, moved: bool = False) -> Arrays:
    """What the part gives in `precision`, simulated in torch (`exporters.formats`), in float32 arrays.

    moved: as engines differ from each other, and more.

    Raises:
        UnsupportedError: values overflow the format.
    """
    outputs = simulated_forward(component, feeds, max_bytes, precision, moved)
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise UnsupportedError(
                f"{component.name} overflows {precision.activations} in {name}: export it with --precision fp32"
            )
    return outputs


def _run(component: Component, feeds: Arrays) -> Arrays:
    with component.load() as runner:
        return {name: np.asarray(array) for name, array in runner.run(feeds).items()}
