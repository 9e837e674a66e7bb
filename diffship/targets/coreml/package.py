"""An .mlpackage: the files in it, and what it is called for Apple's Swift package.

Names are those that `StableDiffusionPipeline.ResourceURLs` of apple/ml-stable-diffusion opens. It looks for
`Unet.mlmodelc`, and `xcrun coremlcompiler compile Unet.mlpackage Resources` makes just that of `Unet.mlpackage`.
"""

from __future__ import annotations

import json
import uuid

SUFFIX, COMPILED = ".mlpackage", ".mlmodelc"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
MANIFEST = "Manifest.json"
FILES = (MODEL, WEIGHTS, MANIFEST)  # the first is what an engine opens

TOKENIZER_FILES = ("vocab.json", "merges.txt")  # of CLIP's byte pairs, beside the packages

_AUTHOR, _ROOM = "com.apple.CoreML", uuid.UUID("5d0f3f5e-2f57-5f0e-9d7c-6b1b7c0d5a11")
_ITEMS = (
    ("CoreML Model Specification", "model.mlmodel", f"{_AUTHOR}/model.mlmodel"),
    ("CoreML Model Weights", "weights", f"{_AUTHOR}/weights"),
)


def resource_name(part: str) -> str:
    """What Apple's clients call a part: its words joined, each with a capital (`TextEncoder2`), and VAE in capitals."""
    return "".join("VAE" if word == "vae" else word.capitalize() for word in part.split("_"))


def manifest(digest: str) -> bytes:
    """Manifest.json of a package; the ids of its items follow from `digest`, so that equal packages are equal bytes."""
    ids = [str(uuid.uuid5(_ROOM, f"{digest} {path}")).upper() for _, _, path in _ITEMS]
    items = {
        name: {"author": _AUTHOR, "description": description, "name": item, "path": path}
        for name, (description, item, path) in zip(ids, _ITEMS, strict=True)
    }
    table = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": ids[0]}
    return (json.dumps(table, indent=4) + "\n").encode()
