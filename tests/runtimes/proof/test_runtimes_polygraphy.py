"""Golden vectors in Polygraphy's form: read without our code, by Polygraphy itself, and used by it to check engines."""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffship.cli.main import main
from diffship.core.bundle import Bundle
from diffship.core.compare import Tolerance
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.runtimes.proof import polygraphy_files
from diffship.runtimes.proof.polygraphy_files import command, write_polygraphy

Command = Callable[..., dict[str, Any]]


def arrays(table: dict[str, Any]) -> dict[str, np.ndarray]:
    """Polygraphy's arrays, as its own reader takes them: base64 of a .npy file, without pickles."""
    found = {}
    for name, entry in table.items():
        entry = entry["values"] if entry["polygraphy_class"] == "LazyArray" else entry
        assert entry["polygraphy_class"] == "ndarray"
        found[name] = np.load(io.BytesIO(base64.b64decode(entry["array"], validate=True)), allow_pickle=False)
    return found


def written(folder: Path) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Inputs and outputs of every call."""
    feeds = [arrays(feed) for feed in json.loads((folder / "inputs.json").read_text(encoding="utf-8"))]
    results = json.loads((folder / "outputs.json").read_text(encoding="utf-8"))
    ((_, iterations),) = results["lst"]
    assert results["polygraphy_class"] == "RunResults"
    return feeds, [arrays(iteration["outputs"]) for iteration in iterations]


def test_the_files_hold_the_golden_vectors(tiny_bundle: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "polygraphy"
    document = command("verify", tiny_bundle, "--polygraphy", out)
    assert document["exit_code"] == 0 and document["passed"] and document["parts"] == []
    bundle = Bundle.open(tiny_bundle)
    assert [entry["part"] for entry in document["polygraphy"]] == [part.name for part in bundle.manifest.parts]
    for part, entry in zip(bundle.manifest.parts, document["polygraphy"], strict=True):
        assert part.golden is not None
        golden = load_file(tiny_bundle / part.golden.file)
        feeds, outputs = written(out / part.name)
        assert len(feeds) == len(outputs) >= 1
        for side, calls in (("in", feeds), ("out", outputs)):
            held = [array for name, array in golden.items() if f".{side}." in f".{name}"]
            sent = [array for call in calls for array in call.values()]
            assert sorted(a.tobytes() for a in held) == sorted(a.tobytes() for a in sent)
        for feed in feeds:
            assert {spec.name: spec.dtype for spec in part.inputs} == {n: a.dtype.name for n, a in feed.items()}
        words = shlex.split(entry["command"])
        assert words[:4] == ["polygraphy", "run", str(tiny_bundle / part.files[0]), "--onnxrt"]
        assert all(word.partition(":")[0] in {spec.name for spec in part.outputs} for word in limits(words, "--rtol"))


def limits(words: list[str], flag: str) -> list[str]:
    """What stands behind a flag, up to the next one."""
    behind = words[words.index(flag) + 1 :]
    ends = [place for place, word in enumerate(behind) if word.startswith("--")]
    return behind[: ends[0]] if ends else behind


def test_polygraphy_reads_what_is_written(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    write_polygraphy(Bundle.open(tiny_bundle), tmp_path, ["unet"])
    feeds, outputs = written(tmp_path / "unet")
    theirs = load_json(str(tmp_path / "unet" / "inputs.json"))
    results = RunResults.load(str(tmp_path / "unet" / "outputs.json"))
    assert len(theirs) == len(feeds) and len(results[0][1]) == len(outputs)
    for ours, found in zip((*feeds, *outputs), (*theirs, *results[0][1]), strict=True):
        assert set(ours) == set(found.keys())
        for name, array in ours.items():
            np.testing.assert_array_equal(found[name], array)


def test_every_call_of_a_part_is_written(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny_bundle)
    golden = bundle.part("vae_decoder").golden
    assert golden is not None
    first = polygraphy_files.read_golden(bundle, golden)[0]
    second = tuple({name: array * np.float32(0.5) for name, array in side.items()} for side in first)
    monkeypatch.setattr(polygraphy_files, "read_golden", lambda *words: [first, second])
    write_polygraphy(bundle, tmp_path, ["vae_decoder"])
    feeds, outputs = written(tmp_path / "vae_decoder")
    assert len(feeds) == len(outputs) == 2
    for before, after in ((feeds[0], feeds[1]), (outputs[0], outputs[1])):
        assert before.keys() == after.keys() and all(np.array_equal(before[n] * 0.5, after[n]) for n in before)


def test_limits_are_by_output_and_psnr_has_one_peak() -> None:
    """Polygraphy's peak is the largest value, ours the largest magnitude: -8 to 2 is 12 dB apart."""
    reference = {"a": np.array([-8.0, 2.0], np.float32), "b": np.array([-1.0, 4.0], np.float32)}
    found = {"a": Tolerance(1e-4, 1e-3, 60.0), "b": Tolerance(atol=None, psnr_db=35.0)}
    words = command("onnx", Path("m.onnx"), Path("f"), [reference], found)
    assert limits(words, "--compare") == ["simple", "psnr"]
    assert limits(words, "--atol") == ["a:0.0001", "b:inf"] and limits(words, "--rtol") == ["a:0.001", "b:0"]
    psnr = dict(word.split(":") for word in limits(words, "--psnr-threshold"))
    assert float(psnr["a"]) == pytest.approx(60 + 20 * math.log10(2 / 8)) and float(psnr["b"]) == 35
    alone = command("onnx", Path("m.onnx"), Path("f"), [reference], {"a": found["b"], "b": found["b"]})
    assert limits(alone, "--compare") == ["psnr"] and "--atol" not in alone
    plain = command("tensorrt", Path("m.plan"), Path("f"), [reference], {"a": Tolerance(1e-4), "b": Tolerance(1e-3)})
    assert limits(plain, "--compare") == ["simple"] and "--psnr-threshold" not in plain
    assert plain[3:6] == ["--trt", "--model-type", "engine"]


def test_what_cannot_be_written_is_told(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(ConfigError, match="unknown part 'unit'"):
        write_polygraphy(bundle, tmp_path / "out", ["unit"])
    (tmp_path / "taken").write_text("x")
    for taken in (tmp_path, tmp_path / "taken"):
        with pytest.raises(ConfigError, match="is taken; name a folder that is empty or not there"):
            write_polygraphy(bundle, taken)
    foreign = replace(bundle, manifest=replace(bundle.manifest, target="coreml"))
    with pytest.raises(UnsupportedError, match="Polygraphy runs bundles of onnx and tensorrt; this one is coreml"):
        write_polygraphy(foreign, tmp_path / "out")
    bare = tuple(replace(part, golden=None) for part in bundle.manifest.parts)
    told = write_polygraphy(replace(bundle, manifest=replace(bundle.manifest, parts=bare)), tmp_path / "out", ["unet"])
    assert told[0].command == "" and "--no-verify" in told[0].reason
    assert main(["verify", str(tiny_bundle), "--polygraphy", str(tmp_path / "out"), "--engine", "onnxruntime"]) == 2


def checked(words: str) -> subprocess.CompletedProcess[str]:
    """What the command that `verify` printed says, run as it is."""
    tool = Path(sys.executable).with_name("polygraphy")
    return subprocess.run([str(tool), *shlex.split(words)[1:]], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_polygraphy_passes_a_sound_bundle_and_fails_a_mutant(
    precision: str, tmp_path: Path, command: Command, graphs_folder: Path
) -> None:
    pytest.importorskip("polygraphy")
    bundle, out = tmp_path / "emoji", tmp_path / "vectors"
    words = ["export", "emoji", "--to", "onnx", "--precision", precision, "-o", str(bundle)]
    assert main([*words, "--cache", str(graphs_folder), "--quiet"]) == 0
    printed = {
        entry["part"]: entry["command"] for entry in command("verify", bundle, "--polygraphy", out)["polygraphy"]
    }
    assert list(printed) == ["text_encoder", "unet", "vae_encoder", "vae_decoder"]
    for part, line in printed.items():
        done = checked(line)
        assert done.returncode == 0 and "PASSED" in done.stdout, f"{part}: {done.stdout[-2000:]}"
    # a mutant: every weight of the U-Net a tenth smaller, as a wrong scale would have it
    data = bundle / "unet" / "model.onnx_data"
    kind = np.float32 if precision == "fp32" else np.float16
    shutil.copy(data, tmp_path / "sound")
    (np.fromfile(data, kind) * kind(0.9)).tofile(data)
    done = checked(printed["unet"])
    assert done.returncode != 0 and "FAILED" in done.stdout
    shutil.copy(tmp_path / "sound", data)
    assert checked(printed["unet"]).returncode == 0
