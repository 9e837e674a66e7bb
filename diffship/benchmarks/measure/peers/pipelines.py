"""Inside a peer's process: diffusers, torch.compile, optimum (ONNX Runtime) and optimum-intel (OpenVINO).

All four have diffusers' pipeline with its own callables in it; they differ in how it is loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from diffship.benchmarks.measure.clock import device_peak, report, timed, waits

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def main() -> None:
    order = json.loads(sys.argv[1])
    case = order["case"]
    figures = timed(lambda: waits(loaded(case, order), case["device"]), case["calls"])
    report({**figures, "device_peak": device_peak(case["device"])})


def loaded(case: Mapping[str, Any], order: Mapping[str, Any]) -> Callable[[], object]:
    """The pipeline with the scheduler that was asked for, and what makes one call of the part."""
    import torch

    torch.set_grad_enabled(False)
    pipeline = LOADERS[case["runner"]](case, order)
    pipeline.set_progress_bar_config(disable=True)
    if case["part"] == "image":
        return _image(pipeline, case, order)
    from safetensors.torch import load_file

    floats = getattr(torch, DTYPES[case["precision"]])
    feeds = {}
    for name, tensor in load_file(order["feeds"]).items():
        # timesteps keep their type, as in the pipeline: 999 is not exact in 16 bits
        dtype = floats if tensor.is_floating_point() and name not in ("timestep", "time_ids") else None
        feeds[name] = tensor.to(case["device"], dtype)
    return PARTS[case["part"]](pipeline, feeds)


def _diffusers(case: Mapping[str, Any], order: Mapping[str, Any]) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, DTYPES[case["precision"]])
    pipeline: Any = DiffusionPipeline.from_pretrained(order["folder"], torch_dtype=dtype, use_safetensors=True)
    return pipeline.to(case["device"])


def _compiled(case: Mapping[str, Any], order: Mapping[str, Any]) -> Any:
    import torch

    pipeline = _diffusers(case, order)
    for name in ("text_encoder", "text_encoder_2", "unet"):
        if getattr(pipeline, name, None) is not None:
            setattr(pipeline, name, torch.compile(getattr(pipeline, name)))
    pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    return pipeline


def _optimum(case: Mapping[str, Any], order: Mapping[str, Any]) -> Any:
    from optimum.onnxruntime import ORTDiffusionPipeline

    provider = "CUDAExecutionProvider" if case["device"] == "cuda" else "CPUExecutionProvider"
    return ORTDiffusionPipeline.from_pretrained(order["exported"], provider=provider)


def _optimum_intel(case: Mapping[str, Any], order: Mapping[str, Any]) -> Any:
    from optimum.intel import OVDiffusionPipeline

    # The plugin computes in bfloat16 where a processor has it, unless it is told the precision.
    config = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[case["precision"]]}
    return OVDiffusionPipeline.from_pretrained(order["exported"], ov_config=config)


LOADERS = {"diffusers": _diffusers, "compile": _compiled, "optimum": _optimum, "optimum-intel": _optimum_intel}


def _image(pipeline: Any, case: Mapping[str, Any], order: Mapping[str, Any]) -> Callable[[], object]:
    import torch

    pipeline.scheduler = _scheduler(case["sampler"]).from_config(pipeline.scheduler.config)
    request = {"num_inference_steps": case["steps"], "guidance_scale": case["guidance"]}
    request |= {"height": order["size"], "width": order["size"], "num_images_per_prompt": case["batch"]}
    return lambda: pipeline(order["prompt"], generator=torch.Generator().manual_seed(0), **request)


def _scheduler(sampler: str) -> Any:
    import diffusers

    names = {"euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler", "lcm": "LCMScheduler"}
    return getattr(diffusers, names[sampler])


def _text(name: str) -> Callable[[Any, Mapping[str, Any]], Callable[[], object]]:
    def part(pipeline: Any, feeds: Mapping[str, Any]) -> Callable[[], object]:
        encoder = getattr(pipeline, name)
        return lambda: encoder(feeds["input_ids"], output_hidden_states=True)

    return part


def _unet(pipeline: Any, feeds: Mapping[str, Any]) -> Callable[[], object]:
    added = {"text_embeds": feeds.get("text_embeds"), "time_ids": feeds.get("time_ids")}
    more = {"added_cond_kwargs": added} if added["time_ids"] is not None else {}
    if "timestep_cond" in feeds:
        more["timestep_cond"] = feeds["timestep_cond"]
    time = feeds["timestep"][:1].squeeze()  # one for all rows, as the pipeline's loop calls it
    hidden = feeds["encoder_hidden_states"]
    return lambda: pipeline.unet(feeds["sample"], time, encoder_hidden_states=hidden, return_dict=False, **more)


def _decoder(pipeline: Any, feeds: Mapping[str, Any]) -> Callable[[], object]:
    (latents,) = feeds.values()
    return lambda: pipeline.vae.decode(latents, return_dict=False)


def _encoder(pipeline: Any, feeds: Mapping[str, Any]) -> Callable[[], object]:
    (pixels,) = feeds.values()
    return lambda: pipeline.vae.encode(pixels, return_dict=False)


PARTS = {
    "text_encoder": _text("text_encoder"),
    "text_encoder_2": _text("text_encoder_2"),
    "unet": _unet,
    "vae_decoder": _decoder,
    "vae_encoder": _encoder,
}

if __name__ == "__main__":
    main()
