"""Inside a measured process of ours: one part, or a whole image, in one of our engines.

python -m diffship.benchmarks.measure.child '{"case": {...}, "folder": ..., "bundle": ..., "feeds": ..., "prompt": ...}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from diffship.benchmarks.measure.case import IMAGE, Case, engine_of
from diffship.benchmarks.measure.ceiling import ceilings
from diffship.benchmarks.measure.clock import device_peak, report, timed
from diffship.core.precision import precision_of
from diffship.core.strict import load
from diffship.models.model import PipelineModel


def main() -> None:
    order = json.loads(sys.argv[1])
    if "ceilings" in order:
        report(ceilings(order["ceilings"]))
        return
    case = load(Case, order["case"], "case")
    figures = timed(lambda: loaded(case, order), case.calls)
    report({**figures, "device_peak": device_peak(case.device)})


def loaded(case: Case, order: Mapping[str, Any]) -> Callable[[], object]:
    """Open the model in its engine and return what makes one call."""
    model = _model(case, order)
    if case.part == IMAGE:
        return _image(model, case, order)
    from safetensors.numpy import load_file

    feeds = load_file(order["feeds"])
    runner = model.use(case.part)
    return lambda: runner.run(feeds)  # numpy in and out: the call ends when the device has finished


def _model(case: Case, order: Mapping[str, Any]) -> Any:
    engine, chosen = engine_of(case.runner)
    if engine == "torch":
        from diffship.models.sources.opening import open_source

        return PipelineModel(open_source(order["folder"]), case.device, precision_of(case.precision).activations)
    from diffship.core.bundle import Bundle
    from diffship.runtimes.engines.model import BundleModel

    options = {"device": case.device} | chosen
    return BundleModel(Bundle.open(order["bundle"]), engine, **options)


def _image(model: Any, case: Case, order: Mapping[str, Any]) -> Callable[[], object]:
    from diffship.sampling.generate import Request, generate

    size = (int(order["size"]), int(order["size"]))
    request = Request(
        order["prompt"],
        steps=case.steps,
        guidance=case.guidance,
        size=size,
        sampler=case.sampler,
        images=case.batch,
    )
    needed = model.parts - {model.family.kind.encoder}  # of an image: loading is counted as such
    for part in sorted(needed):
        model.use(part)
    return lambda: generate(model, request)


if __name__ == "__main__":
    main()
