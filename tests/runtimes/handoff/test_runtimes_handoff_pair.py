"""Which models may share a trajectory, and what may arrive: every refusal, before anything computes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from handoff_models import SIZE, Stand, large, small

from diffship.core.errors import ConfigError, HandoffError
from diffship.runtimes.handoff.arrival import check_arrival, require_answer
from diffship.runtimes.handoff.pair import ModelFacts, check_pair, differences
from diffship.sampling.generate import Request, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.trajectory import Trajectory
from diffship.sampling.wire import pack, unpack

OTHER = "f" * 64


def stand(**family: Any) -> Stand:
    return Stand(large(), "other", **family)


FAMILY = {
    "latent channels is 4 and 16": {"latent_channels": 16},
    "VAE factor is 8 and 4": {"vae_factor": 4},
    "text width is 32 and 768": {"text_width": 768},
    "pooled text width is None and 1280": {"pooled_width": 1280},
    "number of time ids is None and 6": {"time_ids": 6},
    "width of timestep_cond is None and 256": {"time_cond_dim": 256},
    "U-Net input channels is 4 and 9": {"unet_channels": 9},
    "latent scale is 0.18215 and 0.13025": {"scaling_factor": 0.13025},
    "latent shift is 0.0 and 0.1": {"shift_factor": 0.1},
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "prediction type is epsilon and v_prediction": {"prediction_type": "v_prediction"},
    "number of training timesteps is 1000 and 500": {"num_train_timesteps": 500},
    "the betas differ": {"beta_end": 0.02},
    "the betas differ (at timestep": {"beta_schedule": "linear"},
    "only other is a consistency model": {"_class_name": "LCMScheduler"},
}


@pytest.mark.parametrize("reason", [*FAMILY, *SCHEDULERS])
def test_every_difference_that_matters_is_refused_by_name(reason: str) -> None:
    other = stand(**FAMILY.get(reason, {}))
    other.scheduler.update(SCHEDULERS.get(reason, {}))
    with pytest.raises(ConfigError) as caught:
        check_pair([large(), other])
    assert reason in str(caught.value)
    assert str(caught.value).startswith("arch:tiny-sd and other cannot share a trajectory: ")
    assert len(differences(large(), other).reasons) == 1


@pytest.mark.slow
def test_a_model_fits_itself_and_its_sibling() -> None:
    assert check_pair([large()]) == check_pair([large(), large()]) == check_pair([large(), small(), large()]) == ()


def test_all_reasons_are_named_at_once() -> None:
    other = stand(text_width=768, unet_channels=9)
    other.scheduler["beta_end"] = 0.02
    with pytest.raises(ConfigError, match=r"text width .*; U-Net input channels .*; the betas differ"):
        check_pair([large(), other])


@pytest.mark.slow
@pytest.mark.parametrize("other", ["tiny-lcm", "tiny-sdxl", "tiny-inpaint", "tiny-sd+taesd"])
def test_other_kinds_of_model_are_refused(other: str) -> None:
    for pair in ((large(), large(other)), (large(other), large())):
        with pytest.raises(ConfigError, match="cannot share a trajectory"):
            check_pair(pair)


def test_lcm_with_another_model_names_both_reasons() -> None:
    reasons = " ".join(differences(large(), large("tiny-lcm")).reasons)
    assert "width of timestep_cond is None and 32" in reasons and "only arch:tiny-lcm is a consistency model" in reasons


def test_consistency_models_must_be_distilled_alike() -> None:
    other = Stand(large("tiny-lcm"), "other")
    assert check_pair([large("tiny-lcm"), other]) == ()
    for key, value in (("original_inference_steps", 100), ("timestep_scaling", 5.0)):
        changed = Stand(large("tiny-lcm"), "other")
        changed.scheduler[key] = value
        with pytest.raises(ConfigError, match=key):
            check_pair([large("tiny-lcm"), changed])


@pytest.mark.parametrize("same", ["vae_encoder", "vae_decoder"])
def test_one_equal_half_of_the_vae_is_enough(same: str) -> None:
    other = stand()
    other.digests |= {part: OTHER for part in ("vae_encoder", "vae_decoder") if part != same}
    assert check_pair([large(), other]) == ()
    other.digests[same] = OTHER
    with pytest.raises(ConfigError, match=r"the VAEs differ \(vae_decoder \w{8} and ffffffff, .* --shared-latents"):
        check_pair([large(), other])
    assert check_pair([large(), other], shared_latents=True) == ()


def test_a_tiny_vae_may_share_latents_where_one_says_so() -> None:
    """TAESD stores scale 1 for latents that its family stores with 0.18215: the scale is the decoder's."""
    assert check_pair([large(), large("tiny-sd+taesd")], shared_latents=True) == ()
    with pytest.raises(ConfigError, match="latent channels"):
        check_pair([large(), stand(latent_channels=16)], shared_latents=True)


def test_text_encoders_that_differ_only_warn() -> None:
    other = stand()
    other.digests["text_encoder"] = OTHER
    (warning,) = check_pair([large(), other])
    assert "text_encoder differ; the embeddings of the model that starts travel" in warning


def test_a_missing_vae_and_another_scheduler_only_warn() -> None:
    other = stand()
    other.digests = {"unet": OTHER}
    other.scheduler["_class_name"] = "DDIMScheduler"
    vae, sampler = check_pair([large(), other])
    assert "cannot be told" in vae and "PNDMScheduler and DDIMScheduler" in sampler
    assert check_pair([large(), other], "euler") == (vae,)


@pytest.mark.slow
def test_facts_cross_as_json() -> None:
    facts = ModelFacts.of(large())
    assert ModelFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    assert check_pair([facts, small()]) == ()
    for data in ({}, [], {**facts.to_json(), "more": 1}, {**facts.to_json(), "digests": {"unet": 1}}):
        with pytest.raises(ConfigError):
            ModelFacts.from_json(data)


def arrived(**changes: Any) -> Trajectory:
    """Bytes of the large model after two of four calls, as they come."""
    request = Request("a red apple", steps=4, size=SIZE, seed=3, sampler="dpmpp-2m")
    half = denoise(start(large(), request), denoiser_of(large()), until=2)[0]
    return replace(unpack(pack(half)), **changes)


@pytest.mark.slow
def test_what_fits_arrives() -> None:
    assert check_arrival(arrived(), large()) == check_arrival(arrived(), small()) == ()
    (warning,) = check_arrival(arrived(origin=None), small())
    assert "cannot be told" in warning


@pytest.mark.parametrize("other", ["tiny-lcm", "tiny-sdxl", "tiny-inpaint", "tiny-sd+taesd"])
def test_another_family_does_not_arrive(other: str) -> None:
    with pytest.raises(HandoffError, match="does not fit"):
        check_arrival(arrived(), large(other))


@pytest.mark.slow
def test_another_schedule_or_vae_does_not_arrive() -> None:
    betas, vae, trained = stand(), stand(), stand()
    betas.scheduler["beta_end"] = 0.02
    trained.scheduler["num_train_timesteps"] = 500
    vae.digests |= {"vae_decoder": OTHER, "vae_encoder": OTHER}
    for other, reason in ((betas, "betas"), (trained, "training timesteps"), (vae, "the VAEs differ")):
        with pytest.raises(HandoffError, match=f"does not fit other: .*{reason}"):
            check_arrival(arrived(), other)
    assert check_arrival(arrived(), vae, shared_latents=True) == ()


def test_prompts_may_arrive_alone_only_for_the_same_text_encoder() -> None:
    other = stand()
    bare = arrived().without_conditioning()
    assert check_arrival(bare, other) == ()
    other.digests["text_encoder"] = OTHER
    assert "travel" in check_arrival(arrived(), other)[0]
    with pytest.raises(HandoffError, match="without embeddings, and text_encoder differ: send them"):
        check_arrival(bare, other)


def test_a_model_used_with_another_sampler_than_its_own_goes_on_with_it() -> None:
    request = Request("x", steps=2, size=SIZE, guidance=1.0, sampler="euler")
    trajectory = unpack(pack(start(large("tiny-lcm"), request)[0]))
    assert check_arrival(trajectory, large("tiny-lcm")) == ()


ASKED = Request("a red apple", steps=4, size=SIZE, seed=3, sampler="dpmpp-2m", guidance=7.5)


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_the_answer_to_a_request_is_taken(rng: str, image: int) -> None:
    request = replace(ASKED, rng=rng, images=2)
    both = denoise(start(large(), request), denoiser_of(large()), until=1)
    require_answer(unpack(pack(both[image])), request, 1, image)
    require_answer(both[image], replace(request, steps=None, size=None, guidance=None, sampler=None), 1, image)
    with pytest.raises(HandoffError, match=r"its (seed|image) is"):
        require_answer(both[image], request, 1, 1 - image)


@pytest.mark.parametrize(
    ("label", "changes"),
    [
        ("prompt", {"prompt": "a black cat"}),
        ("negative prompt", {"negative": ""}),
        ("seed", {"seed": 4}),
        ("rng", {"rng": "philox"}),
        ("steps", {"steps": 5}),
        ("size", {"size": (128, 64)}),
        ("guidance", {"guidance": 7.0}),
        ("sampler", {"sampler": "euler"}),
        ("spacing", {"spacing": "trailing"}),
        ("eta", {"eta": 0.5}),
    ],
)
def test_an_old_answer_is_refused(label: str, changes: dict[str, Any]) -> None:
    old = arrived()
    require_answer(old, ASKED, 2)
    with pytest.raises(HandoffError, match=f"answers something else: its {label} is"):
        require_answer(old, replace(ASKED, **changes), 2)


def test_an_answer_of_another_step_is_refused() -> None:
    with pytest.raises(HandoffError, match="its step is '2', asked was '3'"):
        require_answer(arrived(), ASKED, 3)


def test_arrival_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(large()), "use", lambda self, part: pytest.fail("a part was loaded"))
    assert check_pair([large(), small()]) == ()
    data = bytearray(pack(trajectory_without_a_model()))
    check_arrival(unpack(bytes(data)), large())
    data[-1] ^= 1
    with pytest.raises(HandoffError, match="damaged"):
        check_arrival(unpack(bytes(data)), large())


def trajectory_without_a_model() -> Trajectory:
    from diffship.sampling.rng import Philox
    from diffship.sampling.samplers import make_sampler

    return Trajectory(
        latents=np.zeros((4, 8, 8), np.float32),
        step=1,
        steps=3,
        sampler=make_sampler(large().scheduler, "ddim"),
        noise=Philox(0),
        size=SIZE,
    )
