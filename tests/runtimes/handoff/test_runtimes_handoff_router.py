"""Several models, one trajectory: bit-equal to what each would have done, on every engine, through bytes too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from handoff_models import SIZE, large, small

from diffship.core.errors import Cancelled, ConfigError, UnsupportedError
from diffship.runtimes.engines.model import open_model
from diffship.runtimes.handoff.router import Router, begin, boundaries, check_split, draw
from diffship.sampling.generate import Request, generate, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.model import Model
from diffship.sampling.picture import Picture
from diffship.sampling.trajectory import Trajectory
from diffship.sampling.wire import pack, unpack

# one sampler of each behaviour: plain, with history, with noise, with several calls a step
SOME = ("ddim", "dpmpp-2m", "dpmpp-sde", "euler-a", "heun", "lcm", "pndm", "unipc")
SPLITS = ((0, 4), (1, 3), (2, 2), (3, 1), (4, 0))


@pytest.fixture(scope="module")
def ort(tiny_bundle: Path) -> Iterator[Model]:
    with open_model(tiny_bundle, "onnxruntime", threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def ort_again(tiny_bundle: Path) -> Iterator[Model]:
    """The same bundle, opened a second time."""
    with open_model(tiny_bundle, "onnxruntime", threads=1) as model:
        yield model


def asked(prompt: str = "a red apple", **changes: Any) -> Request:
    return Request(prompt, **{"size": SIZE, "seed": 1, "negative": "blurry", **changes})


def split_picture(models: Sequence[Model], split: Sequence[int], request: Request) -> Picture:
    router = Router(models, split)
    return draw(router, begin(router, request))[0]


def over_the_wire(models: Sequence[Model], split: Sequence[int], request: Request) -> Trajectory:
    """The same by hand: each model denoises to its end, and bytes go to the next."""
    calls = start(models[0], request)[0].calls
    batch = start(models[0], request)
    for model, until in zip(models, boundaries(split, calls), strict=True):
        batch = [unpack(pack(trajectory)) for trajectory in batch]
        batch = denoise(batch, denoiser_of(model), until)
    return batch[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_the_same_model_on_both_sides_changes_no_bit_torch(name: str) -> None:
    request = asked(steps=4, sampler=name)
    whole = generate(large(), request)[0]
    for split in SPLITS:
        assert_equal(split_picture([large(), large()], split, request), whole)
        np.testing.assert_array_equal(
            over_the_wire([large(), large()], split, request).latents, whole.trajectory.latents
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_the_same_model_on_both_sides_changes_no_bit_onnxruntime(name: str, ort: Model, ort_again: Model) -> None:
    request = asked(steps=4, sampler=name, rng="philox")
    whole = generate(ort, request)[0]
    for split in SPLITS:
        assert_equal(split_picture([ort, ort_again], split, request), whole)
        np.testing.assert_array_equal(over_the_wire([ort, ort_again], split, request).latents, whole.trajectory.latents)


def assert_equal(ours: Picture, whole: Picture) -> None:
    np.testing.assert_array_equal(ours.trajectory.latents, whole.trajectory.latents)
    np.testing.assert_array_equal(ours.pixels, whole.pixels)


@pytest.mark.parametrize("split", [(1, 2, 1), (0, 2, 2), (2, 0, 2), (2, 2, 0), (0, 0, 4), (4, 0, 0)])
def test_three_models(split: tuple[int, ...]) -> None:
    models, request = [large(), small(), large()], asked(steps=4, sampler="dpmpp-2m")
    ours = split_picture(models, split, request)
    np.testing.assert_array_equal(ours.trajectory.latents, over_the_wire(models, split, request).latents)
    assert [share["steps"] for share in ours.settings["split"]] == list(split)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["dpmpp-2m", "pndm", "euler-a"])
def test_a_sibling_draws_the_last_steps(sampler: str) -> None:
    pictures = {}
    for split in SPLITS:
        request = asked(steps=4, sampler=sampler)
        pictures[split] = split_picture([large(), small()], split, request).trajectory.latents
        np.testing.assert_array_equal(pictures[split], over_the_wire([large(), small()], split, request).latents)
    request = asked(steps=4, sampler=sampler)
    np.testing.assert_array_equal(pictures[4, 0], generate(large(), request)[0].trajectory.latents)
    np.testing.assert_array_equal(pictures[0, 4], generate(small(), request)[0].trajectory.latents)
    for first, second in pairwise(SPLITS):
        assert np.abs(pictures[first] - pictures[second]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("split", [(8, 0), (4, 4), (0, 8)])
def test_a_pair_of_consistency_models(split: tuple[int, int]) -> None:
    pair, request = [large("tiny-lcm"), small("tiny-lcm")], asked(guidance=8.0, negative=None)
    router = Router(pair, split)
    ours = draw(router, begin(router, request))[0]
    assert ours.trajectory.sampler.name == "lcm" and ours.trajectory.positive is not None
    assert ours.trajectory.negative is None  # guidance is an embedding
    assert [share.calls for share in router.shares] == list(split)
    whole = asked(guidance=8.0, negative=None, steps=8)
    np.testing.assert_array_equal(ours.trajectory.latents, over_the_wire(pair, split, whole).latents)
    alone = [generate(model, whole)[0].trajectory.latents for model in pair]
    equal = [np.array_equal(ours.trajectory.latents, latents) for latents in alone]
    assert equal == [split[0] == 8, split[1] == 8]


@pytest.mark.slow
def test_sdxl_and_its_embeddings() -> None:
    request = asked(steps=3)
    whole = generate(large("tiny-sdxl"), request)[0]
    for split in ((1, 2), (2, 1)):
        pair = [large("tiny-sdxl"), large("tiny-sdxl")]
        assert_equal(split_picture(pair, split, request), whole)
        np.testing.assert_array_equal(over_the_wire(pair, split, request).latents, whole.trajectory.latents)


@pytest.mark.slow
def test_a_mask_and_its_latents_travel() -> None:
    pair = [large("tiny-inpaint"), large("tiny-inpaint")]
    image, mask = np.full((64, 64, 3), 90, np.uint8), np.eye(64, dtype=np.uint8) * 255
    request = asked(steps=3, sampler="ddim", image=image, mask=mask)
    whole = generate(pair[0], request)[0]
    router = Router(pair, (1, 2))
    half = denoise(begin(router, request), router, until=1)
    assert_equal(draw(router, [unpack(pack(half[0]))])[0], whole)
    with pytest.raises(ConfigError, match="both an image and a mask"):
        begin(router, asked(steps=3, sampler="ddim"))


@pytest.mark.parametrize("mask", [None, np.eye(64, dtype=np.uint8) * 255])
def test_an_image_and_what_is_put_back_of_it_travel(mask: Any) -> None:
    pair = [large(), large()]
    request = asked(steps=4, sampler="euler-a", image=np.full((64, 64, 3), 90, np.uint8), mask=mask, strength=0.8)
    whole = generate(pair[0], request)[0]
    router = Router(pair, (2, 2))
    half = denoise(begin(router, request), router, until=2)
    assert half[0].step == 2 and half[0].blends == (mask is not None)
    assert_equal(draw(router, [unpack(pack(half[0]))])[0], whole)


def test_half_precision_is_close_and_not_equal() -> None:
    router = Router([large(), small()], (2, 2))
    half = denoise(begin(router, asked(sampler="dpmpp-2m")), router, until=2)[0]
    exact, rounded = (draw(router, [unpack(pack(half, dtype))])[0] for dtype in ("float32", "float16"))
    apart = np.abs(exact.trajectory.latents - rounded.trajectory.latents).max()
    assert 0 < apart < 0.02 * np.abs(exact.trajectory.latents).max()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("order", ["torch first", "torch last"])
def test_engines_may_differ(tiny_bundle: Path, engine: str, order: str) -> None:
    request, steps = asked(steps=4, sampler="dpmpp-2m"), {}
    with open_model(tiny_bundle, engine, threads=1) as other:
        models = [large(), other] if order == "torch first" else [other, large()]
        for name, router in (("whole", Router([large()])), ("split", Router(models, (2, 2)))):
            kept = steps[name] = []
            draw(router, begin(router, request), on_step=lambda batch, kept=kept: kept.append(batch[0].latents))
    assert len(steps["whole"]) == len(steps["split"]) == 4
    for whole, split in zip(steps["whole"], steps["split"], strict=True):
        assert np.abs(whole - split).max() <= 1e-3


@pytest.mark.slow
def test_the_surplus_call_goes_to_the_last_model_with_a_share() -> None:
    for split, calls in (((2, 2), [2, 3]), ((4, 0), [5, 0]), ((0, 4), [0, 5])):
        router = Router([large(), small()], split)
        draw(router, begin(router, asked(sampler="pndm")))
        assert [share.calls for share in router.shares] == calls
    assert boundaries((10, 15), 26) == (10, 26) and boundaries((25, 0), 26) == (26, 26)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_boundaries_are_the_published_table(split: list[int], surplus: int) -> None:
    """bytedance/Hybrid-SD fills step index -> model in order; beyond its end comes the last model that has a share."""
    table = [place for place, share in enumerate(split) for _ in range(share)]
    table += [table[-1]] * surplus
    ends = boundaries(split, len(table))
    for step, place in enumerate(table):
        assert ends[place] > step and all(end <= step for end in ends[:place])
    assert ends[-1] == len(table)


def test_a_batch_may_stand_anywhere() -> None:
    """As in a server: one call of the router for samples in the shares of different models."""
    router = Router([large(), small()], (2, 2))
    first, second = begin(router, asked(sampler="euler", images=2))
    ahead = denoise([second], router, until=3)[0]
    together = router([first, ahead])
    for output, trajectory, model in zip(together, (first, ahead), (large(), small()), strict=True):
        np.testing.assert_array_equal(output, denoiser_of(model)([trajectory])[0])


def test_shares_count_pictures_and_time() -> None:
    router = Router([large(), small()], (1, 3))
    pictures = draw(router, begin(router, asked(sampler="ddim", images=3)))
    assert len(pictures) == 3
    assert [share.calls for share in router.shares] == [3, 9]
    assert all(share.seconds > 0 for share in router.shares)


class Watched:
    """A model that records what is loaded and freed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.log: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def use(self, part: str) -> Any:
        self.log.append(part)
        return self._model.use(part)

    def release(self, part: str) -> None:
        self.log.append(f"-{part}")


@pytest.mark.slow
def test_low_memory_loads_one_unet_after_the_other() -> None:
    first, last = Watched(large()), Watched(small())
    router = Router([first, last], (2, 2), keep=False)
    low = draw(router, begin(router, asked(sampler="ddim", images=2)))
    assert [entry for entry in first.log if "unet" in entry] == ["unet", "-unet"]
    assert [entry for entry in last.log if "unet" in entry] == ["unet", "-unet"]
    assert "-text_encoder" in first.log and last.log[-1] == "-vae_decoder"
    for ours, seed in zip(low, (1, 2), strict=True):
        alone = split_picture([large(), small()], (2, 2), asked(sampler="ddim", seed=seed))
        np.testing.assert_array_equal(ours.trajectory.latents, alone.trajectory.latents)


@pytest.mark.parametrize(("split", "used"), [((4, 0), [True, False]), ((0, 4), [False, True])])
def test_who_has_no_share_does_not_load_its_unet(split: tuple[int, int], used: list[bool]) -> None:
    models = [Watched(large()), Watched(small())]
    split_picture(models, split, asked())
    assert ["unet" in model.log for model in models] == used
    assert ["text_encoder" in model.log for model in models] == used
    assert ["vae_decoder" in model.log for model in models] == [False, True]


def test_embeddings_travel_and_prompts_are_encoded_where_they_arrive() -> None:
    models = [Watched(large()), Watched(small())]
    router = Router(models, (2, 2))
    half = denoise(begin(router, asked(sampler="ddim")), router, until=2)[0]
    assert "text_encoder" not in models[1].log
    whole = draw(router, [half])[0]
    assert "text_encoder" not in models[1].log
    bare = draw(router, [unpack(pack(half, embeddings=False))])[0]
    assert "text_encoder" in models[1].log
    np.testing.assert_array_equal(bare.pixels, whole.pixels)


@pytest.mark.slow
def test_a_resumed_trajectory_goes_on_with_the_model_of_its_step() -> None:
    whole = split_picture([large(), small()], (2, 2), asked(sampler="dpmpp-2m"))
    for step in range(5):
        begun = Router([large(), small()], (2, 2))
        half = denoise(begin(begun, asked(sampler="dpmpp-2m")), begun, until=step)[0]
        router = Router([large(), small()], (2, 2))
        np.testing.assert_array_equal(draw(router, [unpack(pack(half))])[0].pixels, whole.pixels)
        assert [share.calls for share in router.shares] == [max(2 - step, 0), min(4 - step, 2)]


def test_cancelled_between_two_models() -> None:
    router = Router([large(), small()], (2, 2))
    seen: list[int] = []
    with pytest.raises(Cancelled, match="before call 3"):
        draw(
            router,
            begin(router, asked(sampler="ddim")),
            on_step=lambda batch: seen.append(batch[0].step),
            cancel=lambda: len(seen) == 2,
        )
    assert [share.calls for share in router.shares] == [2, 0]


@pytest.mark.parametrize(
    ("split", "steps", "message"),
    [
        ((25,), None, "has 1 entries for 2 models; give one per model, such as 10,15"),
        ((1, 2, 3), None, "has 3 entries for 2 models"),
        ((-1, 5), None, "entries are 0 or more, and together 1 to 150 steps"),
        ((0, 0), None, "together 1 to 150 steps"),
        ((100, 51), None, "together 1 to 150 steps"),
        ((10, 15), 20, "makes 25 steps, asked are 20"),
    ],
)
def test_splits_that_are_not_legal(split: tuple[int, ...], steps: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_split(split, 2, steps)


def test_what_a_router_refuses() -> None:
    with pytest.raises(ConfigError, match="has 0 entries for 2 models"):
        Router([large(), small()])
    router = Router([large(), small()], (2, 2))
    with pytest.raises(ConfigError, match="makes 4 steps, asked are 6"):
        begin(router, asked(steps=6))
    with pytest.raises(ConfigError, match="makes 4 steps, asked are 6"):
        router(start(large(), asked(steps=6)))
    with pytest.raises(ConfigError, match="width is 96; sd draws multiples of 64"):
        begin(Router([small(), large()], (2, 2)), asked(size=(96, 96)))


@pytest.mark.parametrize(("part", "place"), [("unet", 0), ("unet", 1), ("vae_decoder", 1)])
def test_a_missing_part_is_named(part: str, place: int) -> None:
    models = [Watched(large()), Watched(small())]
    models[place].parts = large().parts - {part}
    with pytest.raises(UnsupportedError, match=f"has no {part}; export with --parts"):
        Router(models, (2, 2))


def test_the_edge_needs_no_text_encoder() -> None:
    edge = Watched(small())
    edge.parts = small().parts - {"text_encoder"}
    router = Router([large(), edge], (2, 2))
    assert draw(router, begin(router, asked(sampler="ddim")))[0].pixels.any()
