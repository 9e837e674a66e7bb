"""Inside a peer's process: stable-diffusion.cpp through its Python package, on the same diffusers folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from diffship.benchmarks.measure.clock import report, timed

SAMPLERS = {"euler": "euler", "ddim": "ddim_trailing", "lcm": "lcm"}


def main() -> None:
    order = json.loads(sys.argv[1])
    report({**timed(lambda: loaded(order["case"], order), order["case"]["calls"]), "device_peak": None})


def loaded(case: Mapping[str, Any], order: Mapping[str, Any]) -> Callable[[], object]:
    """The library reads the folder's safetensors itself; weights keep the type that they are stored in."""
    from stable_diffusion_cpp import StableDiffusion

    # its own choice of threads (-1) is the physical cores
    model = StableDiffusion(model_path=order["folder"], n_threads=order["threads"], rng_type="cpu", verbose=False)
    request = {"prompt": order["prompt"], "width": order["size"], "height": order["size"], "seed": 0}
    request |= {"sample_steps": case["steps"], "cfg_scale": case["guidance"], "batch_count": case["batch"]}

    def once() -> object:
        try:
            return model.generate_image(sample_method=SAMPLERS[case["sampler"]], **request)
        except ValueError as fault:  # a null pointer is all that is left of a model it could not open
            raise SystemExit(f"stable-diffusion.cpp opens published shapes only (SD 1 and 2, SDXL): {fault}") from None

    return once


if __name__ == "__main__":
    main()
