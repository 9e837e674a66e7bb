from __future__ import annotations

from dataclasses import replace

import pytest

from diffship.core.errors import BundleError
from diffship.core.manifest import Manifest, Part, parse_manifest
from diffship.core.spec import TensorSpec
from diffship.core.staging import Staging, clients_text
from diffship.models.sources.arch_configs import SCHEDULERS

PLANE = ("batch_size", 4, "height", "width")


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape or PLANE)


def part(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Part:
    return Part(name, (f"{name}/model.onnx",), inputs, outputs, "fp32", "0" * 64)


TIME = spec("timestep", "batch_size")
FIRST = part("unet.0", (spec("sample"), TIME), (spec("mid.out"), spec("skip.out")))
LAST = part("unet.1", (spec("mid.out"), spec("skip.out"), TIME, spec("words")), (spec("out_sample"),))
STAGING = Staging("unet", ("unet.0", "unet.1"), (0, 1), "speed", ("mid_block",), (3, 4))


def manifest(staging: Staging | None, *parts: Part) -> Manifest:
    from diffship.core.family import Family

    return Manifest("onnx", Family("sd"), parts or (FIRST, LAST), dict(SCHEDULERS["sd15"]), staging=staging)


def test_a_manifest_keeps_its_stages_and_says_nothing_of_them_without() -> None:
    made = manifest(STAGING)
    assert parse_manifest(made.to_bytes()) == made
    assert "staging" not in manifest(None).to_json()
    assert STAGING.devices == 2
    ports = {each.name: (each.inputs, each.outputs) for each in (FIRST, LAST)}
    assert [each.name for each in STAGING.inputs(ports)] == ["sample", "timestep", "words"]
    assert [each.name for each in STAGING.outputs(ports)] == ["out_sample"]
    assert "unet.0, unet.1" in clients_text(STAGING) and "optimum" in clients_text(STAGING)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"part": "unet.0"}, "unet.0 is cut into stages, and is a part"),
        ({"stages": ("unet.0", "unet.7")}, "has no part 'unet.7'"),
        ({"stages": ("unet.0", "unet.0")}, "of different names"),
        ({"stages": (), "homes": ()}, "has 0 stages"),
        ({"homes": (0, 2)}, r"cannot stand on devices \[0, 2\]"),
        ({"homes": (1, 0)}, r"cannot stand on devices \[1, 0\]"),
        ({"homes": (0,)}, r"cannot stand on devices \[0\]"),
        ({"macs": (1,)}, "1 costs are given for 2 stages"),
        ({"homes": (0, -1)}, "homes"),
    ],
)
def test_stages_that_do_not_fit_are_refused(change: dict[str, object], why: str) -> None:
    table = manifest(STAGING).to_bytes()
    with pytest.raises(Exception, match=why):
        manifest(replace(STAGING, **change))  # type: ignore[arg-type]
    assert table


def test_boundary_tensors_that_do_not_fit_are_refused() -> None:
    wide = part("unet.1", (spec("mid.out", "batch_size", 8, "height", "width"), TIME), (spec("out_sample"),))
    with pytest.raises(BundleError, match=r"takes .*another shape"):
        manifest(STAGING, FIRST, wide)
    with pytest.raises(BundleError, match=r"unet\.1 writes 'mid\.out', which a stage before it writes"):
        manifest(STAGING, FIRST, part("unet.1", LAST.inputs, (spec("mid.out"),)))
