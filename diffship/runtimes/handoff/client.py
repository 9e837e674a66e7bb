"""The edge side of a handoff: a cloud draws the first calls of a picture, this device the last ones.

Whatever becomes of the cloud, the picture is finished here, from what has arrived or from the start.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from types import TracebackType
from typing import Any

from diffship.core.errors import Cancelled, ConfigError, HandoffError, UnsupportedError
from diffship.core.limits import check_range
from diffship.core.reading import PLAIN
from diffship.runtimes.engines.model import open_model
from diffship.runtimes.handoff.arrival import check_arrival, require_answer
from diffship.runtimes.handoff.breaker import Breaker
from diffship.runtimes.handoff.pair import check_pair, sampler_of
from diffship.runtimes.handoff.report import Hybrid
from diffship.runtimes.handoff.router import boundaries, check_split
from diffship.runtimes.handoff.transport import Cloud, CloudError, CloudModel, choose_model, retried
from diffship.runtimes.handoff.work import Pace, Work
from diffship.sampling.encode import text_parts
from diffship.sampling.generate import checked_denoiser, finish, start
from diffship.sampling.generate import draw as draw_local
from diffship.sampling.loop import OnStep, denoise
from diffship.sampling.model import Model
from diffship.sampling.picture import Picture
from diffship.sampling.request import Request
from diffship.sampling.trajectory import Trajectory
from diffship.sampling.wire import unpack

DEADLINE_SECONDS = (0.1, 3600.0)
_SERVER_SECONDS = (1.0, 600.0)  # what a server takes as `deadline_seconds`
_POLL_SECONDS = 0.05


class HybridClient:
    """A small model here and a server at `cloud` draw pictures together.

        with HybridClient("out/small", cloud="https://example.org", token=token, deadline=20) as client:
            made = client.generate(Request("red apple", seed=1), split=(10, 15))
            made.picture.save("apple.png"); print(made.report.line())

    `small` is a bundle (opened in `engine` with its `options`, closed with the client) or an opened Model.
    `cloud_model` is a name of the server's `/v1/models` (default: its first), `deadline` the seconds that a picture may
    take, `shared_latents` as for `check_pair`, `breaker` what decides when a failing cloud is left alone (default:
    after three pictures in a row, for 30 seconds). One picture at a time; no torch is needed.
    """

    def __init__(
        self,
        small: Model | str | PathLike[str],
        cloud: str,
        token: str | None = None,
        deadline: float = 60.0,
        cloud_model: str | None = None,
        shared_latents: bool = False,
        breaker: Breaker | None = None,
        engine: str | None = None,
        **options: Any,
    ) -> None:
        """Opens the bundle and no connection.

        Raises:
            ConfigError: a URL, token or deadline that is not legal.
            UnsupportedError: a model that fills masks, or one without U-Net or decoder.
            MissingExtra: httpx is not installed.
        """
        self.deadline = check_range("deadline", float(deadline), *DEADLINE_SECONDS)
        self.cloud = Cloud(cloud, token)
        self.breaker = breaker or Breaker()
        self.cloud_model = cloud_model
        self.shared_latents = shared_latents
        self._paces: dict[tuple[tuple[int, int], bool], Pace] = {}
        self._facts: CloudModel | None = None
        self._paired = False
        with ExitStack() as stack:
            stack.callback(self.cloud.close)
            if isinstance(small, (str, PathLike)):
                small = stack.enter_context(open_model(small, engine, **options))
            _require_whole(small)
            self.small: Model = small
            self._pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="edge"))
            self._stack = stack.pop_all()

    def __enter__(self) -> HybridClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections, and the model if it was opened here."""
        self._stack.close()

    def generate(
        self,
        request: Request,
        split: Sequence[int],
        on_step: OnStep | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> Hybrid:
        """One picture, of whose calls the cloud makes `split[0]` and this device `split[1]`.

        Size and guidance that the request leaves open are the small model's own, so that they do not depend on the
        cloud; the sampler is that of the model that starts. `on_step` sees the trajectory that arrives, and then every
        step made here.

        Raises:
            ConfigError: a request or split that is not legal, or models that cannot share a trajectory: `check_pair`.
            UnsupportedError: an option that is not built.
            RunnerError: the small model failed.
            Cancelled: `cancel()` was true.
        """
        work = self._begin(request, split)
        preparing = self._pool.submit(self._prepare, work)
        try:
            arrived = self._ask(work, preparing, cancel) if work.split[0] else None
        except BaseException:
            # it uses the model that the caller may close next; no timeout: it computes, here
            wait([preparing])
            raise
        begun = preparing.result()  # no timeout: it computes, here
        if arrived is not None:
            begun = self._joined(work, arrived, begun)
            if on_step is not None:
                on_step([begun])
        picture = self._finish(work, begun, on_step, cancel)
        return Hybrid(picture, work.report(begun, self.cloud.url, self.deadline))

    @property
    def known(self) -> CloudModel | None:
        """What the server said of its model, if it was asked before."""
        return self._facts

    def facts(self) -> CloudModel:
        """What the server says of its model, asked once, and checked against the small one.

        Raises:
            CloudError: no answer, or none of use.
            ConfigError: no such model there, or one that cannot share a trajectory with the small one.
        """
        end = time.monotonic() + self.deadline
        learned = self.cloud.submit(self._learn(lambda: end - time.monotonic(), None)).result(self.deadline + 1)
        check_pair([learned.facts, self.small], None, self.shared_latents)
        return learned

    def body(self, model: CloudModel, request: Request, calls: int, left: float) -> bytes:
        """The JSON of `/v1/handoff` for the first `calls` calls of a settled request.

        If the text encoders are the same weights the embeddings stay there: this device encodes meanwhile.
        """
        assert request.size is not None
        low, high = _SERVER_SECONDS
        content = {
            "prompt": request.prompt,
            "negative_prompt": request.negative,
            "model": model.name,
            "steps": request.steps,
            "guidance": request.guidance,
            "width": request.size[0],
            "height": request.size[1],
            "seed": request.seed,
            "rng": request.rng,
            "sampler": request.sampler,
            "spacing": request.spacing,
            **_reading(request),
            **({} if request.eta is None else {"eta": request.eta}),  # servers of before do not know the field
            "split": calls,
            "embeddings": not self._same_text(model),
            "deadline_seconds": min(max(left, low), high),
        }
        return json.dumps(content).encode()

    def settled(self, request: Request, steps: int) -> Request:
        """The request with the small model's own size and guidance if it leaves them open."""
        family = self.small.family
        guidance = family.guidance_default if request.guidance is None else request.guidance
        size = request.size or family.default_sides
        family.check_size(*size)
        return replace(request, steps=steps, size=size, guidance=float(guidance))

    def _begin(self, request: Request, split: Sequence[int]) -> Work:
        begin = time.monotonic()
        steps = check_split(split, 2, request.steps)
        if request.images != 1 or request.first_image or request.latents is not None:
            raise ConfigError("a handoff is of one image, with its own noise: ask for images one by one, by seed")
        _require_prompt_alone(request)
        settled = self.settled(request, steps)
        assert settled.size is not None and settled.guidance is not None
        pace = self._paces.setdefault((settled.size, settled.guidance > 1), Pace())
        return Work(settled, (split[0], split[1]), begin, pace, warnings=list(self.cloud.warnings))

    # this device, while the cloud draws

    def _prepare(self, work: Work) -> Trajectory:
        """The trajectory that this device would draw alone, encoded, with its parts loaded. The first time it is after
        one call: that warms the engine up, tells how long a call takes, and is not lost if the cloud fails."""
        since = time.monotonic()
        begun = start(self.small, work.request)[0]
        work.pace.encode = work.times["encode"] = time.monotonic() - since
        if work.request.memory == "low" or not work.split[1]:
            return begun
        denoiser = checked_denoiser(self.small)
        self.small.use(self.small.family.kind.decoder)
        if work.pace.call is None and work.split[0]:
            since = time.monotonic()
            begun = denoise([begun], denoiser, until=1)[0]
            work.pace.call = work.times["ahead"] = time.monotonic() - since
        return begun

    def _same_text(self, model: CloudModel) -> bool:
        """Whether both sides are known to have text encoders of the same weights."""
        ours, theirs = self.small.digests, model.facts.digests
        known = bool(self.small.digest) and bool(model.digest)
        return known and all(ours.get(part) == theirs.get(part) for part in text_parts(self.small))

    # the cloud

    def _ask(self, work: Work, preparing: Future[Trajectory], cancel: Callable[[], bool] | None) -> Trajectory | None:
        """What the cloud made, or None, with the reason in `work.fallback`."""
        if not self.breaker.allow():
            work.fallback = f"open: the cloud failed and is not asked for another {self.breaker.wait():.1f} s"
            return None
        asking = self.cloud.submit(self._exchange(work))
        try:
            arrived = self._await(work, asking, preparing, cancel)
        except CloudError as fault:
            self.breaker.failed()
            work.fallback = str(fault)
            work.ignore(fault)
            arrived = None
        except BaseException:
            asking.cancel()
            self.breaker.abandoned()
            raise
        else:
            self.breaker.succeeded()
        work.times["cloud"] = time.monotonic() - work.begin
        return arrived

    def _await(
        self, work: Work, asking: Future[Trajectory], preparing: Future[Trajectory], cancel: Callable[[], bool] | None
    ) -> Trajectory:
        while not asking.done():
            left = self._left(work)
            if left <= 0:
                asking.cancel()
                raise CloudError(f"slow: no answer within {time.monotonic() - work.begin:.1f} s")
            wait([asking], min(left, _POLL_SECONDS))
            if cancel is not None and cancel():
                raise Cancelled("stopped while the cloud drew")
            if preparing.done():
                preparing.result(0)  # a device that failed here could not finish the cloud's picture either
        return asking.result(0)

    def _left(self, work: Work) -> float:
        """Seconds that the cloud may still take."""
        return work.begin + work.spare(self.deadline) - time.monotonic()

    async def _learn(self, left: Callable[[], float], work: Work | None) -> CloudModel:
        if self._facts is None:
            models = await retried(lambda: self.cloud.models(left()), left, _counting(work))
            self._facts = choose_model(models, self.cloud_model)
        return self._facts

    async def _exchange(self, work: Work) -> Trajectory:
        assert work.request.size is not None
        try:
            work.model = await self._learn(lambda: self._left(work), work)
            work.warnings += check_pair([work.model.facts, self.small], work.request.sampler, self.shared_latents)
            sampler = sampler_of(work.model.facts, work.request.sampler)
        except (ConfigError, UnsupportedError) as fault:
            if not self._paired:
                raise
            self._facts = None
            raise CloudError(f"wrong: the cloud serves something else by now: {fault}") from None
        self._paired = True
        work.model.facts.family.check_size(*work.request.size)
        work.asked = boundaries(work.split, sampler.calls(sum(work.split)))[0]
        body, key = self.body(work.model, work.request, work.asked, self._left(work)), uuid.uuid4().hex
        return await retried(lambda: self._handoff(work, body, key), lambda: self._left(work), _counting(work))

    async def _handoff(self, work: Work, body: bytes, key: str) -> Trajectory:
        work.requests += 1
        work.bytes_up += len(body)
        work.answer = answer = await self.cloud.handoff(body, key, max(self._left(work), 0.001))
        work.bytes_down += len(answer.body)
        try:
            trajectory = unpack(answer.body)
        except HandoffError as fault:
            raise CloudError(f"garbage: {fault}", again=True) from None
        try:
            require_answer(trajectory, work.request, work.asked)
            check_arrival(trajectory, self.small, self.shared_latents)
        except HandoffError as fault:
            self._facts = None  # another model may be served there by now
            raise CloudError(f"wrong: {fault}") from None
        return trajectory

    # both

    def _joined(self, work: Work, arrived: Trajectory, begun: Trajectory) -> Trajectory:
        """What arrived, with the embeddings of this device if none travelled, labelled by what we know ourselves."""
        assert work.model is not None
        work.arrived = True
        if arrived.positive is None:
            arrived = replace(arrived, positive=begun.positive, negative=begun.negative)
        sides = [(work.model.name, work.model.digest), (self.small.name, self.small.digest)]
        split = [
            {"model": name, "model_digest": digest, "steps": steps}
            for (name, digest), steps in zip(sides, work.split, strict=True)
        ]
        return replace(
            arrived, facts={**begun.facts, "model": sides[0][0], "model_digest": sides[0][1], "split": split}
        )

    def _finish(
        self, work: Work, begun: Trajectory, on_step: OnStep | None, cancel: Callable[[], bool] | None
    ) -> Picture:
        stamps: list[float] = []

        def stepped(batch: Sequence[Trajectory]) -> None:
            stamps.append(time.monotonic())
            if on_step is not None:
                on_step(batch)

        since, low = time.monotonic(), work.request.memory == "low"
        if begun.done:
            picture = finish(self.small, [begun], low, cancel)[0]
        else:
            picture = draw_local(self.small, [begun], low, on_step=stepped, cancel=cancel)[0]
        end = time.monotonic()
        last = stamps[-1] if stamps else since
        work.times |= {"edge": last - since, "finish": end - last}
        work.pace.decode = end - last
        if len(stamps) > 1:  # the first one may have loaded the U-Net
            work.pace.call = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
        return picture


def _reading(request: Request) -> dict[str, Any]:
    """What of it is not at its default: a server that does not know the fields yet takes every other request."""
    told = {"prompt_syntax": request.prompt_syntax, "clip_skip": request.clip_skip}
    return told if request.reading != PLAIN else {}


def _counting(work: Work | None) -> Callable[[CloudError], None]:
    def count(fault: CloudError) -> None:
        if work is not None:
            work.retries += 1
            work.ignore(fault)

    return count


def _require_prompt_alone(request: Request) -> None:
    """Raises ConfigError for pictures: they do not travel, so the cloud's calls would be made as if there were none."""
    given = {"image": request.image is not None, "mask": request.mask is not None, "controls": bool(request.controls)}
    named = [name for name, there in given.items() if there]
    if named:
        raise ConfigError(
            f"no pictures travel to the cloud, and the request has {' and '.join(named)}: leave them out, or ask its "
            "/v1/handoff for the first calls and go on with `diffship run --resume`"
        )


def _require_whole(model: Model) -> None:
    if model.family.unet_channels != model.family.latent_channels:
        raise UnsupportedError(f"{model.name} fills masks; a handoff draws from prompts alone")
    kind = model.family.kind
    missing = {kind.denoiser, kind.decoder} - set(model.parts)
    if missing:
        raise UnsupportedError(f"{model.name} has no {', '.join(sorted(missing))}; export with --parts, or --base")
