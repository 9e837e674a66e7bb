"""What three clients of Apple's Core ML layout do with a folder: what they refuse, and what they leave out.

- swift: `StableDiffusion` of apple/ml-stable-diffusion (`StableDiffusionPipeline+Resources.swift`, `Unet.swift`,
  `TextEncoder.swift`, `Encoder.swift`, `Decoder.swift` and their XL forms).
- mochi: Mochi Diffusion, which opens the same files and reads the size of pictures from the VAE's encoder.
- diffusers-app: Hugging Face's Diffusers for Mac, whose folders are named after the form of the attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.strict import unknown
from diffship.targets.coreml.description import Description, Feature, describe
from diffship.targets.coreml.package import COMPILED, SUFFIX, TOKENIZER_FILES

CLIENTS = ("swift", "mochi", "diffusers-app")
_CHUNKS = ("UnetChunk1", "UnetChunk2")
_READ = ("TextEncoder", "TextEncoder2", "Unet", *_CHUNKS, "VAEDecoder", "VAEEncoder")
_FED = ("sample", "timestep", "encoder_hidden_states")
_FED_XL = ("time_ids", "text_embeds")
_RESIDUAL = "additional_residual_"
_STEM = re.compile(r".+_(original|split_einsum|split_einsum_v2)(_compiled)?\Z")
_TOKENS = 77
_HALF = 4  # latent channels; Swift reads the mean from channels 0 to 3 and the log variance from 4 to 7


@dataclass(frozen=True)
class Finding:
    """level: "error" (the client refuses or misreads it) or "note". file: relative to the folder."""

    level: str
    file: str
    text: str

    def to_json(self) -> dict[str, str]:
        return {"level": self.level, "file": self.file, "text": self.text}


@dataclass(frozen=True)
class Folder:
    """A folder as clients see it: what each model says of itself, and the suffix that it has there."""

    path: Path
    models: Mapping[str, Description]
    suffixes: Mapping[str, str]

    def file(self, name: str) -> str:
        return f"{name}{self.suffixes.get(name, SUFFIX)}"

    @property
    def is_xl(self) -> bool:
        """Whether its U-Net, or its first chunk, takes the inputs of SDXL."""
        found = self.models.get("Unet") or self.models.get(_CHUNKS[0])
        return found is not None and set(_FED_XL) <= set(found.inputs)


def lint(path: Path, client: str) -> list[Finding]:
    """What `client` makes of the packages, or compiled models, in the folder `path`; errors first.

    Raises:
        ConfigError: no such client, or no such folder.
    """
    if client not in CLIENTS:
        raise ConfigError(unknown("client", client, CLIENTS))
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; a Core ML bundle or a Resources folder is one")
    found: list[Finding] = []
    folder = _opened(path, found)
    rules: tuple[Callable[[Folder], Iterator[Finding]], ...] = (_files, _unets, _texts, _decoder, _encoder, _compiled)
    more = {"mochi": (_mochi,), "diffusers-app": (_app,)}
    for rule in (*rules, *more.get(client, ())):
        found += rule(folder)
    return sorted(found, key=lambda finding: finding.level)


def _opened(path: Path, found: list[Finding]) -> Folder:
    models, suffixes = dict[str, Description](), dict[str, str]()
    for name in _READ:
        for suffix in (SUFFIX, COMPILED):
            file = path / f"{name}{suffix}"
            if not file.is_dir():
                continue
            suffixes[name] = suffix
            try:
                models[name] = describe(file)
            except DiffshipError as fault:
                found.append(Finding("error", file.name, str(fault)))
    return Folder(path, models, suffixes)


def _files(folder: Folder) -> Iterator[Finding]:
    chunks = [name for name in _CHUNKS if name in folder.suffixes]
    unet = "Unet" in folder.suffixes
    needed = ["VAEDecoder", "TextEncoder2" if folder.is_xl else "TextEncoder"]
    for name in needed if unet or chunks else [*needed, "Unet"]:
        if name not in folder.suffixes:
            yield Finding("error", folder.file(name), "it is missing, and every client opens it")
    if len(chunks) == 1:
        yield Finding("error", folder.file(chunks[0]), "one chunk of the U-Net is there and the other is not")
    if unet and len(chunks) == 2:
        yield Finding("error", folder.file("Unet"), "the two chunks beside it are opened instead: remove them, or it")
    for name in TOKENIZER_FILES:
        if not (folder.path / name).is_file():
            yield Finding("error", name, "it is missing: the tokenizer is read from here")
    if "VAEEncoder" not in folder.suffixes:
        yield Finding("note", folder.file("VAEEncoder"), "it is missing: no picture can be the start of another")


def _unets(folder: Folder) -> Iterator[Finding]:
    model = folder.models.get("Unet")
    if model is None:
        return
    file = folder.file("Unet")
    lacking = [name for name in _FED if name not in model.inputs]
    known = (*_FED, *(_FED_XL if folder.is_xl else ()))
    odd = [name for name in model.inputs if name not in known and not name.startswith(_RESIDUAL)]
    if lacking:
        yield Finding("error", file, f"it has no input {lacking[0]}, which is fed by that name")
    if odd:
        yield Finding("error", file, f"it asks for the input {odd[0]}, which no client feeds")
    if len(model.outputs) != 1:
        names = ", ".join(model.outputs)
        yield Finding("error", file, f"it has {len(model.outputs)} outputs ({names}); the first is taken, of any order")
    text, sample = model.inputs.get(_FED[2]), model.inputs.get(_FED[0])
    if text is not None and (len(text.shape) != 4 or text.shape[2] != 1):
        yield Finding("error", file, f"encoder_hidden_states is {text.shape}; clients feed (rows, width, 1, tokens)")
    if sample is not None and folder.is_xl and sample.shape[:1] != (2,):
        yield Finding("error", file, f"sample has {sample.shape[0]} row; SDXL is always fed two, for guidance")
    for name, feature in model.inputs.items():
        if not feature.dtype.startswith("float"):
            yield Finding("error", file, f"{name} is {feature.dtype or 'no array'}; clients feed floats")


def _texts(folder: Folder) -> Iterator[Finding]:
    wanted = ("hidden_embeds", "pooled_outputs") if folder.is_xl else ("last_hidden_state",)
    for name in ("TextEncoder", "TextEncoder2"):
        model = folder.models.get(name)
        if model is None:
            continue
        for output in wanted:
            if output not in model.outputs:
                yield Finding("error", folder.file(name), f"it has no output {output}, which is read by that name")
        for tokens, feature in model.inputs.items():
            if feature != Feature("float32", (1, _TOKENS)):
                text = f"{tokens} is {feature.dtype} {feature.shape}; clients feed float32 (1, {_TOKENS})"
                yield Finding("error", folder.file(name), text)


def _decoder(folder: Folder) -> Iterator[Finding]:
    model, unet = folder.models.get("VAEDecoder"), folder.models.get("Unet")
    if model is None:
        return
    file = folder.file("VAEDecoder")
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        yield Finding("error", file, f"it has {len(model.inputs)} inputs and {len(model.outputs)} outputs; legal: 1, 1")
        return
    latents, sample = next(iter(model.inputs.values())), unet and unet.inputs.get("sample")
    if sample and latents.shape[2:] != sample.shape[2:]:
        yield Finding("error", file, f"it takes latents of {latents.shape[2:]}; the U-Net makes {sample.shape[2:]}")
    if latents.shape[:1] != (1,):
        yield Finding("error", file, f"it takes {latents.shape[0]} pictures at once; clients feed one")


def _encoder(folder: Folder) -> Iterator[Finding]:
    model = folder.models.get("VAEEncoder")
    if model is None:
        return
    file, outputs = folder.file("VAEEncoder"), list(model.outputs.values())
    if len(outputs) != 1:
        yield Finding("error", file, f"it has {len(outputs)} outputs; one is read")
    elif len(outputs[0].shape) > 1 and outputs[0].shape[1] != 2 * _HALF:
        text = f"it gives {outputs[0].shape[1]} channels; clients read mean and log variance of {_HALF} channels each"
        yield Finding("error", file, text)


def _compiled(folder: Folder) -> Iterator[Finding]:
    plain = [folder.file(name) for name, suffix in folder.suffixes.items() if suffix == SUFFIX]
    if plain:
        text = f"clients open {COMPILED}; on a Mac: xcrun coremlcompiler compile {plain[0]} Resources"
        yield Finding("note", plain[0], text)


def _mochi(folder: Folder) -> Iterator[Finding]:
    encoder, unet = folder.models.get("VAEEncoder"), folder.models.get("Unet") or folder.models.get(_CHUNKS[0])
    if "VAEEncoder" not in folder.suffixes:
        text = "Mochi Diffusion reads the size of pictures from it: without it there is no size, and no ControlNet"
        yield Finding("error", folder.file("VAEEncoder"), text)
    elif encoder is not None:
        shape = next(iter(encoder.inputs.values()), Feature("", ())).shape
        if len(shape) == 4:
            yield Finding("note", folder.file("VAEEncoder"), f"pictures are {shape[3]}x{shape[2]}")
    if unet is not None:
        form = "split-einsum" if unet.operations.get("einsum") else "original"
        yield Finding("note", folder.file("Unet"), f"it is listed as {form}")


def _app(folder: Folder) -> Iterator[Finding]:
    match = _STEM.match(folder.path.resolve().name)
    unet = folder.models.get("Unet")
    if match is None:
        text = "the folder must be called NAME_original_compiled, NAME_split_einsum_compiled or .._v2_compiled"
        yield Finding("error", folder.path.name, text)
    elif unet is not None and (match[1] == "original") == bool(unet.operations.get("einsum")):
        has = "split-einsum" if unet.operations.get("einsum") else "original"
        yield Finding("error", folder.path.name, f"it is called {match[1]}, and its U-Net attends as {has}")
