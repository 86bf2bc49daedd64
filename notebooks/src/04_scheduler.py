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
# The chapters so far take a batch of requests, and run it until its longest answer is done. Whoever comes meanwhile waits,
# and whoever is done early leaves a place that nobody takes. This chapter gives up the batch as something that lasts. At
# every step a *scheduler* decides who is in it.
#
# **You need:** chapter 03, and what a queue is. **Time:** about six hours with the exercises.
#
# *You will be able to* write a scheduler with continuous batching, chunked prefill and preemption, read its decisions off a
# timeline, and measure what they do to latency and to throughput.
#
# *If this chapter is left to you (a copy from a course), the cells run on your own file in `work/` and stop with a `TodoError`
# where it is not done. Read the page with its stored outputs first; run it when `python -m chapters check 04` passes.*

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
# The last line takes the end token away. In this notebook every answer has exactly the length that its request asks for,
# so that the pictures are the same on every machine.
#
# ## The problem, measured
#
# Eight requests come at the same time. The machine has four *seats*: at most four sequences in one step (`max_num_seqs`).
# A `StaticScheduler` does what chapters 01 to 03 did. It fills the seats, and lets nobody in until all of them are empty.
#
# A small helper serves requests that come at given steps. It is used in the whole notebook.

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
# A row is a sequence, a column is a step. A tall box is the prefill of a prompt with its number of tokens, a low box a
# decode, a black bar the end. A is done after 4 steps; its seat stands empty until B is done. All this time E waits for a
# seat, and there is one.


# %% tags=["nbval-check-output"]
def count_seats(history, num_seats):
    """Seats in all steps together, and how many of them had somebody in them."""
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
# Nearly half of the seats stand empty. That is not a matter of these eight lengths. A static batch lasts as long as its
# *longest* answer, and does as much work as its *mean* answer. With answers of $n_1, \dots, n_k$ tokens on $k$ seats, the
# share of seats that are used is
#
# $$\frac{n_1 + \dots + n_k}{k \cdot \max_i n_i},$$
#
# and the more the lengths differ, the worse it gets. Real answers differ a lot.
#
# ## The idea
#
# A step takes a few milliseconds, and nothing in it depends on who was in the step before: each sequence has its tokens,
# and a block table that says where its keys and values lie. So the batch need not last longer than one step. After each
# step, look again: who is done leaves, who waits may come in. This is *continuous batching*; the paper that brought
# it calls it *iteration-level scheduling* (Yu et al., "Orca", OSDI 2022).
#
# Three words, from the outside in:
#
# - A **request** is what a user asked for: a prompt, and how many tokens at most.
# - A **sequence** is the stream of tokens that grows out of it. The scheduler moves it from `waiting` to `running`.
# - A **group** is the set of sequences that *one step* computes, each with the tokens that it computes in this step. The
#   class is `SequenceGroup`. (Early vLLM used "sequence group" for the several samples of one request. Here it is always the
#   batch of one step.)
#
# The engine is a loop around that. It asks for a group, computes it in one forward call, and appends the new tokens:

# %%
viz.show_source(ch04.Engine.step)

# %% [markdown]
# There is no prefill function and no decode function in it. An entry of a group says: of this sequence, compute
# `num_tokens` tokens from position `start` on. Its `phase` is a name for the sequence's state: *prefill* while it computes
# tokens that it has already, *decode* when it extends its text. All entries become rows of one flat batch, and since chapter 03
# attention does not mind that their lengths differ.
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
    print(f"step {step}: {group.num_tokens} tokens (waiting before: {waiting or 'nobody'})")
    for entry in sorted(group, key=lambda entry: entry.seq.seq_id):
        name = "ABC"[entry.seq.seq_id]
        end = "samples a token" if entry.samples else "no token yet"
        print(
            f"   {name}  {entry.phase:7s}  start {entry.start:2d}  "
            f"num_tokens {entry.num_tokens}  {end}"
        )

# %% [markdown]
# Read it line by line. In step 0, A's prompt takes 5 of the 8 tokens, and the first 3 tokens of B's prompt fill up the rest.
# In step 1, A *decodes* while B's prompt goes on, from position 3, in the same forward call. It is now computed to its end, so
# step 1 gives B its first token. Nothing is left of the 8 tokens, and C's prompt has to wait for step 2. In step 3, A is gone.
#
# All decisions come from counts that a sequence keeps: `num_tokens` (those it has), `num_scheduled` (those that were
# computed), and the difference, `num_unscheduled`. (A sequence also has `num_computed`. `num_scheduled` counts tokens when their
# step is planned, `num_computed` when it is over. Here each step is over before the next one is planned, so you always find the two
# equal. PageBrain's own engine launches a step while the one before still computes, and then they differ.) This is the whole
# plan of a step:

# %%
viz.show_source(ch04.Scheduler.schedule, ch04.Scheduler.take)

# %% [markdown]
# What it calls, `share_out` and `admit`, and `make_room`, which `share_out` calls, are the exercises.
#
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
# The work is the same: as many boxes as before. They lie closer together. What is left empty is at the end, when nobody
# waits any more.
#
# > **Predict.** Now request B comes alone: 20 new tokens, and nobody else in the machine. How many steps does it take with the
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
# A token needs the token before it. So 20 tokens are 20 steps, one after the other, whoever decides about the seats. A
# scheduler can shorten *waiting*, and it can fill seats. It cannot make one sequence go faster. Who is alone does not wait.
# </details>
#
# <details><summary><b>If you said 21</b></summary>
#
# You counted a step for the prompt and 20 for the tokens. But the step that computes the prompt gives the first token: its
# last row is the one that says what comes next.
# </details>
#
# Memory follows the same pattern. The token slots that are held, with both schedulers:

# %%
viz.memory_over_time({"static": static, "continuous": continuous})

# %% [markdown]
# In both, only the last block of a sequence has empty slots, and a sequence that ends gives its blocks back. But the static
# scheduler has nobody to hand them to: while four requests wait, at least half of the pool lies idle. The continuous one holds more
# memory for a shorter time.
#
# ## A long prompt beside someone who writes
#
# A group holds prefills and decodes side by side, and a step ends for all its members at the same time. If somebody comes with
# a prompt of 400 tokens, that step is a long one, and whoever is writing has to wait for it.
#
# `max_num_batched_tokens` is a *budget* for one step. The decodes are served first, a token each. Prompts get what is left, in
# chunks (Agrawal et al., "Sarathi-Serve", OSDI 2024). With a budget of 64 and one writer, 63 tokens of the prompt fit into a
# step:

# %%
text = (tokenizer.encode("One day a girl met a fox. ") * 150)[:400]
writer_and_prompt = [(0, text[:10], 30), (6, text, 2)]


def beside_a_long_prompt(budget):
    return play(
        writer_and_prompt, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=budget
    ).history


chunked = beside_a_long_prompt(64)
viz.timeline(chunked, names={0: "writes", 1: "400 tokens"})

# %% [markdown]
# A gets its token in every step. What does the clock say? We take the time between A's tokens, with a budget that lets the
# whole prompt through at once, and with the budget of 64. The two take turns, and the best of five runs counts for each
# gap: whatever else the machine did only ever adds.


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
# Look at the longest gap: that is what the budget changes. The usual gap (the median) is that of steps without any prompt,
# which are the same steps with both budgets; if the two differ much, your machine was busy, and the cell deserves another run. Without the small budget, A's reader sees the text stop once, for as long as
# the whole prompt takes. With it, the wait is spread over seven steps. Nothing is free here: B's prompt is computed in seven
# pieces, each step has a cost of its own, and so B's first token comes later. A smaller budget protects those who write, a larger
# one those who have just come.
#
# > **Predict.** Turn it round: prompts get the budget first, and those who write get a token only in steps in which no prompt is
# > there to compute. A and B are writing 12 tokens each. From step 3 on, somebody with a prompt of 32 tokens comes in every
# > second step, eight of them. The budget is 16 tokens. When does A get its tokens?


# %%
class PromptsFirst(ch04.Scheduler):
    """Writers stand aside whenever there is a prompt to compute."""

    def schedule(self):
        writers = [seq for seq in self.running if seq.num_unscheduled == 1]
        self.running = [seq for seq in self.running if seq.num_unscheduled > 1]
        prompts_alone = super().schedule()
        self.running = sorted(writers + self.running, key=lambda seq: seq.seq_id)
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
    """The steps that gave a sequence a token."""
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
# That would be right if one came. But two steps later the next one is there, and stands before A again. As long as prompts
# keep coming as fast as they can be computed, those who write get nothing at all: they *starve*. The newcomers
# themselves starve as soon as they have their first token. With decodes first, A has a token in every step, whatever the crowd
# does.
# </details>
#
# <details><summary><b>Is it a foolish order, then?</b></summary>
#
# No. The newcomers' first tokens come earlier, as the numbers say. vLLM's first scheduler worked like this: prompts first, and in
# steps of their own. It is the better order where the time to the first token is all that counts, and the load is low.
# </details>
#
# ## When blocks run out
#
# Blocks are handed out as texts grow. The scheduler lets in as many as fit *now*, and nobody knows how long they will become.
# So it happens that everyone is in the middle of a sentence, and no block is free.
#
# Then one sequence has to give its blocks back: it is *preempted*. Its keys and values are lost, its tokens are kept. When it is
# let in again, all its tokens, prompt and answer so far, are computed like a prompt. That is *preemption by recompute*.
#
# Three seats, a pool of 9 blocks of 4 slots, four requests:

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
# > **Predict.** In the next step each of the three writes one more token. Which of them needs a new block? Whose blocks are taken?
# > And where in the queue does that one stand, before D or after it?
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
# Each writes a token, but only A needs a block for it. A's 12 tokens fill its three blocks to the last slot. B's 9 and C's 11
# leave empty slots in their third blocks, and the next token goes there. A sequence needs a new block in every fourth step
# (in general, in every `block_size`-th), when all of its slots are filled.
# </details>
#
# <details><summary><b>If you took B: it has the fewest tokens, so the least work is lost</b></summary>
#
# In this one step it is the cheapest choice. As a rule it has a price: who was let in a moment ago has the fewest tokens, and so
# has whoever has just lost them. The same one may be chosen again and again while others, who came later, go on. How much work is
# lost says nothing about who came first. The rule here asks only for the order of arrival, and C came after B.
# </details>
#
# <details><summary><b>If you took the one who needs the block</b></summary>
#
# That is A. It would be simple, and it would be unfair: A was here first, and it could lose its place to newcomers again and again. The rule
# is that whoever needs a block takes it from the *latest arrival*, and only if it is the latest itself does it stand aside. So the first
# in the list always gets on, ends some day, and gives its blocks back. After it the second is first. Nobody starves.
# </details>
#
# <details><summary><b>If you took the one with the most blocks</b></summary>
#
# Here all three have three. In general it frees the most memory and throws away the most work. It also gives up the argument
# above: the oldest is often the longest.
# </details>
#
# <details><summary><b>If you put it behind D</b></summary>
#
# It came before D, and it was preempted through no fault of its own. Behind D, it would have lost its place *and* its cache. At
# the front of the queue, the order is still that of arrival: running first, then waiting.
# </details>

# %%
viz.timeline(history)

# %% [markdown]
# Look at what follows C's crossed box. C gave three blocks back and A took one of them. C would now need three, and waits. D's
# prompt would fit into one, and there is an empty seat; but D does not overtake. If small ones could pass, a long one might never
# get its turn. When C comes back, its box shows 12 tokens, and its prompt had 7: prompt and answer so far, computed again in one
# prefill. Then C grows, and D, now the latest, loses its block to C.
#
# ### Is it the same text?
#
# The keys and values were computed twice, the second time in another batch, in other blocks, many rows at once and not one by
# one. Nothing of that should matter. In double precision, against Hugging Face, each logit:

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
# The last numbers of each line are equal: a preempted sequence never reports a token twice. The reason is one comparison in
# `take`. An entry *samples* only if it reaches the end of what is there. The tokens that were written before the preemption are
# computed again, as rows of a prefill, and of a prefill only the last row's logits are asked for. That row belongs to the token
# which nobody has had yet.
#
# What is paid, then, is computing:

# %% tags=["nbval-check-output"]
computed = sum(trace.num_tokens for trace in engine.history)
needed = sum(len(prompt) + n - 1 for _, prompt, n in scene)
print(
    f"{computed} tokens computed, {needed} would have been enough: {computed - needed} again"
)

# %% [markdown]
# (Why $n - 1$? The last token of an answer is never computed. Nothing comes after it.)
#
# The other way would be to copy the blocks to the host's memory and back, *swapping*. Recomputing needs no second store, and a
# prefill of many tokens is what a GPU does best.
#
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
# Fewer than half of the steps, for the same tokens. The time need not fall as much: a step with eight rows takes longer than a step
# with three, and with a small model on a CPU a row has a price of its own. On a GPU that has to read some gigabytes of weights in
# each step, whoever comes along rides almost for free.
#
# ## Latency against throughput
#
# A server is not handed all its requests at once. They come when they come. Two numbers matter then: how many tokens per second
# the machine gives all users together (*throughput*), and how long one user waits (*latency*). More load brings more of both.
#
# To see that, let us serve 300 requests at different rates. That takes long on this machine, and we need not do it: a scheduler
# decides from counts and never looks at a token. So the real scheduler and the real block tables can run on *pretended* steps.
# Time is pretended, too, by a simple model:
#
# $$t_{\text{step}} = 7\,\mathrm{ms} + 0.05\,\mathrm{ms} \times \text{tokens in the step}$$
#
# Where these come from: take a model of 7 billion parameters in 16 bits on an NVIDIA A100 with 80 GB. To read its 14 GB of weights at
# 2,039 GB/s takes 7 ms, whatever the step computes. A token takes about 14 GFLOP (two for each parameter), which at 312 TFLOP/s is 0.045 ms. These are
# the data sheet's numbers, which no real engine reaches, and reading the cache is left out. The *shape* of
# the result is what counts here, not its milliseconds.
#
# Requests come at random, independent of each other: the times between them are exponentially distributed (a *Poisson process*).
# The generator is seeded, so both schedulers see the same requests. Prompts have 10 to 299 tokens, answers about 100 on average:
# many short ones and a few long ones.

# %%
STEP_S, TOKEN_S = 0.007, 0.00005
pretended = PageBrainConfig(  # heads of one number: nothing is ever written to this cache
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
    engine = ch04.Engine(model, pretended, make_scheduler=make_scheduler)
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
                "nothing was planned, though somebody waits"
            )
            clock = arrival  # nobody is there: wait for the next one
            continue
        clock += STEP_S + TOKEN_S * group.num_tokens
        for entry in group:
            seq = entry.seq
            seq.num_scheduled = entry.context_len
            if entry.samples:
                seq.token_ids.append(0)  # whichever it is
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
# A point is a rate of arrival. Along each curve the load grows. At first more load brings more throughput, and waiting grows
# slowly: there is room. Then the curve turns up. The machine gives no more tokens per second, so requests queue, and each further one waits
# longer than the last. (With 300 requests the queue comes to an end. At a real server it would grow for as long as the load
# lasts.) The curve of the static scheduler turns much earlier, with the same machine and the same cost of a step.
#
# What a user notices first is the time to the first token:

# %% tags=["nbval-check-output"]
print("requests/s   time to first token: static   continuous")
for rate, waits, starts_at_once in zip(
    rates, load["static"], load["continuous"], strict=True
):
    print(f"{rate:10d}   {waits[2]:27.2f} s {starts_at_once[2]:10.2f} s")

# %% [markdown]
# Even at the lowest rate, when seats are plentiful, the static scheduler lets newcomers wait for the end of a batch that they
# have nothing to do with. That is not a lack of capacity: the machine is idle for a good part of the time.
#
# ## Exercises
#
# `python -m chapters start 04` writes `work/ch04_scheduler.py` with three gaps, unless it is there already;
# `python -m chapters check 04` checks them.
#
# Your scheduler also runs in PageBrain's own engine. `python -m chapters try 04` shows it at work with four stories, and this
# lets it serve one prompt:
#
# ```
# pagebrain generate "One morning" --part scheduler=work/ch04_scheduler.py:Scheduler
# ```
#
# To watch it decide, let it serve, open http://127.0.0.1:8000/live, send eight prompts at once, pause, and go on step by step. In a
# pool this small somebody is preempted soon:
#
# ```
# pagebrain serve --part scheduler=work/ch04_scheduler.py:Scheduler --live-control --num-blocks 48 --block-size 8
# ```
#
# ### Exercise 4.1: share out the budget (12 points)
#
# Do one by hand. The budget is 10. In order of arrival run A (1 token to compute), B (a prompt of which 20 tokens are left),
# C (1 token), D (5 tokens left). Who gets how many, and what goes back to the caller? Beware of handing B what C will need: the
# decodes have to be counted before anyone is served. And the list may become shorter at its end while you go through it.
#
# <details><summary><b>The answer, when you have yours</b></summary>
#
# A and C get a token each, wherever they stand. 8 of the 10 remain. B could use 20 and takes all 8. Nothing is left for D: it
# has no part in this step, not one of 0 tokens. 0 goes back to the caller. (With a budget of 24 B would get its 20, D 2 of
# its 5, and 0 would go back; with 30 D would get all 5, and 3 would go back.)
# </details>

# %%
viz.show_task(ch04.Scheduler.share_out)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch04.Scheduler.share_out)

# %% [markdown]
# ### Exercise 4.2: who may start (10 points)
#
# Three things can be missing: tokens in the budget, a seat, blocks. Say for each of them what happens when it runs out in the
# middle of the queue. Blocks are asked for *all* tokens that a sequence has, although its first part of the step may be only a
# chunk. What would go wrong if you asked for the chunk's blocks alone? And which tokens does a preempted sequence have?
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# *Tokens:* the last one to come in gets what is left as a first chunk, and after it nobody comes in. *A seat:* nobody else comes
# in. *Blocks:* the first in the queue stays where it is, and all behind it stay too, even those that would fit.
#
# *The chunk's blocks alone:* two long prompts could come in, each with a small chunk, into a pool that holds only one of them.
# Some steps later blocks run out, one of them is preempted, and what was computed for it is lost. It would come in again with its
# first chunk, and the same could happen once more.
#
# *A preempted sequence* has its prompt and all that it has written so far. All of it must be computed again, so all of it needs
# blocks.
# </details>

# %%
viz.show_task(ch04.Scheduler.admit)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch04.Scheduler.admit)

# %% [markdown]
# ### Exercise 4.3: make room (13 points)
#
# Take the scene above, *When blocks run out*, and draw `running` and `waiting` as two rows of boxes before and after. Then let two
# be preempted in the same step, C first and then B. Each goes to the front of the queue. In what order do they stand there, and
# is it the right one? Lastly: the one who needs a block may be the last in `running` itself.
#
# <details><summary><b>The answers, when you have yours</b></summary>
#
# Before, A, B and C run and D waits. After, A and B run; C waits, and D behind it. If B follows, A runs alone, and
# B, C, D wait. That is the order in which they came, as it should be: the later arrival is preempted first, so the earlier
# one comes to stand in front of it.
#
# If the one who needs the block is the last in `running`, it is the latest arrival. It gives its own blocks back, goes to the front of
# the queue, and has no part in the step. Nobody who came before it loses anything.
# </details>

# %%
viz.show_task(ch04.Scheduler.make_room)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch04.Scheduler.make_room)

# %% [markdown]
# ## What the next chapter must fix
#
# Sequences come and go at every step now. *Users* cannot. There is one caller, who hands over all requests and then calls
# `step` until everything is done. Nobody else can ask for something meanwhile, nobody sees a token before the loop is over, and
# nobody who has lost interest can leave: the sequence goes on to its end, on a seat and in blocks that others wait for. Chapter 05
# puts the loop behind a server.
