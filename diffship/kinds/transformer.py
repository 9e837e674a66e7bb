"""What kinds with a diffusion transformer have in common: how a folder is recognised, completed and spoken of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from diffship.core.errors import UnsupportedError
from diffship.core.kind import Kind, Slot
from diffship.kinds import stock
from diffship.kinds.stock import INDEX

if TYPE_CHECKING:
    from diffship.models.pipeline import Material, Module


class TransformerKind(Kind):
    """A kind whose denoiser is a transformer over latents and text (Peebles and Xie 2023, arXiv 2212.09748).

    plain_class: the diffusers pipeline as which a folder is drawn. from_text: pipelines that take more than a prompt,
    and are drawn from the prompt alone. other_class: what the refusal of another pipeline says further.
    """

    sample_input, output = "hidden_states", "out_hidden_states"
    plain_class: ClassVar[str]
    from_text: ClassVar[tuple[str, ...]]
    other_class: ClassVar[str] = ""

    def recognises(self, modules: Mapping[str, Module]) -> bool:
        (slot,) = [one for one in self.slots if one.folder == self.denoiser]
        return slot.folder in modules and modules[slot.folder].class_name in slot.classes

    def needed(self, material: Material) -> Sequence[Slot]:
        """Slots without which nothing is drawn."""
        return self.slots

    def missing(self, material: Material) -> list[str]:
        needed = self.needed(material)
        found = [slot.folder for slot in needed if slot.folder not in material.modules]
        texts = [slot for slot in self.text_slots if slot in needed or slot.folder in material.modules]
        found += [slot.tokenizer for slot in texts if slot.tokenizer and slot.tokenizer not in material.tokenizers]
        found.sort(key=lambda folder: folder != self.denoiser)
        return found if material.scheduler else [*found, "scheduler"]

    def repaired(self, material: Material) -> Material:
        from diffship.models.sources.defaults import completed

        named = material.index.get("_class_name")
        legal = (self.plain_class, *self.from_text)
        if named is not None and named not in legal:
            raise UnsupportedError(
                f"{INDEX}: _class_name is {str(named)[:80]!r}, which is not drawn here; legal: {', '.join(legal)}"
                f"{self.other_class}"
            )
        given = material.modules
        modules = {name: replace(one, config=completed(one.class_name, one.config)) for name, one in given.items()}
        return replace(material, modules=modules)

    def notes(self, material: Material) -> list[str]:
        return stock.notes(material.index, self.plain_class, self.from_text)
