"""Files of a Core ML bundle: a package for each part, and the tokenizer where Apple's Swift package looks for it."""

from __future__ import annotations

from pathlib import Path

from diffship.core.atomic import write_file
from diffship.models.folder import write_json, write_tokenizer
from diffship.models.pipeline import Pipeline
from diffship.targets.coreml.package import FILES, SUFFIX, TOKENIZER_FILES, resource_name


def package_name(part: str) -> str:
    """`Unet.mlpackage`."""
    return f"{resource_name(part)}{SUFFIX}"


def part_files(part: str) -> tuple[str, ...]:
    """The files of a part's package, relative to the bundle; the first is what an engine opens."""
    return tuple(f"{package_name(part)}/{name}" for name in FILES)


def write_pipeline_files(pipeline: Pipeline, out: Path) -> None:
    """model_index.json, scheduler and tokenizers as in a diffusers folder; vocab.json and merges.txt of the first
    tokenizer lie beside the packages, too, for Swift."""
    write_json(out / "model_index.json", pipeline.model_index)
    (out / "scheduler").mkdir()
    write_json(out / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    for name, files in pipeline.tokenizers.items():
        write_tokenizer(files, out / name)
    first = next((files for files in pipeline.tokenizers.values() if set(TOKENIZER_FILES) <= set(files)), {})
    for name in TOKENIZER_FILES:
        if name in first:
            write_file(out / name, first[name])
