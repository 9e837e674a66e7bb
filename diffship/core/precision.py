"""Precision: the number format of a part, as one object that knows how it is stored, fed and proved.

A format is looked up once by its name (`precision_of`); whoever needs to know what it does asks the object. A new
format is one more instance here. A format that packs a weight as several tensors (codes, scales, zeros) says how in
`packing`; the forms of these are in the target's table of forms (`exporters.onnx.stored`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffship.core.dtype import TensorMeta, from_float32, to_float32
from diffship.core.errors import ConfigError
from diffship.core.spec import TensorSpec
from diffship.core.strict import unknown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Affine:
    """Unsigned codes of `bits` bits: code = round(x / scale) + zero, clipped, and back x = (code - zero) * scale."""

    scale: float
    zero: int
    bits: int


@dataclass(frozen=True)
class Packing:
    """Weights stored as small integers: value = (code - zero) * scale, in float32.

    block: how many neighbouring weights of an output channel share a scale; 0 means all of them.
    bits: without blocks, codes are signed, in one byte, and symmetric: 8 bits are -127 to 127, 7 bits -63 to 63; there
        is no zero. With blocks, codes are unsigned, and every block has a scale and a zero.
    """

    bits: int
    block: int = 0


@dataclass(frozen=True)
class Precision:
    """A number format of a part.

    name: as commands and manifests spell it.
    weights: dtype of a stored float weight.
    activations: dtype of what operators give. Exact tensors (`TensorSpec.exact`) and what is computed from them alone,
        such as sinusoids of timesteps, stay in float32.
    ports: dtype of float inputs and outputs; float32 for bf16, which numpy does not have.
    on_cpu: whether engines on a CPU compute it. If not, a part is proved in float32 arithmetic on its rounded weights.
    packing: how weights of large layers are stored as integers (`calibration.packings` says which layers those are);
        None if every weight has the type `weights`.
    chosen: packing by the name of a weight, of one part, where a user or a budget has chosen; None if the rule decides.
    inputs: bits of the codes that inputs of those layers are rounded to; 0 if they are not.
    ranges: these codes by the path of a layer, of one part of one calibration. A precision that is looked up has none.
    palette_bits: bits of an index into a table of weights; 0 if weights are stored one by one.
    """

    name: str
    weights: str
    activations: str
    ports: str
    on_cpu: bool = True
    palette_bits: int = 0
    packing: Packing | None = None
    chosen: Mapping[str, Packing] | None = field(default=None, compare=False, repr=False)
    inputs: int = 0
    ranges: Mapping[str, Affine] = field(default_factory=dict, compare=False, repr=False)

    @property
    def exact(self) -> bool:
        """Whether an engine computes what torch does in float32 on the weights as they are stored.

        Then a proof is as tight as between two float32 engines, if torch has the stored weights too. What storing them
        costs is quality, and is reported beside the proof.
        """
        return self.weights == self.activations == "float32" and not self.inputs

    @property
    def simulated(self) -> bool:
        """Whether a proof compares with torch as it simulates this precision, and not with torch on the true weights.

        So it is if weights are packed. What the simulation is from the true weights is reported as quality.
        """
        return self.packing is not None

    @property
    def lossless(self) -> bool:
        """Whether an engine computes what torch does in float32, but for the order of sums.

        Then the tolerance of a proof is that of two float32 engines. Otherwise it is measured: what the rounding of
        weights and results costs in torch, and a margin.
        """
        return self.exact and self.packing is None

    @property
    def weight_bytes(self) -> int:
        """Bytes of one stored weight that is not packed, at the most."""
        return TensorMeta(self.weights, ()).nbytes

    def for_range(self, wide: bool) -> Precision:
        """This precision, or fp32 if a part computes values beyond float16 (`wide`) and this one computes in it.

        The largest float16 is 65504; bfloat16 has the range of float32.
        """
        return FP32 if wide and self.activations == "float16" else self

    def port(self, spec: TensorSpec) -> TensorSpec:
        """An input or output as the compiled part has it: in `ports`, unless that would round an exact tensor."""
        kept = not spec.is_float or (spec.exact and not spec.whole)
        return TensorSpec(spec.name, spec.dtype if kept else self.ports, spec.shape)

    def feeds(
        self, specs: Iterable[TensorSpec], feeds: Mapping[str, NDArray[np.generic]]
    ) -> dict[str, NDArray[np.generic]]:
        """`feeds` (by name, of `specs`) with float32 values that the compiled part's inputs hold exactly.

        Raises:
            ConfigError: a value is beyond the range of `ports`.
        """
        rounded = {spec.name for spec in specs if spec.is_float and not spec.exact}
        return {name: self._rounded(array) if name in rounded else array for name, array in feeds.items()}

    def _rounded(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        return to_float32(from_float32(to_float32(array), self.ports), self.ports)


FP32 = Precision("fp32", "float32", "float32", "float32")
FP16 = Precision("fp16", "float16", "float16", "float16")
BF16 = Precision("bf16", "bfloat16", "bfloat16", "float32", on_cpu=False)
INT8_WEIGHTS = Precision("int8-weights", "float32", "float32", "float32", packing=Packing(8))
INT4_WEIGHTS = Precision("int4-weights", "float32", "float32", "float32", packing=Packing(4, 64))
MIXED_WEIGHTS = Precision("mixed-weights", "float32", "float32", "float32", packing=Packing(8))
# On CPUs with AVX2 and without VNNI, kernels for products of codes of 8 bits add two of them in 16 bits, which saturate
# in silence: 32 dB in ONNX Runtime, 37 in OpenVINO. With weights of 7 bits no sum can.
INT8 = Precision("int8", "float32", "float32", "float32", packing=Packing(7), inputs=8)
W8A16 = Precision("w8a16", "float32", "float32", "float32", packing=Packing(8), inputs=16)
_PACKED = (INT8_WEIGHTS, INT4_WEIGHTS, MIXED_WEIGHTS, INT8, W8A16)
FLOATS: Mapping[str, Precision] = {precision.name: precision for precision in (FP32, FP16, BF16)}
PRECISIONS: Mapping[str, Precision] = {**FLOATS, **{one.name: one for one in _PACKED}}
# Weights as indices of a few bits into tables of float16; arithmetic in float16. Of Core ML alone.
PALETTES: Mapping[str, Precision] = {
    f"palette{bits}": Precision(f"palette{bits}", "float16", "float16", "float16", palette_bits=bits)
    for bits in (8, 6, 4, 2)
}
_ALL = {**PRECISIONS, **PALETTES}


def precision_of(name: str) -> Precision:
    """The precision called `name`; raises ConfigError, with the nearest legal name, for any other name."""
    if name not in _ALL:
        raise ConfigError(unknown("precision", name, _ALL))
    return _ALL[name]
