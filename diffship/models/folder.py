"""Writing a pipeline as a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.atomic import write_file
from diffship.core.job import Bytes
from diffship.core.safetensors_file import write_safetensors
from diffship.core.weights import TensorMeta, Weights, cast
from diffship.models.card import write_card

if TYPE_CHECKING:
    from diffship.models.parts.component import Component
    from diffship.models.pipeline import Pipeline

Progress = Callable[[str, int, int], None]
DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"


def write_folder(pipeline: Pipeline, folder: Path, dtype: str | None, progress: Progress | None) -> None:
    """Everything but the atomic rename; `progress(label, done, total)` counts bytes of tensors."""
    write_json(folder / "model_index.json", pipeline.model_index)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    for name, files in pipeline.tokenizers.items():
        write_tokenizer(files, folder / name)
    write_card(pipeline, folder)
    for name, parts in _folders(pipeline):
        target = folder / name
        target.mkdir()
        config = folder_config(parts[0])
        if parts[0].text_type is not None:
            # transformers 5 would load this part alone in the type of its tensors, and the pipeline would not run
            config.pop("torch_dtype", None)
            config["dtype"] = "float32"
        write_json(target / "config.json", config)
        file = DIFFUSERS_FILE if parts[0].text_type is None else TRANSFORMERS_FILE
        _write_weights([part.weights for part in parts], target / file, dtype, name, progress)


def write_tokenizer(files: Mapping[str, bytes], folder: Path) -> None:
    """The files of one tokenizer into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_file(folder / name, data)


def folder_config(component: Component) -> dict[str, Any]:
    """config.json of a part, with the class that diffusers and transformers look up."""
    config = dict(component.config)
    if component.text_type is None:
        config["_class_name"] = component.class_name
    else:
        config.update(architectures=[component.class_name], model_type=component.text_type)
    return config


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Indented JSON with sorted keys, as diffusers writes it."""
    write_file(path, json.dumps(dict(data), indent=2, sort_keys=True) + "\n")


def _folders(pipeline: Pipeline) -> Iterator[tuple[str, list[Component]]]:
    """Each folder with the parts whose weights lie in it together."""
    for slot in pipeline.family.kind.slots:
        parts = [pipeline.components[name] for name in slot.components if name in pipeline.components]
        if parts:
            yield slot.folder, parts


def _write_weights(
    sources: Sequence[Weights], path: Path, dtype: str | None, label: str, progress: Progress | None
) -> None:
    owner: dict[str, Weights] = {}
    metas: dict[str, TensorMeta] = {}
    for source in sources:
        weights = cast(source, dtype) if dtype else source
        for name in weights.names():
            owner[name], metas[name] = weights, weights.meta(name)
    total, done = Bytes(sum(meta.nbytes for meta in metas.values())), 0

    def written(name: str) -> None:
        nonlocal done
        done += metas[name].nbytes
        if progress is not None:
            progress(f"write {label}", done, total)

    write_safetensors(path, metas, lambda name: owner[name].read(name), {"format": "pt"}, written)
