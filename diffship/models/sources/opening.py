"""open_source: the one way from words on a command line to a Pipeline."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffship.core.errors import SourceError
from diffship.core.kind import Slot
from diffship.core.manifest import MANIFEST_NAME
from diffship.core.registry import kinds
from diffship.core.sniff import classify, describe, missing, near, part_of, refuse_unsafe
from diffship.models.assemble import assemble, kind_of
from diffship.models.pipeline import Material, Pipeline
from diffship.models.sources.arch import PREFIX, arch_material
from diffship.models.sources.diffusers_folder import folder_material
from diffship.models.sources.hub import LEGAL, hub_folder, is_hub_id
from diffship.models.sources.licences import joined

_PACKAGED = re.compile(r"emoji(-[a-z0-9]+)*\Z")
_SNAPSHOT = re.compile(r"/models--(?P<id>[^/]+)/snapshots/(?P<commit>[^/]+)\Z")
_EMOJI = "emoji"
_MODELS = Path(__file__).parents[1]


def open_source(text: str, *, base: str | None = None, revision: str | None = None) -> Pipeline:
    """A path that exists, a hub id, `emoji` or its sibling `emoji-small`, or `arch:NAME[+lcm][+taesd]`, as a
    Pipeline; `+small-vae` in place of `+taesd`.

    No tensor is read yet.

    `base`, another source, supplies the parts that this one lacks (a folder with a U-Net alone, say). `revision` is a
    branch, tag or commit of a hub id; the commit is recorded.

    Raises:
        SourceError: nothing readable is there, parts are missing or do not fit, or only pickles or code are on offer.
        UnsupportedError: a class or family that is not known here.
    """
    path = Path(text).expanduser()
    if base is None and (told := part_of(path)):
        completed = ", or complete this part: export, compress and inspect take --base SOURCE"
        raise SourceError(f"{text}: {told}{'' if (path.parent / MANIFEST_NAME).exists() else completed}")
    material = find_material(text, revision)
    if base is not None:
        material = with_base(material, find_material(base, None))
    return assemble(material)


def find_material(text: str, revision: str | None = None) -> Material:
    """What one source yields, whole or not."""
    if text.startswith(PREFIX):
        return arch_material(text)
    require_source(text, revision)
    path = Path(text).expanduser()
    if path.is_dir():
        return folder_material(path, _named(path.resolve()))
    if (home := packaged(text)) is not None:
        material = folder_material(home, {"id": text, "revision": None, "kind": "packaged"})
        # a sibling ships its U-Net alone
        return material if text == _EMOJI else with_base(material, find_material(_EMOJI))
    folder, commit = hub_folder(text, revision)
    return folder_material(folder, {"id": text, "revision": commit, "kind": "hub"})


def _named(folder: Path) -> dict[str, str | None]:
    """What a folder is called in manifests: its own name, or, in a hub cache, that of the hub, at its commit."""
    snapshot = _SNAPSHOT.search(folder.as_posix())
    if snapshot is None:
        return {"id": folder.name, "revision": None, "kind": "folder"}
    return {"id": snapshot["id"].replace("--", "/", 1), "revision": snapshot["commit"], "kind": "folder"}


def require_source(text: str, revision: str | None = None) -> None:
    """Raises SourceError if `text` can be no source: no torch is loaded for it, and nothing is asked of the hub.

    With a `revision` it is a hub id, also if a folder has its owner's name.
    """
    path = Path(text).expanduser()
    kind = classify(path)
    if kind == "folder" and (path / MANIFEST_NAME).is_file():
        raise SourceError(f"{path} is a bundle already; export and compress take a source; {LEGAL}")
    if kind != "folder" and (kind != "unknown" or path.is_file()):
        raise _not_a_folder(path)
    if kind == "folder" or text.startswith(PREFIX) or packaged(text):
        return
    gone = "" if revision and is_hub_id(text) else missing(text)
    if not gone and not (is_hub_id(text) and "/" in text):  # no model of ours is on the hub without an owner
        close = difflib.get_close_matches(text, [folder.name for folder in _MODELS.glob(f"{_EMOJI}*")], 1)
        raise SourceError(f"{text[:200]!r} does not exist; {LEGAL}{_meant(close) or near(text)}")
    if gone:
        raise SourceError(f"{gone}; {LEGAL}{near(text)}")


def _meant(names: Sequence[str]) -> str:
    return f"; did you mean {names[0]!r}?" if names else ""


def packaged(text: str) -> Path | None:
    """The folder of a model that this package ships under the name `text`, or None."""
    home = _MODELS / text
    return home if _PACKAGED.match(text) and (home / "model_index.json").is_file() else None


def with_base(material: Material, base: Material) -> Material:
    """`material`, completed by what it lacks and `base` has; both are recorded."""
    kind = kind_of(material.modules) or kind_of(base.modules) or next(iter(kinds().values()))
    readers = {slot.tokenizer: slot.folder for slot in _text_slots()}
    texts = readers.values()
    modules = {**{name: base.modules[name] for name in base.modules if name not in texts}, **material.modules}
    if not kind.texts_fit(material.modules):
        modules.update({name: base.modules[name] for name in texts if name in base.modules and name not in modules})
    tokenizers = {name: files for name, files in base.tokenizers.items() if readers.get(name) in modules}
    return replace(
        material,
        source={**material.source, "base": dict(base.source)},
        modules=modules,
        tokenizers={**tokenizers, **material.tokenizers},
        scheduler=material.scheduler or kind.scheduler_from(base.scheduler or {}, modules),
        index=material.index or {key: value for key, value in base.index.items() if key != "_class_name"},
        licence=joined(material.licence, base.licence),
    )


def _text_slots() -> list[Slot]:
    return list(dict.fromkeys(slot for kind in kinds().values() for slot in kind.text_slots))


def _not_a_folder(path: Path) -> SourceError:
    refuse_unsafe(path)
    if told := describe(path):
        return SourceError(f"{path}: {told}")
    return SourceError(
        f"{path}: is one file; a diffusers folder is read. Convert a single-file checkpoint once with diffusers: "
        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR)"
    )
