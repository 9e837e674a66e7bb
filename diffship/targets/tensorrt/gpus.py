"""Which TensorRT library goes with which GPU: what flags are checked against, and docs and doctor print.

An engine of TensorRT-RTX is built on any machine, for the compute capabilities ("SM") that its support matrix names; an
engine of TensorRT is built on the GPU that runs it. Statuses say what somebody has seen, not what should work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffship.core.errors import ConfigError
from diffship.targets.tensorrt.libraries import TRT

RTX_SM = (75, 86, 89, 120, 121)  # support matrix of TensorRT-RTX 1.5; 8.0 is in the library's enumeration only
DEFAULT_SM = (89, 120)
DATA_CENTRE_SM = {80: "A100", 90: "H100, H200", 100: "B200", 103: "B300"}
BUILT, UNPROVEN, NO = "built", "unproven", "no"
LEGEND = {
    BUILT: "an engine was built for it; no GPU has run it yet",
    UNPROVEN: "the library names it; nobody here has tried",
    NO: "the library has no engines for it; take ONNX Runtime on CUDA, or the other library",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU model, its compute capability, and for each flavour whether an engine was built for it, or cannot be.

    No engine of either flavour has been run by this project yet.
    """

    name: str
    sm: int
    rtx: str
    trt: str = UNPROVEN


GPUS = (
    Gpu("T4, RTX 20 series", 75, UNPROVEN),
    Gpu("A100", 80, NO),
    Gpu("A10, A10G, A40, RTX 30 series", 86, UNPROVEN),
    Gpu("L4, L40S, RTX 4090, RTX 40 series", 89, BUILT),
    Gpu("H100, H200", 90, NO),
    Gpu("B200", 100, NO),
    Gpu("RTX 50 series, RTX PRO Blackwell", 120, BUILT),
    Gpu("DGX Spark (GB10)", 121, UNPROVEN),
)


def way_for(sm: int) -> str:
    """How to run a model on a GPU of that compute capability."""
    if sm in RTX_SM:
        return f"diffship export SOURCE --to tensorrt --flavour rtx --sm {sm} -o DIR"
    return "diffship export SOURCE --to onnx -o DIR, and --engine onnxruntime --device cuda"


def check_sm(flavour: str, sm: Sequence[int]) -> tuple[int, ...]:
    """The compute capabilities to build for, rising.

    Raises:
        ConfigError: one that TensorRT-RTX has no engines for, with the way that works, or any with TensorRT.
    """
    if flavour == TRT:
        if sm:
            raise ConfigError("--sm is for --flavour rtx; TensorRT builds for the GPU that it runs on: leave it out")
        return ()
    chosen = tuple(sorted(set(sm or DEFAULT_SM)))
    for value in chosen:
        if value in DATA_CENTRE_SM:
            raise ConfigError(
                f"--sm {value} ({DATA_CENTRE_SM[value]}): TensorRT-RTX has no engines for it. Export --to onnx and run "
                "it with --engine onnxruntime --device cuda, or build with --flavour trt on that GPU"
            )
        if value not in RTX_SM:
            raise ConfigError(f"--sm {value} is unknown; legal: {', '.join(map(str, RTX_SM))}")
    return chosen


def capability_text(sm: int) -> str:
    """`8.9` for 89, `12.0` for 120."""
    return f"{sm // 10}.{sm % 10}"


def advice(gpu: Gpu) -> str:
    """What to do for a GPU, in Markdown: a plan that any machine can build, or else the way without a plan."""
    if gpu.rtx != NO:
        return f"`export --to tensorrt --sm {gpu.sm}`, on any machine"
    return (
        "`export --to onnx --precision fp16`, `run --device cuda`; or `export --to tensorrt --flavour trt` on that GPU"
    )


def markdown() -> str:
    """The table of docs/tensorrt.md, and what its words mean. Of ONNX Runtime on CUDA nothing has run either."""
    head = ("GPU", "SM", "what to do", "TensorRT-RTX", "TensorRT", "ONNX Runtime")
    rows = [(gpu.name, str(gpu.sm), advice(gpu), gpu.rtx, gpu.trt, UNPROVEN) for gpu in GPUS]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", *(f"- **{word}**: {meaning}" for word, meaning in LEGEND.items())])
