"""run: draw pictures with a bundle (or, if torch is installed, with a diffusers folder), or with several in turn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffship.cli import partition
from diffship.cli.flags import add_engine, add_load_options, add_request, names, setting, split
from diffship.cli.output import Result
from diffship.cli.places import FIELDS, add_overwrite, require_file_place, require_picture_place
from diffship.core.distributed import first_process
from diffship.core.errors import ConfigError

EXAMPLES = """examples:
  diffship run out/emoji "red apple" --steps 25 --seed 1 --images 4 -o out/pictures
  diffship run out/emoji --prompts-file docs/demo-prompts.txt --grid out/grid.png -o out/pictures
  diffship run out/emoji "black cat" --engine openvino --size 128 --sampler euler -o out/cat.png
  diffship run path/to/model.safetensors "red apple" --steps 20 -o out/apple.png
  diffship run out/small "red apple" --large out/emoji --split 10,15 -o out/apple.png
  diffship run out/small "red apple" --cloud http://127.0.0.1:8765 --split 10,15 -o out/apple.png
  diffship run out/emoji "green apple" --image out/apple.png --strength 0.7 -o out/green.png
  diffship run out/emoji "red apple" --sampler euler -o 'out/{prompt}-{seed}-{sampler}.png'
  diffship run out/emoji "a (red:1.3) apple" --prompt-syntax a1111 -o out/apple.png
  diffship run out/emoji --like out/apple.png -o out/again.png
  diffship run out/tiny-2 "red apple" --devices cpu,cpu --auto --fidelity 30 -o out/apple.png
  torchrun --nproc-per-node 2 -m diffship run out/tiny-2 "red apple" --stride 1 --warm-up 3 -o out/apple.png
"""
EXAMPLES += "\nfields of a template:\n" + "\n".join(f"  {name:<9} {what}" for name, what in FIELDS.items()) + "\n"
_CLOUD_FLAGS = ("cloud_model", "token_file", "deadline", "budget", "quality_curve", "profile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        metavar="DIR",
        nargs="?",
        help="a bundle; where torch is there, a diffusers folder or .safetensors file too",
    )
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", default=[], help="what to draw")
    parser.add_argument(
        "--prompts-file", metavar="FILE", type=Path, help="one prompt a line, - for stdin; a comment is '# ...'"
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", type=Path, default=Path("out"), help="folder, .png file, or template (below)"
    )
    add_overwrite(parser, "pictures, grid and trajectory")
    parser.add_argument("--grid", metavar="FILE", type=Path, help="also write one picture with all of them, labelled")
    parser.add_argument(
        "--save-trajectory", metavar="FILE", type=Path, help="keep the state after every step (one picture)"
    )
    parser.add_argument(
        "--resume", metavar="FILE", type=Path, help="go on from such a file; it knows prompt and settings"
    )
    parser.add_argument(
        "--like", metavar="FILE", type=Path, help="take the settings of a PNG; other flags and prompts win over them"
    )
    parser.set_defaults(liked=None, first_image=None)
    parser.add_argument("--no-metadata", action="store_true", help="leave the settings out of the PNG files")
    picture = add_request(parser)
    picture.add_argument("--images", metavar="N", type=int, help="pictures per prompt (default: 1)")
    picture.add_argument("--image", metavar="FILE", type=Path, help="picture to begin with; with --mask, to fill in")
    picture.add_argument("--mask", metavar="FILE", type=Path, help="white where to draw; elsewhere --image stays")
    picture.add_argument(
        "--strength", metavar="X", type=float, help="share of noise over --image, 0 to 1 (default: the model's)"
    )
    picture.add_argument(
        "--lora",
        metavar="FILE[:X]",
        action="append",
        default=[],
        help="add a LoRA, weighted (torch); repeat",
    )
    picture.add_argument(
        "--embedding", metavar="[WORD=]FILE", action="append", default=[], help="a textual inversion (torch); repeat"
    )
    picture.add_argument("--hires", metavar="SCALE", type=float, help="enlarge the picture so and draw on from it")
    picture.add_argument(
        "--hires-strength", metavar="X", type=float, help="share of noise of that second pass (default: 0.5)"
    )
    _add_control(parser)
    _add_models(parser)
    _add_cloud(parser)
    partition.add_arguments(parser)
    source = parser.add_argument_group("a source in place of a bundle, drawn with by torch")
    source.add_argument("--base", metavar="SOURCE", help="supplies the parts that DIR lacks")
    add_load_options(source)
    engine = add_engine(parser)
    engine.add_argument("--engines", metavar="A,B", type=names, help="one per model, in the order of --split")
    engine.add_argument("--memory", choices=("normal", "low"), help="low: one part at a time, tiles")


def _add_control(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ControlNets (bundles that were exported with --controlnet NAME=SOURCE)")
    group.add_argument(
        "--control", metavar=("NAME", "IMAGE"), nargs=2, action="append", default=[],
        help="a ControlNet and the picture that it sees (edges, depth, ...); repeat for several",
    )  # fmt: skip
    for flag, what in (("scale", "weight (default: 1)"), ("start", "share of the calls before it acts (0)"),
                       ("end", "share of the calls after which it stops (1)")):  # fmt: skip
        group.add_argument(
            f"--control-{flag}", metavar="X", type=float, action="append", default=[],
            help=f"{what}; one for all, or one for each --control in order",
        )  # fmt: skip
    group.add_argument("--guess", action="store_true", help="they act on the prompt alone: a picture without a prompt")


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several models for one picture")
    group.add_argument("--large", metavar="DIR", help="draws the first steps, the positional DIR the last ones")
    group.add_argument("--models", metavar="DIR", nargs="+", help="in place of DIR: in the order of their steps")
    group.add_argument("--split", metavar="A,B", type=split, help="model calls of each; together the number of steps")
    group.add_argument(
        "--shared-latents", action="store_true", help="the VAEs differ and their latents are the same (a tiny VAE)"
    )


def _add_cloud(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a server draws the first steps, DIR the last ones")
    group.add_argument("--cloud", metavar="URL", help="a diffship server; --split CLOUD,HERE or --split auto")
    group.add_argument("--cloud-model", metavar="NAME", help="one of its models (default: its first)")
    group.add_argument("--token-file", metavar="FILE", type=Path, help="holds the server's token (or DIFFSHIP_TOKEN)")
    group.add_argument("--deadline", metavar="S", type=float, help="seconds a picture may take (default: 60)")
    group.add_argument(
        "--budget",
        metavar="KEY=X",
        type=setting,
        action="append",
        default=[],
        help="for --split auto: cloud-ms=X, quality=X or latency=SECONDS; repeat for several",
    )
    group.add_argument("--quality-curve", metavar="FILE", type=Path, help="judge figures by split, for quality=X")
    group.add_argument("--profile", metavar="FILE", type=Path, help="keeps what --split auto measured, for next time")


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known without loading an engine."""


def run(options: argparse.Namespace) -> Result:
    require_picture_place(options.output, "-o")
    if partition.asked(options):
        partition.check(options)
        if not first_process():
            partition.follow(options)
            raise SystemExit(0)  # the first process has the pictures, and tells of them
        partition.continued(options)
    for flag, file in (("--grid", options.grid), ("--save-trajectory", options.save_trajectory)):
        if file is not None:
            require_file_place(file, flag)
    if options.models and options.bundle is not None:  # with --models the first word is a prompt
        options.prompts, options.bundle = [options.bundle, *options.prompts], None
    if options.like is not None:
        from diffship.cli.like import fill

        fill(options)
    if options.cloud is not None:
        from diffship.cli.hybrid import draw as draw_hybrid

        return draw_hybrid(options)
    stray = [f"--{name.replace('_', '-')}" for name in _CLOUD_FLAGS if getattr(options, name) not in (None, [])]
    if stray:
        raise ConfigError(f"{', '.join(stray)} means nothing without --cloud URL")
    if options.auto:
        from diffship.cli.auto import draw as draw_auto

        return draw_auto(options)
    from diffship.cli.drawing import draw

    return draw(options)
