"""Files beside the graphs, as optimum's ONNX Runtime pipelines (and diffusers) look for them."""

from __future__ import annotations

from pathlib import Path

from diffship.models.folder import folder_config, write_json, write_tokenizer
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.models.sources.defaults import class_defaults

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"  # hub clients skip *.bin and *.safetensors beside an ONNX file
# keys that optimum reads (of a U-Net, of a VAE), and guesses if they are not there
_STATED = ("time_cond_proj_dim", "scaling_factor")


def beside(part: str, owner: str) -> str:
    """The file of a part that lies in the folder of another one, over whose data it is: `model_controlled.onnx`."""
    return f"model_{part.removeprefix(owner).strip('_')}.onnx"


def write_part_config(component: Component, folder: Path) -> None:
    """config.json of a part; both halves of a VAE get the whole VAE's."""
    config = folder_config(component)
    usual = class_defaults(component.class_name)
    write_json(folder / "config.json", {**{key: usual[key] for key in _STATED if key in usual}, **config})


def write_pipeline_files(pipeline: Pipeline, out: Path) -> None:
    """model_index.json with the original class names, the scheduler's config, and each tokenizer in all its forms."""
    write_json(out / "model_index.json", pipeline.model_index)
    (out / "scheduler").mkdir()
    write_json(out / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    for name, files in pipeline.tokenizers.items():
        write_tokenizer(files, out / name)
