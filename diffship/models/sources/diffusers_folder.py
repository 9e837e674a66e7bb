"""Reading a diffusers folder: JSON and safetensors only, no pickle, no code that comes with the model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffship.core.document import read_bytes, read_json
from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.kind import Kind, Slot
from diffship.core.limits import LIMITS
from diffship.core.registry import kinds
from diffship.core.sniff import PICKLE_SUFFIXES, also, describe, foreign, refuse_unsafe
from diffship.core.weights import SafetensorsWeights, Weights
from diffship.models.parts.unet import CLASS as UNET
from diffship.models.pipeline import Material, Module, listed
from diffship.models.reduced.released import LIBRARY, translated
from diffship.models.sources.licences import licence_of
from diffship.models.sources.tokenizer_files import NAMES as TOKENIZER_FILES

INDEX = "model_index.json"
_STEMS = ("diffusion_pytorch_model", "model")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", "")
_SMALL = 32 << 20


def folder_material(folder: Path, source: Mapping[str, Any]) -> Material:
    """Everything that is read of a pipeline folder, or of a folder that holds one component.

    Raises:
        SourceError: nothing usable is there, a file is damaged, or the model needs its own code or pickles.
        UnsupportedError: a class that is not known here.
    """
    if (folder / INDEX).is_file():
        index = read_config(folder / INDEX)
        check_index(index, folder / INDEX)
        slots = _slots(lambda name: listed(index, name))
        present = {name: folder / name for name in slots if listed(index, name) and (folder / name).is_dir()}
    elif (folder / "config.json").is_file():
        slot = _slot_of(folder)
        index, slots, present = {}, {slot.folder: [slot]}, {slot.folder: folder}
    else:
        slots = _slots(lambda name: (folder / name).is_dir())
        index, present = {}, {name: folder / name for name in slots if (folder / name / "config.json").is_file()}
    if not present:
        raise SourceError(f"{folder}: {_nothing(folder)}")
    for entry in folder.iterdir():  # as a file system that does not tell A from a leaves them
        if entry.name.lower() in slots and entry.name.lower() not in present and entry.name not in slots:
            raise SourceError(f"{entry}: is not read under this name; call it {entry.name.lower()}")
    left_out = _left_out(index, [one for several in slots.values() for one in several])
    chosen = {name: _chosen(path, slots[name]) for name, path in present.items()}
    return Material(
        source={**source, "left_out": left_out} if left_out else dict(source),
        modules={name: read_module(path, chosen[name]) for name, path in present.items()},
        tokenizers=_tokenizers(folder, chosen.values()),
        scheduler=_scheduler(folder / "scheduler" / "scheduler_config.json", index),
        index=index,
        licence=licence_of(folder),
    )


def _scheduler(file: Path, index: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config, of the class that the index names: diffusers makes that one, whatever the config says."""
    if not file.is_file():
        return None
    entry = index.get("scheduler")
    named = entry[1] if isinstance(entry, list) else None
    return {**read_config(file, infinite=True), **({"_class_name": named} if named else {})}


def _kinds(there: Callable[[str], bool]) -> list[Kind]:
    """The kinds whose denoiser is `there`, or all if none is."""
    every = list(kinds().values())
    return [kind for kind in every if there(kind.slot_of(kind.denoiser).folder)] or every


def _slots(there: Callable[[str], bool]) -> dict[str, list[Slot]]:
    """What may be read, by folder: the slots of `_kinds`, of which several may have one folder."""
    found: dict[str, list[Slot]] = {}
    for slot in dict.fromkeys(slot for kind in _kinds(there) for slot in kind.slots):
        found.setdefault(slot.folder, []).append(slot)
    return found


def _chosen(folder: Path, slots: Sequence[Slot]) -> Slot:
    """The slot for the class in a folder, the first if it names none; if none fits, the first with all legal names."""
    file = folder / "config.json"
    named = _named_class(read_config(file)) if os.path.lexists(file) else None
    if named is None:
        return slots[0]
    fitting = [slot for slot in slots if named in (*slot.classes, *slot.aliases)]
    legal = dict.fromkeys(name for slot in slots for name in slot.classes)
    return fitting[0] if fitting else replace(slots[0], classes=tuple(legal))


def read_module(folder: Path, slot: Slot) -> Module:
    """Class, config and lazy weights of one component folder."""
    if not os.path.lexists(folder / "config.json"):
        raise SourceError(f"{folder}: has no config.json; {foreign(folder, 'so its class is not known')}")
    config = read_config(folder / "config.json")
    class_name = _class_of(config, slot)
    if class_name not in slot.classes:
        raise UnsupportedError(f"{folder}: class {class_name!r} is not supported; legal: {', '.join(slot.classes)}")
    return Module(class_name, translated(config) if class_name == UNET else config, find_weights(folder))


def find_weights(folder: Path) -> Weights:
    """The safetensors of a component folder: one file, or shards by their index; full precision before fp16.

    Raises:
        SourceError: there are none; for pickles the message says how to convert them.
    """
    broken: list[SourceError] = []
    for stem in _STEMS:
        for variant in ("", ".fp16", ".bf16"):
            file = folder / f"{stem}{variant}.safetensors"
            if file.is_file() or file.is_symlink():  # a link to nothing is told by whoever reads it
                return SafetensorsWeights(file)
            for index in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
                if (folder / index).is_file():
                    try:
                        return _sharded(folder / index)
                    except SourceError as fault:  # a download of one variant leaves the index of the other
                        broken.append(fault)
    if broken:
        raise broken[0]
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in PICKLE_SUFFIXES:
            refuse_unsafe(file)
    raise SourceError(f"{folder}: has no {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors; {_instead(folder)}")


def _instead(folder: Path) -> str:
    """What stands in the place of weights that are not there."""
    names = sorted(file.name for file in folder.iterdir())
    for name in names:
        if name.startswith(_STEMS) and (told := describe(folder / name, text=True)):
            return f"{name}: {told}"
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return f"rename the file that is meant; there is {', '.join(others[:8])}"
    return foreign(folder, f"it has {', '.join(names[:8])}")


def read_config(path: Path, infinite: bool = False) -> dict[str, Any]:
    """A JSON table; a config that names code to import is refused.

    `infinite` allows infinite numbers: diffusers writes `-Infinity` into scheduler configs.

    Raises:
        SourceError: missing, too large, not a table, a number that no JSON can hold, or it has `auto_map` or
            `custom_pipeline`.
    """
    data = read_json(path, LIMITS.manifest_bytes, SourceError)
    for key, value in _numbers(data):
        if math.isnan(value) or (math.isinf(value) and not infinite):
            raise SourceError(f"{path}: {key[:80]} is {value}, which no model means and no JSON can hold")
    for key in ("auto_map", "custom_pipeline", "trust_remote_code"):
        if data.get(key):
            raise SourceError(f"{path}: asks for code that comes with the model ({key}); such code is never run")
    return data


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float in `value` with the key that it stands under."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _numbers(entry, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for entry in value:
            yield from _numbers(entry, key)


def check_index(index: Mapping[str, Any], path: Path) -> None:
    """Raises SourceError if a model_index names classes outside diffusers and transformers."""
    if not isinstance(index.get("_class_name"), str):
        raise SourceError(
            f"{path}: _class_name is {str(index.get('_class_name'))[:80]}; a custom pipeline is never run"
        )
    for name, entry in index.items():
        if not isinstance(entry, list):
            continue
        if len(entry) != 2 or not all(part is None or isinstance(part, str) for part in entry):
            raise SourceError(f"{path}: {name} is {str(entry)[:80]}; it must be [library, class]")
        # a module of a library, as in diffusers.pipelines.stable_diffusion.safety_checker, is the library's own code
        if (entry[0] or "").partition(".")[0] not in _LIBRARIES and entry != [LIBRARY, UNET]:
            raise SourceError(
                f"{path}: {name} is of {entry[0][:80]!r}, code that comes with the model; it is never run"
            )
    fitting = _kinds(lambda name: listed(index, name))
    strange = [[name for name in kind.foreign if listed(index, name)] for kind in fitting]
    if all(strange):
        raise UnsupportedError(
            f"{path}: has a {strange[0][0]}; supported are U-Net pipelines (Stable Diffusion, SDXL, LCM), "
            "Stable Diffusion 3 and FLUX.2-klein"
        )


def _sharded(index: Path) -> Weights:
    table = read_config(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise SourceError(f"{index}: has no weight_map")
    for name, file in table.items():
        plain = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
        if not plain or "\\" in file:
            raise SourceError(
                f"{index}: tensor {name[:80]!r} lies in {str(file)[:80]!r}; legal is a file of this folder"
            )
    return SafetensorsWeights({name: index.parent / file for name, file in table.items()})


def _tokenizers(folder: Path, slots: Iterable[Slot]) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for slot in slots:
        name = slot.tokenizer
        if name is not None and (folder / name).is_dir():
            there = [file for file in TOKENIZER_FILES if os.path.lexists(folder / name / file)]
            files = {file: _bytes(folder / name / file) for file in there}
            found[name] = _owner(slot).complete_tokenizer(slot, files, str(folder / name))
    return found


def _owner(slot: Slot) -> Kind:
    """The first kind that has this slot."""
    return next(kind for kind in kinds().values() if slot in kind.slots)


def _bytes(path: Path) -> bytes:
    told = describe(path, text=True)
    if told and (not path.exists() or path.stat().st_size):  # an empty file may be one of a tokenizer
        raise SourceError(f"{path}: {told}")
    if path.name == "tokenizer_config.json":
        read_config(path)
    return read_bytes(path, _SMALL, SourceError)


def _named_class(config: Mapping[str, Any]) -> object:
    """The class in a config of diffusers or, in a list, of transformers; None if it names none."""
    named = config.get("architectures")
    return config.get("_class_name") or (named[0] if isinstance(named, list) and named else named)


def _class_of(config: Mapping[str, Any], slot: Slot) -> str:
    named = str(_named_class(config) or slot.classes[0])
    return slot.classes[0] if named in slot.aliases else named


def _slot_of(folder: Path) -> Slot:
    """The slot that a folder of one component is for, by its class."""
    named = _named_class(read_config(folder / "config.json"))
    slots = [slot for kind in kinds().values() for slot in kind.slots]
    for slot in slots:
        if named in slot.classes:
            return slot
    legal = dict.fromkeys(name for slot in slots for name in slot.classes)
    raise UnsupportedError(f"{folder}: class {str(named)[:80]!r} is not supported; legal: {', '.join(legal)}")


def _left_out(index: Mapping[str, Any], slots: Iterable[Slot]) -> list[str]:
    known = {"scheduler", *(name for slot in slots for name in (slot.folder, slot.tokenizer))}
    return [name for name in index if listed(index, name) and name not in known]


def _nothing(folder: Path) -> str:
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        refuse_unsafe(folder / pickles[0])
    lacking = "holds neither model_index.json nor a component's config.json: it is not a diffusers folder"
    return f"{lacking}{also(folder)}"
