"""Tiny pairs for the handoff tests: a large model, and the small one that bk-tiny's layout makes of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from diffship.compress import compress
from diffship.compression.layout import LayoutPass
from diffship.models.model import PipelineModel
from diffship.models.sources.opening import open_source

SIZE = (64, 64)


@cache
def large(name: str = "tiny-sd") -> PipelineModel:
    """`arch:NAME` on torch; opened once for all tests, which only draw with it."""
    return PipelineModel(open_source(f"arch:{name}"))


@cache
def small(name: str = "tiny-sd") -> PipelineModel:
    """The bk-tiny layout of `large(name)`: other weights, the same text encoder and VAE."""
    return PipelineModel(compress(open_source(f"arch:{name}"), [LayoutPass("bk-tiny")]))


class Stand:
    """Facts of a model, each of which may be changed; it computes nothing."""

    def __init__(self, model: Any, name: str, **family: Any) -> None:
        self.name = name
        self.family = replace(model.family, **family)
        self.scheduler: dict[str, Any] = dict(model.scheduler)
        self.digests: dict[str, str] = dict(model.digests)
