"""The linter of Core ML folders: a sound folder passes, and each of ten planted mistakes is found, by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from diffship.cli.main import main
from diffship.core.errors import ConfigError
from diffship.core.protobuf import encode_block, encode_number, encode_text
from diffship.targets.coreml.clients import lint
from diffship.targets.coreml.package import FILES, MODEL, manifest

HALF, SINGLE = 65552, 65568  # float16 and float32 of FeatureTypes.proto
Features = Mapping[str, tuple[int, tuple[int, ...]]]
TEXT: Features = {"input_ids": (SINGLE, (1, 77))}
STATES: Features = {"last_hidden_state": (SINGLE, (1, 77, 32)), "pooled_outputs": (SINGLE, (1, 32))}
FED: Features = {
    "sample": (HALF, (2, 4, 8, 8)),
    "timestep": (HALF, (2,)),
    "encoder_hidden_states": (HALF, (2, 32, 1, 77)),
}
NOISE: Features = {"noise_pred": (SINGLE, (2, 4, 8, 8))}
LATENT: Features = {"z": (HALF, (1, 4, 8, 8))}
IMAGE: Features = {"image": (SINGLE, (1, 3, 64, 64))}
PICTURE: Features = {"x": (HALF, (1, 3, 64, 64))}
MOMENTS: Features = {"latent": (SINGLE, (1, 8, 8, 8))}


def package(folder: Path, name: str, inputs: Features, outputs: Features, *kinds: str) -> None:
    """An .mlpackage that states these inputs and outputs, with operations of these kinds."""
    described = b"".join(encode_block(1, _feature(n, *f)) for n, f in inputs.items())
    described += b"".join(encode_block(10, _feature(n, *f)) for n, f in outputs.items())
    operations = b"".join(encode_block(3, encode_text(1, kind)) for kind in kinds)
    function = encode_block(3, encode_text(1, "CoreML6") + encode_block(2, operations))
    program = encode_block(2, encode_text(1, "main") + encode_block(2, function))
    file = folder / f"{name}.mlpackage" / MODEL
    file.parent.mkdir(parents=True)
    file.write_bytes(encode_number(1, 7) + encode_block(2, described) + encode_block(502, program))


def _feature(name: str, dtype: int, shape: tuple[int, ...]) -> bytes:
    array = b"".join(encode_number(1, size) for size in shape) + encode_number(2, dtype)
    return encode_text(1, name) + encode_block(3, encode_block(5, array))


def sound(folder: Path, *kinds: str) -> Path:
    """A folder that every client opens."""
    folder.mkdir(exist_ok=True)
    package(folder, "TextEncoder", TEXT, STATES)
    package(folder, "Unet", FED, NOISE, *(kinds or ("einsum",)))
    package(folder, "VAEDecoder", LATENT, IMAGE)
    package(folder, "VAEEncoder", PICTURE, MOMENTS)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def again(name: str, inputs: Features, outputs: Features) -> Callable[[Path], None]:
    """A mistake: the package `name` states these instead."""

    def plant(folder: Path) -> None:
        shutil.rmtree(folder / f"{name}.mlpackage")
        package(folder, name, inputs, outputs, "einsum")

    return plant


def gone(name: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return plant


def chunks(folder: Path) -> None:
    for name in ("UnetChunk1", "UnetChunk2"):
        package(folder, name, FED, NOISE)


XL: Features = {**FED, "time_ids": (HALF, (2, 6)), "text_embeds": (HALF, (2, 32))}
MISTAKES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no decoder": (gone("VAEDecoder.mlpackage"), "VAEDecoder.mlpackage", "missing"),
    "no merges": (gone("merges.txt"), "merges.txt", "tokenizer"),
    "stale chunks": (chunks, "Unet.mlpackage", "chunks beside it are opened instead"),
    "text of rank 3": (
        again("Unet", {**FED, "encoder_hidden_states": (HALF, (2, 77, 32))}, NOISE), "Unet.mlpackage", "tokens)",
    ),
    "an input that nobody feeds": (
        again("Unet", {**FED, "timestep_cond": (HALF, (2, 256))}, NOISE), "Unet.mlpackage", "timestep_cond",
    ),
    "two outputs": (again("Unet", FED, {**NOISE, "mid": (SINGLE, (2, 4))}), "Unet.mlpackage", "2 outputs"),
    "integer ids": (
        again("TextEncoder", {"input_ids": (131104, (1, 77))}, STATES), "TextEncoder.mlpackage", "int32 (1, 77)",
    ),
    "another output name": (
        again("TextEncoder", TEXT, {"hidden": (SINGLE, (1, 77, 32))}), "TextEncoder.mlpackage", "last_hidden_state",
    ),
    "another size": (
        again("VAEDecoder", {"z": (HALF, (1, 4, 16, 16))}, IMAGE), "VAEDecoder.mlpackage", "(16, 16)",
    ),
    "four channels": (
        again("VAEEncoder", PICTURE, {"latent": (SINGLE, (1, 4, 8, 8))}), "VAEEncoder.mlpackage", "4 channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("client", ["swift", "mochi"])
def test_a_sound_folder_has_no_errors(tmp_path: Path, client: str) -> None:
    assert [finding for finding in lint(sound(tmp_path), client) if finding.level == "error"] == []


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("client", ["swift", "mochi", "diffusers-app"])
def test_each_mistake_is_found_alone(tmp_path: Path, client: str, mistake: str) -> None:
    folder = sound(tmp_path / "m_split_einsum_compiled")
    plant, file, words = MISTAKES[mistake]
    plant(folder)
    errors = [finding for finding in lint(folder, client) if finding.level == "error"]
    first = [finding for finding in errors if words in finding.text and finding.file == file]
    assert len(first) == len(errors) == 1, errors


def test_sdxl_is_fed_two_rows_and_names_of_its_own(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    again("Unet", {**XL, "sample": (HALF, (1, 4, 8, 8))}, NOISE)(folder)
    package(folder, "TextEncoder2", TEXT, {"hidden_embeds": (SINGLE, (1, 77, 32)), "pooled_outputs": (SINGLE, (1, 32))})
    found = {finding.file: finding.text for finding in lint(folder, "swift") if finding.level == "error"}
    assert "always fed two" in found["Unet.mlpackage"] and "pooled" not in found.get("TextEncoder2.mlpackage", "")
    assert "hidden_embeds" in found["TextEncoder.mlpackage"]


def test_what_only_one_client_minds(tmp_path: Path) -> None:
    folder = sound(tmp_path / "m_original_compiled")
    assert any("attends as split-einsum" in finding.text for finding in lint(folder, "diffusers-app"))
    assert any(finding.text == "it is listed as split-einsum" for finding in lint(folder, "mochi"))
    gone("VAEEncoder.mlpackage")(folder)
    assert [f.file for f in lint(folder, "mochi") if f.level == "error"] == ["VAEEncoder.mlpackage"]
    assert not any(f.level == "error" for f in lint(folder, "swift"))


def test_compiled_models_are_read_from_their_metadata(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    gone("Unet.mlpackage")(folder)
    (folder / "Unet.mlmodelc").mkdir()
    entry: dict[str, Any] = {
        "inputSchema": [
            {"name": name, "dataType": "Float16", "shape": str(list(shape))} for name, (_, shape) in FED.items()
        ],
        "outputSchema": [{"name": "noise_pred", "dataType": "Float32", "shape": "[2, 4, 8, 8]"}],
        "mlProgramOperationTypeHistogram": {"Ios16.einsum": 4},
    }
    (folder / "Unet.mlmodelc" / "metadata.json").write_text(json.dumps([entry]), encoding="utf-8")
    assert not any(finding.level == "error" for finding in lint(folder, "mochi"))
    (folder / "Unet.mlmodelc" / "metadata.json").write_text("[{", encoding="utf-8")
    assert any("damaged" in finding.text for finding in lint(folder, "swift"))


def test_the_command_exits_with_1_on_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sound(tmp_path)
    assert main(["inspect", str(folder), "--lint", "swift"]) == 0
    gone("vocab.json")(folder)
    capsys.readouterr()
    assert main(["inspect", str(folder), "--lint", "swift", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is False and document["findings"][0]["file"] == "vocab.json"
    with pytest.raises(ConfigError, match="unknown client 'draw-things'"):
        lint(folder, "draw-things")
    with pytest.raises(ConfigError, match="is no folder"):
        lint(folder / "nowhere", "swift")


def test_equal_packages_are_equal_bytes() -> None:
    assert manifest("a") == manifest("a") != manifest("b")
    table = json.loads(manifest("a"))
    assert table["rootModelIdentifier"] in table["itemInfoEntries"] and FILES[0] == MODEL
