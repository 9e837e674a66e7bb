"""A portable ONNX graph, rewritten in memory to operators that ONNX Runtime has fast kernels for.

Two rewrites, both exact identities:
- GroupNormalization has no kernel: ONNX Runtime expands it while loading, which takes longer than all the rest. It
  becomes InstanceNormalization over groups (Wu and He 2018, "Group Normalization", figure 2).
- Attention writes all (tokens x tokens) scores to memory. MultiHeadAttention works in blocks that stay in the cache
  (Dao et al. 2022, "FlashAttention", algorithm 1), on the GPU too, where Attention had no kernel until version 1.25.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from diffship.runtimes.engines.onnx_edit import FLOAT, FLOAT16, Graph, Node, integer, read_graph, real

_SWAP = (0, 2, 1, 3)
_EPSILON = 1e-5
_DTYPES = {FLOAT: "float32", FLOAT16: "float16"}


def tuned(model: bytes) -> bytes | None:
    """The rewritten model, or None if there is nothing to rewrite; raises BundleError for what is no model."""
    graph = read_graph(model)
    before = graph.nodes
    if graph.opset >= 21:  # until then its scale was per group, not per channel
        graph.nodes = [made for node in graph.nodes for made in _group_norm(graph, node)]
    if graph.opset >= 23:
        _fuse_attention(graph)
    return None if graph.nodes == before else graph.encode()


def _group_norm(graph: Graph, node: Node) -> Iterator[Node]:
    scale = graph.constants.get(node.inputs[1]) if len(node.inputs) == 3 else None
    groups = node.get("num_groups")
    if (node.op, node.domain) != ("GroupNormalization", "") or scale is None or groups is None:
        yield node
        return
    if len(scale.shape) != 1 or scale.dtype not in _DTYPES:
        yield node
        return
    x, y, count, dtype = node.inputs[0], node.outputs[0], groups.integer, _DTYPES[scale.dtype]
    epsilon = node.get("epsilon")
    split = graph.add_constant(f"tune/groups_{count}", np.array([0, count, -1]))
    merge = graph.add_constant(f"tune/channels_{scale.shape[0]}", np.array([0, scale.shape[0], -1]))
    ones = graph.add_constant(f"tune/ones_{count}_{dtype}", np.ones(count, dtype))
    zeros = graph.add_constant(f"tune/zeros_{count}_{dtype}", np.zeros(count, dtype))
    last = graph.add_constant("tune/last", np.array([1]))
    eps = (real("epsilon", _EPSILON if epsilon is None else epsilon.real),)
    yield Node("Shape", (x,), (f"{y}/shape",))
    yield Node("Reshape", (x, split), (f"{y}/split",))
    yield Node("InstanceNormalization", (f"{y}/split", ones, zeros), (f"{y}/even",), eps)
    yield Node("Reshape", (f"{y}/even", merge), (f"{y}/merged",))
    yield Node("Unsqueeze", (node.inputs[1], last), (f"{y}/scale",))
    yield Node("Unsqueeze", (node.inputs[2], last), (f"{y}/bias",))
    yield Node("Mul", (f"{y}/merged", f"{y}/scale"), (f"{y}/scaled",))
    yield Node("Add", (f"{y}/scaled", f"{y}/bias"), (f"{y}/shifted",))
    yield Node("Reshape", (f"{y}/shifted", f"{y}/shape"), (y,))


def _fuse_attention(graph: Graph) -> None:
    """Reshape, Transpose (three times), Attention, Transpose, Reshape: one MultiHeadAttention."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    fused: dict[Node, Node] = {}
    dropped: set[Node] = set()
    for node in graph.nodes:
        heads = [_heads(graph, makers, name) for name in node.inputs] if _is_plain_attention(node) else []
        tail = _tail(graph, readers, node.outputs[0]) if len(heads) == 3 else None
        if tail is None or len({count for _, count in heads}) != 1 or heads[0][1] < 2:
            continue
        attributes = (integer("num_heads", heads[0][1]), *node.attributes)
        sources = tuple(source for source, _ in heads)
        fused[node] = Node("MultiHeadAttention", sources, tail[1].outputs, attributes, "com.microsoft", node.name)
        dropped.update(tail)
    if fused:
        graph.use_domain("com.microsoft")
        graph.nodes = [fused.get(node, node) for node in graph.nodes if node not in dropped]
        _drop_unread(graph)


def _is_plain_attention(node: Node) -> bool:
    return (
        (node.op, node.domain, len(node.outputs)) == ("Attention", "", 1)
        and len(node.inputs) == 3
        and all(attribute.name == "scale" for attribute in node.attributes)
    )


def _heads(graph: Graph, makers: dict[str, Node], name: str) -> tuple[str, int]:
    """(tensor of (batch, length, heads * width), heads) behind a (batch, heads, length, width), or ("", 0)."""
    swap = makers.get(name)
    split = makers.get(swap.inputs[0]) if swap is not None and _is_swap(swap) else None
    shape = _constant_shape(graph, split)
    if split is None or shape is None or len(shape) != 4 or shape[:2] != (0, 0) or min(shape[2:]) < 1:
        return "", 0
    return split.inputs[0], shape[2]


def _tail(graph: Graph, readers: dict[str, list[Node]], name: str) -> tuple[Node, Node] | None:
    """The Transpose and the Reshape that bring heads back into channels, if nothing else reads in between."""
    swap = _only_reader(graph, readers, name)
    merge = _only_reader(graph, readers, swap.outputs[0]) if swap is not None and _is_swap(swap) else None
    shape = _constant_shape(graph, merge)
    if swap is None or merge is None or shape is None or len(shape) != 3 or shape[:2] != (0, 0):
        return None
    return swap, merge


def _only_reader(graph: Graph, readers: dict[str, list[Node]], name: str) -> Node | None:
    found = readers.get(name, [])
    return found[0] if len(found) == 1 and name not in graph.outputs else None


def _is_swap(node: Node) -> bool:
    order = node.get("perm")
    return node.op == "Transpose" and order is not None and order.integers == _SWAP


def _constant_shape(graph: Graph, node: Node | None) -> tuple[int, ...] | None:
    if node is None or node.op != "Reshape" or node.get("allowzero") is not None:
        return None
    constant = graph.constants.get(node.inputs[1])
    return None if constant is None else constant.integers


def _drop_unread(graph: Graph) -> None:
    """Remove the Transposes and Reshapes that fed only what was fused; twice, since one feeds the other."""
    for _ in range(2):
        read = Counter(name for node in graph.nodes for name in node.inputs)
        graph.nodes = [
            node
            for node in graph.nodes
            if node.op not in ("Transpose", "Reshape")
            or any(read[name] or name in graph.outputs for name in node.outputs)
        ]
