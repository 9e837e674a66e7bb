"""The distill pass: its losses against direct computations, what it draws, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from distill_cases import SMALL, pictures_in, student_of, task_of, tiny_task
from safetensors.torch import load_file
from torch.nn import functional as F

from diffship.compression.distill import DistillPass
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.strict import load
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline, converted
from diffship.models.saving import save
from diffship.models.sources.opening import open_source
from diffship.sampling.encode import encode
from diffship.training.diffusion import alphas_cumprod
from diffship.training.distillation import DistillationTask, Draws, Forward
from diffship.training.distillation_data import Captions
from diffship.training.loop import Schedule, step_generator, train
from diffship.training.paired import PairedPictures

ATTENTION = "transformer_blocks.0.attn1"
UP = [f"up_blocks.{block}" for block in range(4)]
HAND = {
    "blocks": (
        ["down_blocks.0", "down_blocks.1", "down_blocks.2.attentions.0.proj_out", *UP[:3]],
        ["down_blocks.0", "down_blocks.1", "down_blocks.2.attentions.1.proj_out", *UP[1:]],
    ),
    "self-attention": (
        [f"down_blocks.{block}.attentions.0.{ATTENTION}" for block in range(3)]
        + [f"up_blocks.{block}.attentions.{layer}.{ATTENTION}" for block in range(3) for layer in (0, 1)],
        [f"down_blocks.{block}.attentions.0.{ATTENTION}" for block in range(3)]
        + [f"up_blocks.{block + 1}.attentions.{layer}.{ATTENTION}" for block in range(3) for layer in (0, 2)],
    ),
    "none": ([], []),
}


def called(network: Any, names: list[str], feeds: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and features of a diffusers U-Net, by hooks of this test's own."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: found.__setitem__(name, out[0] if isinstance(out, tuple) else out)
        )
        for name in names
    ]
    with torch.no_grad():
        out = network(feeds[0], feeds[1], feeds[2]).sample
    for handle in handles:
        handle.remove()
    return out, [found[name] for name in names]


def noised(task: DistillationTask, count: int, seed: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Feeds and noise of a batch, the noise added by diffusers' scheduler."""
    samples = task.draws(count, step_generator(seed, 0))
    mean, std = task.latents.take([s.row for s in samples], [s.flip for s in samples])
    clean = mean + std * torch.stack([s.posterior for s in samples])
    noise, steps = torch.stack([s.noise for s in samples]), torch.tensor([s.step for s in samples])
    noisy = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").add_noise(
        clean, noise, steps
    )
    return (noisy, steps, *task.captions([s.caption for s in samples])), noise


@pytest.mark.slow
@pytest.mark.parametrize("features", ["blocks", "self-attention", "none"])
def test_the_loss_is_the_sum_of_its_published_terms(features: str, tmp_path: Path) -> None:
    task = tiny_task(tmp_path, features=features, w_task=0.5, w_out=2.0, w_feat=3.0)
    feeds, noise = noised(task, 3, seed=5)
    own, other = HAND[features]
    output, mine = called(task.student.inner, own, feeds)
    expected, theirs = called(task.teacher.inner, other, feeds)
    terms = {"task": 0.5 * (output - noise).square().mean(), "out": 2.0 * (output - expected).square().mean()}
    if features != "none":
        terms["feat"] = 3.0 * sum((a - b).square().mean() for a, b in zip(mine, theirs, strict=True))
    loss, figures = task.loss(3, step_generator(5, 0))
    assert figures == pytest.approx({name: float(term) for name, term in terms.items()}, rel=1e-4)
    assert loss.item() == pytest.approx(float(sum(terms.values())), rel=1e-4)
    loss.backward()
    assert all(value.grad is not None for value in task.student.parameters())
    assert all(value.grad is None for value in task.teacher.parameters())


@pytest.mark.slow
def test_min_snr_weighs_each_sample(tmp_path: Path) -> None:
    task = tiny_task(tmp_path, features="none", weighting="min-snr-5-capped", w_out=0.0)
    feeds, noise = noised(task, 4, seed=6)
    output, _ = called(task.student.inner, [], feeds)
    alpha = alphas_cumprod()[feeds[1]]
    snr = alpha / (1 - alpha)
    weight = torch.minimum(snr, torch.tensor(5.0)) / snr + torch.minimum(1 / snr, torch.tensor(10.0))
    expected = (weight * (output - noise).square().mean((1, 2, 3))).mean()
    assert task.loss(4, step_generator(6, 0))[0].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_forward_process_is_diffusers(prediction: str) -> None:
    reference = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    forward = Forward(alphas_cumprod(), prediction)
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(forward.noisy(clean, noise, steps), reference.add_noise(clean, noise, steps))
    wanted = {"epsilon": noise, "v_prediction": reference.get_velocity(clean, noise, steps), "sample": clean}
    torch.testing.assert_close(forward.target(clean, noise, steps), wanted[prediction])


@pytest.mark.slow
def test_the_teacher_rests_where_no_term_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task(tmp_path, w_out=0.0, w_feat=0.0)
    monkeypatch.setattr(task, "_taught", lambda feeds: pytest.fail("the teacher was called"))
    assert set(task.loss(2, step_generator(0, 0))[1]) == {"task"}


@pytest.mark.slow
def test_latents_are_those_of_diffusers_held_or_not(tmp_path: Path) -> None:
    held = tiny_task(tmp_path, flip=True)
    fresh = tiny_task(tmp_path, flip=True, cache_gib=0)
    rows, flips = [4, 0, 4], [False, True, True]
    for first, second in zip(held.latents.take(rows, flips), fresh.latents.take(rows, flips), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert type(held.latents) is not type(fresh.latents)
    folder = save(open_source("arch:tiny-sd"), tmp_path / "tiny")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    pixels = torch.from_numpy(held.draws.pictures.pixels(rows, flips)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    mean, std = held.latents.take(rows, flips)
    factor = vae.config.scaling_factor
    torch.testing.assert_close(mean, posterior.mean * factor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["arch:tiny-sd", "arch:tiny-sdxl"])
def test_captions_are_encoded_as_for_drawing(source: str) -> None:
    pipeline = open_source(source)
    made = Captions(pipeline, 64, torch.device("cpu"))(["red apple", None])
    with PipelineModel(pipeline) as model:
        drawn = encode(model, "red apple", None, (64, 64), 5.0)
    assert drawn.negative is not None
    wanted = (drawn.positive, drawn.negative)
    fields = ("encoder_hidden_states", "text_embeds", "time_ids")[: len(made)]
    for tensor, field in zip(made, fields, strict=True):
        for row, condition in zip(tensor.numpy(), wanted, strict=True):
            np.testing.assert_allclose(row, condition[field], rtol=1e-4, atol=1e-5)
    assert len(made) == (3 if "xl" in source else 1)


def test_batches_are_pieces_of_larger_ones(tmp_path: Path) -> None:
    draws = Draws(PairedPictures.open(pictures_in(tmp_path), 64), range(1000), (4, 8, 8), drop=0.5, flip=True)
    one, two = step_generator(1, 2), step_generator(1, 2)
    whole, parts = draws(6, one), [*draws(2, two), *draws(4, two)]
    for a, b in zip(whole, parts, strict=True):
        assert (a.row, a.flip, a.caption, a.step) == (b.row, b.flip, b.caption, b.step)
        assert torch.equal(a.noise, b.noise) and torch.equal(a.posterior, b.posterior)
    many = draws(400, step_generator(3, 0))
    assert 120 < sum(draw.caption is None for draw in many) < 280
    assert 120 < sum(draw.flip for draw in many) < 280
    assert {draw.row for draw in many} == set(range(6))
    assert len({draw.step for draw in many}) > 250


def first_gradients(task: DistillationTask, folder: Path, batch: int, accumulate: int) -> dict[str, torch.Tensor]:
    """What AdamW's first moment holds after one step: a tenth of the gradient, as nothing is clipped."""
    train(task, Schedule(1, batch, 1e-4, clip=1e9, accumulate=accumulate, betas=(0.9, 0.999)), folder)
    held = load_file(folder / "state.safetensors")
    return {name: value for name, value in held.items() if name.startswith("exp_avg/")}


def assert_near(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and len(first) > 100
    largest = max(value.abs().max().item() for value in first.values())
    assert largest > 0
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.slow
def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    made = [
        first_gradients(tiny_task(tmp_path), tmp_path / f"{batch}x{times}", batch, times)
        for batch, times in ((6, 1), (2, 3))
    ]
    assert_near(*made)


@pytest.mark.slow
@pytest.mark.parametrize("features", ["blocks", "self-attention"])
def test_checkpointing_changes_no_gradient(features: str, tmp_path: Path) -> None:
    made = []
    for checkpointing in (False, True):
        task = tiny_task(tmp_path, features=features, checkpointing=checkpointing)
        assert task.student.inner.is_gradient_checkpointing is checkpointing
        made.append(first_gradients(task, tmp_path / str(checkpointing), 3, 1))
    assert_near(*made)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, on numpy 2
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_step_distilled_teachers_timesteps_are_diffusers(steps: int) -> None:
    teacher = open_source("arch:tiny-sdxl")
    reference = diffusers.EulerDiscreteScheduler.from_config(dict(teacher.scheduler), timestep_spacing="trailing")
    reference.set_timesteps(steps)
    found = DistillPass("data", teacher_steps=steps, w_task=0.0).timesteps(teacher)
    assert found == reference.timesteps.round().long().tolist()
    assert found[0] == 999 and len(found) == steps


@pytest.mark.slow
def test_a_few_step_student_learns_the_teachers_output_at_its_steps(tmp_path: Path) -> None:
    options = DistillPass(
        str(pictures_in(tmp_path / "data")),
        w_task=0.0,
        teacher_steps=4,
        features="none",
        teacher="arch:tiny-sdxl",
        **SMALL,
    )
    student = open_source("arch:tiny-sdxl")
    task = task_of(options, student, Job(tmp_path / "job"))
    assert {draw.step for draw in task.draws(64, step_generator(0, 0))} == {999, 749, 499, 249}
    assert task.loss(2, step_generator(0, 1))[0].item() == pytest.approx(0, abs=1e-10)  # its own teacher
    with torch.no_grad():
        task.student.inner.conv_out.weight.add_(0.05)
    before = task.loss(16, step_generator(9, 0))[0].item()
    train(task, Schedule(30, 4, 1e-3, warmup=1), tmp_path / "run")
    assert task.loss(16, step_generator(9, 0))[0].item() < 0.8 * before


def with_scheduler(pipeline: Pipeline) -> Pipeline:
    return dataclasses.replace(pipeline, scheduler={**pipeline.scheduler, "beta_end": 0.02})


def with_family(**changes: Any) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: dataclasses.replace(pipeline, family=dataclasses.replace(pipeline.family, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (with_scheduler, {}, "student and teacher arch:tiny-sd differ in betas"),
        (with_family(prediction_type="v_prediction"), {}, "differ in prediction type: v_prediction and epsilon"),
        (with_family(latent_channels=8, unet_channels=8), {}, "differ in latent channels: 8 and 4"),
        (with_family(text_width=64), {}, "differ in text width: 64 and 32"),
        (with_family(scaling_factor=0.13), {}, "differ in scaling factor"),
        (None, {"teacher": "arch:tiny-sdxl"}, "student and teacher arch:tiny-sdxl differ in"),
        (None, {"teacher": "nowhere at all"}, "'nowhere at all' does not exist"),
        (None, {"size": 100}, "sd draws multiples of 64"),
        (with_family(prediction_type="v_prediction"), {"weighting": "min-snr-5-capped"}, "predicts v_prediction"),
    ],
    ids=["betas", "prediction", "channels", "width", "scaling", "family", "nowhere", "size", "weighting"],
)
def test_a_teacher_or_option_that_does_not_fit_is_refused(
    change: Callable[[Pipeline], Pipeline] | None, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    student = open_source("arch:tiny-sd")
    step = DistillPass(str(pictures_in(tmp_path)), **options)
    problems = step.check(change(student) if change else student)
    assert any(message in str(problem) for problem in problems), problems


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("arch:tiny-lcm", "takes guidance as an embedding (LCM); distill first"),
        ("arch:tiny-inpaint", "is an inpainting"),
    ],
)
def test_students_of_other_kinds_are_refused(source: str, message: str, tmp_path: Path) -> None:
    problems = DistillPass(str(pictures_in(tmp_path))).check(open_source(source))
    assert any(message in str(problem) for problem in problems), problems


@pytest.mark.slow
def test_data_without_captions_and_fp16_on_a_cpu_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for caption in pictures_in(tmp_path).glob("*.txt"):
        caption.unlink()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    problems = DistillPass(str(tmp_path), precision="fp16").check(open_source("arch:tiny-sd"))
    assert [problem.part for problem in problems] == ["", "data"]
    assert "6 of 6 pictures have no caption" in str(problems[1]) and "needs a GPU" in str(problems[0])


@pytest.mark.slow
def test_processes_share_a_batch_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    (problem,) = DistillPass(str(pictures_in(tmp_path)), batch=4).check(open_source("arch:tiny-sd"))
    assert "batch 4 cannot be shared by 3 processes" in str(problem)


@pytest.mark.slow
def test_what_fits_has_no_problem_and_tells_its_calls(tmp_path: Path) -> None:
    student = student_of(open_source("arch:tiny-sd"))
    step = DistillPass(str(pictures_in(tmp_path)), steps=10, batch=3, accumulate=2)
    assert step.check(student) == []
    outline = step.outline(student)
    shapes = [
        {name: weights.meta(name).shape for name in weights.names()}
        for weights in (made.components["unet"].weights for made in (outline.pipeline, student))
    ]
    assert shapes[0] == shapes[1] and outline.pipeline.history == student.history
    assert [calls.count for calls in outline.calls] == [180, 60]
    assert outline.calls[1].part.config["layers_per_block"] == 2
    lone = dataclasses.replace(step, w_out=0.0, features="none", checkpointing=True).outline(student)
    assert [calls.count for calls in lone.calls] == [240]


@pytest.mark.slow
def test_what_is_foreseen_of_a_half_precision_student_is_float32(tmp_path: Path) -> None:
    half = converted(student_of(open_source("arch:tiny-sd")), "float16")
    outline = DistillPass(str(pictures_in(tmp_path / "data")), **SMALL).outline(half)
    kinds = {
        name: {part.weights.meta(tensor).dtype for tensor in part.weights.names()}
        for name, part in outline.pipeline.components.items()
    }
    assert kinds["unet"] == {"float32"} and kinds["text_encoder"] == {"float16"}


def test_a_model_from_a_folder_names_its_teacher(tmp_path: Path) -> None:
    student = open_source(str(save(open_source("arch:tiny-sd"), tmp_path / "model")))
    (problem,) = DistillPass(str(pictures_in(tmp_path / "data"))).check(student)
    assert "the model was read from a folder (model); name the teacher: teacher=SOURCE" in str(problem)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_task": 0, "w_out": 0, "w_feat": 0}, "all losses have weight 0"),
        ({"w_task": 0, "w_out": 0, "features": "none"}, "all losses have weight 0"),
        ({"teacher_steps": 4}, "teacher_steps=4 with w_task=1"),
        ({"features": "block"}, "did you mean 'blocks'"),
        ({"ema": 1.0}, "ema is 1.0; legal is from 0 to 0.999999"),
        ({"learning_rate": 1}, "unknown key 'learning_rate'"),
    ],
)
def test_options_are_strict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(DistillPass, {"data": "x", **options}, "pass distill")


@pytest.mark.slow
def test_a_half_precision_teacher_gives_nearly_the_same(tmp_path: Path) -> None:
    full, half = tiny_task(tmp_path), tiny_task(tmp_path, teacher_precision="bf16")
    assert next(half.teacher.parameters()).dtype == torch.bfloat16
    a, b = (task.loss(4, step_generator(0, 0))[1] for task in (full, half))
    assert a == pytest.approx(b, rel=0.1)
    assert a["out"] != b["out"] and a["task"] == b["task"]
    assert F.mse_loss(*(next(task.student.parameters()) for task in (full, half))).item() == 0
