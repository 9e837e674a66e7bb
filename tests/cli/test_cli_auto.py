"""run --auto: the way that is taken is the one that is drawn, and its fidelity is that of the files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
jsonschema = pytest.importorskip("jsonschema")

from diffship.cli import auto, partition  # noqa: E402
from diffship.runtimes.partition.forecast import Link, PartitionProfile  # noqa: E402

Command = Callable[..., dict[str, Any]]
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "schema" / "run.json").read_text(encoding="utf-8"))
WORDS = ("a cat", "red apple", "--steps", "6", "--size", "64")
FOUR = ("--devices", "cpu,cpu,cpu,cpu", "--option", "threads=1")


def pixels(document: dict[str, Any]) -> list[Any]:
    assert document["exit_code"] == 0, document["stderr"]
    return [np.asarray(Image.open(entry["file"]), np.float64) for entry in document["pictures"]]


def equal_devices(monkeypatch: pytest.MonkeyPatch, stages: int = 2) -> list[PartitionProfile]:
    """Figures of devices that are really apart, in the place of those of this machine; what was measured is kept."""
    kept, measure = [], auto.measure_profile

    def measured(*args: Any, **more: Any) -> PartitionProfile:
        kept.append(made := measure(*args, **more))
        whole, half = (tuple(((cost,) * stages,) * len(made.devices)) for cost in (0.2, 0.15))
        return replace(made, whole=whole, half=half, crowd=(1.0,) * len(made.devices), link=Link())

    monkeypatch.setattr(auto, "measure_profile", measured)
    return kept


@pytest.mark.slow
def test_the_way_taken_is_drawn_and_its_fidelity_is_that_of_the_files(
    command: Command, staged_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(name: str, *flags: object) -> dict[str, Any]:
        return command("run", staged_bundle, *WORDS, *flags, "-o", tmp_path / name)

    plain = pixels(draw("plain"))
    measured = equal_devices(monkeypatch)
    stale = draw("auto", *FOUR, "--auto", "--fidelity", 1)
    jsonschema.validate({key: value for key, value in stale.items() if key not in ("exit_code", "stderr")}, SCHEMA)
    sharing, taken = stale["sharing"], stale["sharing"]["taken"]
    (profile,) = measured
    assert all(cost > 0 for row in (*profile.whole, *profile.half) for cost in row) and profile.link.seconds > 0
    # PNDM makes seven calls of six steps: one exact, then three rounds of two on three devices
    assert sharing["calls"] == 7 and (taken["stages"], taken["stride"], taken["warm_up"]) == (2, 2, 1)
    drawing = 2 * 0.2 + 3 * 0.2
    assert taken["predicted_seconds"] == pytest.approx(
        profile.begin + drawing + 7 * profile.rest + profile.end, abs=1e-5
    )
    opened = partition._models

    def slowly(*args: Any) -> Any:
        time.sleep(1.0)
        return opened(*args)

    monkeypatch.setattr(partition, "_models", slowly)  # loading, and not drawing
    by_hand = draw("hand", "--stride", 2, "--warm-up", 1, "--devices", "cpu,cpu,cpu", "--option", "threads=1")
    assert by_hand["load_seconds"] > 1.0 and 2 * by_hand["picture_seconds"] < by_hand["seconds"] - 1.0
    found = pixels(stale)
    assert all(np.array_equal(one, other) for one, other in zip(found, pixels(by_hand), strict=True))
    errors = [np.mean((one - other) ** 2) for one, other in zip(found, plain, strict=True)]
    assert taken["fidelity_db"] == pytest.approx(10 * math.log10(255**2 / max(errors)), abs=0.02)

    exact = draw("exact", *FOUR, "--auto", "--fidelity", 200)
    taken = exact["sharing"]["taken"]
    assert taken["exact"] and taken["halves"] == 2 and taken["devices"] == 2
    assert {each["why_not"] for each in exact["sharing"]["candidates"]} == {None, "slower", "below 200 dB"}
    assert max(np.abs(one - other).max() for one, other in zip(pixels(exact), plain, strict=True)) <= 1


@pytest.mark.slow
def test_a_bundle_that_is_one_part_may_share_its_halves_and_one_device_is_a_plain_run(
    command: Command, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(name: str, *flags: object) -> dict[str, Any]:
        words = "a cat", "--steps", 3, "--size", 64, "--sampler", "ddim"
        return command("run", tiny_bundle, *words, *flags, "-o", tmp_path / f"{name}.png")

    alone = draw("alone", "--devices", "cpu", "--auto")
    assert alone["sharing"]["taken"]["way"] == "one device" and len(alone["sharing"]["candidates"]) == 1
    plain = pixels(draw("plain"))
    assert all(np.array_equal(one, other) for one, other in zip(pixels(alone), plain, strict=True))
    unguided = draw("unguided", "--devices", "cpu,cpu", "--auto", "--guidance", 1, "--fidelity", 200)
    assert all(each["halves"] == 1 for each in unguided["sharing"]["candidates"])
    equal_devices(monkeypatch, stages=1)
    ahead = draw("ahead", "--devices", "cpu,cpu", "--auto", "--fidelity", 1)
    assert (ahead["sharing"]["taken"]["stages"], ahead["sharing"]["taken"]["stride"]) == (1, 2)
    assert not np.array_equal(pixels(ahead)[0], plain[0])
    monkeypatch.setattr(auto, "free_bytes", lambda name: 1000)
    refused = draw("refused", "--devices", "cpu,cpu", "--auto")
    assert refused["exit_code"] == 3 and "cpu has 1.0 kB. Without --auto" in refused["stderr"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--auto",), "--auto needs --devices"),
        (("--fidelity", "30", "--devices", "cpu,cpu"), "--fidelity is the floor of --auto"),
        (("--auto", "--devices", "cpu,cpu", "--stride", "2"), "--auto settles --stride"),
        (("--auto", "--devices", "cpu,cpu", "--cfg-parallel"), "--auto settles --cfg-parallel"),
        (("--auto", "--devices", "cpu,cpu", "--hires", "2"), "does not go with --hires"),
        (("--auto", "--devices", "cpu,cpu", "--fidelity", "-3"), "--fidelity is -3"),
        (("--auto", "--devices", "cpu,cpu", "--fidelity", "nan"), "--fidelity is nan"),
        # 0 and nothing are values
        (("--fidelity", "0"), "--fidelity is the floor of --auto"),
        (("--auto", "--devices", "cpu,cpu", "--warm-up", "0"), "--auto settles --warm-up"),
        (("--auto", "--devices", "cpu,cpu", "--deadline", "5"), "--deadline means nothing without --cloud"),
        (("--devices", ","), "--devices names no device"),
        (("--auto", "--devices", ","), "--devices names no device"),
        (("--auto", "--devices", "cpu,cpu"), "a partitioned run takes a bundle"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(
    flags: tuple[str, ...], why: str, command: Command, tmp_path: Path
) -> None:
    found = command("run", tmp_path, "a cat", *flags)
    assert found["exit_code"] == 2 and why in found["stderr"]


def test_processes_do_not_measure(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    found = command("run", tmp_path, "a cat", "--devices", "cpu,cpu", "--auto")
    assert found["exit_code"] == 2 and "run it without torchrun" in found["stderr"]
