# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Chapter 04: decide anew at every step
#
# The chapters so far take a batch of requests and run it until its longest answer is done. A request that arrives meanwhile
# waits. A sequence that ends early leaves an empty seat until the whole batch is done. In this chapter no batch lasts longer
# than one step: at every step a *scheduler* decides which sequences are in it.
#
# **You need:** chapter 03, and what a queue is. **Time:** about three and a half hours, reading and exercises together.
#
# *After this chapter you can* write a scheduler with continuous batching, chunked prefill and preemption, read its decisions
# from a timeline, and measure their effect on latency and on throughput.
#
# *If this chapter is left to you (a copy from a course), the cells use your own file in `work/` for the tasks that are done, and
# lent functions for the others. So the page runs from the beginning, and each exercise stands right after its idea.
# `python -m chapters start 04` writes `work/ch04_scheduler.py`, unless it is there already; `python -m chapters check 04` checks
# it.*

# %%
import sys

sys.path.insert(0, "..")  # the chapters lie one folder up

import random
import time
from statistics import mean, median

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

from chapters.course import load_stage
from pagebrain import PageBrainConfig, viz
from pagebrain.assets import BUNDLED_MODEL

logging.disable_progress_bar()
torch.set_num_threads(1)
ch04 = load_stage("04")
model = GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, attn_implementation="eager").eval()
exact = GPT2LMHeadModel.from_pretrained(
    BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager"
).eval()
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
model.config.eos_token_id = exact.config.eos_token_id = None

# %% [markdown]
# The last line removes the end token. In this notebook every answer has exactly the length that its request asks for, so that
# the pictures are the same on every machine.
#
# ## The problem, measured
#
# Eight requests arrive at the same time. The engine has four *seats*: at most four sequences are in one step (`max_num_seqs`).
# A `StaticScheduler` does what chapters 01 to 03 did. It fills the seats, and lets no sequence in until all seats are empty.
#
# The small helper `play` serves requests that arrive at given steps. The whole notebook uses it.

# %%
starts = [
    "One day",
    "And so they went home.",
    "The fox said",
    "It was a good day.",
    "A boy",
    "Once upon a time, a",
    "The girl",
    "A cat sat in a tree.",
]
new_tokens = [4, 20, 7, 12, 5, 16, 3, 9]
requests = [
    (0, tokenizer.encode(line), n) for line, n in zip(starts, new_tokens, strict=True)
]


def play(requests, make_scheduler=ch04.Scheduler, **settings):
    """Serve requests ``(step of arrival, prompt, new tokens)``; return the engine."""
    config = PageBrainConfig.for_model(model, **settings)
    engine = ch04.Engine(model, config, make_scheduler=make_scheduler)
    coming = list(requests)
    while True:
        while coming and coming[0][0] <= len(engine.history):
            engine.add_request(*coming.pop(0)[1:])
        if engine.step() is None:
            waiting = [seq.seq_id for seq in engine.scheduler.waiting]
            running = [seq.seq_id for seq in engine.scheduler.running]
            left = f"{running} run, {waiting} wait, {len(coming)} are still to come"
            assert left == "[] run, [] wait, 0 are still to come", (
                f"schedule() planned nothing after {len(engine.history)} steps, but {left}; "
                f"{engine.cache.num_free_blocks} blocks are free"
            )
            return engine


room = {"block_size": 4, "num_blocks": 20, "max_num_seqs": 4}
static = play(requests, ch04.StaticScheduler, **room).history
viz.timeline(static)

# %% [markdown]
# A row is a sequence, and a column is a step. A tall box is the prefill of a prompt, with its number of tokens. A low box is a
# decode, and a black bar is the end. A is done after 4 steps. Its seat stands empty until B is done, and all this time E waits
# for a seat.


# %% tags=["nbval-check-output"]
def count_seats(history, num_seats):
    """Seats in all steps together, and how many of them were taken."""
    return num_seats * len(history), sum(len(trace.rows) for trace in history)


offered, taken = count_seats(static, 4)
print(
    f"{len(static)} steps of 4 seats: {offered} seats, "
    f"{taken} taken, {offered - taken} empty"
)
for name, seq_id in (("A", 0), ("E", 4)):
    waited = sum(seq_id in trace.waiting for trace in static)
    print(
        f"{name} asks for {new_tokens[seq_id]} tokens and waits {waited} steps for the first"
    )

# %% [markdown]
# Nearly half of the seats stand empty. This is not only so with these eight lengths. A static batch lasts as long as its
# *longest* answer, but the work in it is that of its *mean* answer. With answers of $n_1, \dots, n_k$ tokens on $k$ seats, the
# share of the seats that is used is
#
# $$\frac{n_1 + \dots + n_k}{k \cdot \max_i n_i}.$$
#
# The more the lengths differ, the smaller this share is. Real answers differ a lot.
#
# ## The idea
#
# A step takes a few milliseconds, and nothing in it depends on which sequences were in the step before: each sequence has its
# tokens, and a block table that says where its keys and values lie. So a batch need not last longer than one step. After each
# step, sequences that are done leave, and waiting ones may come in. This is *continuous batching*. The paper that introduced it
# calls it *iteration-level scheduling* (Yu et al., "Orca", OSDI 2022).
#
# Three words:
#
# - A **request** is what a user asked for: a prompt, and the largest number of new tokens.
# - A **sequence** is the prompt and the tokens that follow it. The scheduler moves it from `waiting` to `running`.
# - A **group** is the set of sequences that *one step* computes, each with the tokens that it computes in this step. The
#   class is `SequenceGroup`. (Early vLLM used "sequence group" for the several samples of one request. Here it is always the
#   batch of one step.)
#
# The engine is a loop. It asks the scheduler for a group, computes it in one forward call, and appends the new tokens:

# %%
viz.show_source(ch04.Engine.step)

# %% [markdown]
# It has no prefill function and no decode function. An entry of a group says: compute `num_tokens` tokens of this sequence, from
# position `start` on. Its `phase` is a name for the state of the sequence: *prefill* while it computes tokens that it already
# has, *decode* when it extends its text. All entries become rows of one flat batch. Since chapter 03, attention can compute rows
# of sequences with different lengths together.
#
# Here are the groups of the first steps for three requests. A step may compute 8 tokens (`max_num_batched_tokens`).

# %% tags=["nbval-check-output"]
small = PageBrainConfig.for_model(
    model, block_size=4, num_blocks=16, max_num_seqs=3, max_num_batched_tokens=8
)
engine = ch04.Engine(model, small)
sequences = [
    engine.add_request(list(range(1, 1 + num_prompt)), n)
    for num_prompt, n in ((5, 3), (10, 3), (2, 4))
]
for step in range(5):
    waiting = "".join("ABC"[seq.seq_id] for seq in engine.scheduler.waiting)
    group = engine.step()
    print(f"step {step}: {group.num_tokens} tokens (waiting before: {waiting or 'none'})")
    for entry in sorted(group, key=lambda entry: entry.seq.seq_id):
        name = "ABC"[entry.seq.seq_id]
        end = "samples a token" if entry.samples else "no token yet"
        print(
            f"   {name}  {entry.phase:7s}  start {entry.start:2d}  "
            f"num_tokens {entry.num_tokens}  {end}"
        )

# %% [markdown]
# Read it line by line. In step 0, A's prompt takes 5 of the 8 tokens, and the first 3 tokens of B's prompt take the rest. In step
# 1, A *decodes* while B's prompt goes on, from position 3, in the same forward call. B's prompt is now complete, so step 1 gives
# B its first token. Nothing is left of the 8 tokens, so C's prompt has to wait for step 2. In step 3, A is gone.
#
# ### What a scheduler reads
#
# All decisions are made from counts, never from token values. These are the fields of a sequence that you need:
#
# | field of `Sequence` | what it counts | after `seq.preempt()` |
# |---|---|---|
# | `num_tokens` | the tokens that the sequence has: its prompt and its answer so far | unchanged |
# | `num_scheduled` | tokens that are computed: their K and V are in the cache | 0 |
# | `num_unscheduled` | tokens that can be computed now: 1 is a decode (or the last token of a prompt), more is a prompt, 0 is nothing | all of `num_tokens` |
# | `num_prompt_tokens` | tokens of the prompt | unchanged |
# | `status` | `WAITING`, `RUNNING`, `PREEMPTED` or `FINISHED` | `PREEMPTED` |
#
# `seq.preempt()` touches neither blocks nor queues: that is left to the scheduler. (A sequence also has
# `num_computed`. `num_scheduled` counts tokens when their step is planned, `num_computed` when it is over. Here each step is over
# before the next one is planned, so the two are always equal. PageBrain's own engine launches a step while the previous one
# still computes, and then they differ.)
#
# This is the whole plan of a step:

# %%
viz.show_source(ch04.Scheduler.schedule, ch04.Scheduler.take)

# %% [markdown]
# `schedule` calls `share_out` for the running sequences and `admit` for the waiting ones. These two are your first exercises.
# `share_out` also calls `make_room`, which is the third one, further down. Until it is done, it is lent to you.
#
# The rule for `share_out`: a sequence with one token to compute gets it. The tokens of the budget that are left go to the others
# by order of arrival, each as much as it can use. (Why in this order? The section *A long prompt beside a sequence that decodes*
# measures it.)
#
# ### Exercise 4.1: share out the budget (12 points)
#
# Do one example by hand. The budget is 10. In order of arrival, these run: A (1 token to compute), B (a prompt of which 20 tokens
# are left), C (1 token), D (5 tokens left). Which sequence gets how many tokens, and how many go back to the caller? Take care
# that B does not get the token that C will need. And `running` may become shorter at its end while you go through it.
#
# <details><summary><b>The answer, when you have yours</b></summary>
#
# A and C get a token each, wherever they stand. 8 of the 10 remain. B could use 20 and gets all 8. Nothing is left for D: it
# has no part in this step, not one of 0 tokens. 0 goes back to the caller. (With a budget of 24, B gets its 20, D 2 of its 5, and
# 0 goes back. With 30, D gets all 5, and 3 go back.)
# </details>

# %%
viz.show_task(ch04.Scheduler.share_out)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch04.Scheduler.share_out)

# %% [markdown]
# ### Exercise 4.2: which sequences may start (10 points)
#
# Three things can be missing: tokens in the budget, a seat, or blocks. Say for each of them what happens when it runs out in the
# middle of the queue. Blocks are asked for *all* tokens that a sequence has, although its first part of the step may be only a
# chunk. What would go wrong if you asked only for the blocks of the chunk? And which tokens does a sequence have that was
# preempted, and so waits again?
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# *Tokens:* the last sequence that comes in gets what is left, as a first chunk, and after it none comes in. *A seat:* no other
# sequence comes in. *Blocks:* the first in the queue stays where it is. All behind it stay too, even those that would fit.
#
# *Only the blocks of the chunk:* two long prompts could come in, each with a small chunk, into a pool that holds only one of
# them. Some steps later blocks run out, one of the two is preempted, and what was computed for it is lost. It would come in again
# with its first chunk, and the same could happen once more.
#
# *A preempted sequence* has its prompt and its answer so far. All of it must be computed again, so all of it needs blocks.
# </details>

# %%
viz.show_task(ch04.Scheduler.admit)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch04.Scheduler.admit)

# %% [markdown]
# ## The same requests again

# %%
continuous = play(requests, **room).history
viz.timeline(continuous)

# %% tags=["nbval-check-output"]
for name, history in (("static", static), ("continuous", continuous)):
    offered, taken = count_seats(history, 4)
    waited = [sum(seq_id in trace.waiting for trace in history) for seq_id in range(8)]
    print(
        f"{name:10s}  {len(history)} steps, {offered - taken:2d} empty seats, "
        f"waiting steps {waited}"
    )

# %% [markdown]
# Both runs below each other. A dashed frame marks a box that the static run has in that step, and the continuous one has not:

# %%
viz.compare_traces(static, continuous, titles=("static", "continuous"))

# %% [markdown]
# The work is the same: there are as many boxes as before, but they are closer together. Empty seats are left only at the end,
# when no sequence waits any more.
#
# > **Predict.** Now request B arrives alone, with 20 new tokens, and no other sequence runs. How many steps does it take with the
# > static scheduler, and how many with the continuous one?

# %% tags=["nbval-check-output"]
for name, make_scheduler in (
    ("static", ch04.StaticScheduler),
    ("continuous", ch04.Scheduler),
):
    print(f"{name}: {len(play(requests[1:2], make_scheduler, **room).history)} steps")

# %% [markdown]
# <details><summary><b>If you said that continuous batching is faster</b></summary>
#
# A token needs the token before it. So 20 tokens are 20 steps, one after the other, with any scheduler. A scheduler can shorten
# the time for which a sequence *waits*, and it can fill seats. It cannot make one sequence faster, and a sequence that is alone
# does not wait.
# </details>
#
# <details><summary><b>If you said 21</b></summary>
#
# You counted one step for the prompt and 20 for the tokens. But the step that computes the prompt also gives the first token: the
# logits of its last row say what comes next.
# </details>
#
# Memory shows the same pattern. These are the token slots that are held, with both schedulers:

# %%
viz.memory_over_time({"static": static, "continuous": continuous})

# %% [markdown]
# With both, only the last block of a sequence has empty slots, and a sequence that ends gives its blocks back. But the static
# scheduler does not use the free blocks: while four requests wait, at least half of the pool lies idle. The continuous one holds
# more memory for a shorter time.
#
# ## A long prompt beside a sequence that decodes
#
# A group holds prefills and decodes side by side, and a step ends for all its members at the same time. If a request with a
# prompt of 400 tokens arrives, the step with this prompt is long, and every sequence that decodes has to wait for it.
#
# `max_num_batched_tokens` is a *budget* for one step. The decodes come first, with one token each. Prompts get what is left, in
# chunks (Agrawal et al., "Sarathi-Serve", OSDI 2024). With a budget of 64 and one sequence that decodes, 63 tokens of the prompt
# fit into a step:

# %%
text = (tokenizer.encode("One day a girl met a fox. ") * 150)[:400]
decode_and_prompt = [(0, text[:10], 30), (6, text, 2)]


def beside_a_long_prompt(budget):
    return play(
        decode_and_prompt, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=budget
    ).history


chunked = beside_a_long_prompt(64)
viz.timeline(chunked, names={0: "decodes", 1: "400 tokens"})

# %% [markdown]
# A, the first row, gets its token in every step. How long does this take? We measure the time between A's tokens, with a budget
# that lets the whole prompt through at once, and with the budget of 64. The two take turns, and for each gap the shortest of
# five runs counts, because other work on the machine can only make a run longer.


# %%
def gaps_ms(history, seq_id):
    """Milliseconds between a sequence's tokens."""
    read = [
        trace.read_s
        for trace in history
        for row in trace.rows
        if row.seq_id == seq_id and row.samples
    ]
    return [1e3 * (after - before) for before, after in zip(read, read[1:])]


runs = {512: [], 64: []}
for _ in range(5):
    for budget, histories in runs.items():
        histories.append(beside_a_long_prompt(budget))
for budget, histories in runs.items():
    gaps = [
        min(same)
        for same in zip(*(gaps_ms(history, 0) for history in histories), strict=True)
    ]
    first = next(
        t.step for t in histories[0] for row in t.rows if row.seq_id == 1 and row.samples
    )
    print(
        f"budget {budget:3d}: A's usual gap {median(gaps):5.1f} ms, "
        f"its longest {max(gaps):6.1f} ms; "
        f"B has its first token in step {first}"
    )

# %% [markdown]
# Look at the longest gap: this is what the budget changes. The usual gap (the median) is that of steps without a prompt, which are
# the same with both budgets. (If the two differ much, your machine was busy: run the cell again.) With the large budget, the
# text of A stops once, for as long as the whole prompt takes. With the small one, the wait is spread over seven steps. This has
# a price: B's prompt is computed in seven pieces, each step has a cost of its own, and so B's first token comes later. A smaller
# budget is better for sequences that decode, a larger one for those that have just arrived.
#
# > **Predict.** Now the other way round: prompts get the budget first, and sequences that decode get a token only in steps in
# > which there is no prompt to compute. A and B decode 12 tokens each. From step 3 on, a request with a prompt of 32 tokens arrives
# > in every second step, eight requests in all. The budget is 16 tokens. When does A get its tokens?


# %%
class PromptsFirst(ch04.Scheduler):
    """Sequences that decode have no part in a step in which there is a prompt to compute."""

    def schedule(self):
        decodes = [seq for seq in self.running if seq.num_unscheduled == 1]
        self.running = [seq for seq in self.running if seq.num_unscheduled > 1]
        prompts_alone = super().schedule()
        self.running = sorted(decodes + self.running, key=lambda seq: seq.seq_id)
        return prompts_alone or super().schedule()


stream = [(0, text[:4], 12), (0, text[:4], 12)]
stream += [(3 + 2 * number, text[:32], 3) for number in range(8)]
crowd = {
    "block_size": 8,
    "num_blocks": 64,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 16,
}
prompts_first = play(stream, PromptsFirst, **crowd).history
viz.timeline(prompts_first)


# %% tags=["nbval-check-output"]
def token_steps(history, seq_id):
    """The steps in which a sequence got a token."""
    return [
        t.step for t in history for row in t.rows if row.seq_id == seq_id and row.samples
    ]


decodes_first = play(stream, **crowd).history
for name, history in (("prompts first", prompts_first), ("decodes first", decodes_first)):
    steps = token_steps(history, 0)
    longest = max(after - before for before, after in zip(steps, steps[1:]))
    first = [
        token_steps(history, seq_id)[0] - stream[seq_id][0] + 1
        for seq_id in range(2, len(stream))
    ]
    print(f"{name}: {len(history)} steps, A's longest gap is {longest} steps")
    print(f"   steps until the newcomers' first token: {first}")

# %% [markdown]
# <details><summary><b>If you said: after the first newcomer's prompt, so 2 steps later</b></summary>
#
# That would be right for a single newcomer. But two steps later the next one has arrived, and it comes before A again. As long as
# prompts arrive as fast as they can be computed, sequences that decode get no token at all: they *starve*. The newcomers starve
# too, as soon as they have their first token. With decodes first, A has a token in every step, however many prompts arrive.
# </details>
#
# <details><summary><b>Is this order useless, then?</b></summary>
#
# No. The first tokens of the newcomers come earlier, as the numbers say. The first scheduler of vLLM worked like this: prompts
# first, in steps of their own. It is the better order if only the time to the first token counts, and the load is low.
# </details>
#
# ## When blocks run out
#
# Blocks are handed out as texts grow. The scheduler lets in as many sequences as fit *now*, and it cannot know how long the texts
# will become. So it can happen that all texts are unfinished, and no block is free.
#
# Then one sequence has to give its blocks back: it is *preempted*. Its keys and values are lost, and its tokens are kept. When it
# is let in again, all its tokens, prompt and answer so far, are computed like a prompt. This is *preemption by recompute*.
#
# An example with three seats, a pool of 9 blocks of 4 slots, and four requests:

# %% tags=["nbval-check-output"]
tight = {"block_size": 4, "num_blocks": 9, "max_num_seqs": 3}
scene = [
    (0, list(range(1, 9)), 12),
    (0, list(range(20, 25)), 14),
    (0, list(range(40, 47)), 9),
    (0, list(range(60, 63)), 4),
]
history = play(scene, **tight).history
shortage = next(trace for trace in history if trace.preempted)
before = history[shortage.step - 1]
for name, seq_id in zip("ABC", range(3), strict=True):
    [row] = [row for row in before.rows if row.seq_id == seq_id]
    num_blocks = len(before.block_tables[seq_id])
    print(
        f"{name}: {row.context_len:2d} tokens in {num_blocks} blocks after step {before.step}"
    )
print(
    f"free blocks: {len(before.free_blocks)}, waiting: {['ABCD'[i] for i in before.waiting]}"
)

# %% [markdown]
# > **Predict.** In the next step each of the three sequences gets one more token. Which of them needs a new block? Which one loses
# > its blocks? And where in the queue does that one stand then, before D or after it?
#
# The pool before that step, and the pool in it:

# %%
viz.pool_map(before)

# %%
viz.pool_map(shortage)

# %% tags=["nbval-check-output"]
print(f"step {shortage.step}: preempted {['ABCD'[i] for i in shortage.preempted]}")
print(f"         in the step {sorted('ABCD'[row.seq_id] for row in shortage.rows)}")
print(
    f"         waiting, first in the queue first: {['ABCD'[i] for i in shortage.waiting]}"
)

# %% [markdown]
# <details><summary><b>If you said that all three need a new block</b></summary>
#
# Each gets a token, but only A needs a block for it. A's 12 tokens fill its three blocks to the last slot. B's 9 and C's 11 tokens
# leave empty slots in their third blocks, and the next token goes there. A sequence needs a new block in every fourth step (in
# general, in every `block_size`-th step), when all of its slots are filled.
# </details>
#
# <details><summary><b>If you took B: it has the fewest tokens, so the least work is lost</b></summary>
#
# In this one step it is the cheapest choice. As a rule it has a price. A sequence that was let in a moment ago has few tokens in
# the cache, and so has one that was preempted a moment ago. The same sequence may be chosen again and again, while others that
# arrived later go on. The rule here depends only on the order of arrival, and C arrived after B.
# </details>
#
# <details><summary><b>If you took the one that needs the block</b></summary>
#
# That is A. It would be simple, and it would be unfair: A arrived first, and it could lose its blocks to newcomers again and
# again. The rule is that the *latest arrival* gives its blocks. A sequence that needs a block is preempted itself only if it is
# the latest arrival. So the first in `running` always goes on, ends at some time, and gives its blocks back. Then the second is
# the first. No sequence starves.
# </details>
#
# <details><summary><b>If you took the one with the most blocks</b></summary>
#
# Here all three have three blocks. In general this choice frees the most memory and loses the most work. And the argument above
# no longer holds: the earliest arrival often has the longest text.
# </details>
#
# <details><summary><b>If you put it behind D</b></summary>
#
# It arrived before D. Behind D, it would have lost its blocks *and* its place in the order. At the front of the queue, the order
# is still that of arrival: all of `running`, then all of `waiting`.
# </details>

# %%
viz.timeline(history)

# %% [markdown]
# Look at what follows the crossed box of C. C gave three blocks back, and A took one of them. C would now need three blocks, and
# waits. D's prompt would fit into one block, and there is an empty seat, but D does not overtake C. If small sequences could
# overtake, a long one might wait for ever. When C is let in again, its box shows 12 tokens, although its prompt has 7: prompt and
# answer so far are computed again in one prefill. Then C grows, and D, now the latest arrival, loses its block to C.

# %% [markdown]
# ### Exercise 4.3: make room (13 points)
#
# Take the example above and draw `running` and `waiting` as two rows of boxes, before and after. Then let two sequences be
# preempted in the same step, C first and then B. Each goes to the front of the queue. In what order do they stand there, and is
# it the right one? Lastly: the sequence that needs a block may be the last in `running` itself.
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# Before, A, B and C run and D waits. After, A and B run, and C and D wait, in this order. If B follows, A runs alone, and B, C and
# D wait. This is the order in which they arrived, as it should be: the later arrival is preempted first, so the earlier one comes
# to stand in front of it.
#
# If the sequence that needs the block is the last in `running`, it is the latest arrival. It gives its own blocks back, goes to the
# front of the queue, and has no part in the step. The earlier arrivals keep their blocks.
# </details>

# %%
viz.show_task(ch04.Scheduler.make_room)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch04.Scheduler.make_room)

# %% [markdown]
# ### Is it the same text?
#
# The keys and values of C were computed twice: the second time in another batch, in other blocks, and many rows at a time. The
# text should not depend on any of this. We compare each logit with Hugging Face, in double precision:

# %% tags=["nbval-check-output"]
mine = {}


def note(seq_id, scores):
    mine.setdefault(seq_id, []).append(scores)


config = PageBrainConfig.for_model(exact, **tight)
engine = ch04.Engine(exact, config, note)
sequences = [engine.add_request(prompt, n) for _, prompt, n in scene]
while engine.step() is not None:
    pass

assert sum(seq.num_preemptions for seq in sequences) > 0
for seq in sequences:
    num_prompt = seq.num_prompt_tokens
    with torch.no_grad():
        theirs = exact(torch.tensor([seq.token_ids])).logits[0, num_prompt - 1 : -1]
    assert torch.allclose(torch.stack(mine[seq.seq_id]), theirs, atol=1e-9, rtol=0)
    assert seq.output_token_ids == theirs.argmax(-1).tolist()
    assert len(mine[seq.seq_id]) == len(seq.output_token_ids) == scene[seq.seq_id][2]
    print(
        f"{'ABCD'[seq.seq_id]}: preempted {seq.num_preemptions} times, "
        f"{len(seq.output_token_ids)} tokens, logits reported {len(mine[seq.seq_id])} times"
    )

# %% [markdown]
# The last two numbers of each line are equal: a preempted sequence never reports a token twice. The reason is one comparison in
# `take`. A part *samples* only if it reaches the last token that the sequence has. The tokens that were generated before the
# preemption are computed again as rows of a prefill, and of a prefill only the logits of the last row are used. The token that
# they give is always a new one.
#
# So the cost of a preemption is computation:

# %% tags=["nbval-check-output"]
computed = sum(trace.num_tokens for trace in engine.history)
needed = sum(len(prompt) + n - 1 for _, prompt, n in scene)
print(
    f"{computed} tokens computed, {needed} are needed: {computed - needed} computed again"
)

# %% [markdown]
# (Why $n - 1$? The last token of an answer is never computed, because no token follows it.)
#
# The other way is *swapping*: to copy the blocks to the memory of the host and back. Recomputing needs no second place for K and
# V, and a GPU computes a prefill of many tokens efficiently.
#
# ### Exercise 4.4: measure and explain (3 points)
#
# The pool of this example is too small. How many blocks are enough, so that no sequence is preempted? `play(scene, ...)` serves
# the four requests, and each record in `history` has a field `preempted`. Then say in one to four sentences why this is fewer
# blocks than the four texts need together at their full lengths, and why an operator may choose a pool that is smaller still.
# The number is checked, and your instructor reads the text.

# %%
viz.show_task(ch04.answer_4_4)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch04.answer_4_4)

# %% [markdown]
# ## What was gained
#
# Twenty-four requests of mixed lengths, eight seats, the same model and the same attention. Only `admit` differs.

# %%
lengths = [8, 16, 64, 8, 24, 8, 16, 8] * 3
mixed = [(0, text[number : number + 20], n) for number, n in enumerate(lengths)]
seats = {"num_blocks": 128, "max_num_seqs": 8}
play(mixed[:2], **seats)  # the first run also warms the machine up
for name, make_scheduler in (
    ("static", ch04.StaticScheduler),
    ("continuous", ch04.Scheduler),
):
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        history = play(mixed, make_scheduler, **seats).history
        seconds.append(time.perf_counter() - began)
    num_new = sum(lengths)
    speed = f"about {num_new / min(seconds):4.0f} tokens/s"
    print(f"{name:10s}  {num_new} tokens in {len(history):3d} steps, {speed}")

# %% [markdown]
# Fewer than half of the steps, for the same tokens. The time falls less: a step with eight rows takes longer than a step with
# three, because on a CPU with a small model each row costs time. A GPU has to read some gigabytes of weights in each step, and
# further rows in the same step cost almost nothing.
#
# ## Latency against throughput
#
# The requests of a server do not arrive all at once. Two numbers matter then: how many tokens per second the machine gives to all
# users together (*throughput*), and how long one user waits (*latency*). With more load, both grow.
#
# To see this, we serve 300 requests at different rates. That would take long on this machine, but it is not necessary: a
# scheduler decides from counts and never looks at a token. So the real scheduler and the real block tables can run on *simulated*
# steps. The time of a step is simulated too, by a simple model:
#
# $$t_{\text{step}} = 7\,\mathrm{ms} + 0.05\,\mathrm{ms} \times \text{tokens in the step}$$
#
# The two numbers are those of a model of 7 billion parameters in 16 bits on an NVIDIA A100 with 80 GB. To read its 14 GB of weights
# at 2,039 GB/s takes 7 ms, whatever the step computes. A token takes about 14 GFLOP (two for each parameter), which at 312 TFLOP/s
# is 0.045 ms. These are figures of the data sheet, which no real engine reaches, and reading the cache is left out. What counts
# here is the *shape* of the result, not its milliseconds.
#
# Requests arrive at random and independently: the times between them are exponentially distributed (a *Poisson process*). The
# generator is seeded, so both schedulers get the same requests. Prompts have 10 to 299 tokens. Answers have about 100 tokens on
# average: many are short, and a few are long.

# %%
STEP_S, TOKEN_S = 0.007, 0.00005
simulated = PageBrainConfig(  # heads of one number: nothing is ever written to this cache
    num_layers=1,
    num_heads=1,
    head_dim=1,
    dtype="float32",
    device="cpu",
    num_blocks=2048,
    max_num_seqs=32,
    max_num_batched_tokens=2048,
)


def simulate(make_scheduler, per_second, num_requests=300):
    """Tokens/s, seconds per token from arrival to end, seconds to the first token."""
    rng = random.Random(4)
    engine = ch04.Engine(model, simulated, make_scheduler=make_scheduler)
    arrived, first, ended, clock, arrival = [], {}, {}, 0.0, rng.expovariate(per_second)
    sequences = []
    while len(ended) < num_requests:
        while arrival <= clock and len(arrived) < num_requests:
            prompt, n = (
                [0] * rng.randrange(10, 300),
                8 + int(rng.expovariate(1 / 100)) % 500,
            )
            sequences.append(engine.add_request(prompt, n))
            arrived.append(arrival)
            arrival += rng.expovariate(per_second)
        group = engine.scheduler.schedule()
        if group is None:
            assert not engine.scheduler.waiting, (
                "nothing was planned, although sequences wait"
            )
            clock = arrival  # no sequence is there: wait for the next request
            continue
        clock += STEP_S + TOKEN_S * group.num_tokens
        for entry in group:
            seq = entry.seq
            seq.num_scheduled = entry.context_len
            if entry.samples:
                seq.token_ids.append(0)  # its value does not matter
                first.setdefault(seq.seq_id, clock)
                if seq.num_tokens == seq.max_num_tokens:
                    engine.finish(seq)
                    ended[seq.seq_id] = clock
    outputs = [len(seq.output_token_ids) for seq in sequences]
    per_token = mean((ended[i] - arrived[i]) / outputs[i] for i in ended)
    return sum(outputs) / clock, per_token, mean(first[i] - arrived[i] for i in ended)


rates = [1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40]
load = {
    name: [simulate(make_scheduler, rate) for rate in rates]
    for name, make_scheduler in (
        ("static", ch04.StaticScheduler),
        ("continuous", ch04.Scheduler),
    )
}
viz.latency_throughput(
    {
        name: [(throughput, per_token) for throughput, per_token, _ in points]
        for name, points in load.items()
    },
    latency="seconds per token, waiting included",
)

# %% [markdown]
# Each point is a rate of arrival, and along each curve the load grows. At first more load brings more throughput, and the waiting
# time grows slowly. Then the curve turns up: the machine gives no more tokens per second, so requests queue, and each further
# request waits longer than the one before. (With 300 requests the queue comes to an end. At a real server it would grow as long
# as the load lasts.) The curve of the static scheduler turns up much earlier, with the same machine and the same cost of a step.
#
# A user first notices the time to the first token:

# %% tags=["nbval-check-output"]
print("requests/s   time to first token: static   continuous")
for rate, waits, starts_at_once in zip(
    rates, load["static"], load["continuous"], strict=True
):
    print(f"{rate:10d}   {waits[2]:27.2f} s {starts_at_once[2]:10.2f} s")

# %% [markdown]
# Even at the lowest rate, when many seats are free, a new request waits with the static scheduler for the end of a batch that it is
# not part of. Capacity is not missing: the machine is idle for a large part of the time.
#
# ## Your scheduler in PageBrain's own engine
#
# Your scheduler also runs in PageBrain's engine. `python -m chapters try 04` shows it at work with four stories. This command lets
# it serve one prompt:
#
# ```
# pagebrain generate "One morning" --part scheduler=work/ch04_scheduler.py:Scheduler
# ```
#
# You can also watch its decisions. Start this server, open http://127.0.0.1:8000/live, send eight prompts at once, pause, and go on
# step by step. With such a small pool a sequence is preempted soon:
#
# ```
# pagebrain serve --part scheduler=work/ch04_scheduler.py:Scheduler --live-control --num-blocks 48 --block-size 8
# ```

# %% [markdown]
# ## What the next chapter must fix
#
# Sequences can now join and leave at every step. *Users* cannot. One caller hands over all requests and then calls `step` until
# everything is done. Meanwhile no other user can send a request, and no user sees a token before the loop is over. A user who
# no longer wants an answer cannot cancel it: the sequence goes on to its end, and uses a seat and blocks for which others wait.
# Chapter 05 puts the loop behind a server.
