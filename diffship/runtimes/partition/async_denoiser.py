"""AsyncDenoiser: AsyncDiff on a diffusers pipeline, in two lines. The one file of this room that knows torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffship.core.brief import brief_text
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.runner import Runner
from diffship.runtimes.partition.course import Course
from diffship.runtimes.partition.denoiser import TIMEOUT_SECONDS, Seat, seats
from diffship.runtimes.partition.halves import NAMES, both
from diffship.runtimes.partition.lanes import Lanes, OneByOne, ThreadEach
from diffship.runtimes.partition.placement import place
from diffship.runtimes.partition.spread import Spread
from diffship.runtimes.partition.timetable import Scheme, Task, Timetable, timetable

# the order of UNet2DConditionModel.forward
_ARGUMENTS: tuple[str, ...] = (
    "sample",
    "timestep",
    "encoder_hidden_states",
    "class_labels",
    "timestep_cond",
    "attention_mask",
)
_ARGUMENTS += ("cross_attention_kwargs", "added_cond_kwargs", "down_block_additional_residuals")
_ARGUMENTS += ("mid_block_additional_residual", "down_intrablock_additional_residuals", "encoder_attention_mask")
_ARGUMENTS += ("return_dict",)
_TAKEN = {"sample", "timestep", "encoder_hidden_states", "timestep_cond", "added_cond_kwargs", "return_dict"}


class AsyncDenoiser:
    """Runs a pipeline's U-Net in stages that lag behind each other while it is entered:

        parallel = AsyncDenoiser(pipeline, stages=2, warm_up=3)
        with parallel:
            image = pipeline("a cat").images[0]

    `devices` names one for each stage, and one more at stride 2. A stage on another device than the pipeline's is moved
    there on entry, so that each device holds its own stages alone, and back on exit, also after a fault; meanwhile the
    U-Net cannot be saved. If Ctrl-C stops the exit itself, the next `with` on the same object brings back the rest.

    Without devices all stages run one after another where the pipeline is: the pictures are those of several devices,
    the time is that of one. `cut` is that of models.walks.cuts; by default the published one if there is one for this
    U-Net, else the one that is balanced by time. A warm-up of all steps draws what the pipeline draws.

    `cfg_parallel` splits the rows of every call in two halves, each with devices of its own: twice as many `devices`,
    the first ones for the negative prompts. Rows do not mix, so nothing is stale: with `stages=1` the picture is, bit
    for bit, what the pipeline draws if its U-Net is called with one half after the other.

    Raises:
        UnsupportedError: not such a U-Net, or something that stages would not heed (LoRA, FreeU, hooks, ControlNet).
        ConfigError: no such cut, or another number of devices than the scheme takes.
    """

    def __init__(
        self,
        pipeline: Any,
        stages: int = 2,
        stride: int = 1,
        warm_up: int = 1,
        time_shift: bool = False,
        *,
        cut: str | None = None,
        devices: Sequence[str] | None = None,
        cfg_parallel: bool = False,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        from diffship.models.walks.cuts import find_cuts, partition
        from diffship.models.walks.live import live_unet

        self.scheme = Scheme(stride, warm_up, time_shift)
        self.pipeline = pipeline
        self.devices = None if devices is None else tuple(devices)
        try:
            self._unet: Any = pipeline.unet
        except AttributeError:
            self._unet = None  # which is refused below, with words
        self._timeout = timeout
        self._run: _Run | None = None
        self._lanes: Lanes | None = None
        self._halves: list[_Half] = []
        self._spread: Spread | None = None
        self._count = len(NAMES) if cfg_parallel else 1
        component = live_unet(self._unet)
        self.cuts = find_cuts(component, stages, cut, _sizes(self._unet))
        self._stages = partition(component, self.cuts)
        self.placement = place(self._stages, self.cuts.homes)
        timetable(self.placement, 1, self.scheme)  # refuses a scheme that does not fit, before anything runs
        needed = self._count * self.scheme.devices(self.placement.devices)
        if self.devices is not None and len(self.devices) != needed:
            twice = " for each half of guidance" if cfg_parallel else ""
            raise ConfigError(
                f"{stages} stages at stride {stride}{twice} take {needed} devices; got {len(self.devices)}"
            )

    def __repr__(self) -> str:
        return brief_text(self, cuts=self.cuts, scheme=self.scheme, devices=self.devices, cfg_parallel=self._count > 1)

    def __enter__(self) -> AsyncDenoiser:
        from diffship.models.walks.live import live_unet

        if self.pipeline.unet is not self._unet:
            raise ConfigError("the pipeline has another U-Net than it had; make a new AsyncDenoiser")
        if self._lanes is None:
            self._restore()  # what an exit that was stopped left away
        live_unet(self._unet)  # nothing may have changed since
        try:
            self._halves = self._move()
            # a call is at most as many exchanges as there are stages, and its halves end theirs first
            self._lanes = self._own_lanes(len(self._stages) + 1)
            self._unet.forward = self._forward
        except BaseException:
            self.__exit__()  # nobody leaves what was not entered
            raise
        return self

    def __exit__(self, *_: object) -> None:
        vars(self._unet).pop("forward", None)
        try:
            for lanes in [half.lanes for half in self._halves] + ([] if self._lanes is None else [self._lanes]):
                lanes.close()
        finally:
            self._run, self._lanes, self._halves = None, None, []
            self._restore()

    def _restore(self) -> None:
        """The weights are home again. If that is stopped, what is still away is kept for the next time."""
        if self._spread is not None:
            self._spread.restore()
            self._spread = None

    def _own_lanes(self, exchanges: int) -> Lanes:
        return OneByOne() if self.devices is None else ThreadEach(self._timeout * exchanges)

    def _move(self) -> list[_Half]:
        """Every stage on its device, and there alone."""
        self._spread, kept = Spread(self._unet), list[Any]()
        halves = [_Half(self._load(half, self._spread, kept), self._own_lanes(1)) for half in range(self._count)]
        self._spread.give_up(kept)
        return halves

    def _load(self, half: int, spread: Spread, kept: list[Any]) -> dict[Seat, Runner]:
        """A runner for every seat of a half; stages on the pipeline's own device share its weights, and are `kept`."""
        import torch

        from diffship.models.parts.runner import TorchRunner
        from diffship.models.walks.live import share

        home, dtype = self._unet.device, self._unet.dtype
        first = half * self.scheme.devices(self.placement.devices)
        found: dict[Seat, Runner] = {}
        for device, piece in seats(self.placement, self.scheme):
            stage, module = self._stages[piece], share(self._stages[piece], self._unet)
            where = home if self.devices is None else torch.device(self.devices[first + device])
            if where == home:
                kept.append(module)
            else:
                module = spread.on(module, where)
            found[device, piece] = TorchRunner(module, stage.inputs, stage.outputs, str(where), dtype)
        return found

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of UNet2DConditionModel.forward."""
        given = _arguments(args, kwargs)
        _check(given["sample"], 2**self._unet.num_upsamplers, threaded=self.devices is not None)
        run, self._run = self._follow(given), None  # unless all goes well
        prediction = run.step(given)
        self._run = run
        if not given.get("return_dict", True):
            return (prediction,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def _follow(self, given: Mapping[str, Any]) -> _Run:
        listed = self.pipeline.scheduler.timesteps
        if self._run is not None and self._run.listed is listed and not self._run.ended:
            return self._run
        assert self._lanes is not None  # set while the forward is ours
        begin = _begin(self.pipeline.scheduler, _time(given["timestep"]))
        table = timetable(self.placement, len(listed) - begin, self.scheme)
        return _Run([_Rows(half, table) for half in self._halves], self._lanes, listed, begin, given["sample"].shape)


class _Half:
    """The runners of all stages on one set of devices, and the lanes that they run in."""

    def __init__(self, runners: Mapping[Seat, Runner], lanes: Lanes) -> None:
        self.lanes = lanes
        self._runners = runners

    def call(self, device: int, piece: int, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._runners[device, piece].run(feeds)

    def inputs(self, task: Task) -> set[str]:
        return {spec.name for spec in self._runners[task.device, task.piece].inputs}


class _Rows:
    """Some rows of one picture, or of one batch of them, over all steps."""

    def __init__(self, half: _Half, table: Timetable) -> None:
        self._half = half
        self._course = Course(table, half.call, half.lanes)

    def prediction(self, step: int, whole: Mapping[str, Any], times: Any) -> Any:
        def feeds(task: Task) -> dict[str, Any]:
            wanted = self._half.inputs(task)
            found = {name: value for name, value in whole.items() if name in wanted and value is not None}
            return {**found, "timestep": times[task.time]} if "timestep" in wanted else found

        return self._course.prediction(step, feeds)


class _Run:
    """One picture, or one batch of them: the calls of the U-Net for the timesteps that the scheduler lists. `parts`
    share the rows of every call among them, evenly."""

    def __init__(self, parts: Sequence[_Rows], lanes: Lanes, listed: Any, begin: int, shape: Sequence[int]) -> None:
        self.listed = listed
        self._parts = parts
        self._lanes = lanes
        self._times = listed[begin:]
        self._due = [float(time) for time in self._times]
        self._shape = tuple(shape)
        self._step = 0

    @property
    def ended(self) -> bool:
        return self._step == len(self._due)

    def step(self, given: Mapping[str, Any]) -> Any:
        due, asked = self._due[self._step], _time(given["timestep"])
        if due != asked:
            raise UnsupportedError(
                f"the pipeline calls its U-Net at timestep {asked:g}, and {due:g} is due: it skips steps or calls the "
                "U-Net several times in one; such a pipeline is not partitioned"
            )
        if tuple(given["sample"].shape) != self._shape:
            raise UnsupportedError(
                f"the latents changed from {self._shape} to {tuple(given['sample'].shape)} between two steps; stages "
                "that lag behind need one shape (a callback that turns guidance off, for one, changes it)"
            )
        whole = {name: given.get(name) for name in ("sample", "encoder_hidden_states", "timestep_cond")}
        whole |= given.get("added_cond_kwargs") or {}

        prediction = self._prediction(whole)
        self._step += 1
        # a copy: what stages make cannot be written to, and pipelines may write into predictions
        return prediction.to(given["sample"].device).clone()

    def _prediction(self, whole: Mapping[str, Any]) -> Any:
        import torch

        if len(self._parts) == 1:
            return self._parts[0].prediction(self._step, whole, self._times)
        shares = {half: _share(whole, *ends) for half, ends in _ends(self._shape[0]).items()}
        made = both(self._lanes, {half: self._call(half, share) for half, share in shares.items()})
        rows = [made[half] for half in sorted(made)]
        return torch.cat([row.to(rows[0].device) for row in rows])

    def _call(self, half: int, share: Mapping[str, Any]) -> Callable[[], Any]:
        return lambda: self._parts[half].prediction(self._step, share, self._times)


def _ends(rows: int) -> dict[int, tuple[int, int]]:
    """The first row of each half, and the row after its last; a single row is the second half."""
    middle = rows // 2
    return {half: ends for half, ends in enumerate(((0, middle), (middle, rows))) if ends[0] < ends[1]}


def _share(whole: Mapping[str, Any], begin: int, end: int) -> dict[str, Any]:
    return {name: None if value is None else value[begin:end] for name, value in whole.items()}


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the U-Net was called with, by name; refuses what stages would not heed."""
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    unheeded = [name for name, value in given.items() if name not in _TAKEN and value not in (None, {})]
    extra = given.get("added_cond_kwargs") or {}
    unheeded += [name for name, value in extra.items() if name not in ("text_embeds", "time_ids") and value is not None]
    if unheeded:
        raise UnsupportedError(
            f"a partitioned U-Net does not take {', '.join(unheeded)}; leave the context to use them"
        )
    return given


def _check(sample: Any, multiple: int, threaded: bool) -> None:
    """Raises UnsupportedError if stages would compute something else than the whole."""
    import torch

    if sample.requires_grad:
        raise UnsupportedError("a partitioned U-Net has no gradients; run it under torch.no_grad()")
    if threaded and (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
        raise UnsupportedError(
            "torch.autocast does not reach the threads of the devices; load the pipeline in its dtype"
        )
    if any(side % multiple for side in sample.shape[-2:]):
        sides = " x ".join(map(str, sample.shape[-2:]))
        raise UnsupportedError(f"latents of {sides} are not partitioned; both sides are multiples of {multiple}")


def _time(timestep: Any) -> float:
    """The one timestep of a call: a number, or a tensor with it in every row."""
    values = {float(value) for value in timestep.flatten()} if hasattr(timestep, "flatten") else {float(timestep)}
    if len(values) != 1:
        raise UnsupportedError(f"rows stand at timesteps {sorted(values)}; a partitioned U-Net takes one for all")
    return values.pop()


def _begin(scheduler: Any, timestep: float) -> int:
    """Where in the scheduler's list this run begins: later than 0 for image to image, which drops the first steps."""
    times = [float(time) for time in scheduler.timesteps]
    told = getattr(scheduler, "begin_index", None)
    if told is not None and told < len(times) and times[told] == timestep:
        return int(told)
    if timestep not in times:
        raise UnsupportedError(
            f"the pipeline calls its U-Net at timestep {timestep:g}, which its scheduler does not list; such a "
            "pipeline is not partitioned"
        )
    return times.index(timestep)


def _sizes(unet: Any) -> dict[str, int]:
    """Guidance's two rows at the U-Net's own picture size."""
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side or (64, 64)
    return {"batch_size": 2, "height": height, "width": width}
