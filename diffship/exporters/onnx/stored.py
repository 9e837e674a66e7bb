"""Stored: which tensor of the weights an initialiser of a graph holds, and in which form.

One source tensor may have several initialisers, each in a form of its own; the form is a suffix of the initialiser's
name. A packed weight has up to three: its codes, their scales and their zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffship.core.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


CODES, SCALES, ZEROS = "codes", "scales", "zeros"


@dataclass(frozen=True)
class Form:
    """How an initialiser holds its source tensor. reversed: with its axes in the opposite order.

    packed: which of CODES, SCALES and ZEROS of the source it holds; empty if it holds the source itself. `shape` and
    `values` are then about that one.
    """

    suffix: str
    reversed: bool
    packed: str = ""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The initialiser's shape, given that of its source; and the other way round."""
        return shape[::-1] if self.reversed else shape

    def values(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """The initialiser's values, given those of its source."""
        return array.T if self.reversed else array


PLAIN = Form("", False)
TRANSPOSED = Form(".transposed", True)
_PACKED = {
    (kind, reverse): Form(f".packed_{kind}" + (TRANSPOSED.suffix if reverse else ""), reverse, kind)
    for kind in (CODES, SCALES, ZEROS)
    for reverse in (False, True)
}
# the first one that ends a name is its form: the longest suffixes first, and last the empty one, which ends every name
FORMS = (*_PACKED.values(), TRANSPOSED, PLAIN)


def packed_form(kind: str, reverse: bool) -> Form:
    """The form of codes, scales or zeros (`kind`), with axes in the opposite order if `reverse`."""
    return _PACKED[kind, reverse]


@dataclass(frozen=True)
class Stored:
    """`source` is the tensor's name in the component's weights.

    Raises:
        UnsupportedError: (the constructor) `source` itself ends like a form, so that no name could tell them apart.
    """

    source: str
    form: Form = PLAIN

    def __post_init__(self) -> None:
        taken = next(form for form in FORMS if self.source.endswith(form.suffix))
        if taken is not PLAIN:
            raise UnsupportedError(f"the tensor {self.source!r} is named like a {taken.suffix} form of another one")

    @property
    def name(self) -> str:
        """The initialiser's name."""
        return self.source + self.form.suffix

    @classmethod
    def of(cls, name: str) -> Stored:
        """What the initialiser called `name` holds."""
        form = next(form for form in FORMS if name.endswith(form.suffix))
        return cls(name.removesuffix(form.suffix), form)
