"""Cut an ONNX model into stretches that run one after the other, so that a model larger than memory can be checked.

A stretch is cut out of a finished graph, at nodes where the weights fill the budget and few tensors cross. A stage
(`models.walks.stages`) is something else: it is cut out of a torch module at named blocks, and is a part of its own. A
proof needs stretches, because it must run the very nodes of the file, on machines without torch; a stage that is
exported is another file.

Only the graph is read. The weights of a stretch are copied out of the data file when its path is asked for, and removed
when the next one is asked for, because engines refuse data outside the model's folder, and links that lead there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from diffship.core.errors import BundleError, RunnerError
from diffship.core.lazy import need
from diffship.runtimes.engines.onnx_edit import Node
from diffship.runtimes.proof.onnx_model import OnnxModel, Tensor, moved, read_model, reads
from diffship.runtimes.proof.onnx_widen import widened_bytes, widened_info, widened_inline, widened_node

_DATA = "stage.onnx_data"
_CHUNK = 1 << 24
_LEAST = 1 << 16  # bytes of weights that are worth a stretch of their own
_PAGE = 4096


@dataclass(frozen=True)
class SplitStage:
    """One stretch: `inputs` are graph inputs or outputs of earlier stretches; `weight_bytes` lie outside the graph."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: int
    _model: OnnxModel = field(repr=False, compare=False)
    _nodes: tuple[Node, ...] = field(repr=False, compare=False)
    _data: Path = field(repr=False, compare=False)  # folder of the weights
    _folder: Path = field(repr=False, compare=False)
    _name: str = field(repr=False, compare=False)
    _widen: bool = field(repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The stretch as an ONNX file with its weights beside it; the files of the stretch before are gone then."""
        place = self._folder / self._name
        if not place.exists():
            _clear(self._folder)
            self._write(place)
        return place

    def every_node(self) -> SplitStage:
        """The same stretch, with everything that its nodes make as outputs, in execution order."""
        names = tuple(name for node in self._nodes for name in node.outputs if name)
        return replace(self, outputs=names, _name=self._name.replace(".onnx", "_each.onnx"))

    def node_of(self, output: str) -> str:
        """`MatMul mid_block.attentions.0/MatMul`: the operator that makes `output`, and its name."""
        node = next(node for node in self._nodes if output in node.outputs)
        return f"{node.op} {node.name or output}"

    def _write(self, place: Path) -> None:
        used = dict.fromkeys(name for node in self._nodes for name in reads(node))
        with open(place.with_name(_DATA), "wb") as target:
            tensors = [self._moved(self._model.tensors[name], target) for name in used if name in self._model.tensors]
        nodes, infos = self._nodes, self._model.infos
        if self._widen:
            nodes = tuple(map(widened_node, nodes))
            infos = {name: widened_info(infos[name]) for name in (*self.inputs, *self.outputs)}
        model = replace(self._model, infos=infos)
        place.write_bytes(model.encode(nodes, self.inputs, self.outputs, tensors))

    def _moved(self, tensor: Tensor, target: BinaryIO) -> bytes | memoryview:
        """The tensor's message; bytes from outside are copied to `target`, page-aligned."""
        if not tensor.external:
            return widened_inline(tensor) if self._widen else tensor.raw
        location = tensor.external.get("location", "")
        if Path(location).name != location or not location:
            raise BundleError(f"tensor {tensor.name[:80]!a} lies in {location[:80]!a}, not beside the model")
        target.write(b"\0" * (-target.tell() % _PAGE))
        offset = target.tell()
        dtype = _copy(self._data / location, tensor, target, self._widen)
        return moved(tensor, _DATA, offset, target.tell() - offset, dtype)


def load(path: str | os.PathLike[str]) -> OnnxModel:
    """The graph of an ONNX file, whose weights stay outside; raises BundleError if it is none.

    Types of tensors that the file leaves out are inferred by the onnx package; our own files state all of them.
    """
    try:
        model = read_model(Path(path).read_bytes())
        made = (name for node in model.nodes for name in node.outputs if name)
        return model if all(name in model.infos for name in made) else read_model(_inferred(Path(path)))
    except OSError as fault:
        raise BundleError(f"{path}: not an ONNX model: {fault.strerror}") from None
    except BundleError as fault:
        raise BundleError(f"{path}: {fault}") from None


def _inferred(path: Path) -> bytes:
    onnx = need("onnx")
    model = onnx.load(str(path), load_external_data=False)
    data: bytes = onnx.shape_inference.infer_shapes(model).SerializeToString()
    return data


def split(
    path: str | os.PathLike[str],
    max_bytes: int,
    folder: str | os.PathLike[str],
    *,
    model: OnnxModel | None = None,
    widen: bool = False,
) -> list[SplitStage]:
    """Stretches of at most `max_bytes` of weights in execution order, cut where few tensors cross.

    `folder` must exist and be private to the caller; it holds one stretch at a time. `model` is an edited form of the
    graph at `path`, beside which the weights lie. `widen` writes 16-bit floats as float32; `max_bytes` counts them as
    they were.

    Raises:
        RunnerError: one operator alone has more weights than `max_bytes`.
        BundleError: the file is no ONNX model, or keeps weights elsewhere than beside it.
    """
    return _stretches(_Facts(model or load(path)), max_bytes, Path(path).parent, Path(folder), widen)


def split_evenly(path: str | os.PathLike[str], count: int, folder: str | os.PathLike[str]) -> list[SplitStage]:
    """About `count` stretches with equal bytes of weights; fewer if one operator has more, or if the model is small."""
    facts = _Facts(load(path))
    size = max(sum(facts.sizes.values()) // count, _LEAST, facts.heaviest)
    return _stretches(facts, size, Path(path).parent, Path(folder), False)


class _Facts:
    """Who makes and who reads each tensor, and where the weights are."""

    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        self.nodes = model.nodes
        self.reads = [tuple(dict.fromkeys(reads(node))) for node in self.nodes]
        self.final = frozenset(model.outputs)
        self.maker = {name: i for i, node in enumerate(self.nodes) for name in node.outputs if name}
        self.last_use: dict[str, int] = {}
        for i, names in enumerate(self.reads):
            self.last_use.update(dict.fromkeys(names, i))
        self.last_use.update(dict.fromkeys(self.final, len(self.nodes)))
        self.sizes = {name: tensor.nbytes for name, tensor in model.tensors.items()}

    @cached_property
    def heaviest(self) -> int:
        """Bytes of weights of the operator that has most."""
        return max((sum(self.sizes.get(name, 0) for name in names) for names in self.reads), default=0)

    @cached_property
    def crossing(self) -> list[int]:
        """Tensors that are alive after each node."""
        change = [0] * (len(self.nodes) + 2)
        for name, made in self.maker.items():
            change[made] += 1
            change[self.last_use.get(name, made)] -= 1
        alive, counts = 0, []
        for step in change[: len(self.nodes)]:
            alive += step
            counts.append(alive)
        return counts


def _stretches(facts: _Facts, max_bytes: int, data: Path, folder: Path, widen: bool) -> list[SplitStage]:
    bounds = _cuts(facts, max_bytes)
    starts = [0, *bounds[:-1]]
    return [
        _stage(facts, data, folder, widen, index, start, stop)
        for index, (start, stop) in enumerate(zip(starts, bounds, strict=True))
    ]


def _cuts(facts: _Facts, max_bytes: int) -> list[int]:
    """Ends of the stretches (exclusive node indices); each but the last is at least half full if it can be."""
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
            if held < max_bytes // 2 or best == start or facts.crossing[i] <= facts.crossing[best - 1]:
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


def _stage(facts: _Facts, data: Path, folder: Path, widen: bool, index: int, start: int, stop: int) -> SplitStage:
    model, nodes = facts.model, facts.nodes[start:stop]
    made = {name for node in nodes for name in node.outputs if name}
    read = dict.fromkeys(name for names in facts.reads[start:stop] for name in names)
    inputs = tuple(name for name in read if name not in made and name not in model.tensors)
    outputs = [name for name in made if name in facts.final or facts.last_use.get(name, -1) >= stop]
    outputs.sort(key=lambda name: (facts.maker[name], name))
    for name in (*inputs, *outputs):
        model.info(name)
    size = sum(facts.sizes[name] for name in read if name in facts.sizes)
    place = f"stage_{index:04d}.onnx"
    return SplitStage(inputs, tuple(outputs), size, model, nodes, data, folder, place, widen)


def _clear(folder: Path) -> None:
    for file in folder.glob("stage*.onnx*"):
        file.unlink()


def _copy(source: Path, tensor: Tensor, target: BinaryIO, widen: bool) -> int:
    """Append the tensor's bytes to `target`; the type that they have there."""
    offset = int(tensor.external.get("offset", "0"))
    claimed = tensor.external.get("length")
    dtype = tensor.dtype
    with open(source, "rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size - offset if claimed is None else int(claimed)
        file.seek(offset)
        for piece in _pieces(length):
            data = file.read(piece)
            if len(data) != piece:
                raise BundleError(f"{source} ends before its tensors do")
            wide, dtype = widened_bytes(data, tensor.dtype) if widen else (memoryview(data), tensor.dtype)
            target.write(wide)
    return dtype


def _pieces(length: int) -> Iterable[int]:
    return (min(_CHUNK, length - done) for done in range(0, length, _CHUNK))
