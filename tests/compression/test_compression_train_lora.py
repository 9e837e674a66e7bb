"""The train-lora pass: its loss against diffusers' arithmetic, its files in stock clients, stops, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from train_lora_cases import SMALL, options_for, task_of, tiny

from diffship.compress import compress
from diffship.compression.distill import DistillPass
from diffship.compression.lcm import LcmPass
from diffship.compression.lora import LoraPass
from diffship.compression.train_lora import TrainLoraPass
from diffship.core.errors import Cancelled, ConfigError
from diffship.core.job import Job
from diffship.core.strict import load
from diffship.core.weights import source_digest
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.opening import open_source
from diffship.training.adapters import DOWN, TARGETS, UP
from diffship.training.distillation import DistillationTask
from diffship.training.loop import step_generator

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def digest(pipeline: Pipeline) -> str:
    return source_digest(pipeline.components["unet"].weights)


def stirred(task: DistillationTask) -> None:
    """Random up matrices: fresh ones are zero, and a fault in what they multiply would not be seen."""
    draw = torch.Generator().manual_seed(5)
    for name, value in task.student.named_parameters():
        if name.endswith(UP):
            value.data.add_(0.1 * torch.randn(value.shape, generator=draw))


def published_loss(task: DistillationTask, source: Pipeline, targets: tuple[str, ...], alpha: float) -> float:
    """One loss as diffusers' training script computes it: its U-Net, its scheduler, peft's layers by `add_adapter`.

    Draws, latents and captions are the task's, which are tested by themselves; so are the values of the LoRA.
    """
    unet = source.components["unet"].module().get_submodule("inner")
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=list(targets)))  # type: ignore[operator]
    theirs = {name: value for name, value in unet.named_parameters() if ".lora_" in name}
    ours = {name: value for name, value in task.student.inner.named_parameters() if ".lora_" in name}
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        value.data.copy_(ours[name].data)
    kind = source.family.prediction_type
    scheduler = diffusers.DDPMScheduler(**BETAS, prediction_type=kind)
    samples = task.draws(5, step_generator(3, 1))
    mean, deviation = task.latents.take([s.row for s in samples], [s.flip for s in samples])
    clean = mean + deviation * torch.stack([s.posterior for s in samples])
    noise, times = torch.stack([s.noise for s in samples]), torch.tensor([s.step for s in samples])
    given = task.captions([s.caption for s in samples])
    more = dict(zip(("text_embeds", "time_ids"), given[1:], strict=False)) or None
    with torch.no_grad():
        out = unet(scheduler.add_noise(clean, noise, times), times, given[0], added_cond_kwargs=more).sample
    target = noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, times)
    return torch.nn.functional.mse_loss(out, target).item()


def velocity(pipeline: Pipeline) -> Pipeline:
    """The same model, said to predict v."""
    scheduler = {**pipeline.scheduler, "prediction_type": "v_prediction"}
    return replace(pipeline, scheduler=scheduler, family=replace(pipeline.family, prediction_type="v_prediction"))


@pytest.mark.parametrize(
    ("source", "change", "targets"),
    [
        ("arch:tiny-sd", None, "attention"),
        pytest.param("arch:tiny-sd", velocity, "all", marks=pytest.mark.slow),
        pytest.param("arch:tiny-sdxl", None, "all", marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_that_of_diffusers_script(source: str, change: Any, targets: str, tmp_path: Path) -> None:
    pipeline = open_source(source)
    pipeline = change(pipeline) if change else pipeline
    task = task_of(options_for(tmp_path, targets=targets, alpha=6.0, drop=0.3), pipeline, tmp_path)
    stirred(task)
    names = ("to_q", "to_k", "to_v", "to_out.0") if targets == "attention" else TARGETS
    wanted = published_loss(task, pipeline, names, alpha=6.0)
    made, _ = task.loss(5, step_generator(3, 1))
    assert made.item() == pytest.approx(wanted, rel=2e-5)
    made.backward()
    network = task.student.get_submodule("inner")
    trained = {name for name, value in network.named_parameters() if value.grad is not None and value.grad.any()}
    assert trained == {name for name, _ in network.named_parameters() if name.endswith((DOWN, UP))}
    layers = {name.removesuffix(DOWN) for name in trained if name.endswith(DOWN)}
    assert any("conv1" in layer for layer in layers) == (targets == "all") and any("attn2" in layer for layer in layers)


@pytest.mark.slow
def test_all_timesteps_are_trained(tmp_path: Path) -> None:
    task = task_of(options_for(tmp_path), open_source("arch:tiny-sd"), tmp_path)
    steps = [sample.step for sample in task.draws(3000, step_generator(3, 1))]
    assert (min(steps), max(steps)) == pytest.approx((0, 999), abs=3) and len(set(steps)) > 900


@pytest.mark.slow
def test_a_run_learns_stops_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    source, options = tiny(), options_for(tmp_path, steps=12, batch=6, rate=3e-2, targets="all")
    made = options.run(source, Job(tmp_path / "whole"))
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 8

    with pytest.raises(Cancelled, match="run the same command again"):
        options.run(source, Job(tmp_path / "parts", cancel=stop))
    (run,) = (tmp_path / "parts").glob("train-lora-*")
    (reached,) = {float(value) for name, value in load_file(run / "state.safetensors").items() if "step/" in name}
    assert 0 < reached < 12
    assert digest(options.run(source, Job(tmp_path / "parts"))) == digest(made)
    tasks = [task_of(options, pipeline, tmp_path) for pipeline in (source, made)]
    before, after = (task.loss(32, step_generator(7, 0))[0].item() for task in tasks)
    assert after < 0.9 * before, (before, after)
    assert (run / "curve.jsonl").is_file() and (run / "validation-000012.png").is_file()
    entry = made.history[-1]
    assert (entry["pass"], entry["rank"], entry["data"], entry["pictures"]) == ("train-lora", 3, "data", 6)
    assert (made.scheduler, made.family) == (source.scheduler, source.family)
    again = open_source(str(save(made, tmp_path / "model")))
    assert digest(again) == digest(made)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Pipeline, Path]:
    """(source, the source with a style added, folder of the files of that style and of an LCM-LoRA).

    Rank, alpha and layers of the two differ.
    """
    folder, source = tmp_path_factory.mktemp("style"), tiny()
    options = options_for(folder, alpha=6.0, lora_out=str(folder / "style"), steps=3)
    made = options.run(source, Job(folder / "job"))
    few = {"rank": 5, "steps": 3, "batch": 4, "rate": 1e-2, "prompts": ("red apple",)}
    LcmPass(options.data, **few, lora_out=str(folder / "lcm")).run(source, Job(folder / "job"))
    return source, made, folder


def stock(source: Pipeline, folder: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(save(source, folder / "base"))


def answer(network: Any, pipeline: Pipeline) -> Any:
    """What diffusers' own U-Net gives for a fixed input."""
    feeds = {name: torch.from_numpy(value) for name, value in pipeline.components["unet"].example(4).items()}
    with torch.no_grad():
        return network(feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"]).sample.numpy()


def of_ours(pipeline: Pipeline) -> Any:
    return np.asarray(pipeline.components["unet"].load().run(pipeline.components["unet"].example(4))["out_sample"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a .peft_config.")  # two adapters are what is asked for
def test_style_at_eight_tenths_and_lcm_whole_are_what_diffusers_adds(
    trained: tuple[Pipeline, Pipeline, Path], tmp_path: Path
) -> None:
    """The oracle keeps both adapters apart and weighs their outputs (`set_adapters`); ours are fused."""
    source, made, folder = trained
    theirs = stock(source, tmp_path)
    for name in ("style", "lcm"):
        theirs.load_lora_weights(folder / name, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    answers = {}
    for weights in ((1.0, 0.0), (0.8, 1.0)):
        theirs.set_adapters(["style", "lcm"], list(weights))
        answers[weights] = answer(theirs.unet, source)
    np.testing.assert_allclose(of_ours(made), answers[1.0, 0.0], atol=1e-5)
    files = tuple(str(folder / name / "pytorch_lora_weights.safetensors") for name in ("style", "lcm"))
    fused = compress(source, [LoraPass(files, (0.8, 1.0), sampler="lcm")])
    np.testing.assert_allclose(of_ours(fused), answers[0.8, 1.0], atol=1e-5)
    assert np.abs(answers[0.8, 1.0] - answers[1.0, 0.0]).max() > 1e-2 < np.abs(of_ours(made) - of_ours(source)).max()
    assert (fused.scheduler["_class_name"], fused.family.steps_default) == ("LCMScheduler", 4)


@pytest.mark.slow
def test_every_form_of_the_file_is_the_result(trained: tuple[Pipeline, Pipeline, Path], tmp_path: Path) -> None:
    source, made, folder = trained
    wanted = of_ours(made)
    for name in ("pytorch_lora_weights.safetensors", "kohya/kohya.safetensors", "peft/adapter_model.safetensors"):
        fused = compress(source, [LoraPass((str(folder / "style" / name),))])
        np.testing.assert_allclose(of_ours(fused), wanted, atol=1e-5, err_msg=name)
    theirs = stock(source, tmp_path)
    by_peft = peft.PeftModel.from_pretrained(theirs.unet, folder / "style" / "peft")
    np.testing.assert_allclose(answer(by_peft, source), wanted, atol=1e-5)
    kohya = stock(source, tmp_path / "again")
    kohya.load_lora_weights(folder / "style" / "kohya", weight_name="kohya.safetensors")
    np.testing.assert_allclose(answer(kohya.unet, source), wanted, atol=1e-5)


@pytest.mark.slow
def test_the_command_line_trains_and_combines(tmp_path: Path, command: Callable[..., dict[str, Any]]) -> None:
    data = options_for(tmp_path).data
    values = {**SMALL, "data": data, "prompts": "apple", "lora_out": tmp_path / "style"}
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    foreseen = command("compress", "arch:tiny-sd", "--pass", "train-lora", *words, "--dry-run")
    assert (
        foreseen["exit_code"] == 0 and foreseen["plan"]["passes"][0]["hours"] > 0 and not (tmp_path / "style").exists()
    )
    made = command("compress", "arch:tiny-sd", "--pass", "train-lora", *words, "-o", tmp_path / "model")
    assert made["exit_code"] == 0
    again = command("compress", "arch:tiny-sd", "--pass", "train-lora", *words, "-o", tmp_path / "other")
    assert again["exit_code"] == 2 and "exists already" in again["error"]["message"]
    file = tmp_path / "style" / "pytorch_lora_weights.safetensors"
    both = ("--set", f"files={file}", "--set", "weights=0.8")
    assert command("compress", "arch:tiny-sd", "--pass", "lora", *both, "-o", tmp_path / "fused")["exit_code"] == 0


def scheduled(name: str) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: replace(pipeline, scheduler={**pipeline.scheduler, "_class_name": name})


def flowing(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


@pytest.mark.parametrize(
    ("source", "change", "options", "message"),
    [
        ("arch:tiny-lcm", None, {}, "draws in few steps, and this loss would train that away"),
        ("arch:tiny-sd", scheduled("LCMScheduler"), {}, "draws in few steps"),
        ("arch:tiny-sd", scheduled("TCDScheduler"), {}, "draws in few steps"),
        ("arch:tiny-sd", flowing, {}, "'FlowMatchEulerDiscreteScheduler'"),
        ("arch:tiny-sd", velocity, {"weighting": "min-snr-5-capped"}, "predicts v_prediction; min-snr-5-capped weighs"),
        ("arch:tiny-inpaint", None, {}, "is an inpainting model"),
        ("arch:tiny-sd", None, {"lora_out": "data/0.png"}, "is a file; name a folder"),
        ("arch:tiny-sd", None, {"size": 96}, "draws multiples of 64"),
    ],
)
def test_what_takes_no_lora_of_a_style_is_refused(
    source: str, change: Any, options: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = open_source(source)
    found = options_for(tmp_path, **options).check(change(pipeline) if change else pipeline)
    assert len(found) == 1 and message in str(found[0]), found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; legal is from 1 to 1024"),
        ({"targets": "mlp"}, "unknown value 'mlp'"),
        ({"prompts": ["x" * 200_000]}, "prompt of the validation has 200000 characters"),
    ],
)
def test_options_are_strict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(TrainLoraPass, {"data": "x", **options}, "pass train-lora")


def test_a_teacher_without_the_style_would_train_it_away(tmp_path: Path) -> None:
    source = open_source("arch:tiny-sd")
    styled = replace(source, history=({"pass": "train-lora", "data": "drawings"},))
    found = DistillPass(options_for(tmp_path).data, features="none").check(styled)
    assert len(found) == 1 and "a LoRA (drawings) was fused before" in str(found[0]), found
