"""What the live view is told agrees with the engine, step by step."""

import dataclasses
import time
from typing import Any

import pytest

from pagebrain import LLM, SamplingParams
from pagebrain.server.live.feed import MAX_NEXT_FREE, MAX_STEPS, LiveFeed

PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture
def llm() -> LLM:
    """A pool in which three sequences of this length do not fit."""
    return LLM(num_blocks=9, block_size=8, max_num_seqs=4, max_num_batched_tokens=8, dtype="float64")


def updates_of(llm: LLM, num_requests: int) -> list[dict[str, Any]]:
    """An update after each step, until all is done."""
    feed = LiveFeed()
    llm.engine.observers.append(feed)
    for _ in range(num_requests):
        llm.engine.add_request([50, 60, 70, 80, 90], PARAMS)
    updates = []
    while llm.engine.has_unfinished_requests:
        llm.engine.step()
        updates.append(feed.update(time.monotonic(), llm.engine.stats(), False))
    return updates


def test_blocks_add_up_in_every_update_under_preemption(llm: LLM) -> None:
    updates = updates_of(llm, 3)
    assert llm.engine.stats().num_preemptions > 0
    for update in updates:
        state = update["state"]
        held = {block for blocks in state["tables"].values() for block in blocks}
        assert state["free_blocks"] + len(held) == 9
        assert not held & set(state["next_free"])
        assert set(state["context"]) <= set(state["tables"])
        for seq_id, length in state["context"].items():
            assert length <= 8 * len(state["tables"][seq_id])
        assert set(state["preempted"]) <= set(state["waiting"])
        assert not set(state["running"]) & set(state["waiting"])
    assert updates[-1]["state"]["free_blocks"] == 9 and not updates[-1]["state"]["tables"]


def test_steps_tell_what_was_computed_and_totals_agree(llm: LLM) -> None:
    updates = updates_of(llm, 3)
    steps = [step for update in updates for step in update["steps"]]
    assert [step["step"] for step in steps] == list(range(len(updates)))
    totals = updates[-1]["totals"]
    for phase in ("prefill_tokens", "decode_tokens"):
        assert sum(step[phase] for step in steps) == totals[phase] > 0
    assert sum(len(step["preempted"]) for step in steps) == totals["preemptions"] > 0
    assert sorted(seq_id for step in steps for seq_id in step["finished"]) == [0, 1, 2]
    for step in steps:
        assert sum(count for _, _, count, _ in step["rows"]) == step["prefill_tokens"] + step["decode_tokens"]


def test_who_lost_its_blocks_is_in_the_preempted_queue_until_it_runs_again(llm: LLM) -> None:
    seen_waiting = False
    preempted: set[int] = set()
    for update in updates_of(llm, 3):
        for step in update["steps"]:
            preempted |= set(step["preempted"])
            preempted -= {seq_id for seq_id, *_ in step["rows"]}
        assert set(update["state"]["preempted"]) == preempted
        seen_waiting |= bool(preempted)
    assert seen_waiting


def test_an_update_is_bounded_and_counts_what_it_leaves_out() -> None:
    llm = LLM(num_blocks=200, dtype="float64")
    feed = LiveFeed()
    llm.engine.observers.append(feed)
    llm.generate([[50, 60]], SamplingParams(temperature=0, max_tokens=MAX_STEPS + 20, ignore_eos=True), use_tqdm=False)
    feed(llm.engine.snapshot())
    update = feed.update(0.0, llm.engine.stats(), True)
    assert len(update["steps"]) == MAX_STEPS and update["skipped"] == 20 and update["paused"]
    assert update["steps"][-1]["step"] == MAX_STEPS + 19
    assert len(update["state"]["next_free"]) == MAX_NEXT_FREE
    assert not feed.has_news


def test_a_shared_block_is_told_with_its_holders() -> None:
    llm = LLM(num_blocks=8, dtype="float64")
    llm.engine.add_request([50, 60], PARAMS)
    llm.engine.step()
    feed = LiveFeed()
    trace = llm.engine.snapshot()
    (blocks,) = trace.block_tables.values()
    feed(dataclasses.replace(trace, block_tables={0: blocks, 7: blocks}))
    assert feed.update(0.0, llm.engine.stats(), False)["state"]["shared"] == {str(blocks[0]): 2}
