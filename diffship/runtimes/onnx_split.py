"""Cut an ONNX model into stretches that run one after the other, so that a model larger than memory can be checked.

Only the graph is read; a stretch's weights are copied out of the data file when its path is asked for, and removed
when the next one is: engines refuse data outside the model's folder, and links that lead there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.errors import BundleError, RunnerError
from diffship.core.lazy import lazy, need

if TYPE_CHECKING:
    import onnx
else:
    onnx = lazy("onnx")

_DATA = "stage.onnx_data"
_CHUNK = 1 << 24
_LEAST = 1 << 16  # bytes of weights that are worth a stretch of their own
_INLINE = 1 << 10  # smaller initialisers count for nothing


@dataclass(frozen=True)
class SplitStage:
    """One stretch: `inputs` are graph inputs or outputs of earlier stretches; `weight_bytes` lie outside the graph."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: int
    _model: Any = field(repr=False, compare=False)
    _source: Path = field(repr=False, compare=False)
    _folder: Path = field(repr=False, compare=False)
    _name: str = field(repr=False, compare=False)
    _types: Any = field(repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The stretch as an ONNX file with its weights beside it; the files of the stretch before are gone then."""
        place = self._folder / self._name
        if not place.exists():
            _clear(self._folder)
            _write(self._model, self._source, place)
        return place

    def every_node(self) -> SplitStage:
        """The same stretch, with everything that its nodes make as outputs, in execution order."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        names = [name for node in model.graph.node for name in node.output if name]
        del model.graph.output[:]
        model.graph.output.extend(_typed(self._types, name) for name in names)
        return replace(self, outputs=tuple(names), _model=model, _name=self._name.replace(".onnx", "_each.onnx"))

    def node_of(self, output: str) -> str:
        """`MatMul mid_block.attentions.0/MatMul`: the operator that makes `output`, and its name."""
        node = next(node for node in self._model.graph.node if output in node.output)
        return f"{node.op_type} {node.name or output}"


def split(model_path: str | os.PathLike[str], max_bytes: int, folder: str | os.PathLike[str]) -> list[SplitStage]:
    """Stretches of at most `max_bytes` of weights in execution order, cut where few tensors cross.

    `folder` must exist and be private to the caller; it holds one stretch at a time.

    Raises:
        RunnerError: one operator alone has more weights than `max_bytes`.
        BundleError: the file is no ONNX model, or keeps data elsewhere than beside it.
    """
    path = Path(model_path)
    return _stretches(_Facts(_load(path)), max_bytes, path, Path(folder))


def split_evenly(model_path: str | os.PathLike[str], count: int, folder: str | os.PathLike[str]) -> list[SplitStage]:
    """About `count` stretches of like weight; fewer where an operator outweighs such a one, or the model is small."""
    path = Path(model_path)
    facts = _Facts(_load(path))
    return _stretches(facts, max(sum(facts.sizes.values()) // count, _LEAST, facts.heaviest()), path, Path(folder))


def _stretches(facts: _Facts, max_bytes: int, path: Path, folder: Path) -> list[SplitStage]:
    bounds = _cuts(facts, max_bytes)
    types = _types(facts.model)
    return [
        _stage(facts, types, path, folder, index, start, stop)
        for index, (start, stop) in enumerate(zip([0, *bounds[:-1]], bounds, strict=True))
    ]


class _Facts:
    """Who makes and who reads each tensor, and where the weights are."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.model = model
        self.nodes = list(graph.node)
        self.initialisers = {tensor.name: tensor for tensor in graph.initializer}
        self.reads = [tuple(dict.fromkeys(_reads(node))) for node in self.nodes]
        self.final = {port.name for port in graph.output}
        self.maker = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.last_use: dict[str, int] = {}
        for i, names in enumerate(self.reads):
            self.last_use.update(dict.fromkeys(names, i))
        self.last_use.update(dict.fromkeys(self.final, len(self.nodes)))
        self.sizes = {name: _size(tensor) for name, tensor in self.initialisers.items()}

    def heaviest(self) -> int:
        """Bytes of weights of the operator that has most."""
        return max((sum(self.sizes.get(name, 0) for name in names) for names in self.reads), default=0)

    def crossing(self) -> list[int]:
        """Tensors that are alive after each node."""
        change = [0] * (len(self.nodes) + 2)
        for name, made in self.maker.items():
            used = self.last_use.get(name, made)
            change[made] += 1
            change[used] -= 1
        alive, counts = 0, []
        for step in change[: len(self.nodes)]:
            alive += step
            counts.append(alive)
        return counts


def _cuts(facts: _Facts, max_bytes: int) -> list[int]:
    """Ends of the stretches (exclusive node indices); each but the last is at least half full where it can be."""
    crossing = facts.crossing()
    bounds: list[int] = []
    start, count = 0, len(facts.nodes)
    while start < count:
        held, seen, best = 0, set[str](), start
        for i in range(start, count):
            fresh = [name for name in facts.reads[i] if name in facts.sizes and name not in seen]
            seen.update(fresh)
            held += sum(facts.sizes[name] for name in fresh)
            if held > max_bytes:
                break
            if held < max_bytes // 2 or best == start or crossing[i] <= crossing[best - 1]:
                best = i + 1
        else:
            best = count
        if best == start:
            node = facts.nodes[start]
            raise RunnerError(
                f"operator {node.name[:120]} has {held} bytes of weights; {max_bytes} may be held at once"
            )
        bounds.append(best)
        start = best
    return bounds


def _stage(
    facts: _Facts,
    types: Mapping[str, onnx.ValueInfoProto],
    source: Path,
    folder: Path,
    index: int,
    start: int,
    stop: int,
) -> SplitStage:
    nodes = facts.nodes[start:stop]
    made = {name for node in nodes for name in node.output if name}
    read = dict.fromkeys(name for names in facts.reads[start:stop] for name in names)
    inputs = [name for name in read if name not in made and name not in facts.initialisers]
    outputs = [name for name in made if name in facts.final or facts.last_use.get(name, -1) >= stop]
    outputs.sort(key=lambda name: (facts.maker[name], name))
    weights = [facts.initialisers[name] for name in read if name in facts.initialisers]
    graph = onnx.helper.make_graph(
        nodes, f"stage_{index}", [_typed(types, n) for n in inputs], [_typed(types, n) for n in outputs], weights
    )
    model = onnx.helper.make_model(graph, opset_imports=facts.model.opset_import, functions=facts.model.functions)
    model.ir_version = facts.model.ir_version
    size = sum(facts.sizes[tensor.name] for tensor in weights)
    return SplitStage(tuple(inputs), tuple(outputs), size, model, source, folder, f"stage_{index:04d}.onnx", types)


def _load(path: Path) -> onnx.ModelProto:
    need("onnx")  # which brings protobuf
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as fault:
        raise BundleError(f"{path}: not an ONNX model: {str(fault)[:120]}") from None


def _types(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Type of every tensor that may cross a cut; inferred only where the file does not state it."""
    graph = model.graph
    known = {info.name: info for info in (*graph.value_info, *graph.input, *graph.output)}
    if not all(name in known for node in graph.node for name in node.output if name):
        inferred = onnx.shape_inference.infer_shapes(model).graph
        known = {info.name: info for info in inferred.value_info} | known
    return known


def _typed(types: Mapping[str, onnx.ValueInfoProto], name: str) -> onnx.ValueInfoProto:
    if name not in types:
        raise RunnerError(f"the model does not say of which type the tensor {name[:120]} is, so it cannot be cut there")
    return types[name]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those captured by its inner graphs included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
            made = {name for inner in graph.node for name in inner.output} | {port.name for port in graph.input}
            own = made | {tensor.name for tensor in graph.initializer}
            yield from (name for inner in graph.node for name in _reads(inner) if name not in own)


def _size(tensor: onnx.TensorProto) -> int:
    claims = {entry.key: entry.value for entry in tensor.external_data}
    if "length" in claims:
        return int(claims["length"])
    size = max(len(tensor.raw_data), 4 * math.prod(tensor.dims))
    return size if size > _INLINE else 0


def _clear(folder: Path) -> None:
    for file in folder.glob("stage*.onnx*"):
        file.unlink()


def _write(model: onnx.ModelProto, source: Path, place: Path) -> None:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    with open(place.with_name(_DATA), "wb") as target:
        for tensor in copied.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _move(tensor, source, target)
    place.write_bytes(copied.SerializeToString())


def _move(tensor: onnx.TensorProto, source: Path, target: Any) -> None:
    """Copy one tensor's bytes to `target`, page-aligned, and let the tensor point there."""
    claims = {entry.key: entry.value for entry in tensor.external_data}
    location = claims.get("location", "")
    if Path(location).name != location:
        raise BundleError(f"{source}: tensor {tensor.name[:80]!a} lies in {location[:80]!a}, not beside the model")
    offset = target.tell()
    padding = -offset % 4096
    target.write(b"\0" * padding)
    length = _copy(source.with_name(location), int(claims.get("offset", "0")), claims.get("length"), target)
    del tensor.external_data[:]
    for key, value in (("location", _DATA), ("offset", offset + padding), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def _copy(source: Path, offset: int, claimed: str | None, target: Any) -> int:
    length = source.stat().st_size - offset if claimed is None else int(claimed)
    with open(source, "rb", buffering=0) as file:
        file.seek(offset)
        for piece in _pieces(length):
            data = file.read(piece)
            if len(data) != piece:
                raise BundleError(f"{source} ends before its tensors do")
            target.write(data)
    return length


def _pieces(length: int) -> Iterable[int]:
    return (min(_CHUNK, length - done) for done in range(0, length, _CHUNK))
