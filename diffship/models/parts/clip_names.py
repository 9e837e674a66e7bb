"""What CLIP text encoders go by: classic tensor names (those of hub checkpoints) against other writers', the end token.

transformers 5 saves `CLIPTextModel` without the `text_model.` prefix; transformers 4 then finds none of its tensors
and only warns. So everything here reads both forms and writes the classic one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

LEGACY_END = 2  # old configs say so, and mean the greatest id of a text
_END = 49407  # what transformers takes where a config names none
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


def end_id(config: Mapping[str, Any]) -> int:
    """The id of a CLIP text encoder's end token, as its config has it."""
    found = config.get("eos_token_id")
    return _END if found is None else int(found)
