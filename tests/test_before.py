"""What was written before a model's kind became an object: a bundle, kept results and scores, a training's checkpoint.

The files in `before/` are the bytes of commit ddab0ee, and the names of what it kept are written here. A change that
loses one of them costs a user hours: it must be refused with the command that renews it, and noted in CHANGELOG.
Names of kept results hold the version on purpose, so the tests set that of then. Trajectories of before (schema 2) are
in `sampling/test_sampling_wire.py`, and a bundle of schema 1 in `core/test_core_manifest.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffship.compression import measure as measuring
from diffship.compression import stored, trained
from diffship.compression.distill import DistillPass
from diffship.compression.interior import RESIDUAL, layers
from diffship.compression.layout import LayoutPass
from diffship.compression.measure import Drawing, measure
from diffship.compression.stored import Results
from diffship.compression.trained import run_key
from diffship.core.job import Job
from diffship.core.manifest import parse_manifest
from diffship.core.precision import precision_of
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.training.loop import Schedule, train

BEFORE = Path(__file__).parent / "before"
VERSION = "0.1.0"


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return open_source("arch:tiny-sd")


def test_a_bundle_of_before_is_what_an_export_says_today() -> None:
    data = (BEFORE / "bundle.json").read_bytes()
    manifest, source = parse_manifest(data), open_source("arch:tiny-sdxl")
    assert manifest.to_bytes() == data
    assert (manifest.family, dict(manifest.sampler)) == (source.family, source.scheduler)
    assert [part.name for part in manifest.parts] == list(source.components)
    for part in manifest.parts:
        now, port = source.components[part.name], precision_of(part.precision).port
        assert part.source_digest == now.digest
        assert part.inputs == tuple(map(port, now.inputs)) and part.outputs == tuple(map(port, now.outputs))


def test_results_and_runs_of_before_are_found(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stored, trained):
        monkeypatch.setattr(module, "__version__", VERSION)
    assert Results(tiny, [LayoutPass("bk-tiny")], Job()).names == (
        "result-layout-3fee3e2cac7e1878b5cfce17393236dfc13543f2",
    )
    digests = {"teacher_digest": "1" * 64, "data_digest": "2" * 64}
    assert run_key(DistillPass("data"), ("data", "teacher"), 64, tiny, tiny, digests) == (
        "9680233141c6d4018225306554c62fde6a1825cd"
    )


@pytest.mark.slow
def test_scores_of_before_are_not_measured_again(
    tiny: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "__version__", VERSION)
    monkeypatch.setattr(measuring, "denoise", None)  # nothing is drawn
    shutil.copytree(BEFORE / "scores", tmp_path / "job")
    layer = [one for one in layers(tiny.denoiser, feedforward=True) if one.kind == RESIDUAL][-1]
    drawing = Drawing(("red apple", "black cat", "a tree"), steps=2, guidance=3.0, seed=5, batch=2)
    table = measure(tiny, [layer], {layer.name: (layer.kept(0.5),)}, drawing, Job(tmp_path / "job"))
    (file,) = (file for file in (BEFORE / "scores").iterdir() if file.stat().st_size < 100)
    (shift,) = table.layers[0].shifts
    assert [shift.mean, shift.std, shift.score] == json.loads(file.read_text(encoding="utf-8"))


class Line:
    """Fit y = 3x by a small network, as the run that wrote the checkpoint did."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.modules = {"net": self.net}

    def loss(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(batch, 1, generator=generator)
        return (self.net(x) - 3 * x).square().mean(), {}


def test_a_training_of_before_goes_on_to_the_weights_of_before(tmp_path: Path) -> None:
    """`weights.json` are those of 8 steps without a break; the checkpoint is that of step 4."""
    shutil.copy(BEFORE / "state.safetensors", tmp_path)
    task = Line()
    assert train(task, Schedule(steps=8, batch=4, rate=1e-2, warmup=2, decay=3, ema=0.9), tmp_path) == 8
    found = torch.cat([value.detach().flatten() for value in task.net.parameters()])
    np.testing.assert_allclose(found, json.loads((BEFORE / "weights.json").read_text()), rtol=1e-4, atol=1e-6)
