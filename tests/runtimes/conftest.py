from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from handmade import DIGEST, INPUTS, OUTPUTS, MakeBundle, expected, feeds, unet_like
from tensorrt_rig import Rig

from diffship.core.bundle import Binding, Bundle, Golden, Manifest, Part, write_bundle
from diffship.core.compare import Tolerance
from diffship.core.dtype import meta_of
from diffship.core.family import Family
from diffship.core.safetensors_file import write_safetensors
from diffship.core.spec import TensorSpec


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """A bundle of one part around an ONNX model, with golden vectors unless `golden` is False."""

    def make(
        model: Any,
        inputs: tuple[TensorSpec, ...] = INPUTS,
        outputs: tuple[TensorSpec, ...] = OUTPUTS,
        bindings: tuple[Binding, ...] = (),
        golden: bool = True,
        size_step: int = 64,
        precision: str = "fp32",
        part: str = "unet",
    ) -> Bundle:
        data = model if isinstance(model, bytes) else model.SerializeToString()
        with write_bundle(tmp_path / f"bundle{len(list(tmp_path.iterdir()))}") as draft:
            (draft.folder / part).mkdir()
            (draft.folder / part / "model.onnx").write_bytes(data)
            record = _write_golden(draft.folder) if golden else None
            entry = Part(
                part, (f"{part}/model.onnx",), inputs, outputs, precision, DIGEST, bindings=bindings, golden=record
            )
            return draft.finish(Manifest("onnx", Family("sd", text_width=8, size_step=size_step), (entry,)))

    return make


def _write_golden(folder: Path) -> Golden:
    (folder / "golden").mkdir()
    values = feeds()
    arrays = {f"in.{name}": array for name, array in values.items()}
    arrays["out.out_sample"] = expected(values["sample"], values["timestep"], values["encoder_hidden_states"])
    metas = {name: meta_of(array) for name, array in arrays.items()}
    write_safetensors(folder / "golden" / "unet.safetensors", metas, arrays.__getitem__)
    return Golden("golden/unet.safetensors", {"batch_size": 2}, Tolerance(atol=1e-5, rtol=1e-5))


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> Bundle:
    return make_bundle(unet_like())


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The doubles of TensorRT and CUDA around a plan; everything must have been given back at the end."""
    rig = Rig(tmp_path, monkeypatch)
    yield rig
    rig.check_nothing_left()
