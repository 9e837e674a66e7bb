"""One training loop for everything that diffship trains: accelerate, EMA, bit-exact resume from safetensors.

Nothing random lives outside `(seed, step, rank)`: a `Task` draws its batch and its noise from a generator made for the
step, so a checkpoint holds weights, moments and averages only, and a killed run continues to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, runtime_checkable

from diffship.core.distributed import note_left
from diffship.core.errors import Cancelled, DiffshipError
from diffship.core.lazy import lazy
from diffship.core.quiet import training
from diffship.training.checkpoint import parameters_of, read_state, write_state

if TYPE_CHECKING:
    import accelerate
    import torch
    from torch import Tensor, nn
else:
    accelerate, torch = lazy("accelerate"), lazy("torch")


class Task(Protocol):
    """What a loop trains: named modules, and one loss per step drawn from that step's generator."""

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]: ...


@runtime_checkable
class TakesTurns(Task, Protocol):
    """A task whose modules do not all learn at every step, as generator and discriminator do not.

    `rates` are factors of the schedule's rate, by module; 1 if it names none. AdamW keeps the moments and the count
    of steps of each weight apart, so that modules that take turns are what they would be under optimisers of their own.
    """

    @property
    def rates(self) -> Mapping[str, float]: ...

    def begin(self, step: int) -> Collection[str]:
        """Names of the modules that learn at `step`, whose losses are asked for next."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Steps and rates. The rate warms up, stays, and falls linearly to zero over the last `decay` steps.

    A step's gradient is the mean over `accumulate` batches of `batch` samples, drawn one after the other from the
    step's generator. `betas` are AdamW's. `ema` 0 keeps no average: it is the live weights.
    A checkpoint is written every `save_seconds`, and every `validate_every`-th of them is validated.
    Because nothing before the decay depends on `steps`, a run can be resumed with more steps, or told to end sooner.
    """

    steps: int
    batch: int
    rate: float
    warmup: int = 100
    decay: int = 0
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    save_seconds: float = 180.0
    validate_every: int = 1
    log_every: int = 20
    accumulate: int = 1
    betas: tuple[float, float] = (0.9, 0.99)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step (0-based)."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        falling = min(1.0, (self.steps - step) / self.decay) if self.decay else 1.0
        return self.rate * rising * falling

    def ema_at(self, step: int) -> float:
        """Decay of the average, smaller at first so that the random start is soon forgotten."""
        return min(self.ema, (1 + step) / (10 + step))


class DivergedError(DiffshipError):
    """The loss is not finite; the message names the last good checkpoint."""


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The only source of randomness of a step, for each process of a distributed run.

    torch's CPU generator (MT19937) looks at 32 bits of its seed, so seed and rank are hashed into those; of seed 0 and
    rank 0 the bare step is left.
    """
    mixed = hashlib.sha256(f"{seed} {rank}".encode()).digest()[:4] if seed or rank else bytes(4)
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") ^ (step & 0xFFFFFFFF))


def train(
    task: Task,
    schedule: Schedule,
    folder: Path,
    *,
    validate: Callable[[int], None] | None = None,
    precision: str = "no",
    stop_after_seconds: float = math.inf,
    progress: Callable[[int, int], None] | None = None,
    follow: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> int:
    """Train until `schedule.steps`, resuming from `folder/state.safetensors` if it is there; returns the step reached.

    `validate` sees the averaged weights. `progress(step, steps)` is called after every step (without it, logged steps
    are printed); if it raises Cancelled, what is done is saved first. `follow` is given the averaged weights before the
    first step, by name; they change in place, so that a task can look at them. Under `torchrun` every process computes
    its share of the batch and the gradients are averaged once a step; the first process writes.

    Raises:
        BusyError: something is timed on this machine, and is not over after ten minutes.
        DivergedError: the loss or its gradient became NaN or infinite; the checkpoint before it is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(task, schedule, folder / "state.safetensors", precision)
    if follow is not None:
        follow(run.average)
    started = saved = time.monotonic()
    checkpoints = 0
    with (
        training(lambda text: print(text, file=sys.stderr)),  # nothing is timed on this machine meanwhile
        run.saved_if_cancelled(),
        (folder / "curve.jsonl").open("a", encoding="utf-8") as curve,
    ):
        while run.step < schedule.steps and not run.agree(time.monotonic() - started > stop_after_seconds):
            figures = run.advance()
            if not run.accelerator.is_main_process:
                continue
            if run.step % schedule.log_every == 0 or run.step == schedule.steps:
                _report(curve, run.step, schedule.steps, figures(), aloud=progress is None)
            if time.monotonic() - saved > schedule.save_seconds or run.step == schedule.steps:
                run.save()
                saved, checkpoints = time.monotonic(), checkpoints + 1
                due = checkpoints % schedule.validate_every == 0 or run.step == schedule.steps
                if validate is not None and due:
                    with averaged(run.parameters, run.average):
                        validate(run.step)
            if progress is not None:
                progress(run.step, schedule.steps)
        run.save()
    for value in run.live:  # of modules that took turns, only some have it now
        value.requires_grad_(True)
    run.accelerator.wait_for_everyone()  # no timeout: torch's own, for every exchange
    return run.step


def leave() -> None:
    """Leave a distributed run; every process calls it once its work is done, writing included.

    A process that exits while gloo's thread still holds the tensors of an exchange may abort, and `torchrun` then
    kills the one that is still writing: the barrier is an exchange that holds none. How such a process ends is said in
    `diffship.core.distributed.end`.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # no timeout: torch's own, for every exchange
        torch.distributed.destroy_process_group()
        note_left()


class _Run:
    """Weights, moments and averages of one run, and its place."""

    def __init__(self, task: Task, schedule: Schedule, state: Path, precision: str) -> None:
        self.task, self.schedule, self.state = task, schedule, state
        self.accelerator = new_accelerator(precision)
        for module in task.modules.values():
            module.to(self.accelerator.device)
        self.parameters = parameters_of(task.modules)
        self.live = list(self.parameters.values())
        adam = torch.optim.AdamW(
            self._groups(), lr=schedule.rate, weight_decay=schedule.weight_decay, betas=schedule.betas, fused=True
        )
        self.optimizer = self.accelerator.prepare(adam)
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.step = self._load() if state.exists() else 0
        self._written = self.step if state.exists() else -1  # the step whose checkpoint lies on the disk

    def advance(self) -> Callable[[], dict[str, float]]:
        """One step; returns what reads its figures, so that a step that is not logged never waits for them."""
        tick = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(self.step) * group["factor"]
        learning = self._learning()
        generator = step_generator(self.schedule.seed, self.step, self.accelerator.process_index)
        parts = [self._add_gradients(generator) for _ in range(self.schedule.accumulate)]
        self._average_gradients()
        norm = self.accelerator.clip_grad_norm_(self.live, self.schedule.clip)
        if self.accelerator.scaler is None:  # else fp16 overflows now and then, and such a step is left out
            self._require_finite("gradient norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        weight = 1 - self.schedule.ema_at(self.step)
        torch._foreach_lerp_(
            [self.average[name] for name in learning], [self.parameters[name].detach() for name in learning], weight
        )
        self.step += 1
        seconds = time.monotonic() - tick
        return lambda: {"seconds": seconds, **_mean([{"loss": loss.item(), **figures} for loss, figures in parts])}

    def _groups(self) -> list[dict[str, Any]]:
        """The weights of each module with the factor of its rate."""
        rates = self.task.rates if isinstance(self.task, TakesTurns) else {}
        modules = dict.fromkeys(_module_of(name) for name in self.parameters)
        return [
            {
                "params": [value for name, value in self.parameters.items() if _module_of(name) == module],
                "factor": rates.get(module, 1.0),
            }
            for module in modules
        ]

    def _learning(self) -> list[str]:
        """Names of the weights that learn at this step; the others take no gradient."""
        if not isinstance(self.task, TakesTurns):
            return list(self.parameters)
        modules = self.task.begin(self.step)
        for name, value in self.parameters.items():
            value.requires_grad_(_module_of(name) in modules)
        return [name for name, value in self.parameters.items() if value.requires_grad]

    def _add_gradients(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of this process's share of one batch; its gradient is added to those that are there."""
        share = self.schedule.batch // self.accelerator.num_processes
        with self.accelerator.autocast():
            loss, figures = self.task.loss(share, generator)
        self._require_finite("loss", loss)
        self.accelerator.backward(loss / self.schedule.accumulate)
        return loss.detach(), figures

    def _require_finite(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            last = (
                f"the last good checkpoint is {self.state}" if self.state.exists() else "no checkpoint was written yet"
            )
            raise DivergedError(
                f"{what} is {value.item()} at step {self.step}; {last}. The same command comes to the same step: "
                "lower the rate, or use another precision"
            )

    def _average_gradients(self) -> None:
        """One exchange a step, over all gradients at once."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [value.grad for value in self.live if value.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)  # no timeout: torch's own, for every exchange
        parts = (flat / self.accelerator.num_processes).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def agree(self, stop: bool) -> bool:
        """Whether any process wants to stop: all of them must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        wish = torch.tensor(float(stop), device=self.accelerator.device)
        torch.distributed.all_reduce(wish)  # no timeout: torch's own, for every exchange
        return bool(wish > 0)

    def save(self) -> None:
        """Write the checkpoint of this step, in the first process and unless it is there."""
        if self.accelerator.is_main_process and self._written != self.step:
            scaler = self.accelerator.scaler
            about = {"step": self.step, "scaler": None if scaler is None else scaler.state_dict()}
            write_state(self.state, about, self.parameters, self.average, self.optimizer)
            self._written = self.step

    def _load(self) -> int:
        about = read_state(self.state, self.parameters, self.average, self.optimizer)
        if self.accelerator.scaler is not None and about.get("scaler"):
            self.accelerator.scaler.load_state_dict(about["scaler"])
        return int(about["step"])

    @contextmanager
    def saved_if_cancelled(self) -> Iterator[None]:
        try:
            yield
        except Cancelled:  # raised between two steps only
            self.save()
            raise


def new_accelerator(precision: str) -> accelerate.Accelerator:
    """Device, rank and mixed precision (no, fp16, bf16) of this process; an earlier run may have had another one."""
    accelerate.state.AcceleratorState._reset_state()
    return accelerate.Accelerator(mixed_precision=precision)


def _mean(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


def _report(curve: TextIO, step: int, steps: int, figures: Mapping[str, float], aloud: bool) -> None:
    print(json.dumps({"step": step, **{k: round(v, 5) for k, v in figures.items()}}), file=curve, flush=True)
    if aloud:
        print(f"step {step}/{steps} loss {figures['loss']:.4f} {figures['seconds']:.2f}s", file=sys.stderr)


def _module_of(name: str) -> str:
    return name.partition("/")[0]


class averaged:
    """While open, the parameters hold their exponential averages."""

    def __init__(self, parameters: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
        self.pairs = [(parameters[name], average[name]) for name in parameters]

    def _swap(self) -> None:
        with torch.no_grad():
            for live, kept in self.pairs:
                held = live.detach().clone()
                live.copy_(kept)
                kept.copy_(held)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()
