"""Random lives of an engine with a tiny pool: whatever order things happen in, every text is right and no block is lost."""

from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from pagebrain import BeamSearchParams, SamplingParams
from pagebrain.engine import scheduler
from pagebrain.engine.sequence import SequenceGroup
from tests.support.hashing import VOCAB_SIZE, continuation, hash_engine, is_possible

SHARED = [(5 * position) % VOCAB_SIZE for position in range(20)]
"""Most prompts begin with some of these tokens."""

seen: dict[str, int] = {}


class Expected(NamedTuple):
    """What each of the ``n`` samples of a request may be: ``text``, or ``num_tokens`` tokens that may follow each other."""

    prompt: list[int]
    n: int
    num_tokens: int
    text: list[int] | None

    def allows(self, stream: list[int], is_whole: bool) -> bool:
        """Whether a sample may begin like this, or be this."""
        if self.text is not None:
            return stream == (self.text if is_whole else self.text[: len(stream)])
        return is_possible(self.prompt, stream) and (len(stream) == self.num_tokens or not is_whole)


class EngineLife(RuleBasedStateMachine):
    """Requests come, steps pass, some are aborted; the pool is so small that preemption is common."""

    async_scheduling = False

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(6, 14),
        seats=st.integers(1, 5),
        num_slots=st.sampled_from([0, 4, 64]),
        data=st.data(),
    )
    def start(self, block_size: int, num_blocks: int, seats: int, num_slots: int, data: st.DataObject) -> None:
        """``num_slots`` are those of the swap space."""
        budget = data.draw(st.integers(seats, seats + 6), label="max_num_batched_tokens")
        self.engine = hash_engine(
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=block_size * num_blocks,
            max_num_seqs=seats,
            max_num_batched_tokens=budget,
            async_scheduling=self.async_scheduling,
            swap_space_gib=num_slots * 16 * block_size / 2**30,  # a token's K and V are two float64 numbers
            preemption_mode="swap" if num_slots else "auto",
        )
        self.engine.observers.append(self.observe)
        self.expected: dict[str, Expected] = {}
        self.aborted: set[str] = set()
        self.searched: set[str] = set()
        self.streamed: dict[tuple[str, int], list[int]] = {}
        self.steps_since_progress = 0

    def observe(self, trace: Any) -> None:
        seen["preempted"] = seen.get("preempted", 0) + len(trace.preempted)
        phases = {row.phase for row in trace.rows}
        seen["mixed"] = seen.get("mixed", 0) + (phases == {"prefill", "decode"})

    @rule(data=st.data(), n=st.integers(1, 3), use_stop=st.booleans())
    def add(self, data: st.DataObject, n: int, use_stop: bool) -> None:
        limit = self.engine.config.max_model_len or 0
        prompt = data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=min(limit - 1, 20)), label="prompt")
        num_shared = data.draw(st.integers(0, min(limit - 1, 20)), label="shared")
        prompt[:num_shared] = SHARED[:num_shared]
        max_tokens = data.draw(st.integers(1, 20), label="max_tokens")
        room = min(max_tokens, limit - len(prompt))
        full = continuation(prompt, room)
        stop = (full[len(full) // 2],) if use_stop else ()
        params = SamplingParams(temperature=0, n=n, max_tokens=max_tokens, stop_token_ids=stop)
        request = self.engine.add_request(prompt, params)
        self.expected[request.request_id] = Expected(prompt, n, room, continuation(prompt, room, stop))

    @rule(data=st.data(), n=st.integers(2, 4), seed=st.integers(0, 3))
    def add_samples_that_differ(self, data: st.DataObject, n: int, seed: int) -> None:
        """One that read another's tokens would go on in an impossible way."""
        limit = self.engine.config.max_model_len or 0
        prompt = data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=min(limit - 1, 14)), label="prompt")
        num_tokens = min(data.draw(st.integers(1, 12), label="max_tokens"), limit - len(prompt))
        request = self.engine.add_request(prompt, SamplingParams(n=n, temperature=1.0, seed=seed, max_tokens=num_tokens))
        self.expected[request.request_id] = Expected(prompt, n, num_tokens, None)

    @rule(data=st.data())
    def add_beams(self, data: st.DataObject) -> None:
        """Two beams, because two tokens may follow each text: the others are impossible."""
        limit = self.engine.config.max_model_len or 0
        prompt = data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=min(limit - 1, 9)), label="prompt")
        num_tokens = min(data.draw(st.integers(1, 5), label="max_tokens"), limit - len(prompt))
        request = self.engine.add_request(prompt, BeamSearchParams(2, num_tokens, ignore_eos=True))
        self.expected[request.request_id] = Expected(prompt, 2, num_tokens, None)
        self.searched.add(request.request_id)

    @precondition(lambda self: self.engine.has_unfinished_requests)
    @rule()
    def step(self) -> None:
        deltas = self.engine.step()
        self.steps_since_progress = 0 if deltas else self.steps_since_progress + 1
        limit = 500 if self.searched & self.expected.keys() else 60  # a search brings its tokens at its end
        assert self.steps_since_progress < limit, f"no token for {limit} steps"
        for delta in deltas:
            assert delta.request_id not in self.aborted
            stream = self.streamed.setdefault((delta.request_id, delta.index), [])
            stream.extend(delta.token_ids)
            assert self.expected[delta.request_id].allows(stream, is_whole=delta.finish_reason is not None)
            if delta.finished is not None:
                streams = [self.streamed[delta.request_id, i] for i in range(self.expected.pop(delta.request_id).n)]
                assert [list(out.token_ids) for out in delta.finished.outputs] == streams

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.expected)), label="abort")
        seen["aborted"] = seen.get("aborted", 0) + 1
        assert self.engine.abort(request_id)
        assert not self.engine.abort(request_id)
        del self.expected[request_id]
        self.aborted.add(request_id)

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        self.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "expected"):
            return
        for _ in range(5_000):
            if not self.engine.has_unfinished_requests:
                break
            self.step()
        assert not self.expected, f"never finished: {sorted(self.expected)}"
        manager = self.engine.cache_manager
        assert manager.seq_ids == () and manager.swap_space.num_held == 0
        seen["hit"] = seen.get("hit", 0) + self.engine.stats().prefix_cache_hits
        seen["swapped"] = seen.get("swapped", 0) + self.engine.stats().num_swapped_in_blocks
        seen["copied"] = seen.get("copied", 0) + self.engine.stats().num_copied_blocks
        seen["evicted"] = seen.get("evicted", 0) + manager.block_manager.num_evicted  # type: ignore[attr-defined]
        assert manager.num_free_blocks == manager.num_blocks
        executor: Any = self.engine.executor
        executor.rows.apply(SequenceGroup(()).with_changes(manager.take_changes()))  # what the next plan would carry
        assert len(executor.rows._free) == executor.rows.num_rows


class EngineLifeAhead(EngineLife):
    """The same with each step launched before the last one is read."""

    async_scheduling = True


def live(machine: type[EngineLife], num_lives: int) -> None:
    seen.clear()
    profile = settings(max_examples=num_lives, stateful_step_count=60, suppress_health_check=list(HealthCheck))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "WORTH_WAITING_FOR", 4)  # the prompts here are short
        run_state_machine_as_test(machine, settings=profile)
    events = ("preempted", "mixed", "aborted", "hit", "evicted", "copied", "swapped")
    assert all(seen.get(event, 0) > 0 for event in events), seen


@pytest.mark.parametrize("machine", [EngineLife, EngineLifeAhead])
def test_every_request_gets_its_text_and_no_block_is_lost(machine: type[EngineLife]) -> None:
    live(machine, num_lives=60)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [EngineLife, EngineLifeAhead])
def test_the_same_over_many_more_lives(machine: type[EngineLife]) -> None:
    live(machine, num_lives=1500)
