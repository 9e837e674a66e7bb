"""Classic names of CLIP text encoder tensors (those of hub checkpoints) against the names other writers use.

transformers 5 saves `CLIPTextModel` without the `text_model.` prefix; transformers 4 then finds none of its tensors
and only warns. So everything here reads both forms and writes the classic one.
"""

from __future__ import annotations

from collections.abc import Iterable

_BARE = ("embeddings.", "encoder.", "final_layer_norm.")
_COMPUTED = "embeddings.position_ids"  # an index buffer that old checkpoints carry and no model reads


def classic(name: str) -> str | None:
    """The classic form of one tensor name, or None for a buffer that is computed and not loaded."""
    if name.endswith(_COMPUTED):
        return None
    return f"text_model.{name}" if name.startswith(_BARE) else name


def classic_map(names: Iterable[str]) -> dict[str, str]:
    """{classic name: name as stored}, without computed buffers."""
    pairs = ((classic(name), name) for name in names)
    return {new: old for new, old in pairs if new is not None}
