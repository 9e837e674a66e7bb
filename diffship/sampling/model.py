"""The protocol of an opened pipeline, whatever the engine: all that `generate` needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from diffship.core.family import Family
from diffship.core.runner import Runner
from diffship.sampling.tokenizer import Tokenizer


class Model(Protocol):
    """Facts, tokenizers and parts of a pipeline; a torch Pipeline and a Bundle on any engine both give one.

    `scheduler` is a diffusers scheduler config; `tokenizers` are by folder (`tokenizer`, `tokenizer_2`); `parts` are
    the canonical names that the kind of model has (`family.kind.parts`), all or some of them.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def digests(self) -> Mapping[str, str]:
        """By part: sha256 over its source tensors, equal for equal weights on every engine."""
        ...

    @property
    def family(self) -> Family: ...

    @property
    def scheduler(self) -> Mapping[str, Any]: ...

    @property
    def tokenizers(self) -> Mapping[str, Tokenizer]: ...

    @property
    def parts(self) -> frozenset[str]: ...

    def use(self, part: str) -> Runner:
        """The runner of `part`, opened on first use and kept until `release`."""
        ...

    def release(self, part: str) -> None:
        """Free `part`; `use` opens it again. Not an error if it is not open."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
