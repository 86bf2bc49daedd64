"""Prefill and decode are states of a sequence, whatever the number of tokens; and a step may bring several tokens."""

import dataclasses
from typing import Any

import pytest

from pagebrain import SamplingParams
from pagebrain.engine.output_processor import OutputProcessor
from pagebrain.engine.sequence import Request, ScheduledSequence, Sequence
from pagebrain.engine.trace import StepTrace
from pagebrain.outputs import OutputDelta, TokenLogprobs
from tests.support.hashing import continuation, hash_engine, next_token, run_all


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_prompt_of_one_token_is_a_prefill_and_so_is_a_chunk_of_one(async_scheduling: bool) -> None:
    engine = hash_engine(async_scheduling=async_scheduling, max_num_batched_tokens=4, max_num_seqs=2)
    traces: list[StepTrace] = []
    engine.observers.append(traces.append)
    engine.add_request([1], greedy(3), "one token")
    engine.add_request([2] * 4, greedy(3), "chunks of 3 and 1")
    run_all(engine)
    rows = [[(row.request_id, row.start, row.num_tokens, row.phase) for row in trace.rows] for trace in traces]
    assert rows[:2] == [
        [("one token", 0, 1, "prefill"), ("chunks of 3 and 1", 0, 3, "prefill")],
        [("one token", 1, 1, "decode"), ("chunks of 3 and 1", 3, 1, "prefill")],
    ]
    assert all(row.phase == "decode" for trace in traces[2:] for row in trace.rows)
    stats = engine.stats()
    assert (stats.num_prefill_tokens, stats.num_decode_tokens) == (1 + 4, 2 + 2)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_after_a_preemption_a_sequence_prefills_until_it_has_caught_up(async_scheduling: bool) -> None:
    engine = hash_engine(async_scheduling=async_scheduling, num_blocks=8, block_size=2, max_model_len=16, max_num_seqs=4)
    traces: list[StepTrace] = []
    engine.observers.append(traces.append)
    for index in range(4):
        engine.add_request([index, index], greedy(12))
    run_all(engine)
    num_prefill_tokens = num_caught_up = 0
    reached = dict.fromkeys(range(4), 2)  # tokens that each sequence has, those that steps in flight sample included
    to_catch_up = dict(reached)
    for trace in traces:
        for seq_id in trace.preempted:
            to_catch_up[seq_id] = reached[seq_id]
        for row in trace.rows:
            expected = "prefill" if row.start < to_catch_up[row.seq_id] else "decode"
            assert row.phase == expected
            num_prefill_tokens += row.num_tokens if row.phase == "prefill" else 0
            num_caught_up += row.phase == "prefill" and to_catch_up[row.seq_id] > 2
            if row.samples:
                reached[row.seq_id] = row.context_len + 1
    assert num_caught_up > 0
    assert engine.stats().num_prefill_tokens == num_prefill_tokens > 8


def started(**params: Any) -> tuple[OutputProcessor, Sequence]:
    """A request with a prompt of two tokens, of which nothing has come out yet. Token 9 is the end of sequence."""
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 6} | params
    request = Request("a", None, (1, 2), SamplingParams(**settings), 0, 0, 0.0)
    seq = Sequence(0, request, 0, max_num_tokens=2 + settings["max_tokens"])
    outputs = OutputProcessor(None, frozenset({9}))
    outputs.add(request, [seq], wants_deltas=True)
    return outputs, seq


def test_several_tokens_of_a_step_are_one_delta() -> None:
    outputs, seq = started()
    assert not outputs.append(seq, (3, 4, 5), (), now=1.0)
    assert not outputs.append(seq, (6,), (), now=2.0)
    assert [delta.token_ids for delta in outputs.take_deltas()] == [(3, 4, 5), (6,)]
    assert seq.output_token_ids == [3, 4, 5, 6] and outputs.take_deltas() == []


@pytest.mark.parametrize(
    ("params", "token_ids", "kept", "reason", "stop_reason"),
    [
        ({}, (3, 9, 4), (3, 9), "stop", None),
        ({"stop_token_ids": [4]}, (3, 4, 5), (3, 4), "stop", 4),
        ({"stop_token_ids": [4], "min_tokens": 3}, (4, 4, 4, 4), (4, 4, 4), "stop", 4),
        ({"ignore_eos": True}, (9, 9, 9, 9, 9, 9, 9, 9), (9, 9, 9, 9, 9, 9), "length", None),
    ],
)
def test_tokens_past_the_one_that_ends_a_sequence_are_dropped(
    params: dict[str, Any], token_ids: tuple[int, ...], kept: tuple[int, ...], reason: str, stop_reason: int | None
) -> None:
    outputs, seq = started(logprobs=0, **params)
    scores = tuple(TokenLogprobs(token_id, -1.0, 1) for token_id in token_ids)
    assert outputs.append(seq, token_ids, scores, now=1.0)
    assert tuple(seq.output_token_ids) == kept and tuple(entry.token_id for entry in seq.logprobs) == kept
    delta: OutputDelta
    (delta,) = outputs.take_deltas()
    assert (delta.token_ids, delta.finish_reason, delta.stop_reason) == (kept, reason, stop_reason)
    assert len(delta.logprobs) == len(kept) and not outputs.requests
    assert delta.finished is not None and delta.finished.outputs[0].token_ids == kept


def test_a_step_that_brings_several_tokens_is_applied_by_the_engine() -> None:
    """The step of the prompt brings two tokens here; the executor keeps both, and the next step computes both."""
    engine = hash_engine()
    traces: list[StepTrace] = []
    engine.observers.append(traces.append)
    executor: Any = engine.executor
    launch = executor.launch

    def doubled(group: Any) -> Any:
        in_flight = launch(group)
        (entry,) = group

        def wait() -> Any:
            result = in_flight.wait()
            if entry.start > 0:
                return result
            tokens = [*entry.seq.token_ids, *result.token_ids[0]]
            tokens.append(next_token(tokens))
            executor.rows.token_ids[executor.rows.row_of(entry.seq), len(tokens) - 1] = tokens[-1]
            return dataclasses.replace(result, token_ids=[tuple(tokens[-2:])])

        return dataclasses.replace(in_flight, wait=wait)

    executor.launch = doubled
    engine.add_request([1, 2, 3], greedy(7))
    assert list(run_all(engine)["request-0"].outputs[0].token_ids) == continuation([1, 2, 3], 7)
    rows = [(row.start, row.num_tokens, row.phase) for trace in traces for row in trace.rows]
    assert rows[:3] == [(0, 3, "prefill"), (3, 2, "decode"), (5, 1, "decode")] and len(rows) == 6
    stats = engine.stats()
    assert (stats.num_prefill_tokens, stats.num_decode_tokens) == (3, 6)


def test_a_scheduled_sequence_tells_its_phase_by_state() -> None:
    request = Request("a", None, (1, 2, 3), greedy(4), 0, 0, 0.0)
    seq = Sequence(0, request, 0, max_num_tokens=7)
    assert ScheduledSequence(seq, 2, 1, True).phase == "prefill"
    assert ScheduledSequence(seq, 3, 1, True).phase == "decode"
    assert ScheduledSequence(seq, 3, 4, True).phase == "decode"  # guesses that are checked extend the text too
    seq.token_ids += [4, 5]
    seq.preempt()
    assert ScheduledSequence(seq, 4, 1, True).phase == "prefill"
