"""The library that built a plan, and what can be known of a plan before it is loaded."""

from __future__ import annotations

from typing import Any

from diffship.core.errors import UnsupportedError
from diffship.runtimes.engines.tensorrt.device import Device
from diffship.targets.tensorrt.gpus import RTX_SM, capability_text, way_for
from diffship.targets.tensorrt.libraries import PACKAGES, RTX, TRT
from diffship.targets.tensorrt.plan import PlanFacts


def flavour_here(index: int = 0) -> tuple[str, tuple[int, ...]]:
    """The library whose engines run on this GPU, and the `sm` that its exporter takes for it.

    Raises:
        MissingExtra: no cuda-bindings to ask with. UnsupportedError: no driver, or no such GPU.
    """
    sm = Device(index, PACKAGES[RTX]).capability()
    return (RTX, (sm,)) if sm in RTX_SM else (TRT, ())


def check_version(trt: Any, facts: PlanFacts, where: str) -> None:
    """A plan loads in the very version that built it, RTX's as well as TensorRT's.

    Raises:
        UnsupportedError: with both versions, and the two ways out.
    """
    package = PACKAGES[facts.flavour]
    if trt.__version__ != facts.version:
        raise UnsupportedError(
            f"{where} was built by {package} {facts.version}; this is {trt.__version__}, and a plan loads in its own "
            f"version only. Run: pip install {package}=={facts.version}, or diffship export SOURCE --to tensorrt "
            f"--flavour {facts.flavour} -o DIR"
        )


def check_gpu(facts: PlanFacts, device: Device, where: str) -> None:
    """Raises UnsupportedError if the plan holds no code for this GPU."""
    own = device.capability()
    if facts.sm and own not in facts.sm:
        names = " and ".join(map(capability_text, facts.sm))
        raise UnsupportedError(
            f"{where} was built for SM {names}; GPU {device.index} ({device.model()}) is SM {capability_text(own)}. "
            f"Run: {way_for(own)}"
        )
