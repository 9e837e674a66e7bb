"""Core ML packages: what Apple's clients open, proved by the interpreter of MIL against torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("coremltools")
import torch
from coreml_cases import computed, decibels, of_torch, small_pipeline

from diffship.cli.main import main
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError, MissingExtra, ParityError, UnsupportedError
from diffship.core.precision import precision_of
from diffship.core.registry import EXPORTERS, load
from diffship.core.weights import MemoryWeights
from diffship.export import export
from diffship.exporters.coreml import CoreMl
from diffship.exporters.coreml.lowering import (
    FORMS,
    all_heads,
    channels_first,
    each_head,
    group_norm,
    norms_in_four_axes,
)
from diffship.exporters.coreml.palettes import clustered, palette_bytes, takes_palette
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.runtimes.engines.model import BundleModel
from diffship.runtimes.proof.verify import verify
from diffship.sampling.generate import Request, generate
from diffship.targets.coreml.clients import CLIENTS, lint
from diffship.targets.coreml.description import Feature, describe

SIZE = {"width": 64}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def bundle(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """All parts in fp16, split-einsum, proved."""
    return export(pipeline, "coreml", tmp_path_factory.mktemp("coreml") / "b", **SIZE)


@pytest.mark.slow
def test_names_types_and_shapes_are_those_that_swift_feeds(bundle: Bundle) -> None:
    unet = describe(bundle.path / "Unet.mlpackage")
    assert dict(unet.inputs) == {
        "sample": Feature("float16", (2, 4, 8, 8)),
        "timestep": Feature("float16", (2,)),
        "encoder_hidden_states": Feature("float16", (2, 32, 1, 77)),
    }
    assert dict(unet.outputs) == {"noise_pred": Feature("float32", (2, 4, 8, 8))}
    text = describe(bundle.path / "TextEncoder.mlpackage")
    assert dict(text.inputs) == {"input_ids": Feature("float32", (1, 77))}
    assert dict(text.outputs) == {
        "last_hidden_state": Feature("float32", (1, 77, 32)),
        "pooled_outputs": Feature("float32", (1, 32)),
    }
    decoder, encoder = (describe(bundle.path / f"VAE{side}.mlpackage") for side in ("Decoder", "Encoder"))
    assert dict(decoder.inputs) == {"z": Feature("float16", (1, 4, 8, 8))}
    assert dict(decoder.outputs) == {"image": Feature("float32", (1, 3, 64, 64))}
    assert dict(encoder.inputs) == {"x": Feature("float16", (1, 3, 64, 64))}
    assert dict(encoder.outputs) == {"latent": Feature("float32", (1, 8, 8, 8))}
    assert {"vocab.json", "merges.txt"} <= set(bundle.manifest.files)
    assert unet.metadata["diffship.attention"] == "split-einsum" and unet.operations["einsum"]


@pytest.mark.slow
def test_the_reader_sees_what_coremltools_sees(bundle: Bundle) -> None:
    from coremltools.proto.Model_pb2 import Model

    from diffship.runtimes.engines.mil.blobs import Blobs
    from diffship.targets.coreml.program import Blob, read_program

    files = bundle.part("unet").files
    program = read_program(bundle.file(files[0]))
    spec = Model.FromString(bundle.file(files[0]).read_bytes())
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    assert [op.kind for op in program.operations] == [op.type for op in block.operations]
    assert [op.name for op in program.operations] == [op.outputs[0].name for op in block.operations]
    blobs = Blobs(bundle.file(files[1]))
    held = [op.attributes["val"] for op in program.operations if isinstance(op.attributes.get("val"), Blob)]
    module = small_pipeline().components["unet"].module()
    stored = {tuple(np.unique(tensor.half().numpy())) for tensor in module.state_dict().values()}
    found = [tuple(np.unique(blobs.read(blob))) for blob in held if blob.type.count > 2000]
    assert len(found) >= 10 and sum(values in stored for values in found) >= len(found) - 2


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_encoder", "vae_decoder"])
def test_a_package_computes_what_torch_does_on_the_weights_that_it_stores(
    bundle: Bundle, pipeline: Pipeline, part: str
) -> None:
    component = pipeline.components[part]
    feeds = component.example(1, {**bundle.part(part).extra["sizes"], "batch_size": 3})  # not the package's own rows
    feeds = dict(precision_of("fp16").feeds(component.inputs, feeds))
    wanted = of_torch(component, feeds)
    for arithmetic, least in (("fp32", 80), ("declared", 45)):
        found = computed(bundle, part, arithmetic, feeds)
        assert set(found) == set(wanted)
        for name, array in wanted.items():
            assert decibels(found[name], array) >= least, f"{name} in {arithmetic}"


@pytest.mark.slow
def test_verify_proves_it_and_a_broken_weight_fails(bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    assert all(part.proof["status"] == "proved" for part in bundle.manifest.parts)
    assert verify(bundle, parts=["vae_decoder", "unet"]).passed
    broken = tmp_path / "b"
    shutil.copytree(bundle.path, broken)
    file = broken / bundle.part("unet").files[1]
    data = bytearray(file.read_bytes())
    middle = len(data) // 2 & ~1
    data[middle : middle + 2] = np.float16(100).tobytes()
    file.write_bytes(data)
    from diffship.runtimes.engines.engine import make_engine
    from diffship.runtimes.proof.verify import check_part

    opened = Bundle.open(broken)
    check = check_part(replace(opened, path=broken), opened.part("unet"), make_engine("mil"))
    assert check.status == "failed"


@pytest.mark.slow
def test_the_original_form_has_no_einsum_and_gives_the_same(bundle: Bundle, pipeline: Pipeline, tmp_path: Path) -> None:
    other = export(pipeline, "coreml", tmp_path / "b", parts=["unet"], attention="original", batch=1, **SIZE)
    feeds = pipeline.components["unet"].example(2, bundle.part("unet").extra["sizes"])
    first, second = (computed(one, "unet", "fp32", feeds)["out_sample"] for one in (bundle, other))
    assert decibels(second, first) >= 80
    description = describe(other.path / "Unet.mlpackage")
    assert "einsum" not in description.operations and description.inputs["sample"].shape[0] == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_unet_with_channels_first_is_that_of_diffusers(
    pipeline: Pipeline, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffship.exporters.coreml.lowering._CHUNK", 40)  # of 64 queries
    component = pipeline.components["unet"]
    sample, timestep, text = map(torch.from_numpy, component.example(3, {"batch_size": 2}).values())
    stock, ours = component.module(), component.module()
    assert channels_first(ours, form)
    with torch.no_grad(), norms_in_four_axes():
        found = ours(sample, timestep, text.transpose(1, 2)[:, :, None])[0]
    with torch.no_grad():
        wanted = stock(sample, timestep, text)[0]
    assert decibels(found.numpy(), wanted.numpy()) > 110


@pytest.mark.slow
def test_a_picture_through_the_packages_is_that_of_torch(bundle: Bundle, pipeline: Pipeline) -> None:
    request = Request("an apple", steps=3, seed=4, size=(64, 64), guidance=3.0)
    with BundleModel(bundle, "mil") as model:
        (found,) = generate(model, request)
    (wanted,) = generate(PipelineModel(pipeline), request)
    assert decibels(found.pixels, wanted.pixels.astype(np.float64)) >= 35


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "group"), [("palette6", 0), ("palette4", 0), ("palette2", 4)])
def test_palettes_take_the_bytes_that_their_bits_say(
    pipeline: Pipeline, precision: str, group: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"group": group, "oldest": "iOS18"} if group else {}
    made = export(pipeline, "coreml", tmp_path / "b", parts=["text_encoder"], precision=precision, **SIZE, **options)
    part, bits = made.part("text_encoder"), precision_of(precision).palette_bits
    assert part.proof["status"] == "proved"
    component = pipeline.components["text_encoder"]
    shapes = {name: component.weights.meta(name).shape for name in component.weights.names()}
    packed = {name for name, shape in shapes.items() if takes_palette(name, shape)}
    assert len(packed) == 5, "the tokens, and two large layers of each block"
    predicted = sum(
        palette_bytes(shape, bits, group) if name in packed else 2 * int(np.prod(shape))
        for name, shape in shapes.items()
    )
    predicted += 2 * 77 * 77 if group else 77 * 77 // 8  # the causal mask, whose two values one palette holds
    blobs = 64 * (len(shapes) + len(packed) + 3)  # metadata of each tensor, table and mask; the file's header
    measured = made.manifest.files[part.files[1]].size
    assert abs(measured / (predicted + blobs) - 1) < 0.03


def test_clusters_are_those_of_lloyd() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((8, 40)).astype(np.float16)
    found = clustered(weight, 2, 4)
    for rows, stored in ((weight[:4], found[:4]), (weight[4:], found[4:])):
        table = np.unique(stored)
        assert len(table) == 4
        nearest = np.abs(rows.astype(np.float64)[..., None] - table.astype(np.float64)).min(-1)
        assert np.allclose(np.abs(rows.astype(np.float64) - stored), nearest, atol=1e-6), "each has its nearest"
        for value in table:
            assert abs(rows[stored == value].astype(np.float64).mean() - float(value)) < 2e-3, "each is a mean"
    assert np.array_equal(clustered(found, 2, 4), found)


@pytest.mark.slow
def test_text_encoders_of_sdxl_give_hidden_embeds(tmp_path: Path) -> None:
    made = export("arch:tiny-sdxl", "coreml", tmp_path / "b", parts=["text_encoder", "text_encoder_2"], **SIZE)
    for name in ("TextEncoder", "TextEncoder2"):
        outputs = describe(made.path / f"{name}.mlpackage").outputs
        assert {"hidden_embeds", "pooled_outputs"} <= set(outputs), name
    states = [spec.name for spec in made.part("text_encoder").outputs if spec.name.startswith("hidden_states.")]
    assert len(states) == 2, "the last two, of which clients read the first"


def test_a_vae_that_overflows_stays_in_float32(pipeline: Pipeline) -> None:
    decoder = pipeline.components["vae_decoder"]
    wide = replace(decoder, config={**decoder.config, "force_upcast": True})
    assert [CoreMl(precision=name).of(wide).precision for name in ("fp16", "palette6")] == ["fp32", "fp32"]
    assert CoreMl().of(decoder) == CoreMl()


def test_forms_of_attention_are_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, 12, 1, n, generator=generator) for n in (10, 7, 7))
    heads = [x.reshape(2, 3, 4, -1).transpose(2, 3) for x in (query, key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads, scale=1.0).transpose(2, 3).reshape(2, 12, 1, 10)
    for found in (
        all_heads(query, key, value, 3),
        each_head(query, key, value, 3, 0),
        each_head(query, key, value, 3, 4),
    ):
        assert torch.allclose(found, wanted, atol=1e-5)
    x, weight, bias = torch.randn(2, 12, 5, 3), torch.randn(12), torch.randn(12)
    right = torch.nn.functional.group_norm(x, 4, weight, bias, 1e-6)
    assert torch.allclose(group_norm(x, 4, weight, bias, 1e-6), right, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group": 8}, "--group 8 is for palettes"),
        ({"group": 8, "precision": "palette4"}, "iOS16 does not open"),
        ({"height": 64}, "--height 64 stands alone"),
        ({"precision": "bf16"}, "unknown value 'bf16'"),
        ({"oldest": "iOS15"}, "unknown value 'iOS15'"),
    ],
)
def test_what_cannot_be_is_said_at_once(options: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CoreMl(**options)


def test_refusals_come_before_work(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CoreMl, "package", lambda *_: pytest.fail("work began"))
    with pytest.raises(ConfigError, match=r"width is 100; sd draws multiples of 64.* 64 and 128"):
        export(pipeline, "coreml", tmp_path / "b", width=100)
    with pytest.raises(UnsupportedError, match="has no Core ML form"):
        export("arch:tiny-sd3", "coreml", tmp_path / "b", parts=["transformer"], width=64)

    def absent(name: str) -> Any:
        raise MissingExtra("coremltools", "coreml")

    monkeypatch.setattr("diffship.exporters.coreml.exporter.need", absent)
    assert main(["export", "arch:tiny-sd", "--to", "coreml", "-o", str(tmp_path / "b")]) == 3
    assert "pip install 'diffship[coreml]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_another_block_is_refused() -> None:
    module = small_pipeline(only_cross_attention=True).components["unet"].module()
    with pytest.raises(UnsupportedError, match="another form than those of Stable Diffusion"):
        channels_first(module, "original")


@pytest.mark.slow
def test_another_model_is_found(pipeline: Pipeline, tmp_path: Path) -> None:
    text = pipeline.components["text_encoder"]
    damaged = {name: np.array(text.weights.read(name)) for name in text.weights.names()}
    damaged["text_model.encoder.layers.0.mlp.fc1.weight"][3] *= 1.5
    other = replace(
        pipeline, components={**pipeline.components, "text_encoder": replace(text, weights=MemoryWeights(damaged))}
    )
    with pytest.raises(ParityError, match="text_encoder"):
        export(pipeline, "coreml", tmp_path / "b", parts=["text_encoder"], against=other, **SIZE)


@pytest.mark.slow
def test_clients_open_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    for client in CLIENTS[:2]:
        assert [finding.level for finding in lint(bundle.path, client)].count("error") == 0
    words = ["inspect", str(bundle.path), "--lint", "swift", "--json"]
    assert main(words) == 0
    assert main(["inspect", str(bundle.path), "--lint", "diffusers-app"]) == 1, "its name does not say the form"


def test_the_exporter_is_in_the_table() -> None:
    assert load(EXPORTERS, "coreml") is CoreMl
    assert json.loads(json.dumps(CoreMl().__dict__))["attention"] == "split-einsum"
