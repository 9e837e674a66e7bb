"""Folders of diffusers models as people have them, tiny and random: what each has, and whether it is drawn or refused.

Each is one of six folders that stock diffusers saved (`base`), with changed JSON files. The table of docs/stock.md is
made of CASES.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GONE = "gone"  # the value of a key that a changed file lacks
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
UNET, VAE = "unet/config.json", "vae/config.json"
TEXT, TOKENIZER = "text_encoder/config.json", "tokenizer/tokenizer_config.json"
SPECIAL = "tokenizer/special_tokens_map.json"
STEPS = 4


@dataclass(frozen=True)
class Case:
    """One folder. `scheduler`: (class, keys beside BETAS). `files`: changed keys by file. `ask`: flags of `run`.
    `sampler`: --sampler, and stock's class of it. `refused`: the file and the key that the refusal names; None: the
    picture is equal to stock's. `steps` None: both take their default. `said`: what a warning says. `quick` ones are
    drawn in every test run."""

    name: str
    base: str
    scheduler: tuple[str, Mapping[str, Any]]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ask: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = "a red apple"
    refused: tuple[str, str] | None = None
    said: str = ""
    quick: bool = False
    stock_class: str = "DiffusionPipeline"
    sampler: tuple[str, str] | None = None
    steps: int | None = STEPS


def _pndm(**keys: Any) -> tuple[str, dict[str, Any]]:
    return "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, **keys}


def _ddim(**keys: Any) -> tuple[str, dict[str, Any]]:
    return "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **keys}


def _euler(**keys: Any) -> tuple[str, dict[str, Any]]:
    return "EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1, **keys}


_DPM, _ANCESTRAL, _LCM = "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"
_SDE, _END = "sde-dpmsolver++", {"final_sigmas_type": "sigma_min"}
_EDM = "EDMEulerScheduler", {"sigma_data": 1.0, "prediction_type": "v_prediction"}
_CHECKER = {INDEX: {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}}
_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
_BARE_UNET = dict.fromkeys(("flip_sin_to_cos", "freq_shift", "act_fn", "mid_block_type", "in_channels"), GONE)
_BARE_VAE = dict.fromkeys(("force_upcast", "use_quant_conv", "scaling_factor", "latent_channels", "act_fn"), GONE)
_ZEROS = "force_zeros_for_empty_prompt"
_TOY = "a photo of <toy> on grass, and <toy>"

CASES = (
    Case("PNDM as SD 1.5 has it; its 50 steps", "sd", _pndm(), steps=None),
    Case("PNDM, steps_offset absent", "sd", _pndm(steps_offset=GONE), quick=True),
    Case("PNDM, steps_offset 0", "sd", _pndm(steps_offset=0)),
    Case("PNDM, skip_prk_steps absent", "sd", _pndm(skip_prk_steps=GONE), steps=5),
    Case("PNDM, a safety checker, which is left out", "sd", _pndm(), {**_CHECKER}, said="left out: safety_checker"),
    Case("DDIM, clip_sample absent", "sd", _ddim(clip_sample=GONE), quick=True),
    Case("DDIM, clip_sample true, steps_offset 0", "sd", _ddim(clip_sample=True, steps_offset=0)),
    Case("DDIM, thresholding", "sd", _ddim(thresholding=True), refused=(SCHEDULER, "thresholding")),
    Case("DDIM, v-prediction, padded with '!' (SD 2.1)", "sd", _ddim(prediction_type="v_prediction"), {
        TOKENIZER: {"pad_token": "!"}, SPECIAL: {"pad_token": "!"}, UNET: {"sample_size": 12},
    }),
    Case("DDIM, zero terminal SNR", "sd", _ddim(**_ZERO_SNR)),
    Case("Euler, leading, steps_offset 0", "sd", _euler(steps_offset=0)),
    Case("Euler, spacing absent", "sd", _euler(timestep_spacing=GONE)),
    Case("Euler, Karras sigmas", "sd", _euler(use_karras_sigmas=True)),
    Case("Euler, trailing, 1 step, guidance 0 (SD Turbo)", "sd", _euler(timestep_spacing="trailing"),
         ask={"guidance": 0.0}, steps=1),
    Case("Euler, exponential sigmas", "sd", _euler(use_exponential_sigmas=True)),
    Case("Euler, log-linear interpolation", "sd", _euler(interpolation_type="log_linear"),
         refused=(SCHEDULER, "interpolation_type")),
    Case("Euler ancestral", "sd", (_ANCESTRAL, {"steps_offset": 1})),
    Case("DPM-Solver++", "sd", (_DPM, {"steps_offset": 1})),
    Case("DPM-Solver++, Karras sigmas, steps_offset absent", "sd", (_DPM, {"use_karras_sigmas": True})),
    Case("DPM-Solver++, leading, steps_offset 0", "sd", (_DPM, {"timestep_spacing": "leading", "steps_offset": 0})),
    Case("DPM-Solver++, order 3", "sd", (_DPM, {"solver_order": 3}), steps=6),
    Case("DPM-Solver++, Lu's lambdas", "sd", (_DPM, {"use_lu_lambdas": True})),
    Case("DPM-Solver, which predicts noise", "sd", (_DPM, {"algorithm_type": "dpmsolver", **_END}),
         refused=(SCHEDULER, "algorithm_type")),
    Case("SDE-DPM-Solver++, Karras sigmas", "sd", (_DPM, {"algorithm_type": _SDE, "use_karras_sigmas": True})),
    Case("DPM-Solver++ in single steps", "sd", ("DPMSolverSinglestepScheduler", {})),
    Case("SDE-DPM-Solver++ in single steps", "sd", ("DPMSolverSinglestepScheduler", {"algorithm_type": _SDE})),
    Case("DEIS", "sd", ("DEISMultistepScheduler", {"steps_offset": 1})),
    Case("DEIS, --sampler dpmpp-2m", "sd", ("DEISMultistepScheduler", {"steps_offset": 1}),
         sampler=("dpmpp-2m", _DPM)),
    Case("PNDM, steps_offset absent, --sampler ddim", "sd", _pndm(steps_offset=GONE),
         sampler=("ddim", "DDIMScheduler")),
    Case("UniPC", "sd", ("UniPCMultistepScheduler", {}), quick=True),
    Case("UniPC, order 3, exponential sigmas", "sd", ("UniPCMultistepScheduler", {
        "solver_order": 3, "use_exponential_sigmas": True,
    }), steps=6),
    Case("Heun", "sd", ("HeunDiscreteScheduler", {})),
    Case("KDPM2", "sd", ("KDPM2DiscreteScheduler", {})),
    Case("KDPM2 ancestral, Karras sigmas", "sd", ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True})),
    Case("DDPM, clip_sample absent", "sd", ("DDPMScheduler", {})),
    Case("TCD", "sd", ("TCDScheduler", {}), ask={"guidance": 1.0}),
    Case("LMS", "sd", ("LMSDiscreteScheduler", {}), refused=(SCHEDULER, "_class_name")),
    Case("PNDM, steps_offset absent, --sampler unipc", "sd", _pndm(steps_offset=GONE),
         sampler=("unipc", "UniPCMultistepScheduler")),
    Case("LCM scheduler over a plain U-Net, guidance 1", "sd", (_LCM, {}), ask={"guidance": 1.0}),
    Case("LCM pipeline at its defaults", "lcm", (_LCM, {}), steps=None, quick=True),
    Case("sample_size 32 from before diffusers 0.9", "sd", _pndm(), {
        UNET: {"sample_size": 32, "_diffusers_version": "0.6.0"},
    }, steps=1),
    Case("sample_size [8, 12]", "sd", _pndm(), {UNET: {"sample_size": [8, 12]}}),
    Case("sample_size 9 of a U-Net that halves once", "sd", _pndm(), {UNET: {"sample_size": 9}},
         refused=(UNET, "sample_size")),
    Case("configs without the keys that have defaults", "sd", _pndm(), {UNET: _BARE_UNET, VAE: _BARE_VAE}, quick=True),
    Case("a textual inversion of three vectors", "toy", _pndm(), prompt=_TOY, quick=True),
    Case("a textual inversion in the negative prompt", "toy", _pndm(), ask={"negative": "<toy>, blurry"}),
    Case("a textual inversion written out", "toy", _pndm(), prompt="a <toy> <toy>_1 here"),
    Case("ControlNet folder, from text alone", "sd", _pndm(), {
        INDEX: {"_class_name": "StableDiffusionControlNetPipeline", "controlnet": ["diffusers", "ControlNetModel"]},
    }, stock_class="StableDiffusionPipeline", said="takes an image or a control: drawn as StableDiffusionPipeline"),
    Case("a pipeline that does more in its loop", "sd", _pndm(), {
        INDEX: {"_class_name": "StableDiffusionPipelineSafe"},
    }, refused=(INDEX, "_class_name")),
    Case("text encoder with use_attention_mask", "sd", _pndm(), {TEXT: {"use_attention_mask": True}},
         refused=(TEXT, "use_attention_mask")),
    Case("VAE with shift_factor", "sd", _pndm(), {VAE: {"shift_factor": 0.1}}, refused=(VAE, "shift_factor")),
    Case("flow_prediction", "sd", (_DPM, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
         refused=(SCHEDULER, "prediction_type")),
    Case("SDXL: Euler as its base has it; its 50 steps", "sdxl", _euler(), steps=None),
    Case("SDXL: Euler, steps_offset 0", "sdxl", _euler(steps_offset=0)),
    Case("SDXL: a negative prompt", "sdxl", _euler(), ask={"negative": "blurry"}),
    Case("SDXL: force_zeros_for_empty_prompt absent", "sdxl", _euler(), {INDEX: {_ZEROS: GONE}}),
    Case("SDXL: force_zeros_for_empty_prompt false", "sdxl", _euler(), {INDEX: {_ZEROS: False}}),
    Case("SDXL: Euler ancestral, trailing, 1 step, guidance 0 (SDXL Turbo)", "sdxl",
         (_ANCESTRAL, {"timestep_spacing": "trailing"}), ask={"guidance": 0.0}, steps=1),
    Case("SDXL: DDIM, clip_sample absent", "sdxl", _ddim(clip_sample=GONE), refused=(SCHEDULER, "clip_sample")),
    Case("SDXL: EDM (as CosXL)", "sdxl", _EDM),
    Case("SDXL: EDM DPM-Solver++", "sdxl", ("EDMDPMSolverMultistepScheduler", {**_EDM[1], "solver_order": 3}), steps=6),
    Case("SDXL: EDM, --sampler euler", "sdxl", _EDM, sampler=("euler", ""), refused=(SCHEDULER, "sigma_data")),
    Case("SDXL: latents_mean and latents_std (as Playground 2.5)", "sdxl", ("EDMDPMSolverMultistepScheduler", {}), {
        VAE: {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4},
    }, refused=(VAE, "latents_mean")),
    Case("SDXL: flow matching", "sdxl", ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}), sampler=("euler", ""),
         refused=(SCHEDULER, "_class_name")),
    Case("inpainting: PNDM, skip_prk_steps and steps_offset absent", "inpaint",
         _pndm(skip_prk_steps=GONE, steps_offset=GONE)),
    Case("inpainting: DDIM, strength 0.6", "inpaint", _ddim(), ask={"strength": 0.6}),
    Case("inpainting: DDIM, clip_sample absent", "inpaint", _ddim(clip_sample=GONE),
         refused=(SCHEDULER, "clip_sample")),
    Case("inpainting class, four-channel U-Net", "sd", _pndm(), {
        INDEX: {"_class_name": "StableDiffusionInpaintPipeline"},
    }, refused=(INDEX, "in_channels")),
    Case("SDXL inpainting: Euler, its strength and guidance", "sdxl-inpaint", _euler(), quick=True),
    Case("SDXL inpainting: DPM-Solver++", "sdxl-inpaint", (_DPM, {})),
    Case("SDXL inpainting: Euler ancestral, strength 0.5", "sdxl-inpaint", (_ANCESTRAL, {}), ask={"strength": 0.5}),
    Case("SDXL inpainting: Heun, strength 0.5", "sdxl-inpaint", ("HeunDiscreteScheduler", {}), ask={"strength": 0.5}),
    Case("SDXL inpainting: PNDM, which begins with its second call", "sdxl-inpaint", _pndm()),
    Case("SDXL inpainting: PNDM with Runge-Kutta, whose first calls need each other", "sdxl-inpaint",
         _pndm(skip_prk_steps=False), refused=("pndm", "strength")),
)  # fmt: skip


def table() -> str:
    """The table of docs/stock.md."""
    lines = ["| folder | drawn |", "|---|---|"]
    for case in CASES:
        outcome = "equal to stock" if case.refused is None else f"refused: `{case.refused[1]}` of `{case.refused[0]}`"
        lines.append(f"| {case.name.replace('_', chr(92) + '_').replace('|', '')} | {outcome} |")
    return "\n".join(lines)


def write(case: Case, bases: Path, folder: Path) -> Path:
    """The folder of a case; `bases` keeps the networks."""
    shutil.copytree(base(case.base, bases), folder)
    name, keys = case.scheduler
    table = {**({} if name.startswith(("EDM", "Flow")) else BETAS), **keys}
    said = {key: value for key, value in table.items() if value != GONE}
    (folder / SCHEDULER).write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.30.0", **said}))
    changes = {INDEX: {"scheduler": ["diffusers", name]}}
    for file, values in [*changes.items(), *case.files.items()]:
        changed(folder / file, values)
    return folder


def changed(file: Path, values: Mapping[str, Any]) -> None:
    """Write some keys of a JSON file anew, or take them out."""
    found = {**(json.loads(file.read_text()) if file.is_file() else {}), **values}
    file.write_text(json.dumps({key: value for key, value in found.items() if value != GONE}))


def base(kind: str, bases: Path) -> Path:
    """A folder that stock diffusers saved, made when it is first asked for."""
    from sampling_pipelines import make_pipe, tokenizer_folder

    folder = bases / kind
    if not folder.exists():
        files = bases / f"{kind}-tokenizer"
        files.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = make_pipe({"toy": "sd"}.get(kind, kind), tokenizer_folder(files))
            if kind == "toy":
                import torch

                torch.manual_seed(9)
                vectors = torch.randn(3, pipe.text_encoder.config.hidden_size) * 3
                pipe.load_textual_inversion({"<toy>": vectors}, token="<toy>")
            pipe.save_pretrained(folder)
    return folder
