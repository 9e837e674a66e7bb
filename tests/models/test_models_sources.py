from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from diffship.core import document
from diffship.core.errors import ConfigError, SourceError, UnsupportedError
from diffship.core.safetensors_file import read_header, read_tensor, write_safetensors
from diffship.core.weights import MemoryWeights
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.models.saving import require_place, save
from diffship.models.sources import arch_configs
from diffship.models.sources.hub import is_hub_id, select_files
from diffship.models.sources.opening import open_source


@cache
def arch(name: str) -> Pipeline:
    return open_source(f"arch:{name}")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(arch("tiny-sd"), tmp_path_factory.mktemp("saved") / "tiny-sd")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def digests(pipeline: Pipeline) -> dict[str, str]:
    return {name: component.digest for name, component in pipeline.components.items()}


def test_saved_folder_opens_with_the_same_tensors(saved: Path) -> None:
    again = open_source(str(saved))
    assert digests(again) == digests(arch("tiny-sd"))
    assert again.family == arch("tiny-sd").family
    assert again.tokenizers == arch("tiny-sd").tokenizers
    assert again.source["kind"] == "folder"
    assert again.model_index == arch("tiny-sd").model_index


@pytest.mark.slow
def test_stock_diffusers_loads_the_saved_folder_and_agrees(saved: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(saved)
    component = arch("tiny-sd").components["text_encoder"]
    feeds = component.example(0)
    with torch.no_grad():
        expected = stock.text_encoder(torch.from_numpy(feeds["input_ids"]))[0].numpy()
    assert np.abs(component.load().run(feeds)["last_hidden_state"] - expected).max() < 1e-6
    latents = stock("a red apple", num_inference_steps=1, output_type="latent").images
    assert latents.shape == (1, 4, 8, 8) and torch.isfinite(latents).all()


@pytest.mark.slow
def test_stock_diffusers_loads_sdxl_in_half_precision(tmp_path: Path) -> None:
    folder = save(arch("tiny-sdxl"), tmp_path / "xl", dtype="float16")
    assert {
        entry.meta.dtype for entry in read_header(folder / "text_encoder_2" / "model.safetensors").entries.values()
    } == {"float16"}
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    # EulerDiscreteScheduler hands torch tensors to np.array in a form that numpy 2 deprecates
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    assert stock("x", num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 8)
    assert open_source(str(folder)).family == arch("tiny-sdxl").family


def test_text_encoder_is_written_with_classic_names(saved: Path) -> None:
    names = read_header(saved / "text_encoder" / "model.safetensors").entries
    assert all(name.startswith("text_model.") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-lcm", "tiny-inpaint", "tiny-refiner", "tiny-sd+lcm+taesd", "tiny-sdxl+lcm"])
def test_every_family_survives_a_folder(name: str, tmp_path: Path) -> None:
    again = open_source(str(save(arch(name), tmp_path / "model")))
    assert again.family == arch(name).family
    assert digests(again) == digests(arch(name))


@pytest.mark.slow
def test_facts_of_the_families() -> None:
    facts = {name: arch(name).family for name in ("sd15", "sd21", "sdxl", "sdxl-refiner", "lcm-sd15", "sd15-inpaint")}
    assert [f.default_size for f in facts.values()] == [512, 768, 1024, 1024, 512, 512]
    assert [f.size_step for f in facts.values()] == [64, 64, 32, 64, 64, 64]
    assert [f.text_width for f in facts.values()] == [768, 1024, 2048, 1280, 768, 768]
    assert [f.time_ids for f in facts.values()] == [None, None, 6, 5, None, None]
    assert facts["sd21"].prediction_type == "v_prediction"
    assert facts["sdxl"].scaling_factor == 0.13025 and facts["sdxl"].pooled_width == 1280
    xl = arch("lcm-sdxl")
    assert (xl.family.time_cond_dim, xl.family.pooled_width, xl.family.default_size) == (256, 1280, 1024)
    assert xl.denoiser.inputs[-1].name == "timestep_cond" and xl.scheduler["_class_name"] == "LCMScheduler"
    assert facts["lcm-sd15"].time_cond_dim == 256 and arch("lcm-sd15").scheduler["_class_name"] == "LCMScheduler"
    assert facts["sd15-inpaint"].unet_channels == 9
    assert arch("sd15+taesd").family.scaling_factor == 1.0
    assert arch("sd21+lcm").scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("name", list(arch_configs.UNETS))
def test_every_architecture_opens_with_each_suffix(name: str) -> None:
    pipeline = open_source(f"arch:{name}+lcm+taesd")
    assert pipeline.family.time_cond_dim
    assert pipeline.components["vae_decoder"].class_name == "AutoencoderTiny"
    assert pipeline.scheduler["_class_name"] == "LCMScheduler"


def test_wrong_architectures_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(SourceError, match=r"did you mean 'sd15'"):
        open_source("arch:sd5")
    with pytest.raises(SourceError, match="unknown suffix 'lmc'"):
        open_source("arch:sd15+lmc")


@pytest.mark.slow
def test_full_precision_is_preferred_and_half_is_accepted(folder: Path) -> None:
    before = digests(open_source(str(folder)))
    half = (
        save(arch("tiny-sd"), folder.parent / "half", dtype="float16") / "unet" / "diffusion_pytorch_model.safetensors"
    )
    shutil.copy(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert digests(open_source(str(folder))) == before
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    after = open_source(str(folder)).components["unet"]
    assert {after.weights.meta(name).dtype for name in after.weights.names()} == {"float16"}
    feeds = after.example(0)
    assert after.load().run(feeds)["out_sample"].dtype == np.float32


def shard(folder: Path) -> Path:
    file = folder / "diffusion_pytorch_model.safetensors"
    header = read_header(file)
    names = list(header.entries)
    table = {}
    for i in range(3):
        weights = MemoryWeights({name: read_tensor(header, name) for name in names[i::3]})
        shard_name = f"diffusion_pytorch_model-{i + 1:05}-of-00003.safetensors"
        write_safetensors(folder / shard_name, {n: weights.meta(n) for n in weights.names()}, weights.read)
        table.update(dict.fromkeys(weights.names(), shard_name))
    file.unlink()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return index


def test_sharded_checkpoints(folder: Path) -> None:
    before = digests(open_source(str(folder)))
    index = shard(folder / "unet")
    assert digests(open_source(str(folder))) == before
    table = json.loads(index.read_text())["weight_map"]
    for bad in ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 3):
        edit(index, weight_map={**table, next(iter(table)): bad})
        with pytest.raises(SourceError, match="a file of this folder"):
            open_source(str(folder))


def test_only_tokenizer_json_or_only_merges(folder: Path) -> None:
    full = arch("tiny-sd").tokenizers["tokenizer"]
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / "tokenizer" / name).unlink()
    found = open_source(str(folder)).tokenizers["tokenizer"]
    assert json.loads(found["vocab.json"]) == json.loads(full["vocab.json"])
    assert found["merges.txt"] == full["merges.txt"]
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="not a CLIP tokenizer"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("merges.txt", "not pairs"),
        ("merges.txt", "a b c"),
        ("special_tokens_map.json", "[" * 100_000),
        ("tokenizer.json", '{"a":' * 100_000),
        ("vocab.json", "[" * 100_000),
        ("added_tokens.json", '{"<a>": "x"}'),
    ],
)
def test_a_damaged_tokenizer_is_named(folder: Path, name: str, text: str) -> None:
    (folder / "tokenizer" / name).write_text(text)
    with pytest.raises(SourceError, match=r"tokenizer: not a CLIP tokenizer"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "vae/config.json"])
def test_no_file_of_a_folder_is_read_without_end_or_waited_for(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "PIPE_SECONDS", 0.05)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(SourceError, match=rf"{name} cannot be read: nothing came through this pipe"):
        open_source(str(folder))
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(SourceError, match=rf"{name} cannot be read: it is neither a file nor a pipe"):
        open_source(str(folder))


@pytest.mark.parametrize("value", [True, 1.5, {"a": 1}, [3], "CLIPText"])
def test_a_class_that_is_none_is_refused(folder: Path, value: Any) -> None:
    edit(folder / "text_encoder" / "config.json", architectures=value)
    with pytest.raises(UnsupportedError, match=r"text_encoder: class .* is not supported"):
        open_source(str(folder))


def test_base_supplies_missing_parts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"part of the model {re.escape(str(folder))}; pass that, or .* --base"):
        open_source(str(folder / "unet"))
    alone = shutil.copytree(folder / "unet", tmp_path / "alone")
    with pytest.raises(SourceError, match=r"alone: has no vae, text_encoder, tokenizer, scheduler.*--base"):
        open_source(str(alone))
    merged = open_source(str(folder / "unet"), base="arch:tiny-sd+taesd")
    assert merged.components["unet"].digest == arch("tiny-sd").components["unet"].digest
    assert merged.components["vae_decoder"].class_name == "AutoencoderTiny"
    assert merged.source["base"]["id"] == "arch:tiny-sd+taesd"
    with pytest.raises(SourceError, match="not one family"):
        open_source(str(folder / "unet"), base="arch:tiny-sdxl")


@pytest.mark.slow
def test_base_of_a_time_conditioned_unet_gets_its_scheduler(tmp_path: Path) -> None:
    folder = save(arch("tiny-sdxl+lcm"), tmp_path / "lcm")
    merged = open_source(str(folder / "unet"), base="arch:tiny-sdxl")
    assert merged.scheduler["_class_name"] == "LCMScheduler"
    assert merged.scheduler["beta_start"] == arch("tiny-sdxl").scheduler["beta_start"]
    assert merged.components["text_encoder_2"].digest == arch("tiny-sdxl").components["text_encoder_2"].digest
    assert merged.model_index["_class_name"] == "StableDiffusionXLPipeline"


class Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "diffusion_pytorch_model.safetensors"])
def test_pickles_are_never_opened(folder: Path, name: str) -> None:
    canary = folder / "canary"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Canary(str(canary))))
    with pytest.raises(SourceError, match="safetensors/convert"):
        open_source(str(folder))
    assert not canary.exists()


def test_pickled_checkpoints_are_refused_with_what_to_look_for(tmp_path: Path) -> None:
    for name in ("v1-5.ckpt", "v1-5.bin", "v1-5.pt", "v1-5.safetensors"):  # whatever it is called
        (tmp_path / name).write_bytes(pickle.dumps({"state_dict": 1}))
        with pytest.raises(SourceError, match=r"can run code.*never.*Look for a .safetensors file of the same model"):
            open_source(str(tmp_path / name))
    (tmp_path / "model.dat").write_bytes(b"\1\2\3")
    with pytest.raises(SourceError, match=r"legal: a file that ends in .safetensors or .gguf, or a diffusers folder"):
        open_source(str(tmp_path / "model.dat"))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model_index.json", {"_class_name": ["pipeline", "MyPipeline"]}),
        ("model_index.json", {"unet": ["my_unet", "MyUNet"]}),
        ("model_index.json", {"safety_checker": ["checker", "Checker"]}),
        ("model_index.json", {"unet": ["diffusers"]}),
        ("model_index.json", {"custom_pipeline": "somebody/pipeline"}),
        ("unet/config.json", {"auto_map": {"AutoModel": "m.Model"}}),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "m.Model"}}),
        ("vae/config.json", {"trust_remote_code": True}),
        ("scheduler/scheduler_config.json", {"auto_map": {"A": "b.C"}}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.T", None]}}),
    ],
)
def test_code_that_comes_with_a_model_is_refused(folder: Path, file: str, change: dict[str, Any]) -> None:
    for name in ("pipeline.py", "unet/my_unet.py", "m.py"):
        (folder / name).write_text("open('canary', 'w')")
    edit(folder / file, **change)
    with pytest.raises(SourceError, match=r"never run|must be \[library, class\]"):
        open_source(str(folder))
    assert not (folder / "canary").exists()


def test_a_module_of_a_library_is_the_librarys_own_code(folder: Path) -> None:
    checker = ["diffusers.pipelines.stable_diffusion.safety_checker", "StableDiffusionSafetyChecker"]
    extractor = ["transformers.models.clip.image_processing_clip", "CLIPImageProcessor"]
    edit(folder / "model_index.json", safety_checker=checker, feature_extractor=extractor)
    assert any("left out: safety_checker" in note for note in open_source(str(folder)).source["notes"])
    for name in ("diffusers_modules.local.checker", "my.diffusers"):
        edit(folder / "model_index.json", safety_checker=[name, "Checker"])
        with pytest.raises(SourceError, match="is never run"):
            open_source(str(folder))


def test_other_families_and_classes_are_refused(folder: Path) -> None:
    edit(folder / "unet" / "config.json", _class_name="UNet3DConditionModel")
    with pytest.raises(UnsupportedError, match="UNet3DConditionModel"):
        open_source(str(folder))
    edit(folder / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"])
    with pytest.raises(UnsupportedError, match="U-Net pipelines"):
        open_source(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": NaN', "\x00"])
def test_damaged_json_is_refused(folder: Path, text: str) -> None:
    (folder / "unet" / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"unet/config\.json"):
        open_source(str(folder))


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"vae: has no diffusion_pytorch_model\.safetensors"):
        open_source(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="not a diffusers folder"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(SourceError, match="does not exist"):
        open_source(str(tmp_path / "nowhere"))


def test_licence_and_restrictions_are_carried(folder: Path, tmp_path: Path) -> None:
    front = "---\nlicense: creativeml-openrail-m\nlicense_link: 'https://example.org/l'\ntags:\n- a: b\n---\n"
    card = f"{front}# Model\nlicense: mit\n"
    (folder / "README.md").write_text(card)
    (folder / "LICENSE.md").write_text("the terms")
    licence = open_source(str(folder)).licence
    assert (licence["id"], licence["link"]) == ("creativeml-openrail-m", "https://example.org/l")
    assert "Attachment A" in licence["restrictions"]
    assert licence["notices"] == [{"file": "LICENSE.md", "text": "the terms"}]
    again = open_source(str(save(open_source(str(folder)), tmp_path / "copy"))).licence
    assert again == licence
    merged = open_source(str(folder / "unet"), base=str(folder)).licence
    assert "Attachment A" in merged["restrictions"]


def test_saving_keeps_what_is_there_and_leaves_nothing_half_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not an empty folder"):
        save(arch("tiny-sd"), folder)
    monkeypatch.setattr("diffship.models.folder.write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(arch("tiny-sd"), folder.parent / "new")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_reports_progress(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    save(arch("tiny-sd"), tmp_path / "m", progress=lambda *step: seen.append(step))
    ends = {label: (done, total) for label, done, total in seen}
    assert set(ends) == {"write unet", "write text_encoder", "write vae"}
    assert all(done == total for done, total in ends.values())


def cache_layout(folder: Path, root: Path, name: str, commit: str) -> None:
    repo = root / f"models--{name.replace('/', '--')}"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for i, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = repo / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, repo / "blobs" / f"{i:040x}")
        link.symlink_to(Path(*[".."] * (len(file.relative_to(folder).parts) + 1), "blobs", f"{i:040x}"))


def test_hub_cache_of_links_is_read_offline_and_its_commit_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache_layout(folder, tmp_path / "hub", "someone/tiny", commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    pipeline = open_source("someone/tiny")
    assert pipeline.source == {"id": "someone/tiny", "revision": commit, "kind": "hub"}
    assert digests(pipeline) == digests(arch("tiny-sd"))
    offline = r"no path in .*, and not in the local hub cache; HF_HUB_OFFLINE .* a bundle too"
    with pytest.raises(SourceError, match=offline):
        open_source("someone/absent")
    with pytest.raises(SourceError, match="at v2"):
        open_source("someone/tiny", revision="v2")


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(Exception):
        pass

    def refuse(*_: Any, **__: Any) -> None:
        raise Unreachable("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(SourceError, match="does not give it: Unreachable: Name or service not known"):
        open_source("someone/tiny")


def test_what_can_be_no_source_is_refused_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffship.models.sources.opening.hub_folder", lambda *_: pytest.fail("the hub was asked"))
    for text in ("a/b/c", "./nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(SourceError, match=r"does not exist; legal: .*; where a model is run, a bundle too"):
            open_source(text)
    (tmp_path / "diffship.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SourceError, match="is a bundle already; export and compress take a source; legal: "):
        open_source(str(tmp_path))


def test_what_is_near_is_told_before_the_hub_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffship.models.sources.opening.hub_folder", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    for text, meant in (("emojj", "emoji"), ("models/sd51", "models/sd15"), ("model/sd15", "models/sd15")):
        with pytest.raises(SourceError, match=rf"'{text}' does not exist; legal: .*; did you mean '{meant}'\?"):
            open_source(text)


def test_a_folder_of_a_hub_cache_is_called_as_the_hub_calls_it(folder: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "elsewhere" / "models--some-one--tiny--er" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    source = open_source(str(snapshot)).source
    assert (source["id"], source["revision"]) == ("some-one/tiny--er", commit)
    assert str(tmp_path) not in json.dumps(source)


def test_a_bundle_on_the_hub_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    files = [SimpleNamespace(rfilename=name, size=9) for name in ("diffship.json", "unet/model.onnx")]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=files, sha="0"))
    with pytest.raises(SourceError, match=r"'some/bundle' on the hub is a bundle.*hf download some/bundle --local-dir"):
        open_source("some/bundle")


def test_a_mistyped_path_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom diffship.core.errors import SourceError\n"
        "from diffship.runtimes.engines.torch import TorchRunner\n"
        "try:\n    TorchRunner().open_model('./out/nix')\nexcept SourceError as fault:\n"
        "    sys.exit('torch was loaded' if 'torch' in sys.modules else str(fault))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "'./out/nix' does not exist; legal: " in done.stderr and "a bundle too" in done.stderr, done.stderr


def test_only_files_that_are_read_are_fetched() -> None:
    names = [
        "README.md", "LICENSE.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "pipeline.py",
        "unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/config.json", "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
        "safety_checker/model.safetensors", "safety_checker/config.json", "unet/model.onnx", "unet/code.py",
    ]  # fmt: skip
    assert select_files(names) == sorted(
        [
            "README.md", "LICENSE.md", "model_index.json", "unet/config.json", "text_encoder/config.json",
            "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.fp16.safetensors",
            "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
            "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
            "vae/diffusion_pytorch_model.safetensors.index.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
        ]
    )  # fmt: skip


def test_hub_ids() -> None:
    assert all(map(is_hub_id, ("stabilityai/sdxl-turbo", "gpt2", "a/b.c-d_e")))
    assert not any(map(is_hub_id, ("", "../x", "/etc/passwd", "a/b/c", "a b", "a//b", "-x/y", "x" * 200)))


@pytest.mark.slow
def test_an_unknown_hub_id_is_one_line_in_a_fresh_process(tmp_path: Path) -> None:
    """The hub's client loads its modules lazily: nothing else may have imported them before."""
    code = "from diffship.models.sources.hub import hub_folder; hub_folder('nobody/nothing')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert f"SourceError: 'nobody/nothing' is no path in {Path.cwd()}" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_small_sibling_shares_all_but_the_unet_with_its_teacher() -> None:
    small, large = open_source("emoji-small"), open_source("emoji")
    unet = small.components["unet"]
    assert sum(unet.weights.meta(name).count for name in unet.weights.names()) == 4_585_956
    same = {name for name in large.components if digests(small)[name] == digests(large)[name]}
    assert same == set(large.components) - {"unet"} and small.tokenizers == large.tokenizers
    assert small.family.size_step == 32  # it has a level less
    assert replace(small.family, size_step=64) == large.family and small.scheduler == large.scheduler
    assert [entry["pass"] for entry in small.history] == ["layout", "significance", "distill"]
    assert (small.source["id"], small.source["kind"]) == ("emoji-small", "packaged")


@pytest.mark.slow
def test_the_small_sibling_draws_what_its_teacher_draws() -> None:
    from diffship.sampling.generate import Request, generate

    request = Request("a black cat", steps=10, seed=1, guidance=4.0)
    with PipelineModel(open_source("emoji-small")) as small, PipelineModel(open_source("emoji")) as large:
        pixels = [generate(model, request)[0].pixels.astype(float) for model in (small, large)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 25 < np.abs(255 - pixels[1]).mean()


def test_saving_sweeps_up_what_a_killed_save_left_and_keeps_its_permissions_usual(tmp_path: Path) -> None:
    left = tmp_path / ".m.partial-0123abcd"
    (left / "unet").mkdir(parents=True)
    (tmp_path / "usual").mkdir()
    folder = save(arch("tiny-sd"), tmp_path / "m")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m", "usual"]
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_that_another_fills_meanwhile_is_kept(tmp_path: Path) -> None:
    def other(part: str, done: int, total: int) -> None:
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / "theirs").touch()

    with pytest.raises(ConfigError, match="written by someone else meanwhile"):
        save(arch("tiny-sd"), tmp_path / "m", progress=other)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["theirs"] and len(list(tmp_path.iterdir())) == 1


def test_a_mount_point_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(ConfigError, match="is a mount point"):
        require_place(tmp_path)


def test_a_default_dpm_solver_of_diffusers_exports_as_json(folder: Path) -> None:
    DPMSolverMultistepScheduler.from_config(arch("tiny-sd").scheduler).save_pretrained(folder / "scheduler")
    assert "-Infinity" in (folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    scheduler = open_source(str(folder)).scheduler
    json.dumps(scheduler, allow_nan=False)
    theirs = DPMSolverMultistepScheduler.from_config(dict(scheduler)).config
    assert theirs["lambda_min_clipped"] == float("-inf") and scheduler["_class_name"] == "DPMSolverMultistepScheduler"


def edited(folder: Path, file: str, change: dict[str, Any]) -> str:
    """`folder` with some keys of one of its JSON files changed, as a source."""
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    return str(folder)


SCHEDULER, UNET, VAE, INDEX = (
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "model_index.json",
)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (SCHEDULER, {"prediction_type": None}, "prediction_type is None; it must be a string"),
        (SCHEDULER, {"prediction_type": "v-prediction"}, "prediction_type: .*did you mean 'v_prediction'"),
        (
            UNET,
            {"sample_size": 1024},
            "sample_size is 1024; the default side of a picture, 8 times that, is 8192; legal",
        ),
        (VAE, {"scaling_factor": 0}, "scaling_factor is 0; legal is from"),
        (VAE, {"scaling_factor": -0.18215}, "scaling_factor is -0.18215; legal is from"),
        (VAE, {"scaling_factor": [0.1, 0.2]}, "scaling_factor is .*must be a number"),
        (VAE, {"shift_factor": 1e9}, "shift_factor is 1000000000.0; legal"),
        (UNET, {"sample_size": [64, 1024]}, "sample_size is .*legal is from 8 to 4096"),
        (INDEX, {"_diffship": {"guidance_default": 50}}, "_diffship.guidance_default is 50; legal is from 0.0 to 35.0"),
        (INDEX, {"_diffship": {"steps_default": 400}}, "_diffship.steps_default is 400; legal is from 1 to 150"),
        (INDEX, {"_diffship": {"steps_default": 4.5}}, "_diffship.steps_default is 4.5; it must be a whole number"),
        (SCHEDULER, {"foo": float("nan")}, "foo is nan"),
        (SCHEDULER, {"trained_betas": [0.1, float("nan")]}, "trained_betas is nan"),
        (VAE, {"act": {"slope": float("inf")}}, "act.slope is inf"),
    ],
)
def test_facts_that_no_bundle_may_hold_are_refused_when_the_source_is_read(
    folder: Path, file: str, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(SourceError, match=rf"{file}: {said}"):
        open_source(edited(folder, file, change))


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "flow_prediction"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    ],
)
def test_models_trained_by_flow_matching_are_refused(folder: Path, change: dict[str, Any]) -> None:
    if "_class_name" in change:
        edited(folder, INDEX, {"scheduler": ["diffusers", change["_class_name"]]})
    with pytest.raises(UnsupportedError, match=r"scheduler_config\.json: .*flow matching, which is not built"):
        open_source(edited(folder, SCHEDULER, change))
