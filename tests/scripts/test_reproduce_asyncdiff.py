"""A command of docs/reproduce/asyncdiff.md as it is printed, on a model that fits a test."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prove.capabilities import missing
from prove.published import read_pages

pytest.importorskip("torch")

SOURCE, STEPS = "stable-diffusion-v1-5/stable-diffusion-v1-5", "4"


def printed(title: str) -> tuple[list[str], list[str]]:
    """The two commands under a title of the page, in words: what exports, and what draws."""
    (page,) = (page for page in read_pages() if page.name == "asyncdiff")
    (entry,) = (entry for entry in page.command if entry.title.startswith(title))
    assert missing(entry.needs) == []
    export, draw = (shlex.split(line) for line in entry.ours.replace("\\\n", " ").strip().splitlines())
    return export, draw


def instead(words: list[str], **values: object) -> list[str]:
    """The words with other values after some flags: `steps="4"` is `--steps 4`."""
    found = list(words)
    for flag, value in values.items():
        found[found.index(f"--{flag.replace('_', '-')}" if len(flag) > 1 else f"-{flag}") + 1] = str(value)
    return found


@pytest.mark.slow
def test_three_components_at_stride_two_run_in_four_processes(
    command: Callable[..., dict[str, Any]], graphs_folder: Path, tmp_path: Path
) -> None:
    export, draw = printed("SD 2.1 or 1.5 on four devices")
    assert export[:3] == ["diffship", "export", SOURCE] and draw[:3] == ["torchrun", "--nproc-per-node", "4"]
    bundle, out = tmp_path / "tiny-3", tmp_path / "kitten.png"
    words = instead(["arch:tiny-sd", *export[3:]], o=bundle)
    made = command("export", *words, "--cache", graphs_folder, "--quiet")
    assert made["exit_code"] == 0, made["stderr"]

    words = instead(draw[draw.index("run") + 1 :], o=out, steps=STEPS, warm_up=2)[1:]
    head = [sys.executable, "-m", "torch.distributed.run", *draw[1:3], "-m", "diffship", "run", str(bundle)]
    ran = subprocess.run(
        [*head, *words, "--size", "64"],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    alone = command("run", bundle, *instead(words, o=tmp_path / "alone.png"), "--size", 64)
    assert alone["exit_code"] == 0, alone["stderr"]
    plain = command("run", bundle, words[0], "--steps", STEPS, "--seed", 20, "--size", 64, "-o", tmp_path / "plain.png")
    assert plain["exit_code"] == 0
    four, one, exact = (np.asarray(Image.open(tmp_path / name)) for name in ("kitten.png", "alone.png", "plain.png"))
    assert np.array_equal(four, one) and not np.array_equal(four, exact)
