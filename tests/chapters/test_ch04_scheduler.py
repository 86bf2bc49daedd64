"""Chapter 04: each decision of the scheduler alone, in situations built by hand, and then whole runs of the engine.

The block tables are chapter 02's and really hold the blocks, so whoever plans with blocks that are not there is found out.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from chapters import ch02_block_table
from pagebrain import PageBrainConfig, SamplingParams
from pagebrain.engine import scheduler
from pagebrain.engine.sequence import Request, ScheduledSequence, Sequence, SequenceStatus
from pagebrain.engine.trace import StepTrace
from pagebrain.errors import OutOfBlocksError
from tests.support.departures import assert_same, assert_same_tokens
from tests.support.hashing import continuation, hash_engine, run_all
from tests.support.models import hf_greedy, hf_logits, random_gpt2

CHAPTER = "04"

Counts = list[tuple[int, int]]


class AskedCache(ch02_block_table.PagedCache):
    """Remembers, for each sequence, the number of tokens that ``can_grow`` was last asked for, and who was ``retired``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: dict[int, int] = {}
        self.retired: list[int] = []

    def retire(self, seq: Sequence) -> None:
        self.retired.append(seq.seq_id)
        self.free(seq.seq_id)

    def can_grow(self, seq_id: int, num_tokens: int) -> bool:
        self.asked[seq_id] = num_tokens
        return super().can_grow(seq_id, num_tokens)


class Situation:
    """A scheduler with sequences that run or wait, numbered in order of arrival. Blocks have four slots.

    ``running`` gives ``(tokens that the sequence has, tokens of those that are in the cache)`` for each, ``waiting`` gives
    ``(prompt tokens, output tokens)``. Of the blocks, all but ``free_blocks`` are taken.
    """

    def __init__(self, chapter: Any, running: Counts, waiting: Counts, free_blocks: int = 50, **limits: int) -> None:
        seats, budget = limits.get("seats", 8), limits.get("budget", 16)
        num_blocks = free_blocks + sum(-(-num_cached // 4) for _, num_cached in running)
        settings: dict[str, Any] = {"num_layers": 1, "num_heads": 1, "head_dim": 1, "dtype": "float64", "device": "cpu"}
        settings |= {"block_size": 4, "num_blocks": max(1, num_blocks), "max_num_seqs": seats}
        config = PageBrainConfig(max_num_batched_tokens=budget, **settings)
        self.cache = AskedCache(ch02_block_table.BlockManager(config), config)
        self.scheduler = chapter.Scheduler(config, self.cache)
        self.seqs: list[Sequence] = []
        self.story = f"{free_blocks} free blocks of 4 slots, max_num_seqs {seats}, max_num_batched_tokens {budget}"
        for num_tokens, num_cached in running:
            seq = self.arrive(1, num_tokens - 1)
            seq.num_scheduled = seq.num_computed = num_cached
            seq.status = SequenceStatus.RUNNING
            self.cache.grow(seq.seq_id, num_cached)
            self.scheduler.running.append(seq)
            self.story += f"; {seq.seq_id} runs, has {num_tokens} tokens, {num_cached} of them cached"
        for prompt, output in waiting:
            self.scheduler.waiting.append(self.arrive(prompt, output))
            self.story += f"; {self.seqs[-1].seq_id} waits, has {prompt + output} tokens"

    def arrive(self, num_prompt: int, num_output: int) -> Sequence:
        """A new sequence, with room to grow by many tokens."""
        number, num_tokens = len(self.seqs), num_prompt + num_output
        request = Request(str(number), None, (1,) * num_prompt, SamplingParams(temperature=0), number, number, 0.0)
        self.seqs.append(Sequence(number, request, 0, num_tokens + 100, [1] * num_tokens))
        return self.seqs[-1]

    def expect(self, what: str, got: Any, expected: Any) -> None:
        assert got == expected, f"{what} should be {expected} but is {got}. The situation: {self.story}"

    @contextmanager
    def blocks_asked_for(self) -> Iterator[None]:
        """Whoever plans with blocks that are not there is told what ``can_grow`` was asked."""
        try:
            yield
        except OutOfBlocksError:
            has = {seq.seq_id: seq.num_tokens for seq in self.seqs}
            pytest.fail(
                "a part was taken for which there were not enough blocks. can_grow was last asked for "
                f"{self.cache.asked} tokens ({{sequence: tokens}}); the sequences have {has}. The situation: {self.story}"
            )

    def check_queues(self, running: list[int], waiting: list[int], preempted: list[int]) -> None:
        """Who is where now; and everyone who was preempted was so exactly once, and gave their blocks back."""
        self.expect("running", [seq.seq_id for seq in self.scheduler.running], running)
        self.expect("waiting", [seq.seq_id for seq in self.scheduler.waiting], waiting)
        victims = sorted(seq.seq_id for seq in self.scheduler.preempted)
        self.expect("preempted, in order of arrival,", victims, sorted(preempted))
        self.expect("the list of those given to cache_manager.retire", sorted(self.cache.retired), sorted(preempted))
        for seq in self.seqs:
            times = int(seq.seq_id in preempted)
            self.expect(f"the number of calls of preempt() of sequence {seq.seq_id}", seq.num_preemptions, times)

    def check_parts(self, parts: list[ScheduledSequence], expected: dict[int, int]) -> None:
        """Who has a part in the step, with how many tokens, and with blocks for them; in any order."""
        for part in parts:
            seq, name = part.seq, f"the part of sequence {part.seq.seq_id}"
            lost = seq.status is SequenceStatus.PREEMPTED
            assert not lost, f"there is {name}, which was preempted for this very step. The situation: {self.story}"
            missing = self.cache.num_missing_blocks(seq.seq_id, part.context_len)
            self.expect(f"the number of blocks that are missing for {name} (use take)", missing, 0)
            self.expect(f"the start of {name}", part.start, seq.num_scheduled)
            self.expect(f"`samples` of {name}", part.samples, part.context_len == seq.num_tokens)
        self.expect("the number of parts", len(parts), len({part.seq.seq_id for part in parts}))
        self.expect("the step, {sequence: tokens},", {part.seq.seq_id: part.num_tokens for part in parts}, expected)

    def check_share_out(self, expected: dict[int, int], left: int) -> None:
        """A step in which nobody lacks blocks."""
        waiting = [seq.seq_id for seq in self.scheduler.waiting]
        with self.blocks_asked_for():
            parts, budget = self.scheduler.share_out()
        self.check_parts(parts, expected)
        self.expect("the number of tokens that are left, as returned by share_out,", budget, left)
        self.check_queues([seq.seq_id for seq in self.seqs if seq.seq_id not in waiting], waiting, [])

    def check_share_out_preempts(self, expected: dict[int, int], preempted: list[int]) -> None:
        """A step in which blocks run out. What is left of the budget does not matter then: nobody is let in."""
        with self.blocks_asked_for():
            parts, _ = self.scheduler.share_out()
        self.check_parts(parts, expected)
        self.check_queues([seq.seq_id for seq in self.seqs if seq.seq_id not in preempted], preempted, preempted)

    def check_admit(self, budget: int, admitted: dict[int, int]) -> None:
        """Who is let in, given so many tokens; everybody else stays where they are."""
        running = [seq.seq_id for seq in self.scheduler.running] + list(admitted)
        waiting = [seq.seq_id for seq in self.scheduler.waiting if seq.seq_id not in admitted]
        self.story += f"; admit({budget}) was called"
        with self.blocks_asked_for():
            parts = self.scheduler.admit(budget)
        self.check_parts(parts, admitted)
        self.check_queues(running, waiting, [])

    def check_make_room(self, number: int, num_tokens: int, answer: bool, preempted: list[int]) -> None:
        """Whether there is room, and who lost their blocks for it."""
        running = [seq.seq_id for seq in self.scheduler.running if seq.seq_id not in preempted]
        waiting = sorted(preempted) + [seq.seq_id for seq in self.scheduler.waiting]
        self.story += f"; sequence {number} wants to grow to {num_tokens} tokens"
        lengths = {seq.seq_id: seq.num_tokens for seq in self.seqs}
        got = self.scheduler.make_room(self.seqs[number], num_tokens)
        self.check_queues(running, waiting, preempted)
        self.expect("what make_room returns", bool(got), answer)
        for victim in preempted:
            self.expect(f"the status of sequence {victim}", self.seqs[victim].status, SequenceStatus.PREEMPTED)
        self.expect("how many tokens each sequence has", {seq.seq_id: seq.num_tokens for seq in self.seqs}, lengths)


# Task 4.3 comes first, because share_out can be judged only with a make_room that works.


@pytest.mark.task("4.3", hint="Ask the cache first. Whoever has room takes nothing from anybody.")
def test_nobody_is_preempted_while_there_is_room(chapter: Any) -> None:
    Situation(chapter, [(5, 4), (5, 5)], [(3, 0)], free_blocks=1).check_make_room(0, 5, True, [])
    Situation(chapter, [(5, 5), (5, 5)], [(3, 0)], free_blocks=0).check_make_room(0, 8, True, [])


def after_one_preemption(chapter: Any) -> Situation:
    """Sequence 0 needs a block, none is free, and 2 is the latest arrival among those who run."""
    situation = Situation(chapter, [(5, 4), (20, 20), (5, 5)], [(3, 0), (2, 0)], free_blocks=0)
    situation.story += "; sequence 0 wants to grow to 5 tokens"
    with suppress(IndexError):  # nobody is left in running, if no blocks came back
        situation.scheduler.make_room(situation.seqs[0], 5)
    return situation


@pytest.mark.task("4.3", hint="Blocks do not come back by themselves: call cache_manager.retire(victim).")
def test_a_victims_blocks_are_retired(chapter: Any) -> None:
    situation = after_one_preemption(chapter)
    story = situation.story
    assert situation.cache.retired, f"make_room gave nobody's blocks to cache_manager.retire. The situation: {story}"
    num_free = situation.cache.num_free_blocks
    assert num_free, f"after make_room no block is free, given back were those of {situation.cache.retired}. {story}"


@pytest.mark.task("4.3", hint="The victim is the latest arrival. running is in order of arrival: where in it is that one?")
def test_the_victim_is_the_latest_arrival(chapter: Any) -> None:
    situation = after_one_preemption(chapter)
    situation.expect("the list of those given to cache_manager.retire", situation.cache.retired, [2])
    situation.expect("running", [seq.seq_id for seq in situation.scheduler.running], [0, 1])


@pytest.mark.task(
    "4.3", hint="seq.preempt() marks a sequence: its tokens stay, but none of them counts as computed any more."
)
def test_a_victim_is_marked(chapter: Any) -> None:
    situation = after_one_preemption(chapter)
    times = {seq.seq_id: seq.num_preemptions for seq in situation.seqs}
    situation.expect("the number of calls of preempt(), {sequence: calls},", times, {0: 0, 1: 0, 2: 1, 3: 0, 4: 0})
    situation.expect("the status of sequence 2", situation.seqs[2].status, SequenceStatus.PREEMPTED)
    situation.expect("the number of tokens that sequence 2 has", situation.seqs[2].num_tokens, 5)


@pytest.mark.task("4.3", hint="self.preempted tells schedule, and all who watch, who was preempted in this step.")
def test_a_victim_is_noted(chapter: Any) -> None:
    situation = after_one_preemption(chapter)
    situation.expect("preempted", [seq.seq_id for seq in situation.scheduler.preempted], [2])


@pytest.mark.task("4.3", hint="waiting is in order of arrival, too: whoever ran came before all who never did.")
def test_the_latest_arrival_gives_its_blocks_and_waits_at_the_front(chapter: Any) -> None:
    Situation(chapter, [(5, 4), (20, 20), (5, 5)], [(3, 0), (2, 0)], free_blocks=0).check_make_room(0, 5, True, [2])


@pytest.mark.task("4.3", hint="Ask again after each victim, stop when there is room. waiting is in order of arrival too.")
def test_as_many_are_preempted_as_are_needed_and_wait_in_order_of_arrival(chapter: Any) -> None:
    running = [(12, 4), (7, 7), (3, 3), (3, 3)]
    Situation(chapter, running, [(3, 0)], free_blocks=0).check_make_room(0, 12, True, [2, 3])
    Situation(chapter, running, [(3, 0)], free_blocks=1).check_make_room(0, 12, True, [3])
    Situation(chapter, running, [(3, 0)], free_blocks=0).check_make_room(0, 20, True, [1, 2, 3])


@pytest.mark.task(
    "4.3", hint="If seq is the latest itself, it is a victim like any other; then all earlier ones keep what they have."
)
def test_the_latest_arrival_gives_way_itself(chapter: Any) -> None:
    Situation(chapter, [(8, 8), (5, 4)], [(3, 0)], free_blocks=0).check_make_room(1, 5, False, [1])
    Situation(chapter, [(8, 8), (12, 4), (3, 3)], [(3, 0)], free_blocks=0).check_make_room(1, 12, False, [1, 2])
    Situation(chapter, [(5, 4)], [], free_blocks=0).check_make_room(0, 5, False, [0])


@pytest.mark.task("4.3", hint="preempted collects all victims of a step; schedule empties it.")
def test_victims_of_several_calls_are_all_noted(chapter: Any) -> None:
    situation = Situation(chapter, [(5, 4), (5, 4), (3, 3), (3, 3)], [], free_blocks=0)
    for number, preempted in ((0, [3]), (1, [2, 3])):
        assert situation.scheduler.make_room(situation.seqs[number], 5), f"make_room should return True; {situation.story}"
        situation.check_queues([n for n in range(4) if n not in preempted], preempted, preempted)
        situation.cache.grow(number, 5)


@pytest.fixture(scope="module")
def makes_room(chapter: Any) -> bool:
    """Whether the chapter's own ``make_room`` works."""
    try:
        test_nobody_is_preempted_while_there_is_room(chapter)
        test_as_many_are_preempted_as_are_needed_and_wait_in_order_of_arrival(chapter)
        test_the_latest_arrival_gives_way_itself(chapter)
        test_victims_of_several_calls_are_all_noted(chapter)
    except (Exception, pytest.fail.Exception):
        return False
    return True


@pytest.fixture
def sound(chapter: Any, makes_room: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The chapter with a ``make_room`` that works: if its own does not, task 4.1 is judged with the engine's."""

    def make_room(self: Any, seq: Sequence, num_tokens: int) -> bool:
        cache = self.cache_manager
        asked = {name: getattr(cache, name) for name in ("can_grow", "num_missing_blocks", "retire")}
        blocks = SimpleNamespace(**asked, num_free_blocks=0, num_retiring_blocks=0)  # none come back by themselves
        engine: Any = scheduler.Scheduler(self.config, cast(Any, blocks))
        engine.running, engine.waiting, engine._preempted = self.running, self.waiting, self.preempted
        return bool(engine._make_room(seq, num_tokens))

    if not makes_room:
        monkeypatch.setattr(chapter.Scheduler, "make_room", make_room)
    return chapter


@pytest.mark.task(
    "4.1", hint="First set a token aside for each num_unscheduled of 1. What remains is for the others, as far as it goes."
)
def test_every_decode_gets_its_token_wherever_it_stands(sound: Any) -> None:
    Situation(sound, [(5, 4), (30, 10), (8, 7)], [(3, 0)], budget=8).check_share_out({0: 1, 1: 6, 2: 1}, 0)
    Situation(sound, [(30, 0), (5, 4), (8, 7)], [(3, 0)], budget=8).check_share_out({0: 6, 1: 1, 2: 1}, 0)
    Situation(sound, [(5, 4), (8, 7), (6, 5)], [(3, 0)], seats=3, budget=3).check_share_out({0: 1, 1: 1, 2: 1}, 0)


@pytest.mark.task("4.1", hint="The first prompt takes what it can use, the next what is left. No part has 0 tokens.")
def test_prompts_share_what_is_left_in_order_of_arrival(sound: Any) -> None:
    Situation(sound, [(5, 4), (9, 4), (40, 8), (6, 2)], [], budget=12).check_share_out({0: 1, 1: 5, 2: 6}, 0)
    Situation(sound, [(5, 4), (9, 8), (9, 2)], [], budget=9).check_share_out({0: 1, 1: 1, 2: 7}, 0)


@pytest.mark.task("4.1", hint="If nothing is left for a prompt, it has no part; but a decode may still stand behind it.")
def test_a_prompt_that_gets_nothing_does_not_end_the_step(sound: Any) -> None:
    Situation(sound, [(40, 8), (9, 4), (5, 4)], [], seats=4, budget=4).check_share_out({0: 3, 2: 1}, 0)


@pytest.mark.task("4.1", hint="What is left is the whole budget less the tokens of all parts, decodes included.")
def test_the_tokens_that_are_left_are_returned(sound: Any) -> None:
    Situation(sound, [(5, 4), (9, 4), (8, 7)], [(3, 0)]).check_share_out({0: 1, 1: 5, 2: 1}, 9)
    Situation(sound, [], [(3, 0)]).check_share_out({}, 16)


@pytest.mark.task("4.1", hint="num_unscheduled can be 0: there is nothing to compute for such a sequence.")
def test_a_sequence_with_nothing_to_compute_has_no_part(sound: Any) -> None:
    situation = Situation(sound, [(5, 4), (9, 8), (9, 3)], [], budget=8)
    situation.seqs[1].max_num_tokens = 9
    situation.check_share_out({0: 1, 2: 6}, 1)


@pytest.mark.task("4.1", hint="What is left for prompts may be a single token. It is not wasted: a chunk may be that short.")
def test_a_chunk_may_have_a_single_token(sound: Any) -> None:
    Situation(sound, [(5, 4), (9, 2)], [], seats=2, budget=2).check_share_out({0: 1, 1: 1}, 0)
    Situation(sound, [(9, 4), (9, 2), (9, 3)], [], seats=3, budget=6).check_share_out({0: 5, 1: 1}, 0)


@pytest.mark.task("4.1", hint="Sequences with one token to compute come first, also if it is a prompt's last token.")
def test_the_last_token_of_a_prompt_is_served_with_the_decodes(sound: Any) -> None:
    situation = Situation(sound, [(20, 4)], [(9, 0)], budget=8)
    seq = situation.scheduler.waiting.popleft()
    situation.scheduler.running.append(seq)
    seq.num_scheduled = seq.num_computed = 8
    seq.status = SequenceStatus.RUNNING
    situation.cache.grow(seq.seq_id, 8)
    situation.story += "; 1 runs by now, with 8 of the 9 tokens of its prompt cached"
    situation.check_share_out({0: 7, 1: 1}, 0)


@pytest.mark.task("4.3", hint="Play it on paper: who is last, how many blocks come back, and is that enough?")
def test_room_is_made_in_any_situation(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(50):
        running = [(tokens := choose.randint(2, 20), choose.randint(1, tokens)) for _ in range(choose.randint(1, 6))]
        number = choose.randrange(len(running))
        num_free = free = choose.randint(0, 3)
        held = [-(-num_cached // 4) for _, num_cached in running]
        wanted = choose.randint(running[number][0], 28)
        missing = -(-wanted // 4) - held[number]
        preempted: list[int] = []
        for last in reversed(range(len(running))):
            if missing <= free or number in preempted:
                break
            preempted.insert(0, last)
            free += held[last]
        situation = Situation(chapter, running, [(3, 0)], free_blocks=num_free)
        situation.check_make_room(number, wanted, number not in preempted, preempted)


@pytest.mark.task("4.1", hint="Mixed loads: first all sequences with one token to compute, then the others by arrival.")
def test_random_loads_are_shared_out(sound: Any, seed: int) -> None:
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
        Situation(sound, running, [], budget=budget).check_share_out(expected, left)


@pytest.mark.task("4.1", hint="Ask make_room for the tokens that are cached after this step; then take, one by one.")
def test_room_is_made_for_each_part_before_it_is_taken(sound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[int, int] = {}
    make_room, take = sound.Scheduler.make_room, sound.Scheduler.take

    def watched_make_room(self: Any, seq: Sequence, num_tokens: int) -> Any:
        asked[seq.seq_id] = num_tokens
        return make_room(self, seq, num_tokens)

    def watched_take(self: Any, seq: Sequence, num_tokens: int) -> Any:
        got, expected = asked.get(seq.seq_id), seq.num_scheduled + num_tokens
        assert got == expected, f"sequence {seq.seq_id} grows to {expected} tokens, but make_room was asked for {got}"
        return take(self, seq, num_tokens)

    monkeypatch.setattr(sound.Scheduler, "make_room", watched_make_room)
    monkeypatch.setattr(sound.Scheduler, "take", watched_take)
    Situation(sound, [(5, 4), (40, 8), (8, 7)], [], budget=9).check_share_out({0: 1, 1: 7, 2: 1}, 0)
    Situation(sound, [(40, 4)], [], free_blocks=2, budget=8).check_share_out({0: 8}, 0)  # the chunk fits, the rest not yet


@pytest.mark.task("4.1", hint="make_room may shorten running while you walk along it. Who lost blocks is not in the step.")
def test_a_sequence_that_was_preempted_has_no_part(sound: Any) -> None:
    Situation(sound, [(5, 4), (6, 5), (7, 6)], [], free_blocks=0).check_share_out_preempts({0: 1, 1: 1}, [2])
    Situation(sound, [(5, 4), (5, 4), (3, 2)], [], free_blocks=0).check_share_out_preempts({0: 1}, [1, 2])
    Situation(sound, [(5, 4), (5, 4)], [], free_blocks=1).check_share_out_preempts({0: 1}, [1])
    Situation(sound, [(5, 4), (5, 4), (7, 6), (3, 2)], [], free_blocks=0).check_share_out_preempts({0: 1, 1: 1}, [2, 3])
    Situation(sound, [(9, 4), (3, 2), (8, 7)], [], free_blocks=0).check_share_out_preempts({0: 5, 1: 1}, [2])
    Situation(sound, [(5, 4)], [], free_blocks=0).check_share_out_preempts({}, [0])


@pytest.mark.task("4.2", hint="Take from the front of waiting, add at the end of running, until nothing or nobody is left.")
def test_those_who_wait_are_let_in_in_order_of_arrival(chapter: Any) -> None:
    Situation(chapter, [(4, 4)], [(3, 0), (5, 0), (2, 0)]).check_admit(16, {1: 3, 2: 5, 3: 2})
    Situation(chapter, [(4, 4)], []).check_admit(16, {})


@pytest.mark.task("4.2", hint="Play it on paper: a seat, tokens in the budget, and the first in the queue.")
def test_random_queues_are_let_in(chapter: Any, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(50):
        running = [(4, 4)] * choose.randint(0, 4)
        waiting = [(choose.randint(1, 12), choose.choice([0, 0, 5])) for _ in range(choose.randint(0, 6))]
        seats, budget = choose.randint(4, 8), choose.randint(0, 30)
        admitted, left = {}, budget
        for number, lens in enumerate(waiting, start=len(running)):
            if left > 0 and number < seats:
                admitted[number] = min(sum(lens), left)
                left -= admitted[number]
        Situation(chapter, running, waiting, seats=seats).check_admit(budget, admitted)


@pytest.mark.task("4.2", hint="The last to come in gets what is left, as a first chunk. With no token left nobody comes in.")
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


@pytest.mark.task("4.2", hint="A seat is taken by everyone in running, those who came in a moment ago included.")
def test_no_more_are_let_in_than_there_are_seats(chapter: Any) -> None:
    for seats, admitted in ((2, {}), (3, {2: 3}), (4, {2: 3, 3: 5})):
        Situation(chapter, [(4, 4), (4, 4)], [(3, 0), (5, 0), (2, 0)], seats=seats).check_admit(16, admitted)


@pytest.mark.task(
    "4.2", hint="If can_grow says no to the first in the queue, it stays there and all wait. Ask for each one in its turn."
)
def test_nobody_overtakes_the_first_in_the_queue(chapter: Any) -> None:
    Situation(chapter, [(4, 4)], [(17, 0), (2, 0)], free_blocks=4).check_admit(99, {})
    Situation(chapter, [(4, 4)], [(2, 0), (17, 0), (2, 0)], free_blocks=5).check_admit(99, {1: 2})
    Situation(chapter, [(4, 4)], [(2, 0)], free_blocks=0).check_admit(99, {})


@pytest.mark.task("4.2", hint="Ask for all tokens of the sequence, even if the budget allows only some; for each one anew.")
def test_there_must_be_blocks_for_all_tokens_of_the_first_in_the_queue(chapter: Any) -> None:
    Situation(chapter, [], [(20, 0)], free_blocks=4).check_admit(6, {})
    Situation(chapter, [], [(20, 0)], free_blocks=5).check_admit(6, {0: 6})
    Situation(chapter, [], [(9, 0), (5, 0)], free_blocks=4).check_admit(16, {0: 9})
    Situation(chapter, [], [(9, 0), (4, 0)], free_blocks=4).check_admit(16, {0: 9, 1: 4})


@pytest.mark.task("4.2", hint="A preempted sequence comes back with what it wrote: that is computed again, too.")
def test_a_preempted_sequence_comes_back_with_its_output(chapter: Any) -> None:
    Situation(chapter, [], [(4, 5), (1, 0)], free_blocks=2).check_admit(16, {})
    Situation(chapter, [], [(4, 5), (1, 0)], free_blocks=3).check_admit(16, {0: 9})


def check_steps(steps: list[StepTrace], seats: int, budget: int) -> None:
    """What holds for every step of every run."""
    first_seen: list[int] = []
    for before, trace in zip([None, *steps], steps):
        ids = [row.seq_id for row in trace.rows]
        assert len(ids) <= seats, f"step {trace.step} has {len(ids)} sequences where max_num_seqs is {seats}"
        assert trace.num_tokens <= budget, f"step {trace.step} has {trace.num_tokens} tokens, the budget is {budget}"
        for row in before.rows if before else ():
            if row.samples and row.seq_id not in (*before.finished, *trace.preempted):  # type: ignore[union-attr]
                assert row.seq_id in ids, f"sequence {row.seq_id} runs, but got no token in step {trace.step}"
        first_seen += sorted(set(ids) - set(first_seen))
    assert first_seen == sorted(first_seen), f"sequences first ran in the order {first_seen}, not in that of arrival"


@pytest.mark.task("4.3", hint="Each part may be right alone: follow the first sequence that is wrong in engine.history.")
@pytest.mark.parametrize("name", ["Scheduler", "StaticScheduler"])
def test_the_engine_gives_what_hugging_face_gives(chapter: Any, seed: int, name: str) -> None:
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
    assert any(trace.preempted for trace in steps), "blocks ran out, but nobody was preempted"
    phases = [{row.phase for row in trace.rows} for trace in steps]
    mixed = {"prefill", "decode"} in phases
    assert mixed or name == "StaticScheduler", (
        "no step had a prompt's chunk beside a decode: was anybody let in while others ran?"
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
    assert num_preempted > 0, "blocks ran out in these loads, but nobody was preempted"
