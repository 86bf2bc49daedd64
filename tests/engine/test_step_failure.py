"""A step that fails costs nothing but itself: no request, no block, no token."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pagebrain import LLM, SamplingParams
from pagebrain.cache import RetiringSequence
from pagebrain.engine.engine import Engine
from pagebrain.engine.scheduler import Scheduler
from pagebrain.engine.sequence import Sequence, SequenceGroup
from pagebrain.errors import IntegrityError, StepError
from pagebrain.sampling import SamplerOutput
from tests.support.hashing import continuation, hash_engine, run_all
from tests.support.models import hf_greedy, random_gpt2

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def state(engine: Engine) -> dict[str, Any]:
    """What must be as before after a failed step, block tables aside: a table may have grown ahead of its tokens."""
    seqs = [*engine.scheduler.running, *engine.scheduler.waiting]
    counts = {
        seq.seq_id: (tuple(seq.token_ids), seq.num_computed, seq.num_unread_steps, seq.num_unread_tokens) for seq in seqs
    }
    return {"counts": counts, "unfinished": engine.num_unfinished_requests}


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("failing", range(1, 12))
def test_a_failed_step_is_rolled_back_and_can_be_tried_again(failing: int, async_scheduling: bool) -> None:
    engine = hash_engine(async_scheduling=async_scheduling, num_blocks=10, block_size=2, max_model_len=20)
    model: Any = engine.executor.model  # type: ignore[attr-defined]
    forward, calls = model.forward_tokens, 0

    def sometimes(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise RuntimeError("out of luck")
        return forward(batch)

    model.forward_tokens = sometimes
    prompts = {"a": [1], "b": [2, 3, 4], "c": [5] * 6}
    for name, prompt in prompts.items():
        engine.add_request(prompt, GREEDY, name)
    outputs: dict[str, Any] = {}
    failures = 0
    while engine.has_unfinished_requests:
        try:
            outputs.update((d.request_id, d.finished) for d in engine.step() if d.finished is not None)
        except StepError as error:
            failures += 1
            assert "RuntimeError: out of luck" in str(error)
            engine.check_integrity()
            assert all(seq.num_unread_steps == 0 and seq.num_unread_tokens == 0 for seq in engine.scheduler.running)
            assert all(seq.num_scheduled == seq.num_computed for seq in engine.scheduler.running)
    assert failures == 1
    for name, prompt in prompts.items():
        assert list(outputs[name].outputs[0].token_ids) == continuation(prompt, 12)
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks


def test_a_step_that_cannot_be_launched_leaves_everything_as_it_was() -> None:
    engine = hash_engine()
    engine.add_request([1, 2, 3], GREEDY)
    engine.step()
    before, launch = state(engine), engine.executor.launch

    def refuse(group: Any) -> Any:
        raise RuntimeError("no room")

    engine.executor.launch = refuse  # type: ignore[method-assign]
    with pytest.raises(StepError, match="could not be launched: RuntimeError: no room"):
        engine.step()
    assert state(engine) == before
    engine.executor.launch = launch  # type: ignore[method-assign]
    assert list(run_all(engine)["request-0"].outputs[0].token_ids) == continuation([1, 2, 3], 12)


def test_generate_that_fails_leaves_nothing_behind() -> None:
    base = random_gpt2()
    broken = True

    def attention(
        query: Any, key_pool: Any, value_pool: Any, block_tables: Any, context_lens: Any, query_starts: Any, scale: Any
    ) -> Any:
        if broken:
            raise RuntimeError("not written yet")
        from pagebrain.attention import paged_attention  # noqa: PLC0415

        return paged_attention(query, key_pool, value_pool, block_tables, context_lens, query_starts, scale)

    llm = LLM(base, num_blocks=16, parts={"attention": attention})
    with pytest.raises(StepError, match="not written yet"):
        llm.generate([[1, 2], [3]], GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests and llm.engine.cache_manager.num_free_blocks == 16
    broken = False
    assert list(llm.generate([[1, 2]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == hf_greedy(base, [1, 2], 12)


def test_an_observer_that_fails_is_dropped_and_no_token_with_it() -> None:
    engine = hash_engine()
    calls = []

    def broken(trace: Any) -> None:
        calls.append(trace)
        raise ValueError("cannot draw")

    engine.observers.append(broken)
    engine.add_request([1], GREEDY)
    assert list(run_all(engine)["request-0"].outputs[0].token_ids) == continuation([1], 12)
    assert len(calls) == 1 and not engine.observers


def test_blocks_returned_while_a_step_reads_them_are_noticed() -> None:
    """Blocks are freed late for this reason; if they are not, the integrity check has to see it."""
    engine = hash_engine(async_scheduling=True)

    def at_once(seq: RetiringSequence) -> None:
        engine.cache_manager.free(seq.seq_id)

    engine.cache_manager.retire = at_once  # type: ignore[method-assign]
    engine.add_request([1, 2, 3], GREEDY, "a")
    engine.step()
    engine.abort("a")
    with pytest.raises(IntegrityError, match="a step in flight reads 3"):
        engine.check_integrity()


def test_a_scheduler_that_finds_nothing_to_do_is_an_error_and_not_an_endless_loop() -> None:
    engine = hash_engine()
    engine.add_request([1], GREEDY)
    engine.scheduler.schedule = lambda: None  # type: ignore[method-assign]
    with pytest.raises(StepError, match="nothing to compute although 1 requests"):
        engine.step()


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_an_interrupt_while_a_step_is_read_loses_nothing(async_scheduling: bool) -> None:
    engine = hash_engine(async_scheduling=async_scheduling)
    model: Any = engine.executor.model  # type: ignore[attr-defined]
    forward = model.forward_tokens

    def interrupted(batch: Any) -> Any:
        model.forward_tokens = forward
        raise KeyboardInterrupt

    engine.add_request([1, 2, 3], GREEDY)
    engine.step()
    model.forward_tokens = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check_integrity()
    assert list(run_all(engine)["request-0"].outputs[0].token_ids) == continuation([1, 2, 3], 12)
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks


class BrokenScheduler(Scheduler):
    """Goes wrong in one step, in a way that is set from outside."""

    fault: Callable[[SequenceGroup], Any] | None = None

    def schedule(self) -> Any:
        group = super().schedule()
        fault, self.fault = self.fault, None
        return group if fault is None or group is None else fault(group)


def with_first(group: SequenceGroup, **changes: Any) -> SequenceGroup:
    first = group.scheduled[0]._replace(**changes)
    return SequenceGroup((first, *group.scheduled[1:]))


FAULTS: dict[str, tuple[Callable[[SequenceGroup], Any], str]] = {
    "raises": (lambda group: 1 / 0, r"the scheduler failed: ZeroDivisionError: division by zero \(test_step_failure.py:\d+"),
    "empty group": (lambda group: SequenceGroup(()), "returned an empty group"),
    "sequence twice": (lambda group: SequenceGroup(group.scheduled * 2), "names a sequence twice"),
    "wrong start": (lambda group: with_first(group, start=0), r"scheduled with \(start, samples\) = \(0, True\)"),
    "does not sample": (lambda group: with_first(group, samples=False), "expected .*True"),
    "too many tokens": (lambda group: with_first(group, num_tokens=3), "3 tokens: expected"),
    "over the budget": (lambda group: with_first(group, num_tokens=100), "max_num_batched_tokens allows 8"),
}


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_plan_that_makes_no_sense_is_refused_and_the_next_one_goes_on(name: str, async_scheduling: bool) -> None:
    fault, message = FAULTS[name]
    engine = hash_engine(make_scheduler=BrokenScheduler, async_scheduling=async_scheduling)
    scheduler: Any = engine.scheduler
    engine.add_request([1, 2, 3], GREEDY)
    for _ in range(3):
        engine.step()
    scheduler.fault = fault
    with pytest.raises(StepError, match=message):
        engine.step()
    engine.check_integrity()
    assert list(run_all(engine)["request-0"].outputs[0].token_ids) == continuation([1, 2, 3], 12)
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks


def test_after_an_interrupted_read_no_more_steps_are_in_flight_than_before() -> None:
    engine = hash_engine(async_scheduling=True)
    for _ in range(3):
        engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    engine.step()
    engine.step()
    in_flight = engine._in_flight[0]
    wait = in_flight.in_flight.wait

    def interrupted() -> Any:
        raise KeyboardInterrupt

    engine._in_flight[0] = dataclasses.replace(
        in_flight, in_flight=dataclasses.replace(in_flight.in_flight, wait=interrupted)
    )
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine._in_flight[0] = in_flight
    assert len(engine._in_flight) == 2 and in_flight.in_flight.wait is wait
    while engine.has_unfinished_requests:
        engine.step()
        assert len(engine._in_flight) <= 1


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_failure_while_tokens_are_handed_out_loses_no_token(async_scheduling: bool) -> None:
    """The first sequence has got its token when the second one's fails: each gets its own, once."""
    engine = hash_engine(async_scheduling=async_scheduling)
    append, calls = engine.outputs.append, 0

    def sometimes(seq: Sequence, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (4, 9):
            raise MemoryError("no room for text")
        return append(seq, *args)

    engine.outputs.append = sometimes  # type: ignore[method-assign, assignment]
    for name, prompt in (("a", [1]), ("b", [2, 3])):
        engine.add_request(prompt, GREEDY, name)
    streamed: dict[str, list[int]] = {"a": [], "b": []}
    failures = 0
    while engine.has_unfinished_requests:
        try:
            for delta in engine.step():
                streamed[delta.request_id].extend(delta.token_ids)
        except MemoryError:
            failures += 1
            engine.check_integrity()
    assert failures == 2
    assert streamed == {"a": continuation([1], 12), "b": continuation([2, 3], 12)}


@pytest.mark.parametrize("answer", [[3], [3, 3, 3], [3, 5000]])
def test_a_sampler_that_answers_nonsense_is_named(answer: list[int]) -> None:
    engine = hash_engine()
    sampler: Any = engine.executor.sampler  # type: ignore[attr-defined]
    sample = sampler.sample
    sampler.sample = lambda logits, rows: SamplerOutput(torch.tensor(answer), None)
    for name in ("a", "b"):
        engine.add_request([1, 2], GREEDY, name)
    with pytest.raises(StepError, match="the sampler (was given 2 rows|chose token 5000)"):
        engine.step()
    sampler.sample = sample
    assert {tuple(output.outputs[0].token_ids) for output in run_all(engine).values()} == {tuple(continuation([1, 2], 12))}


def test_the_thread_that_computes_ahead_reports_its_failures_too() -> None:
    """The same with the executor that users get, whose steps run in a thread of their own."""
    base = random_gpt2()
    llm = LLM(base, num_blocks=16, async_scheduling=True)
    model: Any = llm.engine.executor.model  # type: ignore[attr-defined]
    forward, calls = model.forward_tokens, 0

    def sometimes(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of luck")
        return forward(batch)

    model.forward_tokens = sometimes
    with pytest.raises(StepError, match="out of luck"):
        llm.generate([[1, 2], [3]], GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests and llm.engine.cache_manager.num_free_blocks == 16
    outputs = llm.generate([[1, 2], [3]], GREEDY, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [
        hf_greedy(base, [1, 2], 12),
        hf_greedy(base, [3], 12),
    ]
