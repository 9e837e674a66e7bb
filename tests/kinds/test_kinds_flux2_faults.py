"""Faults of transformers in the graph of FLUX.2's: the proof of the bundle sees each, and no other part is asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.core.bundle import Bundle, FileRecord
from diffship.core.bundle_check import digest_file
from diffship.core.manifest import MANIFEST_NAME

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
from onnx import helper, numpy_helper  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
PART = "transformer"
Edit = Callable[[Any], None]


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory, graphs_folder: Path) -> Bundle:
    from diffship.cli.main import main

    folder = tmp_path_factory.mktemp("faults") / "sound"
    words = ["--to", "onnx", "-o", str(folder), "--parts", PART, "--cache", str(graphs_folder), "--quiet"]
    assert main(["export", "arch:tiny-flux2", *words]) == 0
    return Bundle.open(folder)


def spoilt(bundle: Bundle, folder: Path, edit: Edit) -> Bundle:
    """A copy whose graph is edited and whose hashes are right again."""
    shutil.copytree(bundle.path, folder)
    name = bundle.part(PART).files[0]
    model = onnx.load(str(folder / name), load_external_data=False)
    edit(model)
    (folder / name).write_bytes(model.SerializeToString())
    record = FileRecord((folder / name).stat().st_size, digest_file(folder / name))
    files = {**bundle.manifest.files, name: record}
    (folder / MANIFEST_NAME).write_bytes(replace(bundle.manifest, files=files).to_bytes())
    return Bundle.open(folder)


def replaced(model: Any, tensor: str, nodes: Sequence[Any], constants: dict[str, Any]) -> None:
    """Let all that reads `tensor` read `tensor/spoilt`, which `nodes` make of it."""
    readers = [node for node in model.graph.node if tensor in node.input]
    assert readers, tensor
    for node in readers:
        node.input[:] = [f"{tensor}/spoilt" if name == tensor else name for name in node.input]
    at = 1 + max((i for i, node in enumerate(model.graph.node) if tensor in node.output), default=-1)
    for i, node in enumerate(nodes):
        model.graph.node.insert(at + i, node)
    known = {one.name for one in model.graph.initializer}
    added = {name: array for name, array in constants.items() if name not in known}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in added.items())


def nothing(model: Any, tensor: str) -> None:
    zero = {"no": np.zeros((), np.float32)}
    replaced(model, tensor, [helper.make_node("Mul", [tensor, "no"], [f"{tensor}/spoilt"])], zero)


def text_ignored(model: Any) -> None:
    nothing(model, "context_embedder.out")


def attention_dropped(model: Any) -> None:
    weight = "transformer_blocks.1.attn.to_out.0.weight"
    reader = next(node for node in model.graph.node if any(name.startswith(weight) for name in node.input))
    nothing(model, reader.input[0])


def one_token_off(model: Any) -> None:
    constants = {f"n{i}": np.array([i], np.int64) for i in (0, 1, 2**31)}
    for wave in ("cos", "sin"):
        name = f"image_rope_{wave}"
        cuts = [("n1", f"n{2**31}"), ("n0", "n1")]
        pieces = [helper.make_node("Slice", [name, *cut, "n0"], [f"{name}/{i}"]) for i, cut in enumerate(cuts)]
        joined = helper.make_node("Concat", [f"{name}/0", f"{name}/1"], [f"{name}/spoilt"], axis=0)
        replaced(model, name, [*pieces, joined], constants)


def axes_exchanged(model: Any) -> None:
    order = np.concatenate([np.arange(0, 4), np.arange(8, 12), np.arange(4, 8), np.arange(12, 16)])
    for name in ("image_rope_cos", "image_rope_sin"):
        node = helper.make_node("Gather", [name, "order"], [f"{name}/spoilt"], axis=1)
        replaced(model, name, [node], {"order": order})


@pytest.mark.parametrize("edit", [text_ignored, attention_dropped, one_token_off, axes_exchanged])
def test_the_proof_sees_a_fault(edit: Edit, transformer: Bundle, tmp_path: Path) -> None:
    from diffship.runtimes.proof.verify import verify

    report = verify(spoilt(transformer, tmp_path / "spoilt", edit), "onnxruntime", parts=[PART])
    (check,) = report.checks
    assert not report.damage and check.report is not None and not check.report.passed, report.text()


def test_the_proof_passes_an_edit_that_changes_nothing(transformer: Bundle, tmp_path: Path) -> None:
    from diffship.runtimes.proof.verify import verify

    def same(model: Any) -> None:
        replaced(
            model, "image_rope_cos", [helper.make_node("Identity", ["image_rope_cos"], ["image_rope_cos/spoilt"])], {}
        )

    assert verify(spoilt(transformer, tmp_path / "same", same), "onnxruntime", parts=[PART]).passed
