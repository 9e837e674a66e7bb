"""open_source: the one way from words on a command line to a Pipeline."""

from __future__ import annotations

from diffship.models.arch import PREFIX, arch_material
from diffship.models.pipeline import Pipeline, assemble


def open_source(text: str, *, base: str | None = None, revision: str | None = None) -> Pipeline:
    """A path that exists, a hub id, `emoji`, or `arch:NAME[+lcm][+taesd]`; `base` supplies parts that it lacks."""
    if text.startswith(PREFIX):
        return assemble(arch_material(text))
    raise NotImplementedError
