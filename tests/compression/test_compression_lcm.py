"""The lcm pass without a run: its loss against diffusers' formulas, what it refuses, what it foresees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from lcm_cases import SMALL, options_for, task_of
from torch import Tensor

from diffship.compression.lcm import LcmPass
from diffship.core.errors import ConfigError
from diffship.core.strict import load
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.training.adapters import switched_off
from diffship.training.consistency_task import ConsistencyTask
from diffship.training.loop import step_generator

COMBINATIONS = [
    ("lora", "arch:tiny-sd"),
    ("full", "arch:tiny-sd"),
    pytest.param("lora", "arch:tiny-sdxl", marks=pytest.mark.slow),
    pytest.param("full", "arch:tiny-sdxl", marks=pytest.mark.slow),
]


def velocity(pipeline: Pipeline) -> Pipeline:
    """The same model, said to predict v."""
    scheduler = {**pipeline.scheduler, "prediction_type": "v_prediction"}
    return replace(pipeline, scheduler=scheduler, family=replace(pipeline.family, prediction_type="v_prediction"))


def stirred(task: ConsistencyTask, seed: int = 5) -> None:
    """Random values for all that is trained, so that nothing that begins at zero hides a fault."""
    draw = torch.Generator().manual_seed(seed)
    for value in task.student.parameters():
        if value.requires_grad:
            value.data.add_(0.02 * torch.randn(value.shape, generator=draw))


def published_loss(task: ConsistencyTask, source: Pipeline, target: Any, skip: int = 20) -> float:
    """One loss as diffusers' training scripts compute it, with diffusers' own U-Nets and schedulers.

    Draws, latents and captions are the task's, which are tested by themselves.
    """
    samples, guidances = task.draws(6, step_generator(3, 1))
    mean, deviation = task.latents.take([s.row for s in samples], [s.flip for s in samples])
    clean = mean + deviation * torch.stack([s.posterior for s in samples])
    noise, times = torch.stack([s.noise for s in samples]), torch.tensor([s.step for s in samples])
    kind = source.family.prediction_type
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": kind}
    ddim = diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    ddim.set_timesteps(1000 // skip)  # the previous timestep of its step is then `skip` earlier
    lcm = diffusers.LCMScheduler(**betas)
    given, dropped = task.captions([s.caption for s in samples]), task.captions([None] * len(samples))
    pipe = diffusers.LatentConsistencyModelPipeline
    waves = pipe.get_guidance_scale_embedding(None, torch.tensor(guidances), 256)  # it never looks at itself
    cond = waves if task.embedding else None
    teacher = source.components["unet"].module().get_submodule("inner")
    student = task.student.get_submodule("inner")
    noisy = ddim.add_noise(clean, noise, times)
    losses = []
    with torch.no_grad():
        said, guided = called(student, noisy, times, given, cond), []  # the timesteps are those of 50 steps
        for conditions in (given, dropped):
            guided.append(called(teacher, noisy, times, conditions, None))
        earlier, before = (times - skip).clamp(min=0), []
        for i, (time, w) in enumerate(zip(times.tolist(), guidances, strict=True)):
            output = guided[0][i] + w * (guided[0][i] - guided[1][i])
            before.append(ddim.step(output, time, noisy[i]).prev_sample)
        wanted = called(target, torch.stack(before), earlier, given, cond)
        for i in range(len(samples)):
            first = as_picture(lcm, said[i], noisy[i], int(times[i]))
            second = as_picture(lcm, wanted[i], before[i], int(earlier[i]))
            losses.append((torch.sqrt((first - second) ** 2 + 0.001**2) - 0.001).mean().item())
    return float(np.mean(losses))


def called(network: Any, latents: Tensor, times: Tensor, conditions: tuple[Tensor, ...], cond: Tensor | None) -> Tensor:
    more = dict(zip(("text_embeds", "time_ids"), conditions[1:], strict=False)) or None
    out = network(latents, times, conditions[0], timestep_cond=cond, added_cond_kwargs=more)
    made: Tensor = out.sample
    return made


def as_picture(lcm: Any, output: Tensor, latents: Tensor, time: int) -> Tensor:
    """What LCMScheduler takes for the clean latents at `time`."""
    skip, out = lcm.get_scalings_for_boundary_condition_discrete(time)
    alpha = lcm.alphas_cumprod[time]
    if lcm.config.prediction_type == "epsilon":
        clean = (latents - (1 - alpha).sqrt() * output) / alpha.sqrt()
    else:
        clean = alpha.sqrt() * latents - (1 - alpha).sqrt() * output
    return skip * latents + out * clean


@pytest.mark.slow
@pytest.mark.parametrize(("form", "source"), COMBINATIONS)
def test_the_loss_is_that_of_the_published_scripts(form: str, source: str, tmp_path: Path) -> None:
    pipeline = velocity(open_source(source)) if source == "arch:tiny-sd" else open_source(source)
    task = task_of(options_for(tmp_path, form=form, drop=0.3), pipeline, tmp_path)
    stirred(task)
    network = task.student.get_submodule("inner")
    averages = {f"unet/{name}": value.detach().clone() for name, value in network.named_parameters()}
    task.follow({name: value for name, value in averages.items()})
    wanted = published_loss(task, pipeline, network)
    made, _ = task.loss(6, step_generator(3, 1))
    assert made.item() == pytest.approx(wanted, rel=2e-4)
    made.backward()
    trained = {name for name, value in network.named_parameters() if value.grad is not None and value.grad.any()}
    names = {name for name, value in network.named_parameters() if value.requires_grad}
    assert trained == names and len(names) > 100
    assert all(".lora_" in name for name in names) == (form == "lora")


@pytest.mark.slow
def test_the_teachers_step_may_be_longer(tmp_path: Path) -> None:
    """Of all 50 timesteps, also those that are nearer to 0 than one step is long."""
    pipeline = open_source("arch:tiny-sd")
    task = task_of(options_for(tmp_path, skip=100), pipeline, tmp_path)
    stirred(task)
    wanted = published_loss(task, pipeline, task.student.inner, skip=100)
    assert wanted != pytest.approx(published_loss(task, pipeline, task.student.inner), rel=1e-2)
    assert task.loss(6, step_generator(3, 1))[0].item() == pytest.approx(wanted, rel=2e-4)
    assert {s.step for s in task.draws(500, step_generator(3, 1))[0]} == set(range(19, 1000, 20))


@pytest.mark.slow
def test_the_target_of_the_full_form_is_the_average(tmp_path: Path) -> None:
    pipeline = open_source("arch:tiny-sd")
    task = task_of(options_for(tmp_path, form="full"), pipeline, tmp_path)
    other = task_of(options_for(tmp_path, form="full"), pipeline, tmp_path)
    stirred(task)
    stirred(other, seed=6)
    task.follow({f"unet/{name}": value.detach() for name, value in other.student.inner.named_parameters()})
    wanted = published_loss(task, pipeline, other.student.inner)
    assert wanted != pytest.approx(published_loss(task, pipeline, task.student.inner), rel=1e-3)
    assert task.loss(6, step_generator(3, 1))[0].item() == pytest.approx(wanted, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "lora"])
def test_training_begins_with_the_teacher_itself(form: str, tmp_path: Path) -> None:
    source = open_source("arch:tiny-sd")
    task = task_of(options_for(tmp_path, form=form), source, tmp_path)
    feeds = [torch.from_numpy(value) for value in source.components["unet"].example(1).values()]
    more = [torch.randn(1, 256)] if form == "full" else []
    with torch.no_grad():
        wanted = source.components["unet"].module()(*feeds)[0]
        torch.testing.assert_close(task.student(*feeds, *more)[0], wanted, rtol=0, atol=1e-5)
        if form == "lora":
            stirred(task)
            assert not torch.allclose(task.student(*feeds)[0], wanted, atol=1e-3)
            with switched_off(task.student):
                torch.testing.assert_close(task.student(*feeds)[0], wanted, rtol=0, atol=1e-5)
            assert all(p.requires_grad for name, p in task.student.named_parameters() if ".lora_" in name)


@pytest.mark.slow
def test_a_pruned_student_learns_the_trajectories_of_the_whole_model(tmp_path: Path) -> None:
    """The oracle's teacher is the named one; the student alone has LoRA layers."""
    from distill_cases import student_of

    whole = open_source("arch:tiny-sd")
    small = student_of(whole)
    task = task_of(options_for(tmp_path, teacher="arch:tiny-sd"), small, tmp_path)
    stirred(task)
    wanted = published_loss(task, whole, task.student.inner)
    assert task.loss(6, step_generator(3, 1))[0].item() == pytest.approx(wanted, rel=2e-4)
    assert not any(".lora_" in name for name, _ in task.teacher.named_parameters())


@pytest.mark.slow
def test_guidance_is_drawn_evenly_and_sample_by_sample(tmp_path: Path) -> None:
    task = task_of(options_for(tmp_path, w_min=2.0, w_max=6.0), open_source("arch:tiny-sd"), tmp_path)
    _, guidances = task.draws(2000, step_generator(1, 0))
    assert 2.0 <= min(guidances) < 2.02 and 5.98 < max(guidances) <= 6.0
    assert np.mean(guidances) == pytest.approx(4.0, abs=0.1)
    generator = step_generator(1, 0)
    halves = [task.draws(1000, generator)[1] for _ in range(2)]
    assert guidances == halves[0] + halves[1]
    samples, _ = task.draws(2000, step_generator(1, 0))
    assert sorted({sample.step for sample in samples}) == list(range(19, 1000, 20))


@pytest.mark.parametrize(
    ("source", "options", "wanted"),
    [
        ("arch:tiny-sd", {}, (4.875, 9.75)),  # guidance 7.5
        ("arch:tiny-sdxl", {}, (3.0, 6.0)),  # guidance 5
        ("arch:tiny-sd", {"w_min": 3.0, "w_max": 15.0}, (3.0, 15.0)),
        ("arch:tiny-sdxl", {"teacher": "arch:tiny-sd"}, (4.875, 9.75)),
    ],
)
def test_the_range_of_guidance_is_about_the_teachers_own(
    source: str, options: Any, wanted: Any, tmp_path: Path
) -> None:
    made = LcmPass(str(tmp_path), **options)
    assert made.guidances(made.teacher_of(open_source(source))) == pytest.approx(wanted)


def scheduled(name: str, **more: Any) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: replace(pipeline, scheduler={**pipeline.scheduler, "_class_name": name, **more})


def predicting(kind: str) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: replace(pipeline, family=replace(pipeline.family, prediction_type=kind))


def flowing(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


SNR = scheduled("DDIMScheduler", rescale_betas_zero_snr=True)


@pytest.mark.parametrize(
    ("source", "change", "options", "message"),
    [
        ("arch:tiny-lcm", None, {}, "takes guidance as an embedding: it is an LCM already"),
        ("arch:tiny-sd", scheduled("LCMScheduler"), {}, "it was made for a few steps already"),
        ("arch:tiny-inpaint", None, {}, "is an inpainting model"),
        (
            "arch:tiny-sd",
            predicting("sample"),
            {},
            "predicts sample; an LCM is made of a model that predicts epsilon or v",
        ),
        ("arch:tiny-sd", flowing, {}, "'FlowMatchEulerDiscreteScheduler'"),
        ("arch:tiny-sd", SNR, {}, "zero terminal SNR: no signal is left"),
        (
            "arch:tiny-sd",
            None,
            {"teacher": "arch:tiny-sdxl"},
            "differ in scaling factor of the latents: 0.18215 and 0.13025",
        ),
        ("arch:tiny-sd", None, {"teacher": "arch:tiny-lcm"}, "differ in conditions of the U-Net"),
        ("arch:tiny-sd", None, {"w_min": 14.0}, "w_min is 14 and w_max 9.75; give both"),
        ("arch:tiny-sd", None, {"lora_out": "data/0.png"}, "is a file; name a folder"),
        ("arch:tiny-sd", None, {"lora_out": "nowhere/else"}, "the folder of"),
        ("arch:tiny-sd", None, {"precision": "fp16"}, "fp16 needs a GPU"),
        ("arch:tiny-sd", None, {"size": 96}, "draws multiples of 64"),
    ],
)
def test_what_cannot_become_an_lcm_is_refused(
    source: str, change: Any, options: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipeline = open_source(source)
    found = options_for(tmp_path, **options).check(change(pipeline) if change else pipeline)
    assert len(found) == 1 and message in str(found[0]), found


def test_data_without_captions_is_refused(tmp_path: Path) -> None:
    options = options_for(tmp_path)
    (tmp_path / "data" / "0.txt").unlink()
    assert "1 of 6 pictures have no caption" in str(options.check(open_source("arch:tiny-sd"))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; legal is from 1 to 1024"),
        ({"form": "lcm"}, "unknown value 'lcm'"),
        ({"w_min": 5.0, "w_max": 3.0}, "w_min 5 is greater than w_max 3"),
        ({"form": "full", "lora_out": "x"}, "lora_out is of a LoRA, which the full form does not make"),
        ({"form": "full", "alpha": 8.0}, "alpha is of a LoRA"),
        ({"teacher_precision": "fp16"}, "the teacher is the U-Net that is trained"),
        ({"loss": "l1"}, "unknown value 'l1'"),
        ({"prompts": ["x" * 200_000]}, "prompt of the validation has 200000 characters"),
    ],
)
def test_options_are_strict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(LcmPass, {"data": "x", **options}, "pass lcm")


def test_published_rates_are_the_defaults() -> None:
    assert (LcmPass("x").learning_rate, LcmPass("x", form="full").learning_rate) == (1e-4, 1e-6)
    made = LcmPass("x")
    assert (made.rank, made.batch, made.steps, made.ema, made.weight_decay) == (64, 12, 1000, 0.95, 0.0)


@pytest.mark.parametrize(("form", "passes"), [("full", 4 + 2), ("lora", 4 + 2)])
def test_what_is_foreseen(form: str, passes: int, tmp_path: Path) -> None:
    source = open_source("arch:tiny-sd")
    outline = options_for(tmp_path, form=form, steps=10, accumulate=3).outline(source)
    made = outline.pipeline
    assert sum(calls.count for calls in outline.calls) == passes * 10 * SMALL["batch"] * 3
    assert made.scheduler["_class_name"] == "LCMScheduler" and made.family.steps_default == 4
    assert (made.family.time_cond_dim, made.family.guidance_default) == ((256, 7.5) if form == "full" else (None, 1.0))
    weights = made.components["unet"].weights
    assert {weights.meta(name).dtype for name in weights.names()} == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"precision": "bf16", "checkpointing": True}, {"teacher_precision": "bf16"}])
def test_mixed_precision_and_checkpointing_change_the_loss_little(options: dict[str, Any], tmp_path: Path) -> None:
    """A teacher of its own; the first loss of float32 against that of the options, and gradients of the same layers."""
    found = {}
    for name, more in (("plain", {}), ("mixed", options)):
        made = options_for(tmp_path, teacher="arch:tiny-sd", **more)
        task = task_of(made, open_source("arch:tiny-sd"), tmp_path)
        stirred(task)
        with torch.autocast("cpu", torch.bfloat16, enabled=made.precision == "bf16"):
            loss, _ = task.loss(4, step_generator(0, 0))
        loss.backward()
        found[name] = (loss.item(), [p.grad.norm().item() for p in task.student.parameters() if p.grad is not None])
    assert found["mixed"][0] == pytest.approx(found["plain"][0], rel=0.05)
    np.testing.assert_allclose(found["mixed"][1], found["plain"][1], rtol=0.5, atol=1e-3)
