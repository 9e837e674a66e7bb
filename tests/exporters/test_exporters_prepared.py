"""`emoji` without torch: the bundle that the package ships, weights added, is the one that was proved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from diffship.core.errors import BundleError, MissingExtra, SourceError
from diffship.exporters.onnx.exporter import Onnx
from diffship.exporters.onnx.prepared import restore, strip
from diffship.models.sources.opening import open_source, packaged

HOME = packaged("emoji")
assert HOME is not None
READY = HOME / "onnx"
WITHOUT_TORCH = """
import sys, importlib.util
from pathlib import Path
import diffship.export as joined
joined.find_spec = lambda name: None
bundle = joined.export("emoji", out=Path(sys.argv[1]))
bundle.verify()
print(sorted(name for name in ("torch", "onnx", "diffusers") if name in sys.modules), len(bundle.manifest.parts))
"""


@pytest.mark.slow
def test_export_without_torch_gives_the_bundle_that_was_proved(tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "4"]
    assert (out / "diffship.json").read_bytes() == (READY / "diffship.json").read_bytes()


@pytest.mark.parametrize(
    ("source", "options"), [("arch:tiny-sd", {}), ("emoji", {"precision": "fp16"}), ("emoji", {"parts": ["unet"]})]
)
def test_anything_else_names_what_to_install(
    source: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = sys.modules["diffship.export"]
    monkeypatch.setattr(joined, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'diffship\[torch,onnx\]'"):
        joined.export(source, out=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_other_weights_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(READY.parent, home, ignore=shutil.ignore_patterns("judge", "onnx"))
    file = home / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(SourceError, match=r"unet/model\.onnx_data is not what was proved"):
        restore(READY, home, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(READY.parent, home, ignore=shutil.ignore_patterns("judge", "onnx"))
    shutil.copyfile(home / "vae" / "diffusion_pytorch_model.safetensors", home / "unet" / "other.safetensors")
    (home / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SourceError, match="unet: its weights have no tensor 'time_embedding"):
        restore(READY, home, tmp_path / "out")


def test_only_a_proved_fp32_bundle_is_prepared(tiny_sd_fp16: object, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="part text_encoder is proved, fp16"):
        strip(tiny_sd_fp16, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def _but_for_last_bits(made: bytes, shipped: bytes) -> bytes:
    """`made` with the float constants of `shipped` if they are equal but for the last bits: exp is the processor's."""
    ours, theirs = onnx.load_from_string(made), onnx.load_from_string(shipped)
    kept = {one.name: one for one in theirs.graph.initializer}
    for one in ours.graph.initializer:
        other = kept.get(one.name)
        if other is not None and one.raw_data and one.data_type == other.data_type == onnx.TensorProto.FLOAT:
            if np.allclose(numpy_helper.to_array(one), numpy_helper.to_array(other), rtol=2.5e-7, atol=0):
                one.raw_data = other.raw_data
    return ours.SerializeToString(deterministic=True)


@pytest.mark.slow
def test_the_shipped_graphs_are_what_the_exporter_makes_today() -> None:
    pipeline = open_source("emoji")
    recorded = {part["name"]: part for part in json.loads((READY / "diffship.json").read_text())["parts"]}
    assert set(recorded) == set(pipeline.components)
    for name, component in pipeline.components.items():
        assert component.digest == recorded[name]["source_digest"], "run scripts/prepare_emoji.py"
        made, shipped = Onnx().graph(component), (READY / name / "model.onnx").read_bytes()
        assert _but_for_last_bits(made, shipped) == shipped, "run scripts/prepare_emoji.py"
