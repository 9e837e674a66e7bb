"""Every results file of the project: what measures it, in one command, and what its figures depend on.

`python -m diffship.benchmarks NAME` writes `benchmarks/results/NAME.json`.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffship.core.errors import ConfigError
from diffship.core.strict import unknown

BENCH = "measure.bench"  # of the verb `bench`
SIBLINGS = "studies.quality.siblings"
_PACKAGE = "diffship.benchmarks"
_FEW = ("onnx", "onnxruntime", "lcm", "vae", "swap-vae")
_PASSES = ("distill", "layout", "prune", "significance")


@dataclass(frozen=True)
class ResultsFile:
    """One file under `benchmarks/results`.

    module: of this room, whose `main` measures it (BENCH: the verb, which reads the suite's TOML). words: arguments
    of it. uses: entries of the registries that it needs (engines, targets, passes); engines of its rows are added.
    verbs: those that it starts as processes. data: folders of the package that it reads, such as weights. suite: as the
    rows name it. of: the file from whose runs this one is computed.
    """

    name: str
    module: str = BENCH
    words: tuple[str, ...] = ()
    uses: tuple[str, ...] = ("onnx", "onnxruntime")
    verbs: tuple[str, ...] = ()
    data: tuple[str, ...] = ("models/emoji",)
    suite: str = ""
    of: str = ""

    @property
    def roots(self) -> tuple[str, ...]:
        """The modules at which its dependencies begin."""
        return f"{_PACKAGE}.{self.module}", *(f"diffship.cli.{verb}" for verb in self.verbs)

    @property
    def command(self) -> str:
        """What measures it again."""
        return f"python -m {_PACKAGE} {self.name}"


def experiment_file(name: str) -> ResultsFile:
    """The entry of an experiment, whose models are trained, drawn and judged."""
    return ResultsFile(name, SIBLINGS, (f"{name}.toml",), ("onnx", "onnxruntime", *_PASSES))


FILES = {
    entry.name: entry
    for entry in (
        ResultsFile("cpu-edge", words=("--suite", "cpu-edge")),
        ResultsFile("cpu-image", words=("--suite", "cpu-image"), data=()),
        ResultsFile("cpu-edge-repeats", "studies.repeats", ("--suite", "cpu-edge"), of="cpu-edge"),
        ResultsFile("cold-start", "studies.cost.cold_start", verbs=("run",)),
        ResultsFile("low-memory", "studies.cost.low_memory", verbs=("run",), data=()),
        ResultsFile("export-sd15", "studies.cost.export_cost", verbs=("export",), data=(), suite="export"),
        ResultsFile(
            "export-sdxl-fp16",
            "studies.cost.export_cost",
            ("--source", "arch:sdxl", "--precision", "fp16", "--no-optimum"),
            verbs=("export",),
            data=(),
            suite="export",
        ),
        ResultsFile("layout-export", "studies.cost.layout_export", verbs=("export",), data=()),
        ResultsFile("mutation", "studies.mutation.__main__"),
        ResultsFile("engine-build", "studies.cost.engine_build", uses=("onnx", "tensorrt")),
        ResultsFile("serving", "studies.service.serving", verbs=("serve",)),
        ResultsFile("reliability", "studies.service.reliability", verbs=("serve",)),
        ResultsFile("handoff-overhead", "studies.service.handoff_overhead", verbs=("serve",)),
        ResultsFile("handoff-quality", "studies.quality.handoff_quality", data=("models/emoji", "models/emoji-small")),
        ResultsFile("emoji-quality", "studies.quality.emoji_quality"),
        ResultsFile("few-steps", "studies.quality.few_steps", uses=_FEW, data=("models/emoji", "models/emoji-small")),
        ResultsFile("fast-chain", "studies.cost.fast_chain", uses=_FEW, data=("models/emoji", "models/emoji-small")),
        ResultsFile("formats", "studies.quality.formats"),
        experiment_file("compression"),
        experiment_file("criteria"),
        experiment_file("features"),
    )
}
# Suites whose files lie elsewhere, on machines with a GPU or of other people.
ELSEWHERE = {
    "gpu-host": ResultsFile(
        "gpu-host", "gpu_host", uses=("onnx", "tensorrt", "onnxruntime", "torch"), verbs=("export", "verify", "bench")
    ),
    "prove-real": ResultsFile("prove-real", uses=("onnx", "onnxruntime", "lora"), verbs=("export", "verify", "run")),
}


def results_file(name: str) -> ResultsFile:
    """The entry called `name`. Raises ConfigError for one that there is not, with the nearest."""
    if name not in FILES:
        raise ConfigError(unknown("results file", name, FILES))
    return FILES[name]


def of_suite(suite: str) -> ResultsFile:
    """The entry whose rows name this suite; a suite that nobody lists is measured by the verb `bench`."""
    known = {entry.suite or entry.name: entry for entry in reversed([*FILES.values(), *ELSEWHERE.values()])}
    return known.get(suite) or ResultsFile(suite)
