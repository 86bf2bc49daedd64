"""What every scheduler must do, seen from outside: budgets, first come first served, no starvation, right texts."""

from collections.abc import Callable
from typing import Any

import pytest

from chapters import ch04_scheduler
from pagebrain import SamplingParams
from pagebrain.engine.engine import Engine
from pagebrain.engine.scheduler import Scheduler
from pagebrain.engine.trace import StepTrace
from tests.support.hashing import continuation, hash_engine, run_all

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"engine": Scheduler, "chapter 04": ch04_scheduler.Scheduler}


@pytest.fixture(params=IMPLEMENTATIONS)
def make(request: pytest.FixtureRequest) -> Callable[..., tuple[Engine, list[StepTrace]]]:
    def engine(**settings: Any) -> tuple[Engine, list[StepTrace]]:
        built = hash_engine(make_scheduler=IMPLEMENTATIONS[request.param], **settings)
        traces: list[StepTrace] = []
        built.observers.append(traces.append)
        return built, traces

    return engine


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def test_budget_and_seats_are_never_exceeded(make: Callable[..., Any]) -> None:
    engine, traces = make(max_num_seqs=3, max_num_batched_tokens=5, num_blocks=32)
    for length in (1, 9, 4, 17, 2, 6):
        engine.add_request(list(range(length)), greedy(7))
    run_all(engine)
    assert all(trace.num_tokens <= 5 and len(trace.rows) <= 3 for trace in traces)
    assert max(len(trace.rows) for trace in traces) == 3


def test_running_sequences_decode_in_every_step_while_a_long_prompt_is_computed_in_chunks(make: Callable[..., Any]) -> None:
    engine, traces = make(max_num_batched_tokens=6, num_blocks=32)
    engine.add_request([1, 2], greedy(20), "writer")
    for _ in range(3):
        engine.step()
    engine.add_request(list(range(30)), greedy(2), "reader")
    run_all(engine)
    chunks = [trace for trace in traces if any(row.request_id == "reader" and row.phase == "prefill" for row in trace.rows)]
    assert len(chunks) == 6  # 30 tokens, 5 beside the writer's one
    assert all(any(row.request_id == "writer" for row in trace.rows) for trace in chunks)


def test_first_come_first_served(make: Callable[..., Any]) -> None:
    engine, traces = make(max_num_seqs=2, num_blocks=32)
    for name, length in (("a", 3), ("b", 20), ("c", 1), ("d", 2)):
        engine.add_request(list(range(length)), greedy(4), name)
    run_all(engine)
    first_step: dict[str, int] = {}
    for trace in traces:
        for row in trace.rows:
            first_step.setdefault(row.request_id, trace.step)
    assert [name for name, _ in sorted(first_step.items(), key=lambda item: item[1])] == ["a", "b", "c", "d"]


def test_a_later_arrival_is_preempted_first_and_the_oldest_never(make: Callable[..., Any]) -> None:
    engine, traces = make(num_blocks=8, block_size=2, max_model_len=16, max_num_seqs=4)
    for index in range(4):
        engine.add_request([index], greedy(15))
    outputs = run_all(engine)
    preempted = [seq_id for trace in traces for seq_id in trace.preempted]
    assert preempted and 0 not in preempted
    for index in range(4):
        assert list(outputs[f"request-{index}"].outputs[0].token_ids) == continuation([index], 15)


def test_a_preempted_sequence_goes_on_before_any_later_arrival_starts(make: Callable[..., Any]) -> None:
    engine, traces = make(num_blocks=8, block_size=2, max_model_len=16, max_num_seqs=2)
    for index in range(3):
        engine.add_request([index], greedy(15))
    run_all(engine)
    preempted = next(trace.step for trace in traces if 1 in trace.preempted)
    resumed = next(trace.step for trace in traces[preempted:] for row in trace.rows if row.seq_id == 1)
    started = next(trace.step for trace in traces for row in trace.rows if row.seq_id == 2)
    assert preempted < resumed <= started


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones(make: Callable[..., Any]) -> None:
    engine, _ = make(num_blocks=8, block_size=2, max_model_len=16, max_num_seqs=4)
    for index in range(3):
        engine.add_request([index], greedy(8))
    engine.step()
    engine.add_request(list(range(15)), greedy(1), "large")
    ended: list[str] = []
    for turn in range(200):
        engine.add_request([turn], greedy(4))  # a stream of small requests that never ends
        ended.extend(delta.request_id for delta in engine.step() if delta.finished is not None)
        if "large" in ended:
            break
    assert "large" in ended
    assert [name for name in ended if int(name.removeprefix("request-").replace("large", "3")) > 3] == []


def test_a_sequence_that_was_aborted_is_never_scheduled_again(make: Callable[..., Any]) -> None:
    engine, traces = make(max_num_seqs=1)
    for name in ("running", "waiting", "left"):
        engine.add_request([1, 2, 3], greedy(5), name)
    engine.step()
    assert engine.abort("running") and engine.abort("waiting")
    del traces[:]
    outputs = run_all(engine)
    assert set(outputs) == {"left"} and {row.request_id for trace in traces for row in trace.rows} == {"left"}
    assert engine.cache_manager.num_free_blocks == engine.cache_manager.num_blocks
