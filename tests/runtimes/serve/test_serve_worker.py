"""The worker's rounds, one by one, with a clock that only moves when told; states, deadlines, retries' results."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from sampling_toy import ToyModel
from serve_toy import POISON, Bench, Clock, HeldModel, drawn_alone, until

from diffship.core.errors import (
    BusyError,
    Cancelled,
    ConfigError,
    DeadlineError,
    PeerError,
    RunnerError,
    UnsupportedError,
)
from diffship.runtimes.serve.admission import Busy
from diffship.runtimes.serve.forms import GenerateForm, HandoffForm, ResumeForm
from diffship.runtimes.serve.jobs import ConflictError, Generation, Kept, Progress
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.order import Drawn, generate_order, handoff_order, resume_order
from diffship.runtimes.serve.restarts import Restarts
from diffship.runtimes.serve.worker import Served, Worker
from diffship.sampling.generate import Request, start
from diffship.sampling.wire import pack


def test_requests_share_calls_and_give_the_pictures_of_generate() -> None:
    bench = Bench()
    made = [bench.put(f"cat {i}", steps=4, seed=i) for i in range(3)]
    bench.finish()
    assert bench.rows() == [6, 6, 6, 6]  # two rows an image: guidance
    for i, generation in enumerate(made):
        assert generation.state == "done"
        assert [png for png, _ in generation.result(0).pictures] == drawn_alone(f"cat {i}", steps=4, seed=i)


def test_a_request_joins_between_two_steps() -> None:
    bench = Bench()
    bench.put("one", steps=4)
    bench.worker.turn()
    bench.put("two", steps=4)
    bench.worker.turn()
    assert bench.rows() == [2, 4]


def test_several_images_of_a_request_end_together() -> None:
    bench = Bench()
    generation = bench.put(steps=2, images=3, seed=5)
    heard: list[Progress | None] = []
    generation.listen(heard.append)
    bench.finish()
    assert [png for png, _ in generation.result(0).pictures] == drawn_alone("cat", steps=2, images=3, seed=5)
    assert [made and made.step for made in heard] == [0, 1, 2, None]


def test_case_27_a_late_request_is_dropped_at_the_next_step_and_never_written() -> None:
    bench = Bench()
    late, other = bench.put(steps=4, deadline=5), bench.put(steps=4)
    bench.worker.turn()
    bench.clock.now += 6
    bench.worker.turn()
    assert late.state == "expired" and bench.worker.running() == 1
    assert bench.rows() == [4, 2]
    with pytest.raises(DeadlineError, match="within its deadline of 5 s"):
        late.result(0)
    bench.finish()
    assert late.state == "expired" and late.drawn is None and other.state == "done"


def test_case_28_a_cancelled_request_frees_its_place_at_the_next_step() -> None:
    bench = Bench(batch=1)
    first, second = bench.put("one", steps=4), bench.put("two", steps=4)
    heard: list[Any] = []
    first.listen(heard.append)
    bench.worker.turn()
    assert bench.worker.running() == 1 and bench.worker.waiting() == 1
    first.leave(heard.append)  # the only one who listened
    assert first.state == "cancelled"
    bench.worker.turn()
    assert second.state == "running" and len(bench.rows()) == 2
    with pytest.raises(Cancelled):
        first.result(0)


def test_the_queue_is_bounded_and_says_when_to_ask_again() -> None:
    bench = Bench(queue=2, batch=1)
    for _ in range(3):
        bench.put(steps=4)
    with pytest.raises(Busy, match="2 requests wait") as refused:
        bench.put(steps=4)
    assert 1 <= refused.value.after <= 60
    bench.finish()
    assert bench.put(steps=4).state == "waiting"


def test_requests_of_many_images_leave_no_more_in_the_queue_than_it_says() -> None:
    bench = Bench(queue=2, batch=4)
    bench.put(steps=4, images=4)
    bench.worker.turn()
    for _ in range(2):
        bench.put(steps=4)
    with pytest.raises(Busy, match="2 requests wait"):
        bench.put(steps=4)
    assert bench.worker.waiting() == 2
    bench.finish()
    accepted = [bench.put(steps=4, images=2) for _ in range(4)]  # two are drawn at once, two wait
    with pytest.raises(Busy):
        bench.put(steps=4)
    bench.finish()
    assert [generation.state for generation in accepted] == ["done"] * 4


def test_a_deadline_that_the_queue_cannot_keep_is_refused_at_once() -> None:
    bench = Bench(batch=1)
    unet = bench.model.runners["unet"]
    plain, text = unet.function, bench.model.runners["text_encoder"]
    encode = text.function

    def second_long(feeds: Any) -> Any:
        bench.clock.now += 1.0
        return plain(feeds)

    def short(feeds: Any) -> Any:
        bench.clock.now += 1e-4
        return encode(feeds)

    unet.function, text.function = second_long, short
    bench.put(steps=4)
    bench.finish()  # it has learnt that a call takes a second
    (pace,) = bench.worker.paces()
    assert (pace["width"], pace["height"], pace["call_ms"]) == (64, 64, 1000.0)
    bench.put(steps=10)
    assert bench.worker.backlog() == pytest.approx(10, rel=0.01)
    with pytest.raises(Busy, match="deadline is in 12") as refused:
        bench.put(steps=4, deadline=12)
    assert refused.value.after == 11  # rounded up: the queue needs a little more than ten
    assert bench.put(steps=4, deadline=15).state == "waiting"


def test_another_size_is_not_held_up_by_a_full_one() -> None:
    bench = Bench(batch=2)
    for _ in range(3):
        bench.put(steps=4)
    rare = bench.put(steps=4, width=128, height=128)
    bench.worker.turn()
    assert rare.state == "running" and bench.worker.waiting() == 1


def test_one_poisoned_request_fails_alone() -> None:
    bench = Bench(HeldModel())
    bad, good = bench.put(POISON, steps=3), bench.put("cat", steps=3)
    bench.finish()
    assert good.state == "done" and bad.state == "failed"
    assert [png for png, _ in good.result(0).pictures] == drawn_alone("cat", steps=3)
    with pytest.raises(RunnerError, match="not finite"):
        bad.result(0)


def test_a_split_of_no_calls_encodes_and_hands_over() -> None:
    bench = Bench()
    order = handoff_order(HandoffForm(prompt="cat", steps=4, split=0), bench.model)
    generation = Generation("toy", order, bench.clock.now + 60, bench.clock)
    bench.worker.submit(generation)
    bench.finish()
    assert generation.result(0).trajectory and bench.rows() == []


def test_requests_that_need_no_call_do_not_hold_up_those_that_do() -> None:
    bench = Bench(batch=2)
    running = bench.put(steps=4)
    bench.worker.turn()
    order = handoff_order(HandoffForm(prompt="cat", steps=4, split=0), bench.model)
    made = [Generation("toy", order, bench.clock.now + 60, bench.clock) for _ in range(5)]
    for generation in made:
        bench.worker.submit(generation)
    bench.worker.turn()
    assert sum(generation.ended for generation in made) == 2 and len(bench.rows()) == 2
    bench.finish()
    assert running.state == "done" and all(generation.state == "done" for generation in made)


def test_a_request_of_many_images_is_not_overtaken_by_its_own_kind() -> None:
    bench = Bench(batch=4)
    small = [bench.put(f"cat {i}", steps=4) for i in range(2)]
    large, later = bench.put("large", steps=4, images=4), bench.put("later", steps=4)
    bench.worker.turn()
    assert [generation.state for generation in (*small, large, later)] == ["running"] * 2 + ["waiting"] * 2
    for _ in range(4):
        bench.worker.turn()
    assert large.state == "running" and later.state == "waiting"


def test_stopping_refuses_what_waits_and_lets_the_rest_finish() -> None:
    bench = Bench(batch=1)
    running, waiting = bench.put("one", steps=4), bench.put("two", steps=4)
    bench.worker.turn()
    bench.worker.drain()
    assert waiting.state == "failed" and not bench.worker.ready()
    with pytest.raises(BusyError, match="draining"):
        bench.put()
    bench.finish()
    assert running.state == "done"


def test_case_35_a_call_longer_than_any_deadline_is_not_ready() -> None:
    bench = Bench()
    seen = []
    unet = bench.model.runners["unet"]
    plain = unet.function

    def hanging(feeds: Any) -> Any:
        seen.append(bench.worker.ready())
        bench.clock.now += 601
        seen.append(bench.worker.ready())
        return plain(feeds)

    unet.function = hanging
    bench.put(steps=1)
    bench.worker.turn()
    assert seen == [True, False] and bench.worker.ready()


def test_inpainting_models_are_refused_at_load() -> None:
    worker = Worker(Served("fill", ToyModel("inpaint")), ServeOptions())
    with pytest.raises(UnsupportedError, match="fills masks"):
        worker.load()


def test_a_fault_of_our_own_breaks_the_worker_and_frees_its_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(Served("toy", ToyModel()), ServeOptions())
    changes: list[str] = []
    worker.start(lambda changed: changes.append(changed.state))
    until_ready(worker)
    monkeypatch.setattr(worker, "_call", lambda: 1 / 0)
    order = generate_order(GenerateForm(prompt="cat"), worker.served.model)
    generation = Generation("toy", order, time.monotonic() + 30)
    worker.submit(generation)
    with pytest.raises(BusyError, match="broke down"):
        generation.result(10)
    worker.stop()
    assert changes == ["ready", "broken"] and isinstance(worker.fault, ZeroDivisionError)


class Mortal:
    """An engine process of a toy model: dead, every call raises PeerError, and `dies` in the next one; `refuse` starts
    fail."""

    def __init__(self, model: ToyModel) -> None:
        self.living, self.dies, self.refuse, self.starts = True, False, 0, 0
        for runner in model.runners.values():
            runner.function = partial(self._call, runner.function)

    def _call(self, plain: Any, feeds: Any) -> Any:
        self.living, self.dies = self.living and not self.dies, False
        if not self.living:
            raise PeerError("the engine's process ended")
        return plain(feeds)

    def restart(self) -> None:
        self.starts += 1
        if self.refuse:
            self.refuse -= 1
            raise PeerError("it died again")
        self.living = True


def mortal(**options: Any) -> tuple[Bench, Mortal]:
    model = ToyModel()
    engine = Mortal(model)
    bench = Bench(model, **options)
    served = Served("toy", model, alive=lambda: engine.living, restart=engine.restart)
    bench.worker.served = served
    return bench, engine


def test_case_34_only_the_call_that_the_engine_died_of_fails_and_the_rest_goes_on() -> None:
    bench, engine = mortal()
    small, large = bench.put(steps=4, width=64, height=64), bench.put(steps=4, width=128, height=128)
    bench.worker.turn()  # one size each turn
    engine.dies = True
    bench.worker.turn()
    assert engine.starts == 0 and not bench.worker.ready()
    bench.finish()
    ended = sorted([small, large], key=lambda generation: generation.state)
    assert [generation.state for generation in ended] == ["done", "failed"]
    with pytest.raises(PeerError):
        ended[1].result(0)
    assert engine.starts == 1 and bench.worker.state == "ready"
    height, width = (side * 8 for side in ended[0].order.shape[-2:])
    (alone,) = drawn_alone("cat", steps=4, size=(height, width))
    drawn = ended[0].result(0).pictures[0][0]
    assert drawn == alone, "what was under way when the engine died is drawn as if nothing had been"


@pytest.mark.parametrize("part", ["text_encoder", "vae_decoder"])
def test_case_34_an_engine_that_dies_while_it_encodes_or_decodes_takes_one_request(part: str) -> None:
    bench, engine = mortal(batch=3)
    made = [bench.put(f"cat {i}", steps=2, seed=i) for i in range(3)]
    runner = bench.model.runners[part]
    plain, calls = runner.function, iter([False, True])

    def fatal(feeds: Any) -> Any:
        engine.dies = next(calls, False)
        return plain(feeds)

    runner.function = fatal
    bench.finish()
    assert sorted(generation.state for generation in made) == ["done", "done", "failed"]
    assert engine.starts == 1 and bench.worker.state == "ready"
    for i, generation in enumerate(made):
        if generation.state == "done":
            pictures = [png for png, _ in generation.result(0).pictures]
            assert pictures == drawn_alone(f"cat {i}", steps=2, seed=i), "not touched by what happened to the other"


def test_a_start_that_the_system_refuses_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, engine = mortal()
    starts, plain = iter([OSError(11, "Resource temporarily unavailable"), MemoryError()]), engine.restart

    def restart() -> None:
        if (fault := next(starts, None)) is not None:
            raise fault
        plain()

    bench.worker.served = replace(bench.worker.served, restart=restart)
    monkeypatch.setattr(
        bench.worker._wake, "wait", lambda seconds: setattr(bench.clock, "now", bench.clock.now + seconds)
    )
    generation = bench.put(steps=2)
    engine.living = False
    bench.finish()
    assert generation.state == "done" and bench.worker.state == "ready"


def test_case_34_starts_are_bounded_and_the_server_is_not_ready_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, engine = mortal(restarts=3)
    waits: list[tuple[float, bool, str]] = []

    def sleep(seconds: float) -> None:  # in place of the worker's wait
        waits.append((round(bench.clock.now - 100, 1), bench.worker.ready(), bench.worker.state))
        bench.clock.now += seconds

    monkeypatch.setattr(bench.worker._wake, "wait", sleep)
    late = bench.put(deadline=30.0)
    engine.living, engine.refuse = False, 3
    bench.worker._revive()
    assert engine.starts == 4 and engine.living and bench.worker.state == "ready"
    assert not any(ready for _, ready, _ in waits) and {state for *_, state in waits} == {"restarting"}
    assert bench.clock.now >= 160, "three starts in a minute, and the fourth when the first is a minute old"
    assert late.state == "expired", "deadlines pass while it waits"
    assert bench.worker._metrics.value("diffship_restarts_total", model="toy") == 4


def test_an_engine_that_dies_while_nothing_is_drawn_is_started_anew() -> None:
    bench, engine = mortal()
    engine.living = False
    assert not bench.worker.ready()
    assert bench.worker._wait() and engine.starts == 0
    bench.worker.turn()
    assert bench.worker.ready() and engine.starts == 1


def test_a_server_that_is_stopped_does_not_wait_for_another_start() -> None:
    bench, engine = mortal(restarts=1)
    engine.living, engine.refuse = False, 99
    thread = threading.Thread(target=bench.worker._revive)
    thread.start()
    until(lambda: engine.starts == 1)
    bench.worker.stop()
    thread.join(5)
    assert not thread.is_alive() and engine.starts == 1


def test_starts_come_less_and_less_soon() -> None:
    clock = Clock()
    restarts = Restarts(4, clock)
    waits = []
    for _ in range(6):
        waits.append(restarts.wait())
        clock.now += max(restarts.wait(), 0)
        restarts.note()
    assert waits == [0, 0.5, 1, 2, 56.5, 0.5]
    clock.now += 61
    assert restarts.wait() == 0


def until_ready(worker: Worker) -> None:
    end = time.monotonic() + 10
    while not worker.ready():
        assert time.monotonic() < end
        time.sleep(0.002)


def generation(clock: Clock, size: int = 10) -> Generation:
    order = generate_order(GenerateForm(prompt="cat"), ToyModel())
    made = Generation("toy", order, clock.now + 60, clock)
    made.finish(Drawn(trajectory=bytes(size)))
    return made


def test_case_38_the_same_key_gives_the_same_generation_and_another_body_conflicts() -> None:
    clock = Clock()
    kept = Kept(ServeOptions(), clock)
    first = kept.once("k", b"a", lambda: generation(clock))
    assert kept.once("k", b"a", lambda: generation(clock)) is first
    with pytest.raises(ConflictError, match="Idempotency-Key"):
        kept.once("k", b"b", lambda: generation(clock))
    assert kept.once("other", b"b", lambda: generation(clock)) is not first


def test_kept_results_are_bounded_by_time_count_and_bytes() -> None:
    clock = Clock()
    kept = Kept(ServeOptions(kept_results=2, kept_bytes=100, kept_seconds=10), clock)
    first = kept.once("1", b"", lambda: generation(clock))
    clock.now += 11
    assert kept.once("1", b"", lambda: generation(clock)) is not first  # too old
    others = [kept.once(str(i), b"", lambda: generation(clock)) for i in range(2, 4)]
    assert kept.once("1", b"", lambda: generation(clock)) is not first  # one of three had to go
    assert kept.once("3", b"", lambda: generation(clock)) is others[1]
    big = kept.once("big", b"", lambda: generation(clock, 200))
    assert kept.once("big", b"", lambda: generation(clock)) is not big  # more bytes than are kept


def test_a_kept_result_does_not_keep_the_trajectory_that_came_in() -> None:
    bench = Bench()
    trajectory = start(bench.model, Request("cat", steps=3))[0]
    order = resume_order(pack(trajectory), ResumeForm(), bench.model)
    generation = Generation("toy", order, bench.clock.now + 60, bench.clock)
    bench.worker.submit(generation)
    bench.finish()
    assert generation.drawn is not None and generation.order.images == 1
    with pytest.raises(RunnerError, match="drawn before"):
        generation.order.begin(bench.model)


def test_what_failed_is_drawn_anew_by_a_retry() -> None:
    clock = Clock()
    kept = Kept(ServeOptions(), clock)
    order = generate_order(GenerateForm(prompt="cat"), ToyModel())
    first = kept.once("k", b"", lambda: Generation("toy", order, clock.now + 60, clock))
    assert kept.once("k", b"", lambda: generation(clock)) is first  # still running
    first.fail(RunnerError("not finite"))
    assert kept.once("k", b"", lambda: generation(clock)) is not first


def test_the_first_end_counts_and_every_listener_hears_it_once() -> None:
    clock = Clock()
    order = generate_order(GenerateForm(prompt="cat"), ToyModel())
    made = Generation("toy", order, clock.now + 60, clock)
    heard: list[Any] = []
    made.listen(heard.append)
    assert made.expire() and not made.finish(Drawn(trajectory=b"late")) and not made.cancel()
    made.progress(Progress(1, 4))
    assert heard == [None] and made.state == "expired" and made.drawn is None
    made.listen(heard.append)
    assert heard == [None, None]  # who comes late hears it at once


def test_one_of_two_listeners_leaving_cancels_nothing() -> None:
    clock = Clock()
    order = generate_order(GenerateForm(prompt="cat"), ToyModel())
    made = Generation("toy", order, clock.now + 60, clock)

    def one(progress: Progress | None) -> None: ...

    def two(progress: Progress | None) -> None: ...

    made.listen(one)
    made.listen(two)
    made.leave(one)
    assert not made.ended
    made.leave(two)
    assert made.state == "cancelled"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"width": 100, "height": 100}, "nearest are 64 and 128"),
        ({"steps": 4, "seed": 2**63 - 1, "images": 2}, "seed"),
        ({"sampler": "lcm", "spacing": "leading"}, "lcm"),
    ],
)
def test_what_only_the_model_knows_is_refused_before_the_queue(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_order(GenerateForm(**{"prompt": "cat", "response": "json", **words}), ToyModel())


@pytest.mark.parametrize("end", ["cancel", "expire"])
def test_what_ends_while_it_waits_lets_go_of_what_it_was_made_of(end: str) -> None:
    """A retry's key holds the request for minutes, and with it megabytes of a trajectory that came in."""
    bench = Bench(batch=1)
    bench.put(steps=2)
    bench.worker.turn()
    trajectory = start(bench.model, Request("cat", steps=4))[0]
    waiting = bench.submit(resume_order(pack(trajectory), ResumeForm(), bench.model))
    kept = weakref.ref(waiting.order.begin)
    getattr(waiting, end)()
    gc.collect()
    assert kept() is None
    bench.finish()
    assert waiting.state == ("cancelled" if end == "cancel" else "expired")


def test_what_ends_between_the_queue_and_its_first_step_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    taken = bench.put(steps=2)
    begin = taken.begin
    taken.begin = lambda: (taken.cancel(), begin())  # type: ignore[method-assign,assignment,func-returns-value]
    bench.finish()
    assert taken.state == "cancelled" and bench.worker.running() == 0 and not caplog.records
