"""Checkpoint: one file of tensors, what it says of itself, and how it shall be read. Kinds find their parts in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffship.core.brief import brief
from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.load_options import AS_SAID, LoadOptions
from diffship.core.pieces import Piece, Pieced
from diffship.core.weights import Weights
from diffship.models.parts.component import SHOWN

EMA = "model_ema."
# buffers that are computed, counters, and what only training reads: by how their names end
_NO_PARAMETERS = ("position_ids", "attn_mask", "logit_scale", "num_batches_tracked")


@brief
@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file, the notes in its header, and how whoever opened it wants them read."""

    path: Path
    weights: Weights = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    loading: LoadOptions = AS_SAID

    def __contains__(self, name: object) -> bool:
        return name in self.weights.names()

    def under(self, prefix: str) -> dict[str, str]:
        """{name without `prefix`: name} of the tensors whose names begin with it."""
        return {name.removeprefix(prefix): name for name in self.weights.names() if name.startswith(prefix)}

    def pieced(
        self, local: Mapping[str, str], pieces: Callable[[Iterable[str]], Mapping[str, Piece]], what: str
    ) -> Pieced:
        """The tensors of one part, which go by `{name that pieces knows: stored name}`, under their new names.

        Raises:
            UnsupportedError: the part has tensors that `pieces` does not know, so it computes something else.
        """
        made = pieces(local)
        strange = sorted(set(local) - {piece.name for piece in made.values()})
        strange = [name for name in strange if not name.endswith(_NO_PARAMETERS)]
        if strange:
            raise UnsupportedError(
                f"{self.path}: its {what} has {len(strange)} tensors that no {what} read here has, first "
                f"{', '.join(strange[:SHOWN])}: it computes something else"
            )
        return Pieced(self.weights, {new: replace(piece, name=local[piece.name]) for new, piece in made.items()})

    def averaged(self, local: Mapping[str, str], module: str) -> dict[str, str]:
        """`local` with the stored names of the averaged weights of `module`, as LDM's training keeps them: without
        dots (`model_ema.diffusion_modelout2weight`).

        Raises:
            SourceError: the file has none.
        """
        names = set(self.weights.names())
        found = {name: f"{EMA}{module}{name.replace('.', '')}" for name in local}
        missing = [stored for stored in found.values() if stored not in names]
        if missing:
            raise SourceError(
                f"{self.path}: {len(missing)} of {len(found)} averaged (EMA) weights are not in it, first "
                f"{missing[0]!r}; leave --ema out to read its other weights"
            )
        return found
