"""Requests with ControlNets: what `generate` draws of them bit for bit, who shares a call, and what is refused."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sampling_toy import WIDTH, ToyModel, ToyRunner, unet
from serve_toy import Bench, ask, toy_service

from diffship.core.kind import CONTROL_IMAGE, CONTROLNET, RESIDUAL
from diffship.runtimes.serve.forms import ControlForm, GenerateForm, json_schema
from diffship.runtimes.serve.worker import Served, Worker
from diffship.sampling.control import Control
from diffship.sampling.generate import Request, generate
from diffship.sampling.wire import pack, unpack

PICTURES = [np.random.default_rng(seed).integers(0, 256, (64, 128, 3), np.uint8) for seed in (1, 2)]
ASKED: dict[str, Any] = {"prompt": "red cat", "steps": 4, "seed": 7, "guidance": 6.0}


class ControlledToy(ToyModel):
    """A toy with the ControlNets `edges` and `depth`: what one sees shifts what the U-Net gives."""

    def __init__(self) -> None:
        super().__init__()
        self.digests |= ToyModel().digests  # the rest of it is the toy without them

    def _runners(self, kind: str) -> dict[str, ToyRunner]:
        runners = super()._runners(kind)
        shapes = {spec.name: spec.shape for spec in runners["unet"].inputs}
        image, rest = ("batch_size", 3, "image_height", "image_width"), ("batch_size", WIDTH, "height", "width")

        def net(factor: float) -> Any:
            def seen(feeds: Any) -> dict[str, Any]:
                rows, _, height, width = feeds["sample"].shape
                shift = feeds[CONTROL_IMAGE].mean((1, 2, 3)) * np.float32(factor)
                return {
                    f"{RESIDUAL}0": np.full((rows, WIDTH, height, width), 1, np.float32) * shift.reshape(-1, 1, 1, 1)
                }

            return ToyRunner({**shapes, CONTROL_IMAGE: image}, [f"{RESIDUAL}0"], seen)

        controlled = ToyRunner({**shapes, f"{RESIDUAL}0": rest}, ["out_sample"], unet)
        nets = {f"{CONTROLNET}edges": net(0.5), f"{CONTROLNET}depth": net(-0.8)}
        return {**runners, **nets, "unet_controlled": controlled}


def packed(pixels: Any) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


BOTH = [
    {"name": "edges", "image": packed(PICTURES[0]), "scale": 0.7},
    {"name": "depth", "image": packed(PICTURES[1]), "start": 0.2, "end": 0.8},
]
CONTROLS = (Control("edges", PICTURES[0], 0.7), Control("depth", PICTURES[1], 1.0, 0.2, 0.8))


def alone(model: Any, *controls: Control, **more: Any) -> Any:
    return generate(model, Request("red cat", steps=4, seed=7, guidance=6.0, controls=controls, **more))[0]


@pytest.mark.parametrize("guess", [False, True])
def test_a_controlled_picture_is_the_one_of_generate_alone_and_after_a_handoff(guess: bool) -> None:
    expected = alone(ControlledToy(), *CONTROLS, guess=guess)
    others = [alone(ControlledToy(), CONTROLS[0], guess=guess), alone(ControlledToy())]
    assert all(
        not np.array_equal(expected.pixels, other.pixels)
        for other in others
        if other.pixels.shape == expected.pixels.shape
    )
    body = {**ASKED, "controls": BOTH, "guess": guess}
    with toy_service(ControlledToy()) as service:
        whole = ask(service, "POST", "/v1/generate", json=body)
        half = ask(service, "POST", "/v1/handoff", json={**body, "split": 2})
        kind = {"content-type": "application/octet-stream"}
        rest = ask(service, "POST", "/v1/resume", content=half.content, headers=kind)
    assert whole.content == expected.png()
    assert [control.name for control in unpack(half.content).controls] == ["edges", "depth"]
    assert rest.content == expected.png()


def test_pictures_of_another_size_are_resized_as_by_generate_and_wait_in_the_size_that_is_drawn() -> None:
    large = np.random.default_rng(5).integers(0, 256, (300, 400, 3), np.uint8)
    body = {**ASKED, "controls": [{"name": "edges", "image": packed(large)}], "width": 128, "height": 64}
    with toy_service(ControlledToy()) as service:
        answer = ask(service, "POST", "/v1/generate", json={**body, "response": "json"}).json()
    told = "the image of control edges has 400x300 pixels and is resized to 128x64; its proportions change"
    assert answer["warnings"] == [told]
    with Image.open(io.BytesIO(base64.b64decode(answer["images"][0]["png"]))) as drawn:
        pixels = np.asarray(drawn)
    assert np.array_equal(pixels, alone(ControlledToy(), Control("edges", large), size=(128, 64)).pixels)


def test_only_requests_with_equal_controls_share_a_call() -> None:
    bench = Bench(ControlledToy())
    edges, depth = ((ControlForm(name=name, image=packed(PICTURES[0])),) for name in ("edges", "depth"))
    size: dict[str, Any] = {"width": 128, "height": 64, "steps": 3, "guidance": 1.0}
    asked: list[dict[str, Any]] = [{"controls": edges}, {"controls": edges}, {"controls": depth}, {}, {}]
    made = [bench.put(seed=seed, **size, **given) for seed, given in enumerate(asked)]
    for runner in bench.model.runners.values():
        runner.calls.clear()
    turns = bench.finish()
    assert [generation.state for generation in made] == ["done"] * 5
    rows = {
        name: [call["sample"][0] for call in bench.model.runners[name].calls] for name in ("unet", "unet_controlled")
    }
    assert rows["unet"] == [2] * 3 and sorted(rows["unet_controlled"]) == [1] * 3 + [2] * 3
    assert [call["sample"][0] for call in bench.model.runners["controlnet_edges"].calls] == [2] * 3
    assert turns == 9  # three steps of three groups; one turn for all would be three calls one after another
    (pace,) = bench.worker.paces()  # of calls without ControlNets, which a client may judge a split by
    assert (pace["width"], pace["height"]) == (128, 64)


def test_loading_calls_every_controlnet_once() -> None:
    model = ControlledToy()
    Worker(Served("toy", model), Bench().worker._options).load()
    calls = {name: len(runner.calls) for name, runner in model.runners.items() if "control" in name}
    assert calls == {"controlnet_edges": 1, "controlnet_depth": 1, "unet_controlled": 2}


@pytest.mark.parametrize(
    ("controls", "more", "message"),
    [
        ([{"name": "edgez", "image": "AAAA"}], {}, "has no ControlNet 'edgez'; it has depth, edges"),
        ([BOTH[0], BOTH[0]], {}, "a ControlNet is named twice: edges, edges"),
        ([{"name": "edges"}], {}, "body.controls[0]: the key 'image' is missing"),
        ([{"name": "edges", "image": "AAAA", "scal": 1}], {}, "did you mean 'scale'?"),
        ([{**BOTH[0], "scale": 11}], {}, "controls[0].scale is 11; legal is from 0.0 to 10.0"),
        ([{**BOTH[0], "start": 0.8, "end": 0.2}], {}, "control edges starts at 0.8 and ends at 0.2"),
        ([{**BOTH[0], "image": "data:image/png;base64,AA"}], {}, "image of control edges is not base64"),
        ([{**BOTH[0], "image": "AAAA"}], {}, "image of control edges: cannot be read as PNG, JPEG or WebP"),
        ([BOTH[0]] * 5, {}, "there are 5 controls; at most 4 act at once"),
        ({"name": "edges"}, {}, "it must be a list"),
        ([], {"guess": True}, "no control that could guess"),
    ],
)
def test_what_is_no_control_is_refused_before_it_waits(controls: Any, more: dict[str, Any], message: str) -> None:
    with toy_service(ControlledToy()) as service:
        answer = ask(service, "POST", "/v1/generate", json={**ASKED, "controls": controls, **more})
    assert answer.status_code == 422 and message in answer.json()["error"]["message"]


def test_a_bundle_without_them_refuses_requests_and_trajectories() -> None:
    with toy_service() as service:
        asked = ask(service, "POST", "/v1/generate", json={**ASKED, "controls": BOTH[:1]})
        started = pack(alone(ControlledToy(), CONTROLS[0]).trajectory)
        kind = {"content-type": "application/octet-stream"}
        done = ask(service, "POST", "/v1/resume", content=started, headers=kind)
        with toy_service(ControlledToy()) as other:
            half = ask(other, "POST", "/v1/handoff", json={**ASKED, "controls": BOTH[:1], "split": 2})
        resumed = ask(service, "POST", "/v1/resume", content=half.content, headers=kind)
    assert asked.status_code == 422 and "has no ControlNet; export it with --controlnet edges=SOURCE" in asked.text
    assert resumed.status_code == 422 and "the ControlNet edges acts on it, and the model has none" in resumed.text
    assert done.status_code == 200  # no call is left on which it could act


def test_the_schema_describes_a_control() -> None:
    schema = json_schema(GenerateForm)["properties"]["controls"]
    assert schema["type"] == "array" and schema["maxItems"] == 4 and schema["items"]["required"] == ["name", "image"]
    assert schema["items"]["properties"]["scale"] == {"type": "number", "minimum": 0.0, "maximum": 10.0, "default": 1.0}


@pytest.mark.slow
def test_a_real_controlnet_draws_over_http_what_it_draws_in_python(tmp_path: Path) -> None:
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    from diffship.models.model import PipelineModel
    from diffship.models.sources.controlnet import with_controlnets
    from diffship.models.sources.opening import open_source

    pipeline = open_source("arch:tiny-sd")
    torch.manual_seed(0)
    inner = pipeline.denoiser.module().get_submodule("inner")
    net = diffusers.ControlNetModel.from_unet(inner, conditioning_embedding_out_channels=(4, 8, 8, 8))
    for name, parameter in net.named_parameters():
        if name.startswith("controlnet_"):  # zeros, when training begins
            torch.nn.init.normal_(parameter, std=0.2)
    net.save_pretrained(tmp_path / "edges")
    model = PipelineModel(with_controlnets(pipeline, {"edges": str(tmp_path / "edges")}))
    expected = alone(model, CONTROLS[0])
    assert not np.array_equal(expected.pixels, alone(model, size=(128, 64)).pixels)
    with toy_service(model) as service:
        answer = ask(service, "POST", "/v1/generate", json={**ASKED, "controls": BOTH[:1]})
    assert answer.content == expected.png()
