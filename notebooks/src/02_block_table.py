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
# # Chapter 02: blocks and block tables
#
# Chapter 01 sets memory aside for the longest text that a request might become, in one piece. Much of that is never
# written. Operating systems had the same problem with the memory of processes and solved it with *paging*: memory is cut
# into small pieces of equal size, a process gets one when it needs one, and a table says where its pieces lie. The authors
# of PagedAttention did this to the KV cache (Kwon et al., SOSP 2023). So do you, in this chapter.
#
# **You need:** chapter 01, integer division and remainder. **Time:** about five hours with the exercises.
#
# *You will be able to* write a block manager and a paged cache, say for any token where its key and value lie, and say
# where the memory goes in a cache that reserves and in one that is paged.
#
# *If this chapter is left to you (a copy from a course), the cells run on your own file in `work/` and stop with a
# `TodoError` where it is not done. Read the page with its stored outputs first; run it when
# `python -m chapters check 02` passes.*

# %%
import sys

sys.path.insert(0, "..")  # the chapters lie one folder up

import itertools

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

from chapters.course import load_stage
from pagebrain import PageBrainConfig, viz
from pagebrain.assets import BUNDLED_MODEL
from pagebrain.engine.trace import StepTrace, TraceRow, trace_cache
from pagebrain.errors import OutOfBlocksError

logging.disable_progress_bar()
torch.set_num_threads(1)
ch01, ch02 = load_stage("01"), load_stage("02")
from chapters.aids import fragmentation  # it uses chapter 02, so it comes after

exact = GPT2LMHeadModel.from_pretrained(
    BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager"
).eval()
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)

# %% [markdown]
# All runs of this chapter are in double precision. They are about memory, not time, and this way you should see the same
# stories and the same numbers as here.
#
# ## The problem, measured
#
# The six stories of chapter 01 again, with up to 400 new tokens each. How much was reserved for each, and how much did it
# need? A story needs a slot for every token but the last: nothing comes after that one, so nobody asks for its key and
# value.

# %% tags=["nbval-check-output"]
starts = [
    "One day",
    "And so they went home.",
    "The fox said",
    "It was a good day.",
    "A boy",
    '"Thank you," said the fox',
]
prompts = [tokenizer.encode(line) for line in starts]
traces_reserved = []
answers_reserved = ch01.generate(exact, prompts, 400, on_step=traces_reserved.append)

# To a trace, chapter 01's cache is one long block for each story.
reserved = traces_reserved[0].block_size
needed = [
    len(prompt) + len(answer) - 1
    for prompt, answer in zip(prompts, answers_reserved, strict=True)
]
for name, count in zip("ABCDEF", needed, strict=True):
    print(f"{name}: {reserved} slots reserved, {count:3d} needed ({count / reserved:.0%})")
total = sum(needed)
print(f"all: {6 * reserved} slots reserved, {total} needed ({total / 6 / reserved:.0%})")

# %% [markdown]
# Slots that a request holds and never writes are *internal fragmentation*: the waste is inside what was handed out.
#
# There is a second kind of waste, outside. Here are 32 slots and four requests that each get a piece of 8. The allocator
# is the one that this chapter uses at its end to model other systems: it hands out contiguous pieces. Then A and C end. In
# the picture each cell is one slot.

# %% tags=["nbval-check-output"]
memory = fragmentation.BuddyMemory(32)
pieces = [memory.allocate(8) for _ in "ABCD"]
print("A, B, C and D begin at slots", pieces)
memory.free(pieces[0], 8)
memory.free(pieces[2], 8)
print("free slots:", sum(size * len(found) for size, found in memory.free_starts.items()))
print("the start of a free piece of 16 slots:", memory.allocate(16))

# %%
tables = {seq_id: tuple(range(pieces[seq_id], pieces[seq_id] + 8)) for seq_id in (1, 3)}
free = tuple(slot for slot in range(32) if slot not in tables[1] + tables[3])
trace = StepTrace(0, (), tables, free, {}, num_blocks=32, block_size=1)
viz.pool_map(trace, columns=32).with_alt(
    "32 slots in a row. Slots 0 to 7 are free, 8 to 15 are B's, 16 to 23 are free, 24 to 31 are D's."
)

# %% [markdown]
# Sixteen slots are free and a request for sixteen has to wait: there are two holes of eight, and they do not add up. This
# is *external fragmentation*. Moving B would help, and would mean copying its whole cache while it runs.
#
# ## The idea
#
# Both kinds of waste have one cause: a request's memory must be in one piece, so it must be claimed before anyone knows
# how long the text will be. Drop that condition.
#
# - Cut memory into **blocks** of `block_size` token slots each. A block holds keys and values of all layers.
# - A **free list** names the blocks that nobody holds. A sequence that needs room takes one from it. A sequence that ends
#   puts all of its blocks back.
# - A **block table** for each sequence lists its blocks in the order of the text. Its first entry says where the first
#   `block_size` tokens lie, its second where the next ones do. The index in the table is the *logical* block; the entry is
#   the *physical* block.
# - A token's **slot** is its place in the whole pool:
#
# $$\mathrm{slot} = \mathrm{block\_id} \cdot \mathrm{block\_size} + \mathrm{offset},
# \qquad 0 \le \mathrm{offset} < \mathrm{block\_size}.$$
#
# Which blocks they are no longer matters, so any free block is as good as any other and holes do not exist. A sequence
# takes its next block when the last one is full, so nothing is claimed for a future that may not come.
#
# The cache has two parts. `BlockManager` knows numbers: which blocks are free, which are held. `PagedCache` has the
# tensors and the tables. This is given:

# %%
viz.show_source(ch02.BlockManager.__init__, ch02.PagedCache.__init__, ch02.PagedCache.write)

# %% [markdown]
# `write` is the whole of chapter 01's padded writing in one line a tensor. Seen as a flat row of slots, the pool does not
# ask who a token belongs to. The *slot mapping*, for each new token the slot it goes to, says it all.
#
# ## A pool small enough to look at
#
# Twelve blocks of four slots. Three sequences come: A has 6 tokens, B 3 and C 9.

# %%


def one_number_a_slot(block_size: int, num_blocks: int) -> PageBrainConfig:
    """A cache whose keys and values are single numbers: only the bookkeeping matters here."""
    return PageBrainConfig(
        block_size=block_size,
        num_blocks=num_blocks,
        num_layers=1,
        num_heads=1,
        head_dim=1,
        dtype="float32",
        device="cpu",
    )


config = one_number_a_slot(block_size=4, num_blocks=12)
cache = ch02.PagedCache(ch02.BlockManager(config), config)
A, B, C, D, E = range(5)
lengths = {}


def set_length(seq_id: int, num_tokens: int) -> None:
    """The sequence now has that many tokens."""
    cache.grow(seq_id, num_tokens)
    lengths[seq_id] = num_tokens


def picture(step: int):
    """The block tables and the pool as they are now."""
    rows = [TraceRow(seq_id, str(seq_id), 0, 0, n, True) for seq_id, n in lengths.items()]
    return viz.block_tables(trace_cache(step, rows, cache), with_pool=True)


set_length(A, 6)
set_length(B, 3)
set_length(C, 9)
picture(0)

# %% [markdown]
# Above are the tables, below is the pool. Six tokens need two blocks, three need one, nine need three. The hatched part of
# a block is empty: the sequence's own next tokens will go there.
#
# Now all three write on. A grows to 10 tokens and B to 5. Both run out of room in their last block and take one more. C
# stays as it is.

# %%
set_length(A, 10)
set_length(B, 5)
picture(1)

# %% [markdown]
# A's blocks are no longer neighbours. In a cache of contiguous pieces A could not have grown at all with B's memory right
# beside it, unless the room had been reserved from the start.
#
# B ends, and its blocks go back.
#
# > **Predict.** Next, C grows from 9 tokens to 13 and needs a fourth block. Six blocks are free: 0, 1, 2, 3, and the two
# > that B has just given back. Which one will C get?

# %%
cache.free(B)
del lengths[B]
print("free:", sorted(cache.block_manager.free_blocks))
set_length(C, 13)
picture(2)

# %% [markdown]
# <details><summary><b>If you said block 0, or block 3</b></summary>
#
# A good design, and just as correct. Nothing in the idea says which free block comes next. The order is the implementer's
# choice. Ours is last in, first out, because a Python list gives and takes at its end without moving the rest. So the
# block that was freed last is handed out first; B's were put back in the order of its table, so that was 4. If you run
# this notebook with your own chapter 02, your picture may differ, and the tests accept every order.
# </details>
#
# <details><summary><b>If you said block 9, the last of B's table</b></summary>
#
# You thought of "last in, first out", but B's blocks went back in the order of its table: 9 first, then 4. So 4 is the one
# that was given back last. A `free` that puts them back from the end of the table hands out 9 first, and is as correct.
# </details>
#
# <details><summary><b>If you said block 5, since C should stay together</b></summary>
#
# Block 5 is A's. And to stay together is exactly what no sequence has to do any more. To look for a neighbour would cost
# time and gain nothing: the table is read in any case.
# </details>
#
# <details><summary><b>Does the order ever matter?</b></summary>
#
# Not for the result. It matters once a freed block's *content* is worth something. vLLM keeps the blocks of earlier
# prompts in the hope that another request begins with the same words. It therefore hands out first what has been free
# longest.
# </details>
#
# A fourth sequence comes, D, with 18 tokens. It needs five blocks, and five are free, though not side by side.

# %%
set_length(D, 18)
picture(3)

# %% [markdown]
# The holes added up. As long as enough blocks are free, a request fits, wherever they lie: there is no external
# fragmentation. When none is left, the manager says so, and nothing has changed:

# %% tags=["nbval-check-output"]
print("room for one token of E:", cache.can_grow(E, 1))
try:
    cache.grow(E, 1)
except OutOfBlocksError as error:
    print("refused:", type(error).__name__)
print("E's table:", cache.block_table(E))

# %% [markdown]
# Who should wait then, or give way, is a question for a scheduler. Chapter 04 writes one.
#
# ### From a position to a slot
#
# For the next cell we tell the block manager which blocks to hand out, so that you can check every line with a pencil: a
# sequence gets blocks 7, 2 and 9, of four slots each. Positions count tokens in the text; slots count places in the pool.

# %% tags=["nbval-check-output"]
manager = ch02.BlockManager(config)
in_this_order = iter((7, 2, 9))
manager.allocate = lambda count=1: [next(in_this_order) for _ in range(count)]
by_hand = ch02.PagedCache(manager, config)
by_hand.grow(A, 10)
for position, slot in enumerate(by_hand.slots(A, 0, 10)):
    print(f"position {position} -> slot {slot:2d} = {slot // 4} * 4 + {slot % 4}")

# %% [markdown]
# Neighbours in the text are neighbours in memory within a block, and only there.
#
# ### How much is wasted now?
#
# > **Predict.** With a block size of 16, how many blocks does a sequence of 17 tokens hold? And how many empty slots can a
# > sequence hold at most, however long it is?

# %% tags=["nbval-check-output"]
config_16 = one_number_a_slot(block_size=16, num_blocks=8)
empty_cache = ch02.PagedCache(ch02.BlockManager(config_16), config_16)
for num_tokens in (1, 15, 16, 17, 31, 32, 33):
    count = empty_cache.num_missing_blocks(A, num_tokens)
    print(
        f"tokens: {num_tokens:2d}, blocks: {count}, empty slots: {16 * count - num_tokens:2d}"
    )

# %% [markdown]
# <details><summary><b>If you said one block</b></summary>
#
# $17 / 16$ rounded *down* is 1. But the seventeenth token needs a slot too. Rounded *up* it is 2.
# </details>
#
# <details><summary><b>If you said at most 16 empty slots</b></summary>
#
# A block with 16 empty slots would be a block taken for nothing. A new one is taken only for a token that goes there at
# once, so at most $\mathrm{block\_size} - 1 = 15$ slots are empty.
# </details>
#
# <details><summary><b>If you thought that the waste grows with the text</b></summary>
#
# Only the last block can have empty slots. All the blocks before it are full. The bound is the same for 17 tokens and for
# 1,700, so the *share* that is wasted shrinks as texts grow.
# </details>
#
# ## Run it with the model
#
# The forward pass is chapter 01's. The loop takes blocks as texts grow, and gives them back as soon as a text ends. There
# is no padding: a batch is a flat row of tokens, each of which knows its slot.

# %%
viz.show_source(ch02.generate)

# %% [markdown]
# Six stories of different lengths go through it together. Every one of them is held to Hugging Face's model, logit by
# logit.

# %% tags=["nbval-check-output"]
mine = {}


def note(index, scores):
    mine.setdefault(index, []).append(scores)


traces_paged = []
answers = ch02.generate(exact, prompts, 400, on_logits=note, on_step=traces_paged.append)

with torch.no_grad():
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        theirs = exact(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(torch.stack(mine[index]), theirs, atol=1e-9, rtol=0)
        assert answer == theirs.argmax(-1).tolist()
ends = {seq_id: trace.step for trace in traces_paged for seq_id in trace.finished}
assert len(set(ends.values())) == 6
print("last step of each story:", dict(sorted(ends.items())))
print(f"{sum(map(len, answers))} tokens and all their logits equal to Hugging Face's")

# %% [markdown]
# D's story was short and ended first. Here are the blocks that it had at the end, and the tables of the others 80 steps
# later. Look for D's blocks in them: with our order they are all in use again.

# %%
last_step = ends[D]
print("D's blocks when it ended:", traces_paged[last_step].block_tables[D])
viz.block_tables(traces_paged[last_step + 80])

# %% [markdown]
# > **Predict.** When a sequence ends, `free` only moves numbers between lists. The old keys and values stay in the pool,
# > and the next holder of the block finds them there. What goes wrong if nobody clears them?
#
# Let us make it as bad as it can be. Before each step, every free block is filled with NaN, "not a number". Any sum in
# which a NaN takes part is NaN itself, so one careless read would spoil all that follows.

# %% tags=["nbval-check-output"]


def attend_with_dirt(model, cache, rows):
    dirty = list(cache.block_manager.free_blocks)
    cache.key_pools[:, dirty] = torch.nan
    cache.value_pools[:, dirty] = torch.nan
    return ch02.attend_gathered(model, cache, rows)


with_dirt = ch02.generate(exact, prompts, 400, block_size=4, make_attend=attend_with_dirt)
assert with_dirt == answers
print("free blocks full of NaN: the same six stories")

# %% [markdown]
# Nothing goes wrong, and nobody has to clear them. The six stories come out the same, token by token, although every free
# block was full of NaN when it was handed out.
#
# <details><summary><b>If you said that stale keys get attention</b></summary>
#
# They would, if anyone read them. But a query at position $i$ reads the slots of positions $0 \dots i$ and no others, and
# its own sequence has written each of these since it got the block. What lies behind them is not read. Clearing blocks
# would cost memory traffic and change nothing.
# </details>
#
# <details><summary><b>If you said that it works, because the mask hides them</b></summary>
#
# Nearly. A mask gives a slot the weight 0, and $0 \cdot \mathrm{NaN}$ is still NaN. So a mask protects from stale numbers,
# but not from NaN. Here it holds because `gather` hands over the sequence's own tokens and cuts off the rest of the last
# block.
# </details>
#
# ## What was gained
#
# The same requests, the same stories, two caches. Both panels have the same scale.

# %%
viz.memory_over_time({"01 reserved": traces_reserved, "02 paged": traces_paged})

# %% [markdown]
# The reserved cache is held in full from the first step to the last. The paged one grows with the texts and shrinks
# whenever one ends. The upper panel even flatters chapter 01: it counts as used what that chapter writes for stories that
# are over.
#
# In the first cells of this chapter, the stories needed 45 % of what was reserved; here 66 % of it lies empty, not 55 %. Both are true: 45 % is
# what the stories need *at their end*, and the panel averages over *all steps*, in most of which the texts are still short,
# even with what is written for stories that are over.
#
# What is not held is free for others:

# %% tags=["nbval-check-output"]
for name, traces in (("01 reserved", traces_reserved), ("02 paged   ", traces_paged)):
    held = [sum(map(len, t.block_tables.values())) * t.block_size for t in traces]
    mean = sum(held) / len(held)
    print(f"{name}: {mean:5.0f} slots held on average, {max(held)} at most")

# %% [markdown]
# One thing remains as it was. `generate` makes its pool large enough for the worst case, since nobody yet decides who
# waits when blocks run out. The free blocks are there, but no further request comes to use them. Chapter 04 lets them in.
#
# ### Which block size?
#
# Suppose that the last block is equally likely to hold $1, 2, \dots, \mathrm{block\_size}$ tokens. Then
# $(\mathrm{block\_size} - 1) / 2$ of its slots are empty on average, and of what a sequence of $n$ tokens holds, about this
# share is empty:
#
# $$\frac{(\mathrm{block\_size} - 1) / 2}{n + (\mathrm{block\_size} - 1) / 2}.$$
#
# Small blocks waste less. But the smaller the blocks, the longer the tables. The texts' lengths do not depend on the block
# size, so the run above can be played again on the real cache without the model:

# %% tags=["nbval-check-output"]


def replay(block_size: int) -> tuple[float, int]:
    """The share of the held slots that lay empty, and the length of the longest block table."""
    config = one_number_a_slot(block_size, num_blocks=2048 // block_size)
    cache = ch02.PagedCache(ch02.BlockManager(config), config)
    held = used = longest = 0
    for trace in traces_paged:
        for row in trace.rows:
            cache.grow(row.seq_id, row.context_len)
            pages = len(cache.block_table(row.seq_id))
            held += pages * block_size
            used += row.context_len
            longest = max(longest, pages)
        for seq_id in trace.finished:
            cache.free(seq_id)
    return 1 - used / held, longest


print("block size   empty   longest table")
for block_size in (1, 2, 4, 8, 16, 32, 64):
    empty, longest = replay(block_size)
    print(f"{block_size:10d} {empty:7.1%} {longest:15d}")

# %% [markdown]
# With a block size of 1 nothing is empty, and the table has an entry for every token. Every entry has to be stored, looked
# up and followed, and memory is read in small scattered pieces, which a GPU does badly. Large blocks are read in long runs
# and waste more, most of all when texts are short. The authors of PagedAttention measured speed on their two data sets.
# Blocks of 16 to 128 were best for the longer texts, 16 and 32 worked well for the shorter ones, and 16 became vLLM's
# default (section 7.2 of the paper). It is the default here, too.
#
# ## The paper's comparison
#
# Six stories are an example. How much is gained when a server is full? Figure 2 of the paper answers this for four ways to
# allocate. Three model Orca, an earlier serving system (Yu et al., OSDI 2022). They reserve one contiguous piece for a
# request when it starts:
#
# - **Max**: for the longest text that the model can write, 2048 tokens;
# - **Pow2**: for the prompt and the next power of two of the output, as if its length were known to within a factor of
#   two;
# - **Oracle**: for exactly what will be written, which no real system knows.
#
# The fourth takes blocks of 16 as the text grows; in our version it is this chapter's `PagedCache`. The module
# `chapters/aids/fragmentation.py` lets them serve the same requests from the same memory and counts after every step what each
# slot is used for. Its docstring has all the details. A slot can be
#
# - **token states**: the key and value of a token lie here;
# - **reserved**: the request that holds it will write here later;
# - **internal** fragmentation: held, and *never* written;
# - **external** fragmentation: held by nobody, or lost when the contiguous allocator rounds up to a power of two. (It is a
#   *buddy* allocator: it halves memory again and again until a piece just fits.)
#
# These are the paper's words, and finer than ours so far: of a slot that is empty now, they ask whether it will be written
# later. A paged sequence's last block has empty slots, but most of them will be.
#
# The lengths have to come from somewhere. The paper prints the means of its data set ShareGPT: 161.31 tokens for a prompt
# and 337.99 for an output. Ours are *geometric* with these means: after each token the text stops with the same chance
# $1/\mathrm{mean}$, so short texts are common and long ones rare. Pairs of more than 2048 tokens are drawn again, which
# makes the means a little smaller.

# %% tags=["nbval-check-output"]
drawn = list(itertools.islice(fragmentation.WORKLOADS["ShareGPT"].requests(seed=0), 20_000))
for name in ("prompt", "output", "total"):
    values = sorted(getattr(request, name) for request in drawn)
    low, middle, high = (values[len(values) * percent // 100] for percent in (10, 50, 90))
    mean = sum(values) / len(values)
    print(
        f"{name}: mean {mean:5.1f}; 10 % lie below {low}, half below {middle}, 90 % below {high}"
    )

# %%
results = fragmentation.compare(seed=0, workload="ShareGPT")
names = ("token states", "reserved", "internal", "external")
viz.fragmentation_bars(
    {system: dict(zip(names, shares, strict=False)) for system, shares in results.items()},
    paper={system: 100 * share for system, share in fragmentation.PAPER.items()},
)

# %% [markdown]
# In the bar of the paged system two pieces are too small for a label: 1.5 % reserved and 1.1 % external.
#
# All the numbers, ours above the paper's. The last column is how many requests ran at the same time on average; the
# paper's values are in its Figure 13. For the paged system Figure 2 prints only the first share.

# %% tags=["nbval-check-output"]
running = fragmentation.FIGURE_13["ShareGPT"]
print(f"{'percent of slots':20}", *(f"{name:>12}" for name in (*names, "running")))
for system, shares in results.items():
    ours = [f"{100 * share:12.1f}" for share in shares[:4]]
    print(f"{system:20}", *ours, f"{shares.batch_size:12.1f}")
    printed = [f"{100 * share:12.1f}" for share in fragmentation.FIGURE_2[system]]
    missing = [f"{'-':>12}"] * (4 - len(printed))
    print(f"{'  the paper':20}", *printed, *missing, f"{running[system]:12.1f}")
paged = results["Paged (vLLM)"]
print(f"preemptions with paging: {paged.preemptions} in {fragmentation.NUM_STEPS:,} steps")

# %% [markdown]
# ### How and why our numbers differ
#
# We simulate the 15,728 slots of OPT-13B at saturation: someone is always waiting. The paper plots its lengths but prints
# only their means, so ours are geometric, a shape with no other parameter. Nothing was fitted. (In its plot, prompts crowd
# nearer to 0 than ours do. And its Figure 13, the last column, was measured at two requests a second, not at saturation.)
#
# *Internal* is what a policy reserves and never writes. The contiguous allocator's rounding counts as *external*; that the
# paper's Oracle has no internal share implies the same there.
#
# Max's external share is arithmetic. Seven pieces of 2048 fit, and 1,392 slots remain, 8.9 %. That, with the other shares,
# suggests that Figure 2 shows ShareGPT on OPT-13B; its caption says only that it is from the experiment of section 6.2.
#
# Max and Oracle agree with the paper within 1.2 points. Pow2 loses 5 points less outside than in the paper. Log-normal
# lengths of equal means do not close this gap, so it stays open.
#
# Paging exceeds vLLM's 96.3 %. Our queue is never empty, while theirs was fed by Poisson arrivals, at random times. And we
# hold no blocks back when a request is let in; vLLM held back 1 %.
#
# The price of paging is not in the shares. When blocks run out, the latest request is *preempted*: it loses its blocks,
# and its tokens are computed again later.
#
# The module takes other seeds and the paper's other data set:
# `python -m chapters.aids.fragmentation --seed 1 --workload Alpaca`. Another seed moves a share by up to two or three points.
#
# ## Exercises
#
# `python -m chapters start 02` writes `work/ch02_block_table.py` with gaps for four tasks, unless the file is there
# already; `python -m chapters check 02` checks them.
#
# ### Exercise 2.1: who holds which block (10 points)
#
# Nothing may change before an error is raised. Work through these by hand. Three blocks are free and someone asks for
# five: what must `num_free_blocks` be after the error? Someone frees the blocks 2 and 2, or 2 and 99, where 2 is in use
# and 99 does not exist: is block 2 free afterwards? And what should happen if `block_ids` is a generator, which can be
# read only once?

# %%
viz.show_task(ch02.BlockManager.allocate, ch02.BlockManager.free)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch02.BlockManager.allocate, ch02.BlockManager.free)

# %% [markdown]
# ### Exercise 2.2: from position to slot (8 points)
#
# Use the table `7, 2, 9` from above. Cover the output and write down the slots of positions 3, 4 and 9 yourself. Which
# step of your reasoning used the position, which the table, which both? Then: which is the last position that this table
# covers, and does your code still answer for the one after it?

# %%
viz.show_task(ch02.PagedCache.slots)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch02.PagedCache.slots)

# %% [markdown]
# ### Exercise 2.3: block tables that grow and end (6 points)
#
# A sequence holds two blocks of four slots. How many more does it need for 7 tokens, for 8, for 9? `num_missing_blocks`
# counts them for you. What must the table look like after a `grow` that found too few blocks, if the sequence had no table
# before? Also think about who may end without ever having held a block.

# %%
viz.show_task(ch02.PagedCache.grow, ch02.PagedCache.free)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch02.PagedCache.grow, ch02.PagedCache.free)

# %% [markdown]
# ### Exercise 2.4: collecting what lies scattered (6 points)
#
# Draw a pool of five blocks of two slots and a sequence of three tokens with the table `4, 1`. Mark what has to come out,
# and in which order. What of block 1 must not come out, and why did the cell with NaN depend on it?

# %%
viz.show_task(ch02.PagedCache.gather)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch02.PagedCache.gather)

# %% [markdown]
# ## What the next chapter must fix
#
# The cache lies in pages, and attention does not know it. Before each layer's attention, every sequence's pages are
# collected into one piece:

# %%
viz.show_source(ch02.attend_gathered)

# %% [markdown]
# The copy is thrown away after use and made again in the next layer and the next step. In the run of six stories, how much
# was copied for each token that was new?

# %% tags=["nbval-check-output"]
written = sum(row.num_tokens for trace in traces_paged for row in trace.rows)
copied = sum(row.context_len for trace in traces_paged for row in trace.rows)
print(f"keys and values written: {written} tokens, in each layer")
print(
    f"keys and values copied: {copied} tokens, in each layer: {copied / written:.0f} for each new one"
)

# %% [markdown]
# The longer the text, the more: this is chapter 00's pattern again, with copies in place of computing. And while it
# exists, the copy is the contiguous piece of memory that we wanted to be rid of. Chapter 03 computes attention page by
# page, where the pages lie, and needs no copy of the whole context.
