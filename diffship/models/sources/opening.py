"""open_source: the one way from words on a command line to a Pipeline."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffship.core.errors import ConfigError, SourceError
from diffship.core.kind import Kind, Slot
from diffship.core.load_options import AS_SAID, LoadOptions
from diffship.core.manifest import MANIFEST_NAME
from diffship.core.registry import kinds
from diffship.core.sniff import classify, describe, missing, near, part_of, refuse_unsafe
from diffship.models.assemble import assemble, kind_of
from diffship.models.parts.autoencoder import KL
from diffship.models.pipeline import Material, Module, Pipeline
from diffship.models.sources.arch import PREFIX, arch_material
from diffship.models.sources.diffusers_folder import folder_material
from diffship.models.sources.hub import LEGAL, hub_folder, is_hub_id
from diffship.models.sources.licences import joined
from diffship.models.sources.single_file import SUFFIXES, file_material, is_single_file

_PACKAGED = re.compile(r"emoji(-[a-z0-9]+)*\Z")
_SNAPSHOT = re.compile(r"/models--(?P<id>[^/]+)/snapshots/(?P<commit>[^/]+)\Z")
_EMOJI = "emoji"
_MODELS = Path(__file__).parents[1]


def open_source(
    text: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    loading: LoadOptions = AS_SAID,
) -> Pipeline:
    """A path that exists, a hub id, `emoji` or its sibling `emoji-small`, or `arch:NAME[+lcm][+taesd]`, as a
    Pipeline; `+small-vae` in place of `+taesd`. A path leads to a diffusers folder or to a checkpoint in one file.

    No tensor is read yet, but for one small one of a Stable Diffusion 2 checkpoint, which tells what it predicts.

    `base`, another source, supplies the parts that this one lacks (a folder with a U-Net alone, say). `revision` is a
    branch, tag or commit of a hub id; the commit is recorded. `loading` names another VAE, and says what a checkpoint
    in one file does not.

    Raises:
        SourceError: nothing readable is there, parts are missing or do not fit, or only pickles or code are on offer.
        UnsupportedError: a class or family that is not known here.
        ConfigError: an option for single files, and the source is none.
    """
    path = Path(text).expanduser()
    if base is None and (told := part_of(path)):
        completed = ", or complete this part: export, compress and inspect take --base SOURCE"
        raise SourceError(f"{text}: {told}{'' if (path.parent / MANIFEST_NAME).exists() else completed}")
    material = find_material(text, revision, loading)
    if base is not None:
        material = with_base(material, find_material(base))
    if loading.vae is not None:
        material = with_vae_of(material, loading.vae)
    return assemble(material)


def find_material(text: str, revision: str | None = None, loading: LoadOptions = AS_SAID) -> Material:
    """What one source yields, whole or not."""
    path = Path(text).expanduser()
    if is_single_file(path):
        require_source(text, revision)
        return file_material(path, loading)
    for flag, given in (("--ema", loading.ema), ("--prediction", loading.prediction)):
        if given:
            raise ConfigError(
                f"{flag} is for a checkpoint in one file, and {text} is none; a folder's scheduler and "
                "weights say it themselves"
            )
    if text.startswith(PREFIX):
        return arch_material(text)
    require_source(text, revision)
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
    single = is_single_file(path)
    if single:
        refuse_unsafe(path)
    elif kind != "folder" and (kind != "unknown" or path.is_file()):
        raise _not_a_source(path)
    if single or kind == "folder" or text.startswith(PREFIX) or packaged(text):
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


def with_vae_of(material: Material, text: str) -> Material:
    """`material` with the auto-encoder of the source `text`, which is recorded.

    Raises:
        SourceError: there is none, or its latents are of another family, as far as configs tell.
    """
    kind = kind_of(material.modules)
    if kind is None:
        raise SourceError(f"{material.source.get('id')}: has no denoiser that --vae could draw for")
    folder, found = kind.slot_of(kind.decoder).folder, vae_of(text, kind)
    own = material.modules.get(folder)
    _require_alike(text, found, {**kind.vae_facts, **(own.config if own else {})})
    notes = [*material.source.get("notes", ()), f"the VAE is that of {text}"]
    return replace(
        material,
        source={**material.source, "vae": Path(text).stem, "notes": notes},
        modules={**material.modules, folder: found},
    )


def vae_of(text: str, kind: Kind) -> Module:
    """The auto-encoder of a source, for a model of this kind; a file of tensors does not say how latents are scaled,
    so it is as the published models of the kind have it.

    Raises:
        SourceError: it has none, or cannot be read.
    """
    material = find_material(text)
    found = material.modules.get(kind.slot_of(kind.decoder).folder)
    if found is None:
        raise SourceError(f"{text}: has no VAE")
    return found if "scaling_factor" in found.config else replace(found, config=_stated(material, found, kind))


def _stated(material: Material, vae: Module, kind: Kind) -> dict[str, Any]:
    """The config with what no tensor tells; that of a folder has diffusers' defaults."""
    return {**vae.config, **(kind.vae_facts if material.source.get("kind") == "file" else {})}


def _require_alike(text: str, vae: Module, model: Mapping[str, Any]) -> None:
    """Raises SourceError if two KL auto-encoders have latents of other channels or another scale."""
    for key, usual in (("latent_channels", 4), ("scaling_factor", 0.18215)):
        ours, theirs = model.get(key) or usual, vae.config.get(key) or usual
        if ours != theirs and (key == "latent_channels" or vae.class_name == KL):
            raise SourceError(
                f"--vae {text}: its {key} is {theirs}, and that of the model {ours}: latents of another family"
            )


def _text_slots() -> list[Slot]:
    return list(dict.fromkeys(slot for kind in kinds().values() for slot in kind.text_slots))


def _not_a_source(path: Path) -> SourceError:
    refuse_unsafe(path)
    if told := describe(path):
        return SourceError(f"{path}: {told}")
    return SourceError(
        f"{path}: is not read; legal: a file that ends in {' or '.join(SUFFIXES)}, or a diffusers folder"
    )
