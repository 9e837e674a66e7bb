"""What this version can do, asked of the code itself, so that a row stops being "not yet" when its capability lands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.registry import EXPORTERS, PASSES
from diffship.core.strict import unknown
from diffship.models.reduced.released import KEYS


@dataclass(frozen=True)
class Capability:
    """`title` as it is printed after "not yet: "; `there()` asks the code."""

    title: str
    there: Callable[[], bool]


def parses(*words: str) -> bool:
    """Whether the command line takes `diffship WORDS`."""
    from diffship.cli.main import parse

    try:
        parse(words)
    except DiffshipError:
        return False
    return True


def _exporter(name: str) -> Capability:
    title = {"onnx": "ONNX export", "coreml": "Core ML export", "tensorrt": "TensorRT export"}[name]
    return Capability(title, lambda: name in EXPORTERS)


def _pass(name: str, title: str) -> Capability:
    return Capability(title, lambda: name in PASSES)


def _never() -> bool:
    return False


CAPABILITIES: Mapping[str, Capability] = {
    "onnx": _exporter("onnx"),
    "coreml": _exporter("coreml"),
    "tensorrt": _exporter("tensorrt"),
    "lora": _pass("lora", "LoRA fusion"),
    "significance": _pass("significance", "significance pruning"),
    "distill": _pass("distill", "distillation"),
    "lcm": _pass("lcm", "consistency distillation"),
    "vae": _pass("vae", "training of a tiny VAE"),
    "handoff": Capability(
        "handoff between two models", lambda: parses("run", "A", "x", "--large", "B", "--split", "10,15")
    ),
    "partition": Capability(
        "asynchronous execution on several devices",
        lambda: parses("export", "A", "--stages", "2", "--cut", "published", "-o", "B"),
    ),
    "published-widths": Capability(
        "the config keys of Hybrid SD's pruned widths", lambda: "block_mid_channels" in KEYS
    ),
    # these have no form in the command line yet: whoever builds one gives it a test here
    "coco": Capability("FID, IS and CLIP score on COCO captions", _never),
    "asymmetric-vae": Capability("reading released VAEs whose decoder is narrower than their encoder", _never),
    "transformer": Capability("diffusion transformers (Stable Diffusion 3, PixArt)", _never),
    "upscaler": Capability("the x4 upscaler", _never),
    "video": Capability("video models", _never),
    "staged-controlnet": Capability("ControlNet beside a denoiser in stages", _never),
    "controlnet": Capability("ControlNet", lambda: parses("export", "A", "--controlnet", "n=B", "-o", "C")),
}


def missing(needs: Iterable[str]) -> list[str]:
    """Titles of the capabilities among `needs` that this version lacks.

    Raises:
        ConfigError: a name that is no capability.
    """
    found = []
    for name in needs:
        if name not in CAPABILITIES:
            raise ConfigError(unknown("capability", name, CAPABILITIES))
        if not CAPABILITIES[name].there():
            found.append(CAPABILITIES[name].title)
    return found
