"""optimum's ORT pipelines open our bundle and draw the picture that ours draws.

optimum pins an older transformers, so it lives in its own environment: `make venv-optimum` makes `.venv-optimum`, or
DIFFSHIP_OPTIMUM_PYTHON names another interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).with_name("optimum_client.py")


def _python() -> str:
    named = os.environ.get("DIFFSHIP_OPTIMUM_PYTHON")
    path = Path(named) if named else ROOT / ".venv-optimum" / "bin" / "python"
    if not path.exists():
        pytest.skip(f"no interpreter with optimum at {path}: make venv-optimum")
    return str(path)


@pytest.mark.parametrize(("source", "size"), [("arch:tiny-sd", 64), ("emoji", 128)])
def test_optimum_draws_the_same_picture(source: str, size: int, tmp_path: Path) -> None:
    python = _python()
    import diffship
    from diffship.export import export
    from diffship.sampling.generate import Request

    export(source, to="onnx", out=tmp_path / "bundle", verify=False)
    latents = np.random.default_rng(0).standard_normal((1, 4, size // 8, size // 8)).astype(np.float32)
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    asked = {"prompt": "a red apple", "steps": 4, "guidance": 5.0, "size": size}
    files = {"latents": str(tmp_path / "latents.safetensors"), "out": str(tmp_path / "theirs.safetensors")}
    done = subprocess.run(
        [python, str(CLIENT), str(tmp_path / "bundle"), json.dumps({**asked, **files})],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["class"] == "ORTStableDiffusionPipeline"
    theirs = load_file(tmp_path / "theirs.safetensors")["images"][0]
    request = Request(prompt="a red apple", steps=4, guidance=5.0, size=(size, size), latents=latents)
    with diffship.open_model(tmp_path / "bundle") as model:
        ours = diffship.generate(model, request)[0].pixels.astype(np.float32) / 255
    # Ours is rounded to 8 bits; round theirs the same way, so that only a real difference counts.
    error = np.square(np.round(theirs * 255) / 255 - ours).mean()
    assert 10 * np.log10(1 / max(error, 1e-12)) >= 60
