"""Reading a ControlNet: a folder of diffusers or a hub id, alone or beside a pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from diffship.core.errors import ConfigError, SourceError, UnsupportedError
from diffship.core.kind import Slot
from diffship.core.sniff import missing, near
from diffship.models.pipeline import Pipeline
from diffship.models.sources.diffusers_folder import read_module
from diffship.models.sources.hub import hub_folder, is_hub_id
from diffship.models.sources.licences import joined, licence_of

TARGETS = ("onnx",)  # that have a form for them
SLOT = Slot("controlnet", ("ControlNetModel",))
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,31}\Z")


def with_controlnets(pipeline: Pipeline, sources: Mapping[str, str], target: str = TARGETS[0]) -> Pipeline:
    """`pipeline` with a part for each of `sources` (name: folder or hub id), and one more: its denoiser, which takes
    their residuals.

    Raises:
        ConfigError: a name that no part can have, or no denoiser among the parts.
        SourceError: nothing readable is there, or it was trained for another family.
        UnsupportedError: there are no ControlNets for this kind of model, not such ones, or none for this `target`.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"ControlNets are exported to {TARGETS[0]}, and the target is {target}: leave them out")
    kind, modules, licence = pipeline.family.kind, {}, dict(pipeline.licence)
    for name, text in sources.items():
        if not _NAME.match(name):
            raise ConfigError(f"a ControlNet is called {name[:40]!a}; legal are a-z, 0-9 and _, at most 32 of them")
        folder = controlnet_folder(text)
        modules[name] = read_module(folder, SLOT)
        licence = joined(licence, licence_of(folder))
    if kind.denoiser not in pipeline.components:
        raise ConfigError(f"a ControlNet controls the {kind.denoiser}, which is not among the parts")
    parts = kind.with_controlnets(pipeline.denoiser, pipeline.family, modules)
    source = {**pipeline.source, "controlnets": dict(sources)}
    return replace(pipeline.having(*parts), source=source, licence=licence)


def controlnet_folder(text: str) -> Path:
    """The folder with the config and weights of a ControlNet. Raises SourceError if there is none."""
    path = Path(text).expanduser()
    if not path.is_dir():
        if not (is_hub_id(text) and "/" in text) or missing(text):
            raise SourceError(
                f"{text[:200]!r} is no folder with a ControlNet and no hub id; name what diffusers saved{near(text)}"
            )
        path, _ = hub_folder(text, None)
    inside = path / SLOT.folder
    return inside if (inside / "config.json").is_file() else path
