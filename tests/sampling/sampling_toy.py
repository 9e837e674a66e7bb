"""A Model of numpy runners: tiny fixed maps that mix every input, elementwise over a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffship.core.family import Family
from diffship.core.registry import SAMPLERS, load
from diffship.core.runner import Handle
from diffship.core.spec import TensorSpec
from diffship.sampling.tokenizer import Tokens

SD = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
# schedulers of models that were trained on another noise than that of betas
OTHERS = {
    "edm": {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"},
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True},
}
# one sampler of each behaviour: plain, with history, with noise, with several calls a step
SOME = ("ddim", "dpmpp-2m", "dpmpp-sde", "euler-a", "heun", "lcm", "pndm", "unipc")
WIDTH = 8
Feeds = Mapping[str, Any]


class ToyRunner:
    """Runs a function; remembers how often it was called, put and closed."""

    def __init__(
        self, inputs: dict[str, tuple[Any, ...]], outputs: list[str], function: Callable[[Feeds], Any]
    ) -> None:
        self.inputs = tuple(TensorSpec(name, "float32", shape) for name, shape in inputs.items())
        self.outputs = tuple(TensorSpec(name, "float32", ("batch_size",)) for name in outputs)
        self.function = function
        self.calls: list[dict[str, tuple[int, ...]]] = []
        self.puts = 0

    def run(self, feeds: Feeds) -> dict[str, Any]:
        assert set(feeds) == {spec.name for spec in self.inputs}
        plain = {name: feed.value if isinstance(feed, Handle) else feed for name, feed in feeds.items()}
        self.calls.append({name: tuple(array.shape) for name, array in plain.items()})
        return dict(self.function(plain))

    def put(self, array: Any) -> Handle:
        self.puts += 1
        return Handle(array, tuple(array.shape))

    def close(self) -> None:
        pass


def text(feeds: Feeds) -> dict[str, Any]:
    states = np.sin(feeds["input_ids"][..., None] * np.arange(1, WIDTH + 1)).astype(np.float32)
    return {"last_hidden_state": states, "pooler_output": states[:, 0]}


def text_wide(feeds: Feeds) -> dict[str, Any]:
    states = text(feeds)["last_hidden_state"]
    layers = {f"hidden_states.{i}": states * np.float32(i + 1) for i in range(3)}
    return {**layers, "last_hidden_state": states, "text_embeds": states[:, 0] * 2}


def unet(feeds: Feeds) -> dict[str, Any]:
    x = feeds["sample"]
    push = feeds["timestep"].reshape(-1) / np.float32(1000)
    for name, array in feeds.items():
        if name not in ("sample", "timestep"):
            push = push + np.tanh(array.reshape(len(array), -1).sum(1) / np.float32(50))
    mixed = x[:, :4] * np.float32(0.7) + np.roll(x, 1, axis=-1)[:, -4:] * np.float32(0.2)
    return {"out_sample": np.tanh(mixed + push[:, None, None, None]).astype(np.float32)}


def vae_decode(feeds: Feeds) -> dict[str, Any]:
    return {"sample": np.tanh(feeds["latent_sample"][:, :3].repeat(8, 2).repeat(8, 3) * np.float32(0.2))}


def vae_encode(feeds: Feeds) -> dict[str, Any]:
    means = feeds["sample"][:, :, ::8, ::8]
    return {"latent_parameters": np.concatenate([means, means[:, :1], means - 3, means[:, :1] - 3], 1)}


class ToyModel:
    """`kind` is sd, sdxl, lcm, inpaint, or, for the noise of an sd model, edm or flow."""

    def __init__(self, kind: str = "sd", **scheduler: Any) -> None:
        self.name, self.digest = f"toy-{kind}", "0123456789abcdef" * 4
        self.family = Family(
            name="sdxl" if kind == "sdxl" else "sd",
            default_size=64,
            text_width=2 * WIDTH if kind == "sdxl" else WIDTH,
            pooled_width=WIDTH if kind == "sdxl" else None,
            time_ids=6 if kind == "sdxl" else None,
            time_cond_dim=256 if kind == "lcm" else None,
            unet_channels=9 if kind == "inpaint" else 4,
            force_zeros_for_empty_prompt=kind == "sdxl",
            steps_default=4,
            prediction_type={"edm": "v_prediction", "flow": "flow"}.get(kind, "epsilon"),
        )
        self.scheduler = {**OTHERS.get(kind, SD), **scheduler}
        self.released: list[str] = []
        self.runners = self._runners(kind)
        self.parts = frozenset(self.runners)
        self.digests = {part: f"{number}" * 64 for number, part in enumerate(sorted(self.parts))}
        self.tokenizers = {"tokenizer": letters, "tokenizer_2": letters}

    def use(self, part: str) -> ToyRunner:
        return self.runners[part]

    def release(self, part: str) -> None:
        self.released.append(part)

    def close(self) -> None:
        pass

    def _runners(self, kind: str) -> dict[str, ToyRunner]:
        image = ("batch_size", 3, "sample_height", "sample_width")
        latent = ("batch_size", 4, "latent_height", "latent_width")
        ids = {"input_ids": ("batch_size", "sequence_length")}
        states = ("batch_size", "sequence_length", self.family.text_width)
        inputs: dict[str, tuple[Any, ...]] = {
            "sample": ("batch_size", self.family.unet_channels, "height", "width"),
            "timestep": ("batch_size",),
            "encoder_hidden_states": states,
        }
        wide = [f"hidden_states.{i}" for i in range(3)]
        runners = {
            "vae_decoder": ToyRunner({"latent_sample": latent}, ["sample"], vae_decode),
            "vae_encoder": ToyRunner({"sample": image}, ["latent_parameters"], vae_encode),
            "text_encoder": ToyRunner(ids, ["last_hidden_state"], text),
        }
        if kind == "sdxl":
            inputs |= {"text_embeds": ("batch_size", WIDTH), "time_ids": ("batch_size", 6)}
            runners["text_encoder"] = ToyRunner(ids, wide, text_wide)
            runners["text_encoder_2"] = ToyRunner(ids, ["text_embeds", *wide], text_wide)
        if kind == "lcm":
            inputs["timestep_cond"] = ("batch_size", 256)
        return {**runners, "unet": ToyRunner(inputs, ["out_sample"], unet)}


def toy_for(sampler: str) -> ToyModel:
    """A model that `sampler` can draw with."""
    noise = load(SAMPLERS, sampler).process_kind
    return ToyModel("sd" if noise == "betas" else noise)


def letters(prompts: Any) -> Tokens:
    return Tokens(np.array([[ord(letter) % 997 for letter in prompt[:77].ljust(77)] for prompt in prompts], np.int64))
