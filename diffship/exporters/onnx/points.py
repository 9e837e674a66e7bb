"""Which node of an exported program gives a module's output."""

from __future__ import annotations

from collections import defaultdict
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
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            inside[_own(str(path))].add(node)
    found = {path: [node for node in nodes if not nodes.issuperset(node.users)] for path, nodes in inside.items()}
    single = {path: nodes[0] for path, nodes in found.items() if path and len(nodes) == 1}
    return dict(sorted(single.items(), key=lambda item: -item[0].count(".")))


def _own(path: str) -> str:
    """`path` without the wrappers' names in front."""
    names = path.split(".")
    return ".".join(names[sum(name == wrapper for name, wrapper in zip(names, _WRAPPERS, strict=False)) :])
