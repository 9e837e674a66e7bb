"""Files beside the graphs, as optimum's ONNX Runtime pipelines (and diffusers) look for them."""

from __future__ import annotations

from pathlib import Path

from diffship.models.folder import folder_config, write_json, write_tokenizer
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"  # hub clients skip *.bin and *.safetensors beside an ONNX file


def write_part_config(component: Component, folder: Path) -> None:
    """config.json of a part; both halves of a VAE get the whole VAE's.

    optimum reads `time_cond_proj_dim` of a U-Net and `scaling_factor` of a VAE, and guesses where they are not stated.
    """
    config = folder_config(component)
    if component.name == "unet":
        config.setdefault("time_cond_proj_dim", None)
    if component.name.startswith("vae"):
        config.setdefault("scaling_factor", 0.18215 if component.class_name == "AutoencoderKL" else 1.0)
    write_json(folder / "config.json", config)


def write_pipeline_files(pipeline: Pipeline, out: Path) -> None:
    """model_index.json with the original class names, the scheduler's config, and each tokenizer in all its forms."""
    write_json(out / "model_index.json", pipeline.model_index)
    (out / "scheduler").mkdir()
    write_json(out / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    for name, files in pipeline.tokenizers.items():
        write_tokenizer(files, out / name)
