"""Plain tables name -> "module:Class", so that listing what exists imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from diffship.core.errors import ConfigError
from diffship.core.lazy import need
from diffship.core.strict import unknown

if TYPE_CHECKING:
    from diffship.core.kind import Kind

EXPORTERS: dict[str, str] = {
    "onnx": "diffship.exporters.onnx:Onnx",
    "tensorrt": "diffship.exporters.tensorrt:TensorRt",
    "coreml": "diffship.exporters.coreml:CoreMl",
}
# How the file that an engine opens, the first of a part, is named in a bundle for that target.
MODEL_FILES: dict[str, str] = {"onnx": ".onnx", "tensorrt": ".plan", "coreml": ".mlmodel"}
# By the name of the family in manifests. A source is of the first kind that recognises it.
KINDS: dict[str, str] = {
    "sd": "diffship.kinds.sd:StableDiffusion",
    "sdxl": "diffship.kinds.sdxl:StableDiffusionXl",
    "sdxl-refiner": "diffship.kinds.sdxl:Refiner",
    "sd3": "diffship.kinds.sd3:StableDiffusion3",
    "flux2": "diffship.kinds.flux2:Flux2Klein",
}
RUNNERS: dict[str, str] = {
    "onnxruntime": "diffship.runtimes.engines.onnxruntime:OnnxRuntimeRunner",
    "openvino": "diffship.runtimes.engines.openvino:OpenVinoRunner",
    "tensorrt": "diffship.runtimes.engines.tensorrt:TensorRtRunner",
    "mil": "diffship.runtimes.engines.mil:MilRunner",
    "torch": "diffship.runtimes.engines.torch:TorchRunner",
}
SAMPLERS: dict[str, str] = {
    "ddim": "diffship.sampling.solvers.ddim:Ddim",
    "ddpm": "diffship.sampling.solvers.ddpm:Ddpm",
    "deis": "diffship.sampling.solvers.deis:Deis",
    "dpmpp-2m": "diffship.sampling.solvers.dpmpp:DpmPP",
    "dpmpp-2m-karras": "diffship.sampling.solvers.dpmpp:DpmPP",
    "dpmpp-2m-sde": "diffship.sampling.solvers.dpmpp:DpmPP",
    "dpmpp-2m-sde-karras": "diffship.sampling.solvers.dpmpp:DpmPP",
    "dpmpp-3m": "diffship.sampling.solvers.dpmpp:DpmPP",
    "dpmpp-3m-karras": "diffship.sampling.solvers.dpmpp:DpmPP",
    "dpmpp-3m-sde": "diffship.sampling.solvers.dpmpp:DpmPP",
    "dpmpp-3m-sde-karras": "diffship.sampling.solvers.dpmpp:DpmPP",
    "dpmpp-2s": "diffship.sampling.solvers.singlestep:DpmPPSingle",
    "dpmpp-2s-sde": "diffship.sampling.solvers.singlestep:DpmPPSingle",
    "dpmpp-3s": "diffship.sampling.solvers.singlestep:DpmPPSingle",
    "dpmpp-3s-sde": "diffship.sampling.solvers.singlestep:DpmPPSingle",
    "dpmpp-sde": "diffship.sampling.solvers.kdpm2:DpmPPSde",
    "edm-dpmpp": "diffship.sampling.solvers.edm:EdmDpmPP",
    "edm-euler": "diffship.sampling.solvers.edm:EdmEuler",
    "euler": "diffship.sampling.solvers.euler:Euler",
    "euler-a": "diffship.sampling.solvers.euler:EulerAncestral",
    "flow-euler": "diffship.sampling.solvers.flow:FlowEuler",
    "flow-heun": "diffship.sampling.solvers.flow:FlowHeun",
    "heun": "diffship.sampling.solvers.heun:Heun",
    "kdpm2": "diffship.sampling.solvers.kdpm2:Kdpm2",
    "kdpm2-a": "diffship.sampling.solvers.kdpm2:Kdpm2Ancestral",
    "lcm": "diffship.sampling.solvers.lcm:Lcm",
    "pndm": "diffship.sampling.solvers.pndm:Pndm",
    "tcd": "diffship.sampling.solvers.tcd:Tcd",
    "unipc": "diffship.sampling.solvers.unipc:UniPc",
}
PASSES: dict[str, str] = {
    "distill": "diffship.compression.distill:DistillPass",
    "layout": "diffship.compression.layout:LayoutPass",
    "lcm": "diffship.compression.lcm:LcmPass",
    "lora": "diffship.compression.lora:LoraPass",
    "significance": "diffship.compression.significance:SignificancePass",
    "prune": "diffship.compression.structural:PrunePass",
    "swap-vae": "diffship.compression.swap_vae:SwapVaePass",
    "train-lora": "diffship.compression.train_lora:TrainLoraPass",
    "vae": "diffship.compression.vae:VaePass",
}
# What `train` runs, in the order of a whole run.
STAGES: dict[str, str] = {
    "emoji-data": "diffship.training.commands:make_data",
    "emoji-vae": "diffship.training.commands:train_vae",
    "emoji-unet": "diffship.training.commands:train_unet",
    "emoji-decoder": "diffship.training.commands:train_decoder",
    "judge": "diffship.training.commands:train_judge",
    "emoji-pack": "diffship.training.commands:pack",
    "emoji-unpack": "diffship.training.commands:unpack",
}
# Values of flags, here so that `--help` needs no numpy: how timesteps are spread (diffusers' `timestep_spacing`).
SPACINGS = ("linspace", "leading", "trailing")
# How prompts are written; the first one, in which every character is text, is the default.
SYNTAXES = ("plain", "a1111", "compel")


def load(table: Mapping[str, str], name: str, what: str = "name") -> Any:
    """The class that `table[name]` points to, imported now.

    Raises:
        ConfigError: `name` is not in the table; the nearest legal one is named.
        MissingExtra: an optional dependency is not installed.
    """
    if name not in table:
        raise ConfigError(unknown(what, name, table))
    module, _, attribute = table[name].partition(":")
    return getattr(need(module), attribute)


def kind(name: str) -> Kind:
    """The kind of model that manifests call `name`.

    Raises:
        ConfigError: this version knows no such kind.
    """
    return cast("Kind", _made(load(KINDS, name, "kind of model")))


def kinds() -> dict[str, Kind]:
    """All kinds by name, in the order in which a source is offered to them."""
    return {name: kind(name) for name in KINDS}


_made = cache(lambda made: made())
