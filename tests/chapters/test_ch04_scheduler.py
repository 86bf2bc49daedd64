"""Chapter 04: each decision of the scheduler alone, in situations built by hand, and then whole runs of the engine.

The block tables of the tests hold real block numbers, so a part that is planned without its blocks is found out. They need
nothing of a learner's chapters 02 and 03.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from pagebrain import PageBrainConfig, SamplingParams
from pagebrain.block import BlockManager
from pagebrain.engine.sequence import Request, ScheduledSequence, Sequence, SequenceStatus
from pagebrain.engine.trace import StepTrace
from pagebrain.errors import OutOfBlocksError
from pagebrain.model_config import attention_scale
from tests.support.answers import assert_text
from tests.support.departures import assert_same, assert_same_tokens
from tests.support.hashing import continuation, hash_engine, run_all
from tests.support.hints import hint
from tests.support.models import hf_greedy, hf_logits, poison, random_gpt2

CHAPTER = "04"

Counts = list[tuple[int, int]]


class BlockTables:
    """What chapter 02's cache is to a scheduler, and notes of what it was asked.

    Attributes:
        asked: for each sequence the number of tokens that ``can_grow`` was last asked for.
        num_asked: calls of ``can_grow``.
        retired: the sequences that were given to ``retire``.
    """

    def __init__(self, block_manager: BlockManager, config: PageBrainConfig) -> None:
        self.block_manager, self.block_size = block_manager, config.block_size
        self._tables: dict[int, list[int]] = {}
        self.asked: dict[int, int] = {}
        self.num_asked = 0
        self.retired: list[int] = []

    @property
    def num_free_blocks(self) -> int:
        return self.block_manager.num_free_blocks

    @property
    def seq_ids(self) -> tuple[int, ...]:
        return tuple(self._tables)

    def block_table(self, seq_id: int) -> tuple[int, ...]:
        return tuple(self._tables.get(seq_id, ()))

    def num_missing_blocks(self, seq_id: int, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - len(self.block_table(seq_id)))

    def can_grow(self, seq_id: int, num_tokens: int) -> bool:
        self.asked[seq_id] = num_tokens
        self.num_asked += 1
        return self.block_manager.can_allocate(self.num_missing_blocks(seq_id, num_tokens))

    def grow(self, seq_id: int, num_tokens: int) -> None:
        count = self.num_missing_blocks(seq_id, num_tokens)
        self._tables[seq_id] = [*self.block_table(seq_id), *self.block_manager.allocate(count)]

    def free(self, seq_id: int) -> None:
        self.block_manager.free(self.block_table(seq_id))
        self._tables.pop(seq_id, None)

    def retire(self, seq: Sequence) -> None:
        self.retired.append(seq.seq_id)
        self.free(seq.seq_id)

    def slots(self, seq_id: int, start: int, count: int) -> list[int]:
        table = self._tables[seq_id]
        return [table[n // self.block_size] * self.block_size + n % self.block_size for n in range(start, start + count)]


class WatchedSequence(Sequence):
    """Counts how often ``num_unscheduled`` is read."""

    num_reads = 0

    @property
    def num_unscheduled(self) -> int:
        self.num_reads += 1
        return super().num_unscheduled


QUEUE_HINTS = {
    "running": "The latest arrival is the last in running. Victims leave from the end until there is room, and no more.",
    "waiting": "waiting is in order of arrival too: victims stand before all that never ran, the earlier before the later.",
    "preempted": "preempted collects all victims of a step, the sequences themselves; schedule empties it.",
    "retired": "Blocks do not come back by themselves: give each victim to cache_manager.retire, once.",
    "calls": "seq.preempt() marks a victim, once. The other sequences stay as they are.",
}
ITSELF = "If the sequence that asks is the last in running, it is preempted like any other. Earlier ones keep their blocks."


class Situation:
    """A scheduler with sequences that run or wait, numbered in order of arrival.

    ``running`` gives ``(tokens that the sequence has, tokens of those that are in the cache)`` for each, ``waiting`` gives
    ``(prompt tokens, output tokens)``. Of the blocks, all but ``free_blocks`` are taken. Blocks have four slots unless
    ``block_size`` says otherwise.
    """

    def __init__(self, chapter: Any, running: Counts, waiting: Counts, free_blocks: int = 50, **limits: int) -> None:
        seats, budget, block_size = limits.get("seats", 8), limits.get("budget", 16), limits.get("block_size", 4)
        num_blocks = free_blocks + sum(-(-num_cached // block_size) for _, num_cached in running)
        settings: dict[str, Any] = {"num_layers": 1, "num_heads": 1, "head_dim": 1, "dtype": "float64", "device": "cpu"}
        settings |= {"block_size": block_size, "num_blocks": max(1, num_blocks), "max_num_seqs": seats}
        config = PageBrainConfig(max_num_batched_tokens=budget, **settings)
        self.cache = BlockTables(BlockManager(config), config)
        self.scheduler = chapter.Scheduler(config, self.cache)
        self.seqs: list[WatchedSequence] = []
        self.limits = (
            f"blocks of {block_size} slots: {free_blocks} free\nmax_num_seqs {seats}; max_num_batched_tokens {budget}"
        )
        self.story = ""
        for num_tokens, num_cached in running:
            self.run(self.arrive(1, num_tokens - 1), num_cached)
        for prompt, output in waiting:
            self.scheduler.waiting.append(self.arrive(prompt, output))

    def arrive(self, num_prompt: int, num_output: int) -> WatchedSequence:
        """A new sequence, with room to grow by many tokens."""
        number, num_tokens = len(self.seqs), num_prompt + num_output
        request = Request(str(number), None, (1,) * num_prompt, SamplingParams(temperature=0), number, number, 0.0)
        self.seqs.append(WatchedSequence(number, request, 0, num_tokens + 100, [1] * num_tokens))
        return self.seqs[-1]

    def run(self, seq: Sequence, num_cached: int) -> None:
        """Let a sequence run, with so many of its tokens in the cache."""
        seq.num_scheduled = seq.num_computed = num_cached
        seq.status = SequenceStatus.RUNNING
        self.cache.grow(seq.seq_id, num_cached)
        self.scheduler.running.append(seq)

    def call(self, what: str) -> None:
        """Note the situation as it is now, and the call that follows: what a failure shows."""
        lines = ["The situation:", "seq  state  tokens  cached  to compute  blocks"]
        for seq in self.seqs:
            state = "runs" if seq in self.scheduler.running else "waits"
            blocks = len(self.cache.block_table(seq.seq_id))
            counts = f"{seq.num_tokens:6d}  {seq.num_computed:6d}  {seq.num_unscheduled:10d}  {blocks:6d}"
            lines.append(f"{seq.seq_id:3d}  {state:5s}  {counts}")
        self.story = "\n".join([*lines, self.limits, f"the call: {what}"])
        for seq in self.seqs:
            seq.num_reads = 0
        self.cache.num_asked = 0
        self.cache.asked = {}

    def expect(self, what: str, got: Any, expected: Any) -> None:
        assert got == expected, f"{what} should be {expected} but is {got}\n{self.story}"

    def ids(self, name: str) -> list[int]:
        """The ids of the sequences in one of the scheduler's lists."""
        found = list(getattr(self.scheduler, name))
        for seq in found:
            assert isinstance(seq, Sequence), f"{name} should hold sequences, but there is {seq!r} in it\n{self.story}"
        return [seq.seq_id for seq in found]

    @contextmanager
    def blocks_asked_for(self) -> Iterator[None]:
        """A plan with blocks that are not there: the failure says what ``can_grow`` was asked."""
        try:
            yield
        except OutOfBlocksError:
            asked = self.cache.asked or "never"
            pytest.fail(
                "a part was taken for which there were not enough blocks. "
                f"can_grow was last asked for {{sequence: tokens}} {asked}\n{self.story}"
            )

    def check_queues(self, running: list[int], waiting: list[int], preempted: list[int], asking: int | None = None) -> None:
        """Which sequence is where now; each that was preempted was so exactly once, and gave its blocks back."""
        hints = QUEUE_HINTS if preempted else {}
        if asking in preempted:
            hints = hints | {"running": ITSELF}
        checks = {
            "running": ("running", lambda: self.ids("running"), running),
            "waiting": ("waiting", lambda: self.ids("waiting"), waiting),
            "preempted": ("preempted, in order of arrival,", lambda: sorted(self.ids("preempted")), sorted(preempted)),
            "retired": ("the list of those given to retire", lambda: sorted(self.cache.retired), sorted(preempted)),
        }
        for name, (what, got, expected) in checks.items():
            with hinted(hints.get(name)):
                self.expect(what, got(), expected)
        for seq in self.seqs:
            times = int(seq.seq_id in preempted)
            with hinted(hints.get("calls")):
                self.expect(f"the number of calls of preempt() of sequence {seq.seq_id}", seq.num_preemptions, times)

    def check_parts(self, parts: list[ScheduledSequence], expected: dict[int, int], held: dict[int, int]) -> None:
        """Which sequences have a part in the step, with how many tokens and with the blocks for them; in any order."""
        for part in parts:
            seq, name = part.seq, f"the part of sequence {part.seq.seq_id}"
            with hint(
                "make_room may preempt sequences behind the one that you ask for, and that one too: look at its answer."
            ):
                lost = seq.status is SequenceStatus.PREEMPTED
                assert not lost, f"there is {name}, which was preempted in this very step\n{self.story}"
            with hint("Make each part with self.take(seq, num_tokens): it fetches the blocks and sets start and samples."):
                missing = self.cache.num_missing_blocks(seq.seq_id, part.context_len)
                self.expect(f"the number of blocks that are missing for {name}", missing, 0)
                self.expect(f"the start of {name}", part.start, seq.num_scheduled)
                self.expect(f"`samples` of {name}", part.samples, part.context_len == seq.num_tokens)
        self.expect("the number of parts", len(parts), len({part.seq.seq_id for part in parts}))
        asked = f" (can_grow was last asked for {self.cache.asked})" if self.cache.asked else ""
        step = {part.seq.seq_id: part.num_tokens for part in parts}
        assert step == expected, f"the step, {{sequence: tokens}}, should be {expected} but is {step}{asked}\n{self.story}"
        for part in parts:
            seq_id = part.seq.seq_id
            needed = max(held[seq_id], -(-part.context_len // self.cache.block_size))
            with hint("self.take gives a part its blocks. More blocks are not held before they are needed."):
                blocks = len(self.cache.block_table(seq_id))
                self.expect(f"the number of blocks that sequence {seq_id} holds after this", blocks, needed)

    def held(self) -> dict[int, int]:
        """How many blocks each sequence holds."""
        return {seq.seq_id: len(self.cache.block_table(seq.seq_id)) for seq in self.seqs}

    def check_share_out(self, expected: dict[int, int], left: int) -> None:
        """A step in which there are blocks for all."""
        waiting = [seq.seq_id for seq in self.scheduler.waiting]
        self.call("share_out()")
        held = self.held()
        with self.blocks_asked_for():
            parts, budget = self.scheduler.share_out()
        self.check_parts(parts, expected, held)
        self.expect("the number of tokens that are left, as returned by share_out,", budget, left)
        with hint("share_out itself moves no sequence: running and waiting change only if make_room preempts."):
            self.check_queues([seq.seq_id for seq in self.seqs if seq.seq_id not in waiting], waiting, [])

    def check_share_out_preempts(self, expected: dict[int, int], preempted: list[int]) -> None:
        """A step in which blocks run out. The tokens that are left do not matter then, because nothing is let in."""
        self.call("share_out()")
        held = self.held()
        with self.blocks_asked_for():
            parts, _ = self.scheduler.share_out()
        self.check_parts(parts, expected, held)
        self.check_queues([seq.seq_id for seq in self.seqs if seq.seq_id not in preempted], preempted, preempted)

    def check_admit(self, budget: int, admitted: dict[int, int]) -> None:
        """Which sequences are let in, given so many tokens; all others stay where they are."""
        running = [seq.seq_id for seq in self.scheduler.running] + list(admitted)
        waiting = [seq.seq_id for seq in self.scheduler.waiting if seq.seq_id not in admitted]
        self.call(f"admit({budget})")
        held = self.held()
        lengths = {seq.seq_id: seq.num_tokens for seq in self.seqs}
        with self.blocks_asked_for():
            parts = self.scheduler.admit(budget)
        with hint("A sequence that was preempted keeps its tokens: all of them are computed again."):
            self.expect("how many tokens each sequence has", {seq.seq_id: seq.num_tokens for seq in self.seqs}, lengths)
        self.check_parts(parts, admitted, held)
        with hint("A sequence that gets a part, and no other, goes from the front of waiting to the end of running."):
            self.check_queues(running, waiting, [])

    def check_make_room(self, number: int, num_tokens: int, answer: bool, preempted: list[int]) -> None:
        """Whether there is room, and which sequences lost their blocks for it."""
        running = [seq.seq_id for seq in self.scheduler.running if seq.seq_id not in preempted]
        waiting = sorted(preempted) + [seq.seq_id for seq in self.scheduler.waiting]
        self.call(f"make_room(sequence {number}, {num_tokens})")
        lengths = {seq.seq_id: seq.num_tokens for seq in self.seqs}
        got = self.scheduler.make_room(self.seqs[number], num_tokens)
        with hint(
            "num_tokens counts all tokens of the sequence, cached ones included: ask can_grow for exactly this number."
        ):
            if number in self.cache.asked:
                self.expect(f"what can_grow was asked for sequence {number}", self.cache.asked[number], num_tokens)
        self.check_queues(running, waiting, preempted, asking=number)
        with hint(
            "The answer is whether the sequence can grow now: after a preemption, ask again. No only if it was a victim."
        ):
            self.expect("what make_room returns", bool(got), answer)
        for victim in preempted:
            with hint("seq.preempt() sets the status and resets the counts, because K and V of all its tokens are lost."):
                seq = self.seqs[victim]
                self.expect(f"the status of sequence {victim}", seq.status, SequenceStatus.PREEMPTED)
                self.expect(f"num_scheduled of sequence {victim}", seq.num_scheduled, 0)
                self.expect(f"num_computed of sequence {victim}", seq.num_computed, 0)
        with hint("A victim keeps its tokens. Only its K and V are lost."):
            self.expect("how many tokens each sequence has", {seq.seq_id: seq.num_tokens for seq in self.seqs}, lengths)
        limit = 3 * (len(preempted) + 1)
        with hint("While make_room runs, blocks come back through preemption only: asking again without one is of no use."):
            times = self.cache.num_asked
            assert times <= limit, f"can_grow was called {times} times for {len(preempted)} preemptions\n{self.story}"


@contextmanager
def hinted(text: str | None) -> Iterator[None]:
    """A hint where there is one."""
    if text is None:
        yield
    else:
        with hint(text):
            yield


@pytest.mark.task("4.3", hint="Ask the cache first. If there is room, nothing changes and the answer is True.")
def test_no_sequence_is_preempted_while_there_is_room(chapter: Any) -> None:
    Situation(chapter, [(5, 4), (5, 5)], [(3, 0)], free_blocks=1).check_make_room(0, 5, True, [])
    Situation(chapter, [(5, 5), (5, 5)], [(3, 0)], free_blocks=0).check_make_room(0, 8, True, [])


def after_one_preemption(chapter: Any) -> Situation:
    """Sequence 0 needs a block, none is free, and 2 is the latest arrival in running."""
    situation = Situation(chapter, [(5, 4), (20, 20), (5, 5)], [(3, 0), (2, 0)], free_blocks=0)
    situation.call("make_room(sequence 0, 5)")
    with suppress(IndexError):  # running is empty in the end, if no blocks came back
        situation.scheduler.make_room(situation.seqs[0], 5)
    return situation


@pytest.mark.task("4.3", hint="Blocks do not come back by themselves: call cache_manager.retire(victim).")
def test_a_victims_blocks_are_retired(chapter: Any) -> None:
    situation = after_one_preemption(chapter)
    cache = situation.cache
    with hint("num_tokens counts all tokens of the sequence, cached ones included: ask can_grow for exactly this number."):
        if 0 in cache.asked:
            situation.expect("what can_grow was asked for sequence 0", cache.asked[0], 5)
    assert cache.retired, f"no sequence was given to cache_manager.retire\n{situation.story}"
    assert cache.num_free_blocks, f"no block is free after make_room; retired were {cache.retired}\n{situation.story}"


@pytest.mark.task(
    "4.3", hint="The victim is the latest arrival, the last in running, and only as many are preempted as are needed."
)
def test_the_victim_is_the_latest_arrival(chapter: Any) -> None:
    situation = after_one_preemption(chapter)
    situation.expect("the list of those given to retire", situation.cache.retired, [2])
    situation.expect("running", situation.ids("running"), [0, 1])


@pytest.mark.task(
    "4.3", hint="seq.preempt() marks a sequence: its tokens stay, and none of them counts as computed any more."
)
def test_a_victim_is_marked(chapter: Any) -> None:
    situation = after_one_preemption(chapter)
    times = {seq.seq_id: seq.num_preemptions for seq in situation.seqs}
    situation.expect("the number of calls of preempt(), {sequence: calls},", times, {0: 0, 1: 0, 2: 1, 3: 0, 4: 0})
    situation.expect("the status of sequence 2", situation.seqs[2].status, SequenceStatus.PREEMPTED)
    situation.expect("the number of tokens that sequence 2 has", situation.seqs[2].num_tokens, 5)


@pytest.mark.task(
    "4.3", hint="self.preempted lists the sequences that were preempted in this step: schedule and the traces read it."
)
def test_a_victim_is_noted(chapter: Any) -> None:
    situation = after_one_preemption(chapter)
    situation.expect("preempted", situation.ids("preempted"), [2])


@pytest.mark.task("4.3", hint="waiting is in order of arrival too: a sequence that ran came before all that never ran.")
def test_the_latest_arrival_gives_its_blocks_and_waits_at_the_front(chapter: Any) -> None:
    Situation(chapter, [(5, 4), (20, 20), (5, 5)], [(3, 0), (2, 0)], free_blocks=0).check_make_room(0, 5, True, [2])


@pytest.mark.task("4.3", hint="Ask again after each victim, stop when there is room. waiting is in order of arrival too.")
def test_as_many_are_preempted_as_are_needed_and_wait_in_order_of_arrival(chapter: Any) -> None:
    running = [(12, 4), (7, 7), (3, 3), (3, 3)]
    Situation(chapter, running, [(3, 0)], free_blocks=0).check_make_room(0, 12, True, [2, 3])
    Situation(chapter, running, [(3, 0)], free_blocks=1).check_make_room(0, 12, True, [3])
    Situation(chapter, running, [(3, 0)], free_blocks=0).check_make_room(0, 20, True, [1, 2, 3])


@pytest.mark.task(
    "4.3", hint="If seq is the latest arrival itself, it is a victim like any other. All earlier ones keep their blocks."
)
def test_the_latest_arrival_gives_way_itself(chapter: Any) -> None:
    Situation(chapter, [(8, 8), (5, 4)], [(3, 0)], free_blocks=0).check_make_room(1, 5, False, [1])
    Situation(chapter, [(8, 8), (12, 4), (3, 3)], [(3, 0)], free_blocks=0).check_make_room(1, 12, False, [1, 2])
    Situation(chapter, [(5, 4)], [], free_blocks=0).check_make_room(0, 5, False, [0])


@pytest.mark.task("4.3", hint="preempted collects all victims of a step; schedule empties it.")
def test_victims_of_several_calls_are_all_noted(chapter: Any) -> None:
    situation = Situation(chapter, [(5, 4), (5, 4), (3, 3), (3, 3)], [], free_blocks=0)
    for number, preempted in ((0, [3]), (1, [2, 3])):
        situation.call(f"make_room(sequence {number}, 5)")
        assert situation.scheduler.make_room(situation.seqs[number], 5), f"make_room should return True\n{situation.story}"
        situation.check_queues([n for n in range(4) if n not in preempted], preempted, preempted)
        situation.cache.grow(number, 5)


@pytest.mark.task(
    "4.1", hint="First set a token aside for each num_unscheduled of 1. What remains is for the others, as far as it goes."
)
def test_every_decode_gets_its_token_wherever_it_stands(chapter: Any) -> None:
    Situation(chapter, [(5, 4), (30, 10), (8, 7)], [(3, 0)], budget=8).check_share_out({0: 1, 1: 6, 2: 1}, 0)
    Situation(chapter, [(30, 0), (5, 4), (8, 7)], [(3, 0)], budget=8).check_share_out({0: 6, 1: 1, 2: 1}, 0)
    Situation(chapter, [(5, 4), (8, 7), (6, 5)], [(3, 0)], seats=3, budget=3).check_share_out({0: 1, 1: 1, 2: 1}, 0)


@pytest.mark.task("4.1", hint="The first prompt takes what it can use, the next what is left. No part has 0 tokens.")
def test_prompts_share_what_is_left_in_order_of_arrival(chapter: Any) -> None:
    Situation(chapter, [(5, 4), (9, 4), (40, 8), (6, 2)], [], budget=12).check_share_out({0: 1, 1: 5, 2: 6}, 0)
    Situation(chapter, [(5, 4), (9, 8), (9, 2)], [], budget=9).check_share_out({0: 1, 1: 1, 2: 7}, 0)


@pytest.mark.task("4.1", hint="If nothing is left for a prompt, it has no part; but a decode may still stand behind it.")
def test_a_prompt_that_gets_nothing_does_not_end_the_step(chapter: Any) -> None:
    Situation(chapter, [(40, 8), (9, 4), (5, 4)], [], seats=4, budget=4).check_share_out({0: 3, 2: 1}, 0)


@pytest.mark.task("4.1", hint="What is left is the whole budget less the tokens of all parts, decodes included.")
def test_the_tokens_that_are_left_are_returned(chapter: Any) -> None:
    Situation(chapter, [(5, 4), (9, 4), (8, 7)], [(3, 0)]).check_share_out({0: 1, 1: 5, 2: 1}, 9)
    Situation(chapter, [], [(3, 0)]).check_share_out({}, 16)


@pytest.mark.task("4.1", hint="num_unscheduled can be 0: there is nothing to compute for such a sequence.")
def test_a_sequence_with_nothing_to_compute_has_no_part(chapter: Any) -> None:
    situation = Situation(chapter, [(5, 4), (9, 8), (9, 3)], [], budget=8)
    situation.seqs[1].max_num_tokens = 9
    situation.check_share_out({0: 1, 2: 6}, 1)


@pytest.mark.task("4.1", hint="What is left for prompts may be a single token. It is not wasted: a chunk may be that short.")
def test_a_chunk_may_have_a_single_token(chapter: Any) -> None:
    Situation(chapter, [(5, 4), (9, 2)], [], seats=2, budget=2).check_share_out({0: 1, 1: 1}, 0)
    Situation(chapter, [(9, 4), (9, 2), (9, 3)], [], seats=3, budget=6).check_share_out({0: 5, 1: 1}, 0)


@pytest.mark.task("4.1", hint="Sequences with one token to compute come first, also if it is a prompt's last token.")
def test_the_last_token_of_a_prompt_is_served_with_the_decodes(chapter: Any) -> None:
    situation = Situation(chapter, [(20, 4)], [(9, 0)], budget=8)
    situation.run(situation.scheduler.waiting.popleft(), 8)
    situation.check_share_out({0: 7, 1: 1}, 0)


@pytest.mark.task("4.3", hint="Play it on paper: which sequence is last, how many blocks come back, and are they enough?")
def test_room_is_made_in_any_situation(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(50):
        running = [(tokens := choose.randint(2, 20), choose.randint(1, tokens)) for _ in range(choose.randint(1, 6))]
        number, block_size = choose.randrange(len(running)), choose.choice([1, 4, 5, 12])
        num_free = free = choose.randint(0, 3)
        held = [-(-num_cached // block_size) for _, num_cached in running]
        wanted = choose.randint(running[number][0], 28)
        missing = -(-wanted // block_size) - held[number]
        preempted: list[int] = []
        for last in reversed(range(len(running))):
            if missing <= free or number in preempted:
                break
            preempted.insert(0, last)
            free += held[last]
        situation = Situation(chapter, running, [(3, 0)], free_blocks=num_free, block_size=block_size)
        situation.check_make_room(number, wanted, number not in preempted, preempted)


@pytest.mark.task("4.1", hint="Mixed loads: first all sequences with one token to compute, then the others by arrival.")
def test_random_loads_are_shared_out(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(50):
        running = [
            (tokens := choose.randint(2, 20), choose.choice([tokens - 1, choose.randrange(tokens)])) for _ in range(6)
        ]
        budget = left = choose.randint(8, 40)
        expected = {number: 1 for number, (num_tokens, cached) in enumerate(running) if num_tokens - cached == 1}
        left -= len(expected)
        for number, (num_tokens, cached) in enumerate(running):
            if number not in expected and left > 0:
                expected[number] = min(num_tokens - cached, left)
                left -= expected[number]
        block_size = choose.choice([1, 4, 5, 12, 24])
        Situation(chapter, running, [], free_blocks=99, budget=budget, block_size=block_size).check_share_out(expected, left)


@pytest.mark.task("4.1", hint="num_unscheduled changes from step to step: keep no plan between calls.")
def test_a_step_is_planned_from_the_counts_of_now(chapter: Any) -> None:
    situation = Situation(chapter, [(5, 4), (40, 10), (8, 7)], [], budget=8)
    situation.check_share_out({0: 1, 1: 6, 2: 1}, 0)
    for seq, num_computed, num_tokens in ((0, 2, 9), (1, 39, 40), (2, 0, 9)):
        situation.seqs[seq].num_scheduled = situation.seqs[seq].num_computed = num_computed
        situation.seqs[seq].token_ids = [1] * num_tokens
    situation.check_share_out({0: 7, 1: 1}, 0)


@pytest.mark.task("4.1", hint="Count the sequences with one token once, before the loop, not again for each sequence.")
def test_the_work_grows_with_the_sequences_and_not_with_their_square(chapter: Any) -> None:
    running = [(5, 4) if number % 2 else (9, 3) for number in range(60)]
    situation = Situation(chapter, running, [], free_blocks=99, seats=64, budget=512)
    situation.check_share_out({number: 1 if number % 2 else 6 for number in range(60)}, 512 - 30 - 180)
    most = max(situation.seqs, key=lambda seq: seq.num_reads)
    assert most.num_reads <= 10, (
        f"with 60 running sequences, share_out reads num_unscheduled of sequence {most.seq_id} {most.num_reads} times"
    )


@pytest.mark.task(
    "4.1", hint="Ask make_room for all tokens that are cached after this step, then take, one sequence after the other."
)
def test_room_is_made_for_each_part_before_it_is_taken(chapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[int, int] = {}
    make_room, take = chapter.Scheduler.make_room, chapter.Scheduler.take

    def watched_make_room(self: Any, seq: Sequence, num_tokens: int) -> Any:
        asked[seq.seq_id] = num_tokens
        return make_room(self, seq, num_tokens)

    def watched_take(self: Any, seq: Sequence, num_tokens: int) -> Any:
        got, expected = asked.get(seq.seq_id), seq.num_scheduled + num_tokens
        said = "was not asked before" if got is None else f"was asked for {got}"
        assert got == expected, f"take lets sequence {seq.seq_id} grow to {expected} tokens, but make_room {said}"
        return take(self, seq, num_tokens)

    monkeypatch.setattr(chapter.Scheduler, "make_room", watched_make_room)
    monkeypatch.setattr(chapter.Scheduler, "take", watched_take)
    Situation(chapter, [(5, 4), (40, 8), (8, 7)], [], budget=9).check_share_out({0: 1, 1: 7, 2: 1}, 0)
    Situation(chapter, [(40, 4)], [], free_blocks=2, budget=8).check_share_out({0: 8}, 0)  # the chunk fits, the rest not yet


@pytest.mark.task("4.1", hint="A prompt that gets no token in this step needs no room: do not ask make_room for it.")
def test_no_room_is_made_for_a_prompt_that_gets_nothing(chapter: Any) -> None:
    situation = Situation(chapter, [(40, 8), (9, 4), (7, 6)], [], free_blocks=1, seats=4, budget=4)
    situation.check_share_out({0: 3, 2: 1}, 0)


@pytest.mark.task(
    "4.1",
    hint="make_room may shorten running at its end while you go through it. A sequence that was preempted has no part.",
)
def test_a_sequence_that_was_preempted_has_no_part(chapter: Any) -> None:
    Situation(chapter, [(5, 4), (6, 5), (7, 6)], [], free_blocks=0).check_share_out_preempts({0: 1, 1: 1}, [2])
    Situation(chapter, [(5, 4), (5, 4), (3, 2)], [], free_blocks=0).check_share_out_preempts({0: 1}, [1, 2])
    Situation(chapter, [(5, 4), (5, 4)], [], free_blocks=1).check_share_out_preempts({0: 1}, [1])
    Situation(chapter, [(5, 4), (5, 4), (7, 6), (3, 2)], [], free_blocks=0).check_share_out_preempts({0: 1, 1: 1}, [2, 3])
    Situation(chapter, [(9, 4), (3, 2), (8, 7)], [], free_blocks=0).check_share_out_preempts({0: 5, 1: 1}, [2])
    Situation(chapter, [(5, 4)], [], free_blocks=0).check_share_out_preempts({}, [0])


@pytest.mark.task(
    "4.2", hint="Take from the front of waiting and add at the end of running, while there are sequences, seats and tokens."
)
def test_those_who_wait_are_let_in_in_order_of_arrival(chapter: Any) -> None:
    Situation(chapter, [(4, 4)], [(3, 0), (5, 0), (2, 0)]).check_admit(16, {1: 3, 2: 5, 3: 2})
    Situation(chapter, [(4, 4)], []).check_admit(16, {})


@pytest.mark.task("4.2", hint="The last to come in gets what is left, as a first chunk. With no token left, none comes in.")
def test_the_budget_is_used_up_and_not_exceeded(chapter: Any) -> None:
    for budget, admitted in (
        (7, {0: 3, 1: 4}),
        (3, {0: 3}),
        (1, {0: 1}),
        (0, {}),
        (8, {0: 3, 1: 5}),
        (9, {0: 3, 1: 5, 2: 1}),
    ):
        Situation(chapter, [], [(3, 0), (5, 0), (2, 0)]).check_admit(budget, admitted)


@pytest.mark.task("4.2", hint="Each sequence in running has a seat, those that came in a moment ago included.")
def test_no_more_are_let_in_than_there_are_seats(chapter: Any) -> None:
    for seats, admitted in ((2, {}), (3, {2: 3}), (4, {2: 3, 3: 5})):
        Situation(chapter, [(4, 4), (4, 4)], [(3, 0), (5, 0), (2, 0)], seats=seats).check_admit(16, admitted)


@pytest.mark.task(
    "4.2", hint="If can_grow says no for the first in the queue, it stays there and all wait. Ask for each one in its turn."
)
def test_no_sequence_overtakes_the_first_in_the_queue(chapter: Any) -> None:
    Situation(chapter, [(4, 4)], [(17, 0), (2, 0)], free_blocks=4).check_admit(99, {})
    Situation(chapter, [(4, 4)], [(2, 0), (17, 0), (2, 0)], free_blocks=5).check_admit(99, {1: 2})
    Situation(chapter, [(4, 4)], [(2, 0)], free_blocks=0).check_admit(99, {})


@pytest.mark.task(
    "4.2", hint="Ask for all tokens that the sequence has, even if the budget allows fewer; and again for each sequence."
)
def test_there_must_be_blocks_for_all_tokens_of_the_first_in_the_queue(chapter: Any) -> None:
    Situation(chapter, [], [(20, 0)], free_blocks=4).check_admit(6, {})
    Situation(chapter, [], [(20, 0)], free_blocks=5).check_admit(6, {0: 6})
    Situation(chapter, [], [(9, 0), (5, 0)], free_blocks=4).check_admit(16, {0: 9})
    Situation(chapter, [], [(9, 0), (4, 0)], free_blocks=4).check_admit(16, {0: 9, 1: 4})


@pytest.mark.task(
    "4.2", hint="A preempted sequence comes back with prompt and answer: all of it is computed again and needs blocks."
)
def test_a_preempted_sequence_comes_back_with_its_output(chapter: Any) -> None:
    Situation(chapter, [], [(4, 5), (1, 0)], free_blocks=2).check_admit(16, {})
    Situation(chapter, [], [(4, 5), (1, 0)], free_blocks=3).check_admit(16, {0: 9})
    Situation(chapter, [], [(4, 9), (1, 0)], free_blocks=3).check_admit(2, {})
    Situation(chapter, [], [(4, 9), (1, 0)], free_blocks=4).check_admit(2, {0: 2})


@pytest.mark.task("4.2", hint="Ask can_grow for tokens, not for whole blocks: the cache knows how many blocks they need.")
@pytest.mark.parametrize("block_size", [5, 12, 24])
def test_blocks_of_any_size_are_counted(chapter: Any, block_size: int) -> None:
    for num_tokens in (2 * block_size - 1, 2 * block_size, 2 * block_size + 1):
        needed = -(-num_tokens // block_size)
        for free_blocks in (needed - 1, needed):
            situation = Situation(chapter, [], [(num_tokens, 0)], free_blocks=free_blocks, block_size=block_size)
            situation.check_admit(99, {0: num_tokens} if free_blocks == needed else {})


@pytest.mark.task(
    "4.2", hint="Play it on paper: is there a seat, a token in the budget, and blocks for the first in the queue?"
)
def test_random_queues_are_let_in(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(80):
        block_size = choose.choice([1, 4, 5, 12, 24])
        running = [(4, 4)] * choose.randint(0, 4)
        waiting = [(choose.randint(1, 12), choose.choice([0, 0, 5, 30])) for _ in range(choose.randint(0, 6))]
        seats, budget, num_free = choose.randint(4, 8), choose.randint(0, 30), choose.choice([99, 60 // block_size])
        admitted, left, free = {}, budget, num_free
        for number, lens in enumerate(waiting, start=len(running)):
            if left <= 0 or number >= seats or -(-sum(lens) // block_size) > free:
                break
            admitted[number] = min(sum(lens), left)
            left -= admitted[number]
            free -= -(-admitted[number] // block_size)
        situation = Situation(chapter, running, waiting, free_blocks=num_free, seats=seats, block_size=block_size)
        situation.check_admit(budget, admitted)


@pytest.mark.task(
    "4.2", hint="Only the first in the queue can come in next. Sequences behind it are not looked at before it is in."
)
def test_the_rest_of_the_queue_is_not_looked_at(chapter: Any) -> None:
    situation = Situation(chapter, [(4, 4)], [(3, 0)] * 40, free_blocks=90)
    situation.check_admit(7, {1: 3, 2: 3, 3: 1})
    asked = sorted(seq.seq_id for seq in situation.seqs if seq.seq_id in situation.cache.asked or seq.num_reads)
    assert set(asked) <= {0, 1, 2, 3, 4}, f"three sequences came in, but counts or blocks of {len(asked)} were looked at"


def check_steps(steps: list[StepTrace], seats: int, budget: int) -> None:
    """What holds for every step of every run."""
    first_seen: list[int] = []
    for before, trace in zip([None, *steps], steps):
        ids = [row.seq_id for row in trace.rows]
        assert len(ids) <= seats, f"step {trace.step} has {len(ids)} sequences where max_num_seqs is {seats}"
        assert trace.num_tokens <= budget, f"step {trace.step} has {trace.num_tokens} tokens, the budget is {budget}"
        for row in before.rows if before else ():
            if row.samples and row.seq_id not in (*before.finished, *trace.preempted):  # type: ignore[union-attr]
                assert row.seq_id in ids, f"sequence {row.seq_id} runs, but has no token in step {trace.step}"
        first_seen += sorted(set(ids) - set(first_seen))
    assert first_seen == sorted(first_seen), f"sequences first ran in the order {first_seen}, not in that of arrival"


class PoolTables(BlockTables):
    """Block tables with pools, as the chapter's engine wants them. Slots hold a large value until they are written."""

    def __init__(self, block_manager: BlockManager, config: PageBrainConfig) -> None:
        super().__init__(block_manager, config)
        num_layers, num_heads, head_dim = config.require_shape()
        self.key_pools = torch.zeros(num_layers, block_manager.num_blocks, config.block_size, num_heads, head_dim).double()
        self.value_pools = torch.zeros_like(self.key_pools)
        poison(self)


def attend_textbook(model: Any, cache: PoolTables, rows: Any) -> Callable[..., Tensor]:
    """Attention in the textbook way over the slots that the block tables name; in place of chapter 03's."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = cache.key_pools[layer].flatten(0, 1), cache.value_pools[layer].flatten(0, 1)
        keys[rows.slots], values[rows.slots] = key, value
        out = []
        for row, position in enumerate(rows.positions.tolist()):
            seq_id = rows.seq_ids[sum(row >= start for start in rows.query_starts[1:].tolist())]
            seen = cache.slots(seq_id, 0, position + 1)
            scores = torch.einsum("hd,khd->hk", query[row], keys[seen]) * attention_scale(model.config, layer)
            out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values[seen]))
        return torch.stack(out)

    return attend


@pytest.mark.task(
    "4.3", hint="The decisions may be right one by one: follow the first sequence that is wrong in engine.history."
)
@pytest.mark.parametrize("name", ["Scheduler", "StaticScheduler"])
def test_the_engine_gives_what_hugging_face_gives(
    chapter: Any, seed: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, own in (("BlockManager", BlockManager), ("FreeAtOnce", PoolTables), ("attend_paged", attend_textbook)):
        monkeypatch.setattr(chapter, given, own)  # so that no task of chapters 02 and 03 is needed
    model, prompts = random_gpt2(seed=seed), [[1, 2, 3], [7] * 17, [40, 41, 42], list(range(30)), [95]]
    logits: dict[int, list[Tensor]] = {number: [] for number in range(len(prompts))}

    def keep(number: int, scores: Tensor) -> None:
        logits[number].append(scores.clone())

    config = PageBrainConfig.for_model(model, block_size=4, num_blocks=14, max_num_seqs=4, max_num_batched_tokens=8)
    engine = chapter.Engine(model, config, keep, make_scheduler=getattr(chapter, name))
    seqs = [engine.add_request(prompt, 20) for prompt in prompts]
    for _ in range(1000):
        if engine.step() is None:
            break
    steps: list[StepTrace] = engine.history
    check_steps(steps, 4, 8)
    for number, (prompt, seq) in enumerate(zip(prompts, seqs, strict=True)):
        when = [trace.step for trace in steps if number in trace.preempted]
        what = f"{name}: the answer to prompt {number} (preempted in steps {when} of {len(steps)})"
        assert_same_tokens(seq.output_token_ids, hf_greedy(model, prompt, 20, 96), what=what)
        theirs = hf_logits(model, prompt + seq.output_token_ids)[len(prompt) - 1 : -1]
        assert_same(
            torch.stack(logits[number]),
            theirs,
            what=f"{name}: the logits of prompt {number}",
            axes=("output token", "score"),
        )
    assert engine.cache.num_free_blocks == 14, f"{14 - engine.cache.num_free_blocks} blocks are still held at the end"
    assert any(trace.preempted for trace in steps), "blocks ran out, but no sequence was preempted"
    phases = [{row.phase for row in trace.rows} for trace in steps]
    mixed = {"prefill", "decode"} in phases
    assert mixed or name == "StaticScheduler", (
        "no step had a prompt's chunk beside a decode: is any sequence let in while others run?"
    )


@pytest.mark.task("4.3", hint="Many runs with few blocks. The text depends on every slot, so a lost block changes it.")
def test_random_loads_are_served_exactly(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    num_preempted = 0
    for load in range(8):
        block_size, seats = choose.choice([1, 2, 4]), choose.randint(2, 4)
        budget = choose.randint(seats, 9)
        limits: dict[str, Any] = {"block_size": block_size, "num_blocks": 20 // block_size, "max_model_len": 20}
        limits |= {"max_num_seqs": seats, "max_num_batched_tokens": budget}
        engine = hash_engine(make_scheduler=chapter.Scheduler, **limits)
        steps: list[StepTrace] = []
        engine.observers.append(steps.append)
        prompts = [[choose.randrange(100) for _ in range(choose.randint(1, 9))] for _ in range(7)]
        outputs: dict[str, Any] = {}
        for number, prompt in enumerate(prompts):
            engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=choose.randint(1, 11)), str(number))
            for _ in range(choose.randint(0, 3)):  # the others arrive while these run
                if engine.has_unfinished_requests:
                    outputs |= {out.request_id: out.finished for out in engine.step() if out.finished is not None}
        outputs |= run_all(engine, limit=1000)
        check_steps(steps, seats, budget)
        num_preempted += sum(len(trace.preempted) for trace in steps)
        for number, prompt in enumerate(prompts):
            answer = list(outputs[str(number)].outputs[0].token_ids)
            what = f"load {load}: the answer to request {number}"
            assert_same_tokens(answer, continuation(prompt, len(answer)), what=what)
    assert num_preempted > 0, "blocks ran out in these loads, but no sequence was preempted"


def preempted_with(chapter: Any, num_blocks: int, seed: int) -> list[int]:
    """The sequences that are preempted when the four requests of the notebook are served with so many blocks."""
    settings: dict[str, Any] = {"num_layers": 1, "num_heads": 1, "head_dim": 1, "dtype": "float64", "device": "cpu"}
    settings |= {"block_size": 4, "num_blocks": num_blocks, "max_num_seqs": 3}
    config = PageBrainConfig(**settings)
    cache = BlockTables(BlockManager(config), config)
    scheduler = chapter.Scheduler(config, cache)
    for number, (num_prompt, num_new) in enumerate([(8, 12), (5, 14), (7, 9), (3, 4)]):
        prompt = (seed % 50,) * num_prompt  # which tokens these are makes no difference
        request = Request(str(number), None, prompt, SamplingParams(temperature=0), number, number, 0.0)
        scheduler.add(Sequence(number, request, 0, num_prompt + num_new))
    preempted: list[int] = []
    for _ in range(200):
        group = scheduler.schedule()
        if group is None:
            break
        preempted += [seq.seq_id for seq in group.preempted]
        for entry in group:
            seq = entry.seq
            seq.num_scheduled = seq.num_computed = entry.context_len
            seq.status = SequenceStatus.RUNNING
            if entry.samples:
                seq.token_ids.append(0)
            if seq.num_tokens == seq.max_num_tokens:
                scheduler.finish(seq)
                cache.retire(seq)
    return preempted


@pytest.mark.task(
    "4.4", hint="Serve the four requests with pools of several sizes, and look for preempted sequences in the history."
)
def test_the_smallest_pool_was_measured(chapter: Any, seed: int, record_property: Callable[[str, object], None]) -> None:
    answer = chapter.answer_4_4()
    with hint("Return two things: a number, and a text for the instructor."):
        assert isinstance(answer, tuple) and len(answer) == 2, f"answer_4_4 must return (number, text), got {answer!r:.80}"
    number, text = answer
    with hint("The number is the first of the two, and a whole number of blocks."):
        assert isinstance(number, (int, float)), f"the number of answer_4_4 is a {type(number).__name__}"
        assert number == int(number) and 5 <= number <= 1000, f"answer_4_4 says {number:g} blocks"
    with hint("Say in one to four sentences why so few blocks are enough, and why a pool may be smaller still."):
        assert_text("answer_4_4", text)
    preempted = preempted_with(chapter, int(number), seed)
    with hint("Too small. Use three seats, blocks of 4 slots, and all four requests from the first step on."):
        assert not preempted, f"with {number:g} blocks, {len(preempted)} sequences are preempted"
    with hint("Too large. Not every text is at its full length at the same time: try fewer blocks."):
        assert preempted_with(chapter, int(number) - 1, seed), f"with {number - 1:g} blocks, none is preempted either"
    record_property("answer", text)
