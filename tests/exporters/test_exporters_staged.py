"""Bundles of stages: each stage proved on what it meets in use, all of them together the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError, ParityError, UnsupportedError
from diffship.core.job import Job
from diffship.core.weights import MemoryWeights
from diffship.export import export
from diffship.exporters.staged import find_staging, references
from diffship.models.pipeline import Pipeline
from diffship.models.walks.cuts import Cuts, partition
from diffship.runtimes.engines.model import BundleModel
from diffship.runtimes.partition.staged import placement_of
from diffship.runtimes.proof.verify import read_golden

Command = Callable[..., dict[str, Any]]


@pytest.mark.slow
def test_a_bundle_of_stages_computes_what_the_whole_computes(
    staged_bundle: Path, tiny_bundle: Path, tiny_sd: Pipeline
) -> None:
    sizes = {"batch_size": 2, "height": 16, "width": 8, "sequence_length": 9}
    feeds = tiny_sd.denoiser.example(5, sizes)
    expected = tiny_sd.denoiser.load().run(feeds)["out_sample"]
    with BundleModel(Bundle.open(staged_bundle)) as model, BundleModel(Bundle.open(tiny_bundle)) as other:
        staged, whole = model.use("unet"), other.use("unet")
        assert [spec.name for spec in staged.inputs] == [spec.name for spec in whole.inputs]
        kept = {**feeds, "encoder_hidden_states": staged.put(feeds["encoder_hidden_states"])}
        found, same = staged.run(kept)["out_sample"], whole.run(feeds)["out_sample"]
        assert np.abs(found - expected).max() < 1e-4 and np.abs(found - same).max() < 1e-5
        model.release("unet")
        assert not model._runners


@pytest.mark.slow
def test_stages_are_proved_on_what_the_stages_before_them_give(staged_bundle: Path, tiny_sd: Pipeline) -> None:
    """References of the last stage, against the whole in torch on the very feeds of a whole's proof."""
    bundle = Bundle.open(staged_bundle)
    staging = bundle.manifest.staging
    assert staging is not None and all(part.proof["status"] == "proved" for part in bundle.manifest.parts)
    assert [link.tensors for link in placement_of(bundle).links(dict.fromkeys(placement_of(bundle).writer, 1))]
    part = bundle.part("unet.1")
    assert part.golden is not None and part.golden.blocks is not None
    _, whole_feeds = references(tiny_sd, None, 1 << 30)
    for feeds, (_, outputs) in zip(
        whole_feeds.calls(tiny_sd.denoiser, part.golden.sizes), read_golden(bundle, part.golden), strict=True
    ):
        expected = tiny_sd.denoiser.load().run(feeds)["out_sample"]
        assert np.abs(outputs["out_sample"] - expected).max() < 1e-5
    # three stages do the work of two, and embed the timestep once more: two rows through 16 x 64 and 64 x 64
    assert sum(find_staging(tiny_sd, 3, "memory").macs) - sum(staging.macs) == 2 * (16 * 64 + 64 * 64)


@pytest.mark.slow
def test_run_verify_and_inspect_know_a_bundle_of_stages(
    command: Command, staged_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    words = ("a cat", "--steps", 3, "--size", 64)
    pictures = [
        command("run", bundle, *words, "-o", tmp_path / f"{name}.png")["pictures"][0]["file"]
        for name, bundle in (("staged", staged_bundle), ("whole", tiny_bundle))
    ]
    from PIL import Image

    first, second = (np.asarray(Image.open(file), np.int16) for file in pictures)
    assert first.std() > 1 and np.abs(first - second).max() <= 1
    found = command("verify", staged_bundle, "--parts", "unet.0,unet.1")
    assert found["passed"] and [part["part"] for part in found["parts"]] == ["unet.0", "unet.1"]
    assert command("inspect", staged_bundle)["staging"]["homes"] == [0, 1]
    placed = command("inspect", staged_bundle, "--placement", "--warm-up", 2)
    source = command("inspect", "arch:tiny-sd", "--placement", "--warm-up", 2, "--cut", "speed")
    same = ("cut_after", "homes", "links", "bytes_per_round", "speed_up")
    assert [placed[key] for key in same] == [source[key] for key in same]
    assert command("inspect", staged_bundle, "--placement", "--stages", 3)["exit_code"] == 2
    assert "--stages 2" in command("inspect", tiny_bundle, "--placement")["stderr"]
    assert "optimum" in (staged_bundle / "README.md").read_text()


@pytest.mark.slow
def test_a_stage_that_computes_something_else_is_refused(
    staged_bundle: Path, graphs_folder: Path, tiny_sd: Pipeline, tmp_path: Path
) -> None:
    whole = tiny_sd.denoiser
    values = {name: np.array(whole.weights.read(name)) for name in whole.weights.names()}
    values["up_blocks.3.resnets.1.conv1.weight"] *= np.float32(1.02)  # of the second stage
    odd = tiny_sd.having(replace(whole, weights=MemoryWeights(values)))
    with pytest.raises(ParityError, match=r"unet\.1"):
        made_before = Job(graphs_folder)
        export(odd, out=tmp_path / "b", parts=["unet"], stages=2, cut="speed", against=tiny_sd, job=made_before)
    assert not (tmp_path / "b").exists()


def test_stages_that_cannot_be_exported_are_refused_before_any_work(tiny_sd: Pipeline, tmp_path: Path) -> None:
    place = tmp_path / "b"
    for options, error, why in (
        ({"stages": 1}, ConfigError, "stages is 1; legal: 2 or more"),
        ({"cut": "speed"}, ConfigError, "no stages are asked for; add --stages N"),
        ({"stages": 2, "trajectory": 2}, ConfigError, "no golden trajectory"),
        ({"stages": 2, "parts": ["vae_decoder"]}, ConfigError, "stages are cut from unet, and it is not exported"),
        ({"stages": 9, "cut": "published"}, ConfigError, "published for sd15: 2, 3, 4"),
        ({"stages": 2, "to": "tensorrt"}, UnsupportedError, "not built for tensorrt;"),
    ):
        with pytest.raises(error, match=why):
            export(tiny_sd, out=place, **options)  # type: ignore[arg-type]
    assert not place.exists()


@pytest.mark.slow
def test_a_cut_read_from_a_manifest_is_the_cut_that_was_made(tiny_sd: Pipeline) -> None:
    staging = find_staging(tiny_sd, 3)
    again = partition(tiny_sd.denoiser, Cuts(staging.after, staging.homes))
    assert [stage.name for stage in again] == list(staging.stages) and staging.cut == "published"
