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
# # Chapter 06: attention as kernels
#
# Chapter 03 found the method: go over the pages, keep three numbers, never copy the cache. In PyTorch the method lost. Each
# page was some operations of its own, each started from Python, and picking a page copied it after all.
#
# Here we write the program that runs *inside* one operation, a **kernel**, in Triton, which is Python for kernels. Then we ask how
# fast it could be at all, and how near it comes.
#
# **You need:** chapter 03, and how a tensor's strides lead to an address (there is a reminder). No GPU: without one, Triton's
# *interpreter* runs the kernels on the CPU, slowly. **Time:** about seven hours with the exercises.
#
# *You will be able to* write a kernel that reads a paged cache, split its work when there is too little of it for a GPU, and say from
# shapes alone how fast a kernel can be and what holds it back.
#
# *If this chapter is left to you (a copy from a course), the cells run on your own file in `work/` and stop with a `TodoError`
# where it is not done. Read the page with its stored outputs first; run it when `python -m chapters check 06` passes.*

# %%
import sys

sys.path.insert(0, "..")  # the chapters lie one folder up

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

from chapters.aids import prefill
from chapters.aids.triton_anywhere import INTERPRETED, tl, triton
from chapters.course import load_stage
from pagebrain import LLM, SamplingParams, viz
from pagebrain.assets import BUNDLED_MODEL

logging.disable_progress_bar()
torch.set_num_threads(1)
DEVICE = "cpu" if INTERPRETED else "cuda"
ch03, ch06 = load_stage("03"), load_stage("06")
model = GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, attn_implementation="eager").eval()
model = model.to(DEVICE)
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
print(f"kernels are {'interpreted, on the CPU' if INTERPRETED else 'compiled for a GPU'}")

# %% [markdown]
# ## The problem, measured
#
# We need sequences with something in their cache. This function makes them up: random K and V, in blocks handed out in random
# order. What it returns are the arguments of `paged_attention`, one decode for each sequence.


# %%
def scene(contexts, num_heads=2, head_dim=64, block_size=16, dtype=torch.float32):
    """The arguments of ``paged_attention`` for one query of each sequence."""
    generator = torch.Generator().manual_seed(0)
    num_pages = [-(-length // block_size) for length in contexts]
    order = torch.randperm(sum(num_pages), generator=generator).tolist()
    tables = torch.zeros(len(contexts), max(num_pages), dtype=torch.int64)
    for table, count in zip(tables, num_pages, strict=True):
        table[:count] = torch.tensor([order.pop() for _ in range(count)])
    shape = (sum(num_pages), block_size, num_heads, head_dim)
    pools = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2)]
    query = torch.randn(len(contexts), *shape[2:], generator=generator).to(DEVICE, dtype)
    starts = torch.arange(len(contexts) + 1, device=DEVICE)
    lens = torch.tensor(contexts, device=DEVICE)
    return query, *pools, tables.to(DEVICE), lens, starts, head_dim**-0.5


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


class Noted:
    """A kernel that notes the grid of each of its launches."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(tuple(grid))
        return self.kernel[grid]


def launches(run):
    """What ``run`` launches: kernel -> grids."""
    names = ("decode_kernel", "merge_kernel")
    kernels = {name: getattr(ch06, name) for name in names}
    noted = {name: Noted(kernel) for name, kernel in kernels.items()}
    try:
        for name in names:
            setattr(ch06, name, noted[name])
        run()
    finally:
        for name in names:
            setattr(ch06, name, kernels[name])
    return {name: noted[name].grids for name in names}


# %% tags=["nbval-check-output"]
print("context   chapter 03: operations of PyTorch   chapter 06: kernels launched")
for length in (64, 256, 960):
    inputs = scene([length])
    with Operations() as counted:
        theirs = ch03.paged_attention(*inputs)
    started = launches(lambda: ch06.paged_decode(*inputs[:5], inputs[-1]))
    mine = ch06.paged_attention(*inputs)
    assert torch.allclose(mine, theirs, atol=1e-5)
    print(f"{length:7d} {counted.count:>36} {sum(map(len, started.values())):>30}")

# %% [markdown]
# The same numbers, to five digits. (We use chapter 06's kernels here before you have seen them; that follows.)
# Chapter 03 starts some sixty operations for every page, in every layer, for every token of an answer. Chapter 06 launches two kernels,
# whatever the context. Most operations of PyTorch are a kernel launched from Python, which takes some microseconds, however little
# it computes. So with 60 pages, chapter 03 spends its time on starting things.
#
# ## What a kernel is
#
# A GPU is a computer for doing the same thing very many times. One writes a program for *one* piece of the work and launches a
# **grid** of copies. Each copy, called a **program**, asks for its place in the grid, and finds its piece by that. Here is a
# kernel that multiplies numbers by a factor:


# %%
@triton.jit
def multiply_kernel(out_ptr, x_ptr, factor, num_numbers, TILE: tl.constexpr):
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)  # a tile: TILE places at once
    exists = places < num_numbers
    x = tl.load(x_ptr + places, mask=exists)
    tl.store(out_ptr + places, x * factor, mask=exists)


# %% tags=["nbval-check-output"]
x = torch.arange(20.0, device=DEVICE)
out = torch.zeros(24, device=DEVICE)
multiply_kernel[3,](out, x, 10, 20, TILE=8)
print(out.long().tolist())

# %% [markdown]
# Line by line:
#
# - `[3,]` is the grid: three programs. `tl.program_id(0)` is 0 in the first, 1 in the second, 2 in the third.
# - `out_ptr` and `x_ptr` are **addresses**. A tensor that is handed to a kernel arrives as the address of its first number, and
#   nothing else: no shape, no strides. What the kernel has to know about these, it must be told.
# - `places` is a **tile**, eight numbers in one variable. All of Triton works on tiles. Along each axis they have a power of 2
#   of places, known when the kernel is compiled (`tl.constexpr`).
# - `tl.load` takes a tile of addresses and reads all of them. 20 is no multiple of 8, so the third tile has places that do
#   not exist. The **mask** says which do. The others are not touched, and what the tile holds there afterwards is undefined,
#   unless one says it: `tl.load(x_ptr + places, mask=exists, other=0.0)`. Here it does not matter, since the store has the same mask.
#
# On the GPU, a program runs on one of its *multiprocessors*: an H200 has 132 of them, and each holds dozens of programs. The
# threads of a program come in groups of 32, called **warps**. A warp executes one instruction for its 32 threads at a
# time. When a warp waits for memory, which takes the time of several hundred instructions, another one computes. How
# the places of a tile are shared out among threads is the compiler's business. That is what Triton takes off our hands.
#
# In the interpreter the grid is a Python loop: program after program, each tile a numpy array. It shows whether a kernel computes
# the right numbers. It does not show whether a GPU's compiler takes it. What the interpreter forgives and a GPU does not:
#
# - bounds of `tl.arange` that are known only when the kernel runs (a loop's `range` may have such bounds);
# - a variable that changes its type in a loop: one that begins as the integer `0` and becomes a number with a fraction (begin with `0.0`);
# - Python's own things, such as `print` of a tile without a text before it, dictionaries or `try`;
# - programs that rely on running one after the other: on the GPU they run side by side.
#
# > **Predict.** Now `x` is the first 20 of 24 numbers that lie side by side, and the four after it are a neighbour's: sevens. A kernel without a
# > mask multiplies `x` by 10 in its place. What becomes of the sevens?


# %%
@triton.jit
def careless_kernel(out_ptr, x_ptr, factor, TILE: tl.constexpr):
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out_ptr + places, tl.load(x_ptr + places) * factor)


# %% tags=["nbval-check-output"]
memory = torch.tensor([*range(20), 7, 7, 7, 7], device=DEVICE, dtype=torch.float32)
x, neighbour = memory[:20], memory[20:]
careless_kernel[3,](x, x, 10, TILE=8)
print("x:", x.long().tolist())
print("its neighbour in memory:", neighbour.long().tolist())

# %% [markdown]
# <details><summary><b>If you said that they stay sevens, because x has only 20 numbers</b></summary>
#
# The kernel does not know that. It computes addresses, and whatever lies there is read, multiplied and written back.
# </details>
#
# <details><summary><b>If you said that there would be an error</b></summary>
#
# Sometimes. If the memory belongs to somebody else of the same process, as most of a GPU's memory does while PyTorch
# holds it, nothing is noticed and somebody's numbers are wrong. In an engine that somebody is another user's sequence.
# If it belongs to nobody, the GPU stops with "illegal memory access", and *everything* that the process had there is lost.
# The exercises' tests watch each address in the interpreter, and say by how much you missed.
# </details>
#
# ## From a slot to an address
#
# The pool is `[num_blocks, block_size, num_heads, head_dim]`. Where is the first number of head 1, in slot 1 of block 2? That depends
# on the **strides**: how many numbers further the next block, slot or head is. Chapter 02 laid a token's heads side by side. The
# engine lays a head's slots side by side. The same formula serves both.

# %% tags=["nbval-check-output"]
for name, pool in {
    "as chapter 02": torch.empty(3, 4, 2, 16),
    "as the engine": torch.empty(3, 2, 4, 16).transpose(1, 2),
}.items():
    block, slot, head, _ = pool.stride()
    offset = 2 * block + 1 * slot + 1 * head
    assert offset == pool[2, 1, 1].storage_offset()
    print(f"{name}: strides {pool.stride()}, so 2*{block} + 1*{slot} + 1*{head} = {offset}")

# %% [markdown]
# A kernel that swaps two strides is right in neither of the two, or, worse, in one.
#
# One more trap. Kernels compute with 32-bit integers where nothing else is said, and these end at 2,147,483,647. Pools do not:

# %% tags=["nbval-check-output"]
block_stride = 16 * 12 * 64  # numbers of K in a block of GPT-2 small, one layer
largest = (2**31 - 1) // block_stride
print(f"block {largest:,} is the last that begins below 2**31")
print(f"K of one layer up to there: {2**31 * 2 / 2**30:.0f} GiB in bfloat16")
block_id = torch.tensor(largest + 1, dtype=torch.int32)
print(f"block {largest + 1:,} begins, in 32 bits, at {(block_id * block_stride).item():,}")
print(f"and in 64 bits at {(block_id.long() * block_stride).item():,}")

# %% [markdown]
# A negative offset: memory *before* the pool. All tests on small pools pass, and a large machine fails, weeks later. So the rule is: **make
# a block id 64 bits wide before you multiply it.** Now you have what exercise 6.1 asks for.
#
# ## A query walks over its pages
#
# One decode: one query for each sequence and head, no query needs another, and so each gets a program. What does a
# program do? Chapter 03's loop, with two changes. It reads `TILE` tokens at a time, whatever the block size is, and it looks up
# the block of *each* token by itself. Here is what it finds for a context of 37 tokens in three large blocks, and in ten small ones:


# %% tags=["nbval-check-output"]
def walk(block_table, context_len, block_size, tile=16):
    for start in range(0, context_len, tile):
        tokens = range(start, min(start + tile, context_len))
        runs = {}
        for token in tokens:
            runs.setdefault(block_table[token // block_size], []).append(token % block_size)
        where = ", ".join(f"block {b} [{s[0]}..{s[-1]}]" for b, s in runs.items())
        masked = start + tile - tokens[-1] - 1
        print(f"tile {start // tile}: tokens {start:2d}..{tokens[-1]:2d}: {where}", end="")
        print(f"; {masked} places masked" if masked else "")


print("blocks of 16")
walk([6, 2, 7], 37, 16)
print("blocks of 4")
walk([6, 2, 7, 0, 9, 4, 1, 8, 5, 3], 37, 4)

# %% [markdown]
# In the first case a tile is a page. In the second it takes four, in any order; the load is the same line of code, since `tl.load` takes
# a tile of *any* addresses.
#
# The last tile is cut short, and its mask is needed three times: for the table (the entry past the last page may lie past the table),
# for K and V, and for the scores, which have to be $-\infty$ where there is no token. Forgetting the last is chapter 03's mistake:
# a key that was not loaded is 0 if one says `other=0.0`, so its score is 0, and $e^{0 - m}$ is not.
#
# Which of K and V needs the mask of tokens? A slot without a token may hold anything, even `nan` (a block's former owner left
# it, or nobody ever wrote there). In K that spoils one score, and `tl.where` puts $-\infty$ in its place. In V it meets a weight
# of 0, and $0 \cdot \mathrm{nan}$ is `nan`: nothing repairs V. So V needs the mask. K's spares reading what is thrown away.
#
# And shapes: `query` has `[PADDED_DIM]` places, `keys` and `values` `[TILE, PADDED_DIM]`. `query[None, :] * keys` summed over axis 1
# gives `[TILE]` scores. Is there no matrix product? There is an operation for it, `tl.dot`, for which a GPU has units of its own. They
# take 16 rows or more, and a query is one. Fifteen sixteenths of their work would be for nothing; and as we shall see, arithmetic
# is not what we are short of.
#
# Let us see the three numbers move. A kernel cannot print from a GPU in good order, but we can ask for ever longer ranges:

# %%
inputs = scene([70], num_heads=1)
query, key_pool, value_pool, tables, lens, _, scale = inputs
for last in (16, 32, 48, 64, 70):
    accs = torch.empty(1, 1, 1, 64, device=DEVICE)
    maxima, totals = torch.empty(2, 1, 1, 1, device=DEVICE)
    strides = query.stride()[:2], key_pool.stride()[:3], tables.stride(0)
    shown = torch.tensor([last], device=DEVICE)
    ch06.decode_kernel[1, 1, 1](
        *(accs, maxima, totals, query, key_pool, value_pool, tables, shown, scale),
        *strides,
        **prefill.sizes(key_pool),
    )
    print(
        f"tokens 0..{last - 1}: m = {maxima.item():6.3f}, l = {totals.item():6.3f}", end=""
    )
    print(f", first number of acc / l = {accs.flatten()[0] / totals.item():7.4f}")
whole = ch03.attend_one(query[0], key_pool, value_pool, tables[0].tolist(), 70, scale)
print(f"chapter 03, one query over 70 tokens: {whole.flatten()[0]:31.4f}")

# %% [markdown]
# That is also a launch in full. Everything that the kernel needs to know about a tensor's layout is there as a number, and in
# the same order as in its signature. `prefill.sizes` gives the three constants for which it is compiled.
#
# ## Too few programs
#
# GPT-2 small has 12 heads. With 256 sequences that is 3,072 programs, and all 132 multiprocessors have plenty. With one
# sequence it is 12: nine in ten multiprocessors stand idle, while 12 of them read a context each, tile after tile, waiting for memory
# between two tiles.
#
# The way out is to cut contexts into parts, a program for each (**split-KV**). Are attentions over parts of any use? What chapter 03 proved
# about pages holds for any two sets of tokens, $A$ and $B$, each with its $m$, $\ell$ and $a$. Relative to $m = \max(m_A, m_B)$:
#
# $$\ell = e^{m_A - m}\,\ell_A + e^{m_B - m}\,\ell_B, \qquad a = e^{m_A - m}\,a_A + e^{m_B - m}\,a_B,
# \qquad \mathrm{out} = \frac{a}{\ell}$$
#
# The proof is the same: $e^{m_A - m}$ turns each term $e^{s_j - m_A}$ of the sum into $e^{s_j - m}$. With more parts there are more
# terms. An empty part has $m = -\infty$ and weighs $e^{-\infty} = 0$, as long as *some* part is not empty.
#
# > **Predict.** Two parts of a context have the outputs 1.0 and 3.0 (each divided by its own $\ell$). Part A has 30 tokens,
# > part B has 2. Is the whole output nearer to 1.0 or to 3.0?

# %% tags=["nbval-check-output"]
for m_b in (0.0, 2.0, 4.0, 6.0):
    m_a, l_a, l_b = 0.0, 30.0, 2.0  # all scores of a part equal: every term is 1
    m = max(m_a, m_b)
    w_a, w_b = (torch.tensor([m_a - m, m_b - m]).exp() * torch.tensor([l_a, l_b])).tolist()
    out = (w_a * 1.0 + w_b * 3.0) / (w_a + w_b)
    print(f"scores 0 in A and {m_b:.0f} in B: output {out:.3f}")

# %% [markdown]
# <details><summary><b>If you said nearer to 1.0, since it has 30 of 32 tokens</b></summary>
#
# That is right if all scores are about equal, as in the first line. But a part counts by its $e^{m}\ell$, not by its tokens: a
# difference of 4 in the scores makes a factor of 55.
# </details>
#
# <details><summary><b>If you said 2.0, the mean</b></summary>
#
# The mean of outputs is what a program computes that divides too early. After the division it is lost how much a part weighs. So parts
# leave $a$, $\ell$ and $m$, undivided, and the division comes once, at the end.
# </details>
#
# <details><summary><b>If you said that it cannot be told</b></summary>
#
# Exactly. It depends on the scores.
# </details>
#
# Who reads which tokens? Parts are whole tiles, shared out evenly. To see them we use a trick: if all keys are 0, all scores
# are 0, every term is $e^0 = 1$, and `total` *counts* the tokens that a part has seen.


# %%
def tokens_of_parts(contexts, num_splits):
    """How many tokens each part of each context attends to, by asking the kernel."""
    query, key_pool, value_pool, tables, lens, _, scale = scene(contexts, num_heads=1)
    key_pool.zero_()
    grid = len(contexts), 1, num_splits
    accs = torch.empty(*grid, 64, device=DEVICE)
    maxima, totals = torch.empty(2, *grid, device=DEVICE)
    strides = query.stride()[:2], key_pool.stride()[:3], tables.stride(0)
    ch06.decode_kernel[grid](
        *(accs, maxima, totals, query, key_pool, value_pool, tables, lens, scale),
        *strides,
        **prefill.sizes(key_pool),
    )
    return totals[:, 0].long().tolist()


contexts = [320, 150, 90, 33]
parts = tokens_of_parts(contexts, 4)
viz.context_parts({"ABCD"[i]: part for i, part in enumerate(parts)}, tile=16)

# %% [markdown]
# The number of parts is the same for all sequences, because the grid is. Short contexts have parts with a single tile, or with
# none. C has six tiles, and four parts of two tiles each would be eight: the fourth gets nothing.
#
# How many parts should there be? As few as make enough programs: each part more is a partial result that is written
# and read again. Two dozen programs for each multiprocessor is what we want here: each is a single warp that mostly waits for memory,
# and it takes about so many until there are always loads under way. `choose_num_splits` makes it a number:

# %% tags=["nbval-check-output"]
wanted = 24 * 132
print(
    f"wanted: {wanted} programs; 12 heads, contexts of up to 1,024 tokens in {1024 // 16} tiles"
)
for num_seqs in (1, 8, 64, 256, 512):
    num_splits = ch06.choose_num_splits(num_seqs * 12, 1024 // 16, wanted)
    print(
        f"{num_seqs:3d} sequences: {num_splits:2d} splits, {num_seqs * 12 * num_splits:5,d} programs"
    )

# %% [markdown]
# With 8 sequences, one of the 33 parts is always empty: 64 tiles in 33 parts are 2 a part, rounded up, so 32 parts have work. An
# empty part weighs 0 in the merge, and costs a program that ends at once.

# %% tags=["nbval-check-output"]
inputs = scene([320, 150, 33])
theirs = ch03.paged_attention(*inputs)
for num_splits in (1, 2, 5, 8):
    mine = ch06.paged_decode(*inputs[:5], inputs[-1], num_splits=num_splits)
    assert torch.allclose(mine, theirs, atol=1e-5)
grids = launches(lambda: ch06.paged_decode(*inputs[:5], inputs[-1], num_splits=5))
print("with 1, 2, 5 and 8 splits: the outputs of chapter 03")
print("grids with 5 splits:", *(f"{name} {grid}" for name, [grid] in grids.items()))

# %% [markdown]
# ## Many queries at once
#
# A prompt has many queries, and in causal attention they read nearly the same keys. There a matrix product is what we want: sixteen
# queries share each tile of keys, and `tl.dot` has its sixteen rows. This kernel is given, `prefill_kernel` in `chapters/aids/prefill.py`. It is
# the loop of exercise 6.2 with one more axis, so its listing comes after that exercise.
#
# The mask costs nothing extra: a query at position $p$ sees tokens up to $p$, which covers later tokens of the prompt and empty
# slots alike. And the loop stops at the last token that the newest of the sixteen sees, so most of what is hidden is not even read.
#
# ## The whole generation, compared with Hugging Face
#
# Kernels keep their sums in float32, whatever the model's dtype is. So the comparison is at $10^{-4}$, not at $10^{-9}$ as before.

# %% tags=["nbval-check-output"]
prompts = [tokenizer.encode(line) for line in ("One day", "One day a girl met a fox.")]
mine = {}
answers = ch06.generate(
    model, prompts, 8, lambda i, scores: mine.setdefault(i, []).append(scores)
)
with torch.no_grad():
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = torch.tensor([prompt + answer], device=DEVICE)
        theirs = model(text).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(torch.stack(mine[index]), theirs, atol=1e-4, rtol=0)
        assert answer == theirs.argmax(-1).tolist()
        print(tokenizer.decode(prompt + answer))

# %% [markdown]
# And it serves. The engine takes an attention from outside, chapter 03's, this one, or yours: `python -m chapters try 06`,
# or on the command line `pagebrain serve --part attention=work/ch06_kernels.py:paged_attention`.

# %% tags=["nbval-check-output"]
params = SamplingParams(temperature=0, max_tokens=8)
served = [
    LLM(model, num_blocks=32, **parts).generate([prompts[1]], params, use_tqdm=False)
    for parts in ({}, {"parts": {"attention": ch06.paged_attention}})
]
tokens = [outputs[0].outputs[0].token_ids for outputs in served]
assert tokens[0] == tokens[1]
print(tokenizer.decode(prompts[1] + list(tokens[1])))

# %% [markdown]
# How fast is it? In the interpreter that is no question to ask, but so that nobody thinks it is:

# %%
inputs = scene([256] * 4)
for name, attention in (
    ("chapter 03", ch03.paged_attention),
    ("chapter 06", ch06.paged_attention),
):
    attention(*inputs)
    began = time.perf_counter()
    attention(*inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{name}: {(time.perf_counter() - began) * 1e3:6.1f} ms for 4 queries of 2 heads")

# %% [markdown]
# ## How fast can it be?
#
# Now for a GPU. Before measuring a kernel one should know what to expect. There are two things that a kernel cannot do
# without: read its inputs and write its results, and compute. Both have a speed limit. Count for one decode step in one layer of
# GPT-2 small, in bfloat16:

# %% tags=["nbval-check-output"]
print("sequences  context      bytes   operations   operations for each byte")
for num_seqs, context in ((1, 512), (64, 512), (256, 512), (256, 1024)):
    work = ch06.decode_work(num_seqs, context, 12, 64, 2)
    print(f"{num_seqs:9d} {context:8d} {work.num_bytes / 1e6:7.1f} MB", end="")
    print(f" {work.num_operations / 1e6:8.1f} M {work.intensity:16.3f}")

# %% [markdown]
# The last column is the **arithmetic intensity**, and it is 1, or a hair less, whatever the batch and the context. Each number of K is
# used for one multiplication and one addition, and then never again in this step; so is each of V. A number has two bytes. (The hair is
# the queries and the results.) Nothing that we do to the kernel will change that.
#
# > **Predict.** An H200 reads about 4 TB a second, and its matrix units compute some 700 T operations a second. Its
# > ordinary units compute about 60 T. We do not use the matrix units. By what factor does that slow us down?

# %% tags=["nbval-check-output"]
work = ch06.decode_work(256, 512, 12, 64, 2)
for name, operations_per_s in (("matrix units", 700e12), ("ordinary units", 60e12)):
    read, computed = work.num_bytes / 4e12, work.num_operations / operations_per_s
    floor = ch06.floor_seconds(work, 4e12, operations_per_s)
    print(
        f"{name:14s}: read {read * 1e6:5.1f} us, compute {computed * 1e6:4.1f} us", end=""
    )
    print(f", at least {floor * 1e6:5.1f} us together")

# %% [markdown]
# <details><summary><b>If you said 12: 700 / 60</b></summary>
#
# If arithmetic were what we wait for. The numbers arrive at 4 T bytes a second, and so there are 4 T operations to do a second, one for
# each byte. Units that could do 60 are as idle as units that could do 700.
# </details>
#
# <details><summary><b>If you said not at all</b></summary>
#
# Right. Reading and computing overlap, and the longer of the two remains: the floor is the same.
# </details>
#
# To draw this: intensity to the right, operations per second upwards, both logarithmic. Memory allows (bytes per second) × (operations
# per byte), a straight line. Arithmetic allows a fixed number, a flat line. Together they are a roof, and the corner
# where they meet is the *ridge*: the **roofline** (Williams, Waterman and Patterson, 2009). A kernel is a point under
# it. How far below the roof it is, is how much there is to gain; *where* under it, is what holds it back.
#
# The engine's own kernels, measured with `pagebrain bench kernels`. On a GPU this cell measures anew, in about a minute; elsewhere it reads
# what was recorded.

# %%
RECORDED = Path("../docs/performance/kernels.json")


def measure():
    """What ``pagebrain bench kernels`` measures, here and now."""
    from pagebrain.bench.kernel_bench import KernelBench, add_kernels_arguments

    parser = argparse.ArgumentParser()
    add_kernels_arguments(parser)
    return KernelBench(parser.parse_args([])).run() | {"command": "pagebrain bench kernels"}


report = None
if DEVICE == "cuda":
    report = measure()
elif RECORDED.is_file():
    report = json.loads(RECORDED.read_text(encoding="utf-8"))
if report is None:
    print("skipped: there is no GPU, and this copy has no docs/performance/kernels.json")
else:
    versions, shape = report["versions"], report["shape"]
    print(f"{'measured now' if DEVICE == 'cuda' else 'recorded'}: {report['command']}")
    print(f"{versions['gpu']}, {report['date'][:10]}", end="")
    print(f", torch {versions['torch']}, triton {versions['triton']}")
    print(f"{shape['num_heads']} heads of {shape['head_dim']} in {shape['dtype']}", end="")
    print(f", blocks of {shape['block_size']}")
    print(f"a copy moves {report['copy_bytes_per_s'] / 1e12:.2f} TB/s", end="")
    print(
        f", a matrix product computes {report['product_flops_per_s'] / 1e12:.0f} T operations/s"
    )

# %%
if report is None:
    print("skipped: nothing was measured")
else:
    series = {}
    for row in report["decode"]:
        name = f"decode of {row['num_seqs']}"
        series.setdefault(name, []).append((row["intensity"], row["flops_per_s"]))
    for row in report["prefill"]:
        series.setdefault("prefill", []).append((row["intensity"], row["flops_per_s"]))
    roofs = report["copy_bytes_per_s"], report["product_flops_per_s"]
    gpu = report["versions"]["gpu"]
    viz.show(
        viz.roofline(series, *roofs, f"{gpu}: attention kernels by sequences in the batch")
    )

# %% [markdown]
# The roof's slope is what a plain copy reached in the same run, its flat part what a large matrix product reached: both a little
# less than what is printed on the box, and more honest. All decode points stand at an intensity of 1, far to the left of the ridge: one above
# the other, according to how many sequences there are. The three points of a series are three contexts, of 128, 512 and 960 tokens.
#
# Prefill is elsewhere. There a key is used by every query that comes after it. Both points are prompts of 512 tokens, one alone and
# eight together, so both have the same intensity, about 128; longer prompts would stand further to the right. In the recorded run they reach 5 and 21
# percent of the roof. These launches are short (15 and 29 microseconds, of which starting and ending is a good part), and a single prompt has too few
# tiles to fill 132 multiprocessors: 64 queries each, that is 8 for each of 12 heads. And the kernel is a simple one: between its two products, while
# the softmax is computed, the matrix units wait.
#
# How far are they from the floor?

# %%
if report is None:
    print("skipped: nothing was measured")
else:
    print("sequences  context   floor   measured   of the floor's speed")
    for row in report["decode"]:
        sizes = shape["num_kv_heads"], shape["head_dim"], shape["itemsize"]
        work = ch06.decode_work(row["num_seqs"], row["context_len"], *sizes)
        floor = ch06.floor_seconds(work, *roofs)
        print(f"{row['num_seqs']:9d} {row['context_len']:8d} {floor * 1e6:7.1f}", end="")
        print(f" {row['seconds'] * 1e6:8.1f} us {floor / row['seconds']:12.0%}")

# %% [markdown]
# Read it from the bottom. A full batch moves so many bytes that everything else disappears beside them. (A kernel that only reads may even
# beat a copy, which has to write as well, by a percent or two.) For a single sequence the
# floor is below a microsecond, and no kernel is that quick: it has to be started, its first load takes most of a microsecond to come back,
# then there is the merge. Such a step is not bound by memory's *bandwidth* but by its *latency*. Splitting helps there, and only
# there: it lets more loads wait at the same time.
#
# Your own kernels are simpler than the engine's: they always merge, load one tile at a time, and look up the block of each token. What does that
# cost? This cell times yours, or the chapter's, on the same shapes, each launch repeated from a CUDA graph, so that Python's
# part does not count.

# %%
if DEVICE != "cuda":
    print("skipped: timing a kernel needs a CUDA GPU, and torch finds none here")
else:
    print("sequences  splits      time   K and V read at")
    for num_seqs in (1, 64, 256):
        inputs = scene([512] * num_seqs, num_heads=12, dtype=torch.bfloat16)
        kv_bytes = 2 * num_seqs * 512 * 12 * 64 * 2
        for num_splits in (1, 4, 16):

            def run():
                return ch06.paged_decode(*inputs[:5], inputs[-1], num_splits)

            ms = triton.testing.do_bench_cudagraph(run, return_mode="median")
            print(
                f"{num_seqs:9d} {num_splits:7d} {ms * 1e3:8.1f} us {kv_bytes / ms / 1e9:9.2f} TB/s"
            )

# %% [markdown]
# (One sequence's 1.5 MB of K and V stay in the GPU's own cache from one launch to the next, so the first lines may beat memory.
# In a model they would not: twelve layers take turns.)
#
# ## Exercises
#
# `python -m chapters start 06` writes `work/ch06_kernels.py` with its gaps, unless it is there already;
# `python -m chapters check 06` checks them. Without a GPU everything runs in the interpreter, and there you may put
# `print(...)` into a kernel to see a tile: a line for each program. Leave them out again before a GPU compiles it.
#
# What you need of Triton, all of it:
#
# - `tl.program_id`, `tl.num_programs`, `tl.arange`, `tl.zeros`, `tl.full`, `tl.where`, `tl.maximum`, `tl.minimum`, `tl.max`, `tl.sum`, `tl.exp`
#   and `tl.cdiv`. They are numpy's where numpy has them, with an `axis` where numpy has one.
# - `tl.load(addresses, mask=..., other=...)` and `tl.store(addresses, numbers, mask=...)`. An address is a pointer plus an offset; a
#   pointer cannot be indexed. Without `other`, what is not loaded is undefined.
# - `x.to(tl.int64)`, `x.to(tl.float32)`; `x[:, None]` and `x[None, :]`, which give a tile one more axis; `&` between masks.
# - `for start in range(first, last, TILE)`, whose bounds may be known only when the kernel runs; `-float("inf")`.
# - An argument that is a tuple is indexed with a constant: `pool_strides[0]`.
# - One jitted function calls another as in Python, and may get several results: `acc, maximum, total = attend_tokens(...)`.
# - `TILE` is no argument, it is a constant of the module: use it as it is.
#
# A kernel has no `raise`, no lists and no dictionaries.
#
# ### Exercise 6.1: K and V to their slots (5 points)
#
# One program copies one head of one token: the smallest kernel that has everything. Write down two offsets first, that of the
# row it reads and that of the place it writes. Which of the numbers in them come as 32 bits?

# %%
viz.show_task(ch06.write_kernel.fn)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch06.write_kernel.fn)

# %% [markdown]
# ### Exercise 6.2: tokens, tile by tile (10 points)
#
# No program ids here: this is a function that kernels call. Start from your `add_page` of chapter 03, and write the shape of every variable
# beside it. The first tile always has a token, so $m$ is a number from then on. What do you return if there is no tile at all? And
# where is each of the three masks?

# %%
viz.show_task(ch06.attend_tokens.fn)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch06.attend_tokens.fn)

# %% [markdown]
# Read this when 6.2 is done: the kernel that is given for prompts. It is your loop with one more axis. Find the mask, which now is causal;
# the two products; and what has become of $m$ and $\ell$.

# %%
source = viz.show_source(prefill.prefill_kernel.fn)
source

# %% [markdown]
# ### Exercise 6.3: a program for each part (8 points)
#
# First make it right for one part, `num_splits` 1: the range is the whole context. (Three of the tests need no more.) Then the
# parts. Take the picture above, and work out `first` and `last` of all four parts for D with its 33 tokens. How many tiles are there, how
# many does a part get, and where does the second part end?

# %%
viz.show_task(ch06.decode_kernel.fn)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch06.decode_kernel.fn)

# %% [markdown]
# ### Exercise 6.4: the merge (6 points)
#
# A program takes all parts of its query at once, as tiles of `[PADDED_SPLITS]` and `[PADDED_SPLITS, PADDED_DIM]`. What must a place
# past `num_splits` hold, so that it weighs nothing? Try your formula on an empty part, by hand, before you run it.

# %%
viz.show_task(ch06.merge_kernel.fn)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch06.merge_kernel.fn)

# %% [markdown]
# ### Exercise 6.5: what is possible (6 points)
#
# Plain Python. Count for one query of one head over one token first, then multiply. For the splits: the first cell about them says what
# comes out for 12 heads and 3,168 wanted programs; try 64 sequences by hand, where 768 programs are there without any split.

# %%
viz.show_task(ch06.decode_work, ch06.floor_seconds, ch06.choose_num_splits)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch06.decode_work, ch06.floor_seconds, ch06.choose_num_splits)

# %% [markdown]
# ## What the next chapter must fix
#
# A step of GPT-2 small has 12 layers. Each writes K and V, attends and merges; and there are matrix products, norms and the rest of the layer
# between. How many things does a step start from Python, if each is a launch?

# %%
with Operations() as counted, torch.no_grad():
    model(torch.tensor([[1]], device=DEVICE))
layers = model.config.n_layer
print(
    f"{counted.count} operations for one token in {layers} layers, attention included",
    end="",
)
print(f": about {counted.count // layers} a layer")

# %% [markdown]
# At some microseconds each that is longer than the whole batch's attention takes on the GPU. The kernel is near its roof; the GPU waits for
# Python. Chapter 07 keeps the state of a batch on the GPU, records a step's launches once, and sends them off as one.
