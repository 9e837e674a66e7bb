"""Which node of an exported program gives a module's output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("part", "inner")


def module_outputs(program: torch.export.ExportedProgram) -> dict[str, torch.fx.Node]:
    """Module path -> the one node inside it that nodes outside of it use; innermost modules first.

    Modules whose nodes are used outside at several places (blocks that hand on skips) or at none are left out.
    """
    inside: dict[str, set[torch.fx.Node]] = defaultdict(set)
    for node in program.graph.nodes:
        if _same_tensor(node):
            continue
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            inside[_own(str(path))].add(node)
    found = {path: [node for node in nodes if not nodes.issuperset(_users(node))] for path, nodes in inside.items()}
    single = {path: nodes[0] for path, nodes in found.items() if path and len(nodes) == 1}
    return dict(sorted(single.items(), key=lambda item: -item[0].count(".")))


def _users(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Those of `node`, and of what is the same tensor."""
    for user in node.users:
        yield from _users(user) if _same_tensor(user) else (user,)


def _same_tensor(node: torch.fx.Node) -> bool:
    """Whether a node converts to the type that its tensor has: whoever reads the tensor later on, outside the module
    that asks for this, is traced as a reader of such a node."""
    if str(node.target) != "aten.to.dtype":
        return False
    (given,) = node.all_input_nodes
    return bool(given.meta["val"].dtype == node.meta["val"].dtype)


def _own(path: str) -> str:
    """`path` without the wrappers' names in front."""
    names = path.split(".")
    return ".".join(names[sum(name == wrapper for name, wrapper in zip(names, _WRAPPERS, strict=False)) :])
