"""Reading: which syntax a prompt is written in, and how many layers of a text encoder are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diffship.core.limits import LIMITS
from diffship.core.registry import SYNTAXES
from diffship.core.strict import bounded, bounds, choices, load


@dataclass(frozen=True)
@bounded
class Reading:
    """How the prompts of a picture are read.

    syntax: `plain` reads every character as text, and 75 tokens of it, as stock diffusers does. `a1111` and `compel`
    read weights and any number of tokens, as these programs do. clip_skip: how many of the last layers of the CLIP text
    encoders are left out, as diffusers counts: 0 is none, and 1 is what A1111 calls "Clip skip: 2".
    """

    syntax: str = field(default=SYNTAXES[0], metadata=choices(*SYNTAXES))
    clip_skip: int = field(default=0, metadata=bounds(*LIMITS.clip_skip))

    @property
    def of_negative(self) -> Reading:
        """How the negative prompt is read: A1111 leaves the layers out of both prompts, diffusers of the first."""
        return self if self.syntax == "a1111" else replace(self, clip_skip=0)

    def to_json(self) -> dict[str, Any]:
        """The fields that are not at their default, so that an older reader knows all keys unless they matter."""
        own = {"syntax": self.syntax, "clip_skip": self.clip_skip}
        return {name: value for name, value in own.items() if value != getattr(PLAIN, name)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reading:
        """The inverse of `to_json`; raises ConfigError for an unknown key or a value that is not legal."""
        return load(cls, data, "reading")


PLAIN = Reading()
