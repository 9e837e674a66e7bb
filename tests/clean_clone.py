"""A clean clone with an environment of its own, and processes that find nothing else: what a new user has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAMPS = (".made", ".torch", ".runs", ".tests")


def clean_clone(folder: Path) -> Path:
    """`folder` with every tracked file and a `.venv` into which pip has installed it, as `make demo` does.

    Dependencies are not installed again: numpy, torch and the like are found where the tests have them.
    """
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, timeout=30)
    if done.returncode or not done.stdout:
        pytest.skip("not a git checkout")
    for name in done.stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    made = folder / ".venv"
    venv.create(made, symlinks=os.name != "nt")
    places = sysconfig.get_paths("venv", {"base": str(made), "platbase": str(made)})
    Path(places["purelib"], "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    install = "install -q --no-deps --no-build-isolation --ignore-installed --no-index -e .".split()
    outside(folder, sys.executable, "-m", "pip", "--python", str(Path(places["scripts"], "python")), *install)
    torchrun = Path(places["scripts"], "torchrun")  # a command of torch's, which pip would have written
    torchrun.write_text(
        f"#!{places['scripts']}/python\nfrom torch.distributed.run import main\n\nmain()\n", encoding="utf-8"
    )
    torchrun.chmod(0o755)
    for stamp in STAMPS:  # so that make installs nothing again
        (made / stamp).touch()
    return folder


def outside(folder: Path, *words: str) -> str:
    """stdout of a process in `folder` that finds neither this checkout nor this environment by itself."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    places = [place for place in kept["PATH"].split(os.pathsep) if not list(Path(place).glob("diffship*"))]
    environment = {**kept, "PATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
