"""AsyncDenoiser on tiny diffusers pipelines, against the published mechanism: every module wrapped, features kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import diffship  # noqa: E402
from diffship.core.errors import ConfigError, RunnerError, UnsupportedError  # noqa: E402
from diffship.models.sources.arch_configs import SCHEDULERS, UNETS  # noqa: E402

# published modules by device; the lists for the other numbers are in tests/models/test_models_cuts.py
ROWS = {
    ("tiny-sd", 2): ("conv_in d0 d1 d2 d3 mid u0 u1.r0 u1.a0 u1.r1", "u1.a1 u1.r2 u1.a2 u1.s0 u2 u3 norm out"),
    ("tiny-sd", 3): (
        "conv_in d0 d1 d2 d3",
        "mid u0 u1 u2.r0 u2.a0 u2.r1 u2.a1 u2.r2",
        "u2.a2 u2.s0 u3 norm out",
    ),
    ("tiny-sdxl", 2): ("d2 mid u0.r0 u0.a0 u0.r1 u0.a1", "conv_in d0 d1 u0.r2 u0.a2 u0.s0 u1 u2 norm out"),
    ("tiny-sdxl", 3): ("d2 mid u0.r0", "u0.a0 u0.r1 u0.a1 u0.r2 u0.a2 u0.s0", "conv_in d0 d1 u1 u2 norm out"),
}
STEPS = 6


def module_of(unet: Any, name: str) -> Any:
    plain = {"mid": unet.mid_block, "conv_in": unet.conv_in, "norm": unet.conv_norm_out, "out": unet.conv_out}
    if name in plain:
        return plain[name]
    block, _, inner = name.partition(".")
    found = (unet.down_blocks if block[0] == "d" else unet.up_blocks)[int(block[1:])]
    kinds = {"r": "resnets", "a": "attentions", "s": "upsamplers"}
    return getattr(found, kinds[inner[0]])[int(inner[1:])] if inner else found


class Published:
    """The forward of a U-Net as AsyncDiff has it, on one process: for each simulated rank the whole network runs, with
    its own modules live and the others giving back what their owners made in the round before."""

    def __init__(self, unet: Any, rows: tuple[str, ...], times: list[Any], scheme: tuple[int, int, bool]) -> None:
        self.unet, self.times, self.ranks = unet, times, len(rows)
        self.stride, self.warm_up, self.shift = scheme
        self.live: set[int] = set()
        self.keep = True
        self.seen: dict[str, Any] = {}
        self.new: dict[str, Any] = {}
        self.step, self.next = 0, None
        self.whole: Callable[..., Any] = unet.forward
        for rank, row in enumerate(rows):
            for name in row.split():
                self.wrap(name, module_of(unet, name), rank)
        unet.forward = self.forward

    def wrap(self, name: str, module: Any, rank: int) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if rank not in self.live:
                return self.seen[name]
            made = inner(*args, **kwargs)
            if self.keep:
                self.new[name] = made
            return made

        module.forward = forward

    def run(self, live: set[int], sample: Any, time: Any, rest: Any, keep: bool = True) -> Any:
        self.live, self.keep = live, keep
        return self.whole(sample, time, **rest)[0]

    def forward(self, sample: Any, time: Any, **rest: Any) -> Any:
        i, self.step = self.step, self.step + 1
        assert float(time) == float(self.times[i])
        if i < self.warm_up:
            return (self.run(set(range(self.ranks)), sample, time, rest),)
        if (i - self.warm_up) % self.stride:
            return (self.next,)
        self.seen = dict(self.new)
        ahead = min(i + self.stride - 1, len(self.times) - 1) - self.shift
        made = [self.run({rank}, sample, self.times[ahead], rest) for rank in range(self.ranks)][-1]
        if self.stride == 1:
            return (made,)
        self.next = made
        return (self.run({self.ranks - 1}, sample, self.times[i - self.shift], rest, keep=False),)


def pipeline(name: str = "tiny-sd", kind: Any = None, scheduler: str = "DDIMScheduler") -> Any:
    """Only a U-Net and a scheduler; embeddings go in and latents come out."""
    torch.manual_seed(0)
    xl = name.endswith("xl")
    config = {key: value for key, value in UNETS[name].items() if not key.startswith("_")}
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if xl else ())))
    if not xl:
        none |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = (kind or (diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline))(
        **none,
        unet=diffusers.UNet2DConditionModel(**config).eval(),
        scheduler=getattr(diffusers, scheduler).from_config(SCHEDULERS["sd15"]),
    )
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, seed: int = 0, **more: Any) -> Any:
    rng = torch.Generator().manual_seed(seed)
    width = pipe.unet.config.cross_attention_dim
    words = {name: torch.randn(1, 7, width, generator=rng) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if hasattr(pipe, "text_encoder_2"):
        pooled = pipe.unet.config.projection_class_embeddings_input_dim - 6 * 8
        words |= {
            name: torch.randn(1, pooled, generator=rng)
            for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        }
    call = {"num_inference_steps": STEPS, "height": 64, "width": 128, "output_type": "latent", "guidance_scale": 3.0}
    return pipe(**words, **{**call, **more}, generator=rng).images


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stages"), ROWS, ids=str)
@pytest.mark.parametrize("scheme", [(1, 1, False), (1, 2, True), (2, 1, False), (2, 2, False), (2, 3, True)], ids=str)
def test_pictures_are_those_of_the_published_mechanism(name: str, stages: int, scheme: tuple[int, int, bool]) -> None:
    reference = pipeline(name)
    reference.scheduler.set_timesteps(STEPS)
    Published(reference.unet, ROWS[name, stages], list(reference.scheduler.timesteps), scheme)
    expected = draw(reference)
    pipe = pipeline(name)
    with diffship.AsyncDenoiser(pipe, stages, *scheme) as parallel:
        found = draw(pipe)
    assert parallel.cuts.homes == {2: (1, 0, 1), 3: (2, 0, 1, 2)}[stages] or name == "tiny-sd"
    assert torch.equal(found, expected)
    assert not torch.equal(found, draw(pipe)) and "forward" not in vars(pipe.unet)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers
@pytest.mark.parametrize(("scheduler", "calls"), [("PNDMScheduler", STEPS + 1), ("HeunDiscreteScheduler", 11)])
def test_more_calls_than_steps_are_those_of_the_published_mechanism(scheduler: str, calls: int) -> None:
    """The published code counts calls: PNDM makes its second one twice, Heun all but the last."""
    reference, pipe = pipeline(scheduler=scheduler), pipeline(scheduler=scheduler)
    reference.scheduler.set_timesteps(STEPS)
    times = list(reference.scheduler.timesteps)
    assert len(times) == calls
    published = Published(reference.unet, ROWS["tiny-sd", 2], times, (2, STEPS - 1, False))
    with diffship.AsyncDenoiser(pipe, 2, 2, STEPS - 1):
        found = draw(pipe)
    assert torch.equal(found, draw(reference)) and published.step == calls


@pytest.fixture(scope="module")
def pipe() -> Iterator[Any]:
    made = pipeline()
    yield made
    assert "forward" not in vars(made.unet)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "stride", "warm_up"), [(1, 1, 1), (2, 1, STEPS), (3, 2, STEPS + 2), (4, 1, STEPS), (5, 1, STEPS)]
)
def test_one_stage_or_a_warm_up_of_all_steps_is_the_plain_picture(
    pipe: Any, stages: int, stride: int, warm_up: int
) -> None:
    with diffship.AsyncDenoiser(pipe, stages, stride, warm_up):
        found = draw(pipe)
    assert torch.equal(found, draw(pipe))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers
@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_schedulers_that_repeat_timesteps_or_draw_noise_stay_in_step(scheduler: str) -> None:
    pipe = pipeline(scheduler=scheduler)
    with diffship.AsyncDenoiser(pipe, warm_up=2 * STEPS):
        exact = draw(pipe)
    with diffship.AsyncDenoiser(pipe):
        stale = draw(pipe)
    assert torch.equal(exact, draw(pipe)) and not torch.equal(stale, exact)


@pytest.mark.slow
def test_threads_draw_what_one_thread_draws_and_every_picture_begins_anew(pipe: Any) -> None:
    expected = {}
    for seed in (0, 1):
        with diffship.AsyncDenoiser(pipe, 3, 2):
            expected[seed] = draw(pipe, seed)
    with diffship.AsyncDenoiser(pipe, 3, 2, devices=["cpu"] * 4, timeout=60):
        assert all(torch.equal(draw(pipe, seed), expected[seed]) for seed in (0, 1, 0))


@pytest.mark.slow
def test_image_to_image_embeds_the_timesteps_that_are_left() -> None:
    """The published code counts them from the list's first, whatever strength is."""
    kind = diffusers.StableDiffusionImg2ImgPipeline
    call = {"image": torch.ones(1, 4, 8, 16), "strength": 0.7, "num_inference_steps": 10}
    plain, reference = pipeline(kind=kind), pipeline(kind=kind)
    reference.scheduler.set_timesteps(10)
    times = list(reference.scheduler.timesteps)[3:]
    Published(reference.unet, ROWS["tiny-sd", 2], times, (2, 1, True))
    with diffship.AsyncDenoiser(plain, 2, 2, 1, True):
        found = redraw(plain, call)
    assert torch.equal(found, redraw(reference, call))


def redraw(pipe: Any, call: dict[str, Any]) -> Any:
    words = torch.ones(1, 7, 32)
    generator = torch.Generator().manual_seed(3)
    return pipe(
        prompt_embeds=words, negative_prompt_embeds=-words, output_type="latent", generator=generator, **call
    ).images


@pytest.mark.slow
def test_the_forward_is_restored_after_a_fault_and_the_stage_is_named(pipe: Any) -> None:
    plain = draw(pipe)

    def stop(*_: Any) -> Any:
        raise KeyError("stop")

    with pytest.raises(KeyError), diffship.AsyncDenoiser(pipe):
        draw(pipe, callback_on_step_end=stop)
    handle = pipe.unet.up_blocks[3].resnets[0].register_forward_pre_hook(stop)
    for devices in (None, ["cpu", "cpu"]):
        with diffship.AsyncDenoiser(pipe, devices=devices):
            with pytest.raises(RunnerError, match=r"stage unet\.1 on device 1, step 1 of 6: 'stop'"):
                draw(pipe)
    handle.remove()
    assert torch.equal(draw(pipe), plain)


def freeu(pipe: Any) -> Callable[[], Any]:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return pipe.disable_freeu


def replaced(pipe: Any) -> Callable[[], Any]:
    block = pipe.unet.down_blocks[1]
    block.forward = block.forward
    return lambda: delattr(block, "forward")


def hooked(pipe: Any) -> Callable[[], Any]:
    return pipe.unet.up_blocks[1].attentions[0].register_forward_hook(print).remove


def compiled(pipe: Any) -> Callable[[], Any]:
    pipe.unet._compiled_call_impl = print
    return lambda: setattr(pipe.unet, "_compiled_call_impl", None)


def adapted(pipe: Any) -> Callable[[], Any]:
    pipe.unet._hf_peft_config_loaded = True
    return lambda: delattr(pipe.unet, "_hf_peft_config_loaded")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (freeu, "disable_freeu"),
        (replaced, r"forward of down_blocks\.1 is replaced"),
        (hooked, r"up_blocks\.1\.attentions\.0 has forward hooks"),
        (compiled, "the U-Net itself is compiled"),
        (adapted, "fuse_lora"),
    ],
)
def test_what_stages_would_not_heed_is_refused(pipe: Any, change: Callable[[Any], Any], why: str) -> None:
    early = diffship.AsyncDenoiser(pipe)
    undo = change(pipe)
    try:
        for make in (lambda: diffship.AsyncDenoiser(pipe), early.__enter__):
            with pytest.raises(UnsupportedError, match=why):
                make()
    finally:
        undo()
    with early, pytest.raises(UnsupportedError, match="the U-Net itself is replaced"):
        diffship.AsyncDenoiser(pipe)


@pytest.mark.slow
def test_calls_that_stages_would_not_heed_are_refused(pipe: Any) -> None:
    x, words = torch.zeros(1, 4, 8, 8), torch.zeros(1, 7, 32)
    pipe.scheduler.set_timesteps(4)
    first, second, *_ = pipe.scheduler.timesteps

    def halve(made: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        made._guidance_scale = 0.0
        return {"latents": values["latents"], "prompt_embeds": values["prompt_embeds"][-1:]}

    with diffship.AsyncDenoiser(pipe, devices=["cpu", "cpu"]), torch.no_grad():
        with pytest.raises(UnsupportedError, match="does not take mid_block_additional_residual, image_embeds"):
            pipe.unet(x, first, words, mid_block_additional_residual=x, added_cond_kwargs={"image_embeds": x})
        with pytest.raises(UnsupportedError, match="8 x 12 are not partitioned; both sides are multiples of 8"):
            pipe.unet(torch.zeros(1, 4, 8, 12), first, words)
        with pytest.raises(UnsupportedError, match="timestep 7, which its scheduler does not list"):
            pipe.unet(x, 7, words)
        with pytest.raises(UnsupportedError, match="one for all"):
            pipe.unet(torch.cat([x, x]), torch.stack([first, second]), torch.cat([words, words]))
        assert pipe.unet(x, first.expand(1), words).sample.shape == x.shape
        with pytest.raises(UnsupportedError, match=f"at timestep {first}, and {second} is due"):
            pipe.unet(x, first, words)
        with pytest.raises(UnsupportedError, match="no gradients"):
            pipe.unet(x.clone().requires_grad_(), first, words)
        with pytest.raises(UnsupportedError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
            pipe.unet(x, first, words)
        with pytest.raises(UnsupportedError, match="between two steps"):
            draw(pipe, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


@pytest.mark.slow
def test_what_cannot_be_asked_for(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="2 stages at stride 2 take 3 devices; got 2"):
        diffship.AsyncDenoiser(pipe, 2, 2, devices=["cpu", "cpu"])
    with pytest.raises(ConfigError, match="time_shift"):
        diffship.AsyncDenoiser(pipe, 1, time_shift=True)
    parallel, own = diffship.AsyncDenoiser(pipe), pipe.unet
    try:
        pipe.unet = pipeline().unet
        with pytest.raises(ConfigError, match="another U-Net"), parallel:
            pass
    finally:
        pipe.unet = own
    with pytest.raises(UnsupportedError, match="NoneType; a UNet2DConditionModel is cut"):
        diffship.AsyncDenoiser(object())


def in_halves(pipe: Any, forward: Callable[..., Any]) -> None:
    """The U-Net is called with the negative rows, then with the positive ones; `forward(half, ...)` computes either."""

    def run(sample: Any, time: Any, **rest: Any) -> Any:
        def rows(value: Any, half: int) -> Any:
            if isinstance(value, dict):
                return {name: rows(each, half) for name, each in value.items()}
            return value.chunk(2)[half] if isinstance(value, torch.Tensor) else value

        halves = [{name: rows(value, half) for name, value in rest.items()} for half in (0, 1)]
        return (torch.cat([forward(i, sample.chunk(2)[i], time, **halves[i])[0] for i in (0, 1)]),)

    pipe.unet.forward = run


@pytest.mark.slow
@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]])
def test_halves_of_guidance_are_the_picture_of_a_unet_that_is_called_for_each(pipe: Any, devices: Any) -> None:
    with diffship.AsyncDenoiser(pipe, 1, devices=devices, cfg_parallel=True):
        found, alone = draw(pipe), draw(pipe, guidance_scale=1.0)
    assert torch.equal(alone, draw(pipe, guidance_scale=1.0))  # one row, one device
    plain = pipe.unet.forward
    try:
        in_halves(pipe, lambda half, *args, **rest: plain(*args, **rest))
        assert torch.equal(found, draw(pipe))
    finally:
        del pipe.unet.forward
    assert torch.allclose(found, draw(pipe), atol=1e-4)


@pytest.mark.slow
def test_halves_of_guidance_may_be_stages_that_lag_behind() -> None:
    """2 x 3 devices, against the published mechanism on each half."""
    reference, pipe = pipeline(), pipeline()
    reference.scheduler.set_timesteps(STEPS)
    published = []
    for _ in range(2):
        other = pipeline().unet
        Published(other, ROWS["tiny-sd", 2], list(reference.scheduler.timesteps), (2, 2, True))
        published.append(other.forward)
    in_halves(reference, lambda half, *args, **rest: published[half](*args, **rest))
    with diffship.AsyncDenoiser(pipe, 2, 2, 2, True, devices=["cpu"] * 6, cfg_parallel=True):
        found = draw(pipe)
    assert torch.equal(found, draw(reference))
    with pytest.raises(ConfigError, match="2 stages at stride 2 for each half of guidance take 6 devices; got 3"):
        diffship.AsyncDenoiser(pipe, 2, 2, devices=["cpu"] * 3, cfg_parallel=True)
