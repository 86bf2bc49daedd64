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
# Chapter 03 found the method: go over the pages, keep three numbers, never copy the cache. In PyTorch this method was slower than
# chapter 02. Each page was several operations, each started from Python, and picking a page copied it.
#
# In this chapter we write the program that runs *inside* one operation, a **kernel**. We write it in Triton, which is a form of Python for
# kernels. Then we ask how fast such a kernel can be at most, and how near to that it comes.
#
# **You need:** chapters 02 and 03, and how a tensor's strides lead to an address (there is a reminder). You need no GPU: without one, Triton's
# *interpreter* runs the kernels on the CPU, slowly. You need Linux on x86-64, because Triton exists only there. On a Mac or on Windows,
# read the page with its stored outputs, and use a Linux machine (a container or a hosted notebook is enough) for the exercises.
# **Time:** about 5.5 hours with reading and exercises.
#
# *You will be able to* write a kernel that reads a paged cache, split its work when there is too little of it for a GPU, and say from
# shapes alone how fast a kernel can be and what limits it.
#
# *In a copy from a course, the cells use your own file in `work/`. Tasks that you have not done yet are lent to the notebook, so every
# cell runs. Each exercise stands right after the idea that it needs.*

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
from chapters.aids.draw_accesses import draw_accesses
from chapters.aids.triton_anywhere import INTERPRETED, tl, triton
from chapters.aids.watch_kernels import watching
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
# We need sequences that have something in their cache. This function makes random K and V, in blocks that are handed out in random
# order. It returns the arguments of `paged_attention`, with one query (a decode) for each sequence.


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
# The results agree to five digits. (Here we use chapter 06's kernels before you have seen them. They follow below.)
#
# Chapter 03 starts about sixty operations for every page, in every layer, for every token of an answer. Chapter 06 launches two kernels,
# whatever the context is. Most operations of PyTorch are one kernel each, launched from Python. A launch takes some microseconds, even if
# the kernel computes little. So with 60 pages, chapter 03 spends its time on launches.
#
# ## What a kernel is
#
# A GPU is made for doing the same thing very many times. You write a program for *one* piece of the work, and launch a
# **grid** of copies of it. Each copy is called a **program**. A program asks for its place in the grid, and computes from that which piece
# is its own. This kernel multiplies numbers by a factor:


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
# - `@triton.jit` makes a kernel of a Python function. A launch names the grid in square brackets, and then the arguments: `kernel[grid](...)`.
# - `[3,]` is the grid: three programs. (A grid is a tuple. The comma makes a tuple of a single number.) `tl.program_id(0)` is 0 in the first program, 1 in the
#   second, 2 in the third.
# - A grid may have up to three axes. With the grid `(num_tokens, num_heads)`, `tl.program_id(0)` is the token, `tl.program_id(1)` the head, and
#   `tl.num_programs(1)` the number of heads. There is a program for each pair of the two.
# - `out_ptr` and `x_ptr` are **addresses**. A tensor that is given to a kernel arrives as the address of its first number, and
#   nothing else: no shape, no strides. A kernel knows about these only what it is told.
# - `places` is a **tile**: eight numbers in one variable. In Triton everything is computed with tiles. `TILE` is the usual name for the number of
#   places of a tile. Along each axis it is a power of 2, and it is known when the kernel is compiled (`tl.constexpr`).
# - `tl.load` takes an address or a tile of addresses. `tl.load(x_ptr + 5)` reads one number, that of place 5, and `tl.store(out_ptr + 5, number)` writes one.
#   A tile of addresses is read at once. 20 is not a multiple of 8, so the third tile has places that do
#   not exist. The **mask** says which places exist. The others are not read, and what the tile holds there is *undefined*,
#   unless you give a value: `tl.load(x_ptr + places, mask=exists, other=0.0)`. Here it does not matter, because the store has the same mask.
#
# On the GPU, a program runs on one of its *multiprocessors*. An H200 has 132 of them, and each holds dozens of programs. A
# program has *threads*, each of which computes a few numbers of every tile. They form groups of 32, called **warps**. A warp executes one instruction for its
# 32 threads at a time. How many warps a program gets is said at the launch: `num_warps=1` in this chapter. A load from memory takes the time of several hundred instructions. While one warp waits for it, another warp computes. The compiler decides
# which thread gets which places of a tile. You do not have to.
#
# In the interpreter the grid is a Python loop: one program after another, and each tile is a numpy array. So it shows whether a kernel computes
# the right numbers. It does not show whether a GPU's compiler accepts the kernel.
#
# ### What the interpreter forgives
#
# - **Sizes of tiles.** The arguments of `tl.arange` have to be known when the kernel is compiled. (The arguments of a loop's `range` need not.)
# - **A variable that changes its type in a loop.** If it begins as the integer `0` and becomes a number with a fraction, the compiler refuses it. Begin
#   with `0.0`.
# - **Undefined places.** The interpreter puts 0 where a masked load has no `other`. A GPU puts anything there. `check` puts `nan` there.
# - **Python's own things**, such as dictionaries, `try`, or `print` of a tile without a text before it.
# - **Order.** A kernel may not rely on programs running one after another. On the GPU they run side by side.
#
# `python -m chapters check 06` also compiles your kernels for a GPU (this needs no GPU), and says which line the compiler refuses and why.
#
# > **Predict.** Now `x` is the first 20 of 24 numbers that lie side by side. The four numbers after it belong to another tensor: sevens. A kernel without a
# > mask multiplies `x` by 10 in its place. What happens to the sevens?


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
# The kernel does not know that. It computes addresses. What lies there is read, multiplied and written back.
# </details>
#
# <details><summary><b>If you said that there would be an error</b></summary>
#
# Sometimes there is one. If the memory belongs to another tensor of the same process, there is no error, and the other tensor has wrong numbers. (PyTorch
# holds most of a GPU's memory, so this is the usual case. In an engine the other tensor holds another user's sequence.)
# If the memory belongs to no tensor, the GPU stops with "illegal memory access", and *everything* that the process had on the GPU is lost.
# The exercises' tests watch each address in the interpreter, and say how far away a wrong one is.
# </details>
#
# ## Warm-up: four small puzzles
#
# Each puzzle is one idea of the exercises below, and needs a change in one line, the one marked `# change this line`. Run the cell again after your
# change. There are no points. The picture shows each load and store, as the watched interpreter saw them: a filled box is a number that is read or
# written, a cross is a place that the mask leaves out, and each program has its own colour.


# %%
def puzzle(kernel, grid, expected, drawn, **constants):
    """Run a kernel whose first tensor is its result; say whether the result is right, and draw what was read and written."""
    out = torch.zeros(len(expected), device=DEVICE)
    inputs = {name: torch.as_tensor(value).to(DEVICE) for name, value in drawn.items()}
    if not INTERPRETED:  # compiled kernels cannot be watched
        kernel[grid](out, *inputs.values(), **constants)
    else:
        with watching() as watch:
            kernel[grid](out, *inputs.values(), **constants)
        viz.show(draw_accesses(watch, {"out_ptr": out} | inputs))
    right = torch.allclose(out.cpu(), torch.tensor(expected))
    said = (
        "right"
        if right
        else f"not yet: got {[round(n, 2) for n in out.tolist()]}, expected {expected}"
    )
    print(f"{kernel.__name__}: {said}")


# %% [markdown]
# **Puzzle 1: a masked load.** `x` has 12 numbers, but only the first 10 are ours. Each program adds up four of them. The last two numbers (sevens)
# must not be read.


# %%
@triton.jit
def add_up(out_ptr, x_ptr, TILE: tl.constexpr):
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = places < 12  # change this line: only the first 10 numbers are ours
    numbers = tl.load(x_ptr + places, mask=exists, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(numbers, axis=0))


x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 7.0, 7.0]
puzzle(add_up, (3,), [10.0, 26.0, 19.0], {"x_ptr": x}, TILE=4)

# %% [markdown]
# <details><summary><b>Solution</b></summary>
#
# `exists = places < 10`. The two places are not read now. `other=0.0` says what the tile holds there, and 0 does not change a sum.
# </details>
#
# **Puzzle 2: a maximum that a loop carries.** One program goes over eight numbers, four at a time, and keeps the largest.


# %%
@triton.jit
def largest_of(out_ptr, x_ptr, TILE: tl.constexpr):
    largest = -float("inf")
    for start in range(0, 8, TILE):
        numbers = tl.load(x_ptr + start + tl.arange(0, TILE))
        largest = tl.max(numbers, axis=0)  # change this line: earlier tiles count, too
    tl.store(out_ptr, largest)


puzzle(largest_of, (1,), [9.0], {"x_ptr": [1.0, 9.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]}, TILE=4)

# %% [markdown]
# <details><summary><b>Solution</b></summary>
#
# `largest = tl.maximum(largest, tl.max(numbers, axis=0))`. `tl.max` reduces a tile to one number, `tl.maximum` compares two values.
# </details>
#
# **Puzzle 3: a sum over one axis.** Three keys of four numbers lie side by side. The score of a key is the sum of its numbers, each multiplied by the number of
# the query at the same place. A tile has four rows, because 4 is a power of 2; the mask leaves the fourth row out.


# %%
@triton.jit
def scores_of(out_ptr, query_ptr, keys_ptr, ROWS: tl.constexpr, DIM: tl.constexpr):
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    exists = rows < 3
    query = tl.load(query_ptr + dims)  # [DIM]
    places = rows[:, None] * DIM + dims[None, :]  # [ROWS, DIM]
    keys = tl.load(keys_ptr + places, mask=exists[:, None], other=0.0)
    scores = tl.sum(query[None, :] + keys, axis=1)  # change this line: products, not sums
    tl.store(out_ptr + rows, scores, mask=exists)


drawn = {"query_ptr": [1.0, 0.0, 2.0, 0.0], "keys_ptr": [float(n) for n in range(12)]}
puzzle(scores_of, (1,), [4.0, 16.0, 28.0], drawn, ROWS=4, DIM=4)

# %% [markdown]
# <details><summary><b>Solution</b></summary>
#
# `scores = tl.sum(query[None, :] * keys, axis=1)`. `query[None, :]` has the shape `[1, DIM]`, so the same query meets each row. Axis 1 is that of the dims; one
# number for each row is left.
# </details>
#
# **Puzzle 4: following a table.** Six numbers lie in pages of two, and the pages lie in any order: the table says that page 0 of the sequence is page 2 of the
# pool, page 1 is page 0, and page 2 is page 1. Read the numbers in the order of the sequence.


# %%
@triton.jit
def in_order(out_ptr, table_ptr, pool_ptr, TILE: tl.constexpr):
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slots = tokens  # change this line: the page is tokens // 2, the place in it tokens % 2
    tl.store(out_ptr + tokens, tl.load(pool_ptr + slots))


drawn = {"table_ptr": [2, 0, 1], "pool_ptr": [30.0, 40.0, 50.0, 60.0, 10.0, 20.0]}
puzzle(in_order, (3,), [10.0, 20.0, 30.0, 40.0, 50.0, 60.0], drawn, TILE=2)

# %% [markdown]
# <details><summary><b>Solution</b></summary>
#
# `slots = tl.load(table_ptr + tokens // 2) * 2 + tokens % 2`. The load takes a tile of addresses, so each token looks up its own page.
# </details>
#
# ## From a slot to an address
#
# The pool is `[num_blocks, block_size, num_heads, head_dim]`. Where is the first number of head 1, in slot 1 of block 2? That depends
# on the **strides**: how many numbers further the next block, slot or head begins. Chapter 02 laid a token's heads side by side. The
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
# If a kernel swaps two strides, its results are wrong in both layouts, or in one of them only. The second case is worse, because tests with the other layout pass.
#
# One more trap. Kernels compute with 32-bit integers unless you say otherwise, and the largest of these is 2,147,483,647. Offsets into a pool can be larger:

# %% tags=["nbval-check-output"]
block_stride = 16 * 12 * 64  # numbers of K in a block of GPT-2 small, one layer
largest = (2**31 - 1) // block_stride
print(f"block {largest:,} is the last that begins below 2**31")
print(f"K of one layer up to there: {2**31 * 2 / 2**30:.0f} GiB in bfloat16")
block_id = torch.tensor(largest + 1, dtype=torch.int32)
print(f"block {largest + 1:,} begins, in 32 bits, at {(block_id * block_stride).item():,}")
print(f"and in 64 bits at {(block_id.long() * block_stride).item():,}")

# %% [markdown]
# The offset is negative: an address *before* the pool. All tests on small pools pass, and a large machine fails weeks later. So the rule is: **make
# a block id 64 bits wide before you multiply it.**
#
# ### What you need of Triton
#
# This is all that the exercises use:
#
# - `tl.program_id`, `tl.num_programs`, `tl.arange`, `tl.zeros`, `tl.full`, `tl.where`, `tl.maximum`, `tl.minimum`, `tl.max`, `tl.sum`, `tl.exp`
#   and `tl.cdiv` (division, rounded up). Most of them are as in numpy where numpy has them, with an `axis` where numpy has one.
# - `tl.zeros([PADDED_DIM], dtype=tl.float32)` and `tl.full([PADDED_DIM], 1.0, dtype=tl.float32)` are not: the shape is a list, also for a single axis, and
#   the dtype must be given.
# - `tl.load(addresses, mask=..., other=...)` and `tl.store(addresses, numbers, mask=...)`. An address is a pointer plus an offset: a single
#   number (`tl.load(slots_ptr + token)`) or a tile. A pointer cannot be indexed.
# - `x.to(tl.int64)`, `x.to(tl.float32)`; `x[:, None]` and `x[None, :]`, which give a tile one more axis; `&` between masks.
# - `for start in range(first, last, TILE)`, whose bounds may be known only when the kernel runs; `-float("inf")`.
# - An argument that is a tuple is indexed with a constant: `pool_strides[0]`.
# - One jitted function calls another as in Python, and may get several results: `acc, maximum, total = attend_tokens(...)`.
# - In the exercises `TILE` is not an argument. It is a constant of the module, 16: the number of tokens that a program reads with one load.
#
# A kernel has no `raise`, no lists and no dictionaries. In the interpreter you may put `print("scores", scores)` into a kernel to see a tile; take it out
# before you run `check`.
#
# `python -m chapters start 06` writes `work/ch06_kernels.py` with its gaps, unless it is there already.
# `python -m chapters check 06` checks all tasks, `check 6.1` only one.
#
# ### Exercise 6.1: K and V to their slots (5 points)
#
# One program copies one head of one token. It is the smallest kernel that has everything. Write down two offsets first: that of the
# row that it reads, and that of the place that it writes. As in chapter 02, slot = block id × block size + place in the block. Which of these numbers may be
# 32 bits wide when the kernel gets it?
#
# (`write_kernel` is the kernel, and `write_kernel.fn` the Python function that `@triton.jit` was given. Only the latter has a source to show.)

# %%
viz.show_task(ch06.write_kernel.fn)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch06.write_kernel.fn)

# %% [markdown]
# ## A query walks over its pages
#
# In a decode there is one query for each sequence and head. The queries do not need each other, so each gets a program. What does a
# program do? It runs chapter 03's loop, with two changes. It reads `TILE` tokens at a time, whatever the block size is, and it looks up
# the block of *each* token separately. This cell shows what it finds for a context of 37 tokens, in three large blocks and in ten small ones:


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
# In the first case a tile is a page. In the second case it takes four pages, in any order. The load is the same line of code, because `tl.load` takes
# a tile of *any* addresses.
#
# The last tile is cut short: some of its places belong to no token. A slot without a token may hold anything, even `nan` (from the block's previous sequence,
# or because nothing was ever written there). Where is it needed that tokens from `last` on are left out?
#
# | where | needed? | why |
# |---|---|---|
# | load of the table | yes | the entry past the last page may lie past the table |
# | load of K | no, but it saves reading | `nan` in a key spoils the score of its own token, and `tl.where` replaces this score |
# | scores: `tl.where(..., scores, -float("inf"))` | yes | a key that is not loaded is 0 with `other=0.0`, so its score is 0, and $e^{0 - m}$ is not 0 (chapter 03's mistake) |
# | load of V | yes, with `other=0.0` | the weight is 0, but $0 \cdot \mathrm{nan}$ is `nan`, which nothing replaces |
#
# Besides, both loads need the mask of dims, because of the `PADDED_DIM` places only `HEAD_DIM` are the head's. K needs `other=0.0` with it: a sum over all places
# makes the score.
#
# And the shapes: `query` has `[PADDED_DIM]` places, `keys` and `values` have `[TILE, PADDED_DIM]`. `query[None, :] * keys` summed over axis 1
# gives `[TILE]` scores. Why is there no matrix product? There is an operation for it, `tl.dot`, and a GPU has special units for it. They
# take 16 rows or more, and here the query is a single row. Fifteen sixteenths of their work would be wasted. And we shall see that arithmetic
# is not what limits this kernel.
#
# ### Exercise 6.2: tokens, tile by tile (10 points)
#
# This function has no program ids, because kernels call it. Start from `add_page` in `chapters/ch03_paged_attention.py`, and write the shape of every variable
# beside it. The first tile always has a token, so $m$ is a finite number from then on. What do you return if there is no tile at all? And
# where are tokens left out? The number of tokens at a time is part of the task: one load of K and one of V for each tile, and nothing is read twice.

# %%
viz.show_task(ch06.attend_tokens.fn)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch06.attend_tokens.fn)

# %% [markdown]
# Let us watch the three numbers. Each line asks for a longer range of the same context, through `decode_kernel`, which calls `attend_tokens`:

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
# This is also a complete launch. Everything that the kernel needs to know about a tensor's layout is passed as a number, in
# the order of its signature. `prefill.sizes` gives the three constants for which the kernel is compiled.
#
# ## Too few programs
#
# GPT-2 small has 12 heads. With 256 sequences there are 3,072 programs, and all 132 multiprocessors have enough to do. With one
# sequence there are 12 programs. Nine in ten multiprocessors are idle, while 12 of them read a context each, tile after tile, and wait for memory
# between two tiles.
#
# The solution is to cut contexts into parts, with a program for each (**split-KV**). Can attention over parts be put together? What chapter 03 proved
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
# A program that divides too early computes the mean of the outputs. After the division it is not known any more how much a part weighs. So parts
# leave $a$, $\ell$ and $m$, undivided, and the division comes once, at the end.
# </details>
#
# <details><summary><b>If you said that it cannot be told</b></summary>
#
# That is right. It depends on the scores.
# </details>
#
# Which part reads which tokens? Parts are whole tiles, shared out evenly. To see them we use a trick: if all keys are 0, all scores
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
# The number of parts is the same for all sequences, because all are in one grid. Short contexts have parts with a single tile, or with
# none. C has six tiles. In the picture of the reference its parts have 2, 2, 2 and 0 tiles. To share them out as 2, 2, 1 and 1 is right, too: in both cases
# no part has more than two.
#
# ### Exercise 6.3: a program for each part (8 points)
#
# First make it right for one part, `num_splits` 1: then the range is the whole context. Next come the
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
# ## How many parts
#
# Each further part is a partial result, which has to be written and read again. So the number of parts is the smallest that gives enough programs. We want two
# dozen programs for each multiprocessor. Each program is a single warp, which mostly waits for memory, and with about so many there are always loads under way.
# `choose_num_splits` (a part of exercise 6.5) computes the number:

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
# With 8 sequences, one of the 33 parts is always empty: 64 tiles in 33 parts are 2 tiles for each part, rounded up, so 32 parts have work. An
# empty part weighs 0 in the merge. Its program has no tile to read, and only writes its three numbers.

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
# A prompt has many queries, and in causal attention they read nearly the same keys. Here a matrix product is useful: sixteen
# queries share each tile of keys, and `tl.dot` has its sixteen rows. This kernel is given, `prefill_kernel` in `chapters/aids/prefill.py`. It is
# the loop of exercise 6.2 with one more axis, so read it when 6.2 is done (`viz.show_source(prefill.prefill_kernel.fn)` in a cell shows it).
# Find the mask, which is causal there, the two products, and what has become of $m$ and $\ell$.
#
# The mask costs nothing extra: a query at position $p$ sees tokens up to $p$. This leaves out later tokens of the prompt and empty
# slots alike. The loop ends at the last token that the newest of the sixteen queries sees, so most of the hidden tokens are not read at all.
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
# The engine can use this attention. It takes an attention from outside, chapter 03's, this one, or yours: `python -m chapters try 06`,
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
# How fast is it? The interpreter's time says nothing about a GPU. It is slow, as this cell shows:

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
# Before you measure a kernel on a GPU, you should know what to expect. A kernel has to do two things: read its inputs and write its results, and
# compute. Both have a speed limit. Count for one decode step in one layer of GPT-2 small, in bfloat16:

# %% tags=["nbval-check-output"]
print("sequences  context      bytes   operations   operations for each byte")
for num_seqs, context in ((1, 512), (64, 512), (256, 512), (256, 1024)):
    work = ch06.decode_work(num_seqs, context, 12, 64, 2)
    print(f"{num_seqs:9d} {context:8d} {work.num_bytes / 1e6:7.1f} MB", end="")
    print(f" {work.num_operations / 1e6:8.1f} M {work.intensity:16.3f}")

# %% [markdown]
# The last column is the **arithmetic intensity**. It is 1, or slightly less, whatever the batch and the context are. Each number of K is
# used for one multiplication and one addition, and then never again in this step. The same is true of V. A number has two bytes. (The small difference comes
# from the queries and the results.) No change of the kernel changes this.
#
# > **Predict.** An H200 reads about 4 TB a second, and its matrix units compute about 700 T operations a second. Its
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
# That would be right if we waited for arithmetic. But the numbers arrive at 4 T bytes a second, so there are 4 T operations to do a second, one for
# each byte. Units that could do 60 T wait just like units that could do 700 T.
# </details>
#
# <details><summary><b>If you said not at all</b></summary>
#
# That is right. Reading and computing overlap, and the longer of the two remains: the shortest possible time, the *floor*, is the same.
# </details>
#
# ### Exercise 6.5: what is possible (6 points)
#
# This is plain Python. Count for one query of one head over one token first, then multiply. For the splits, the cell under *How many parts* shows
# the results for 12 heads and 3,168 wanted programs. Try 64 sequences by hand, where there are 768 programs without any split.

# %%
viz.show_task(ch06.decode_work, ch06.floor_seconds, ch06.choose_num_splits)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch06.decode_work, ch06.floor_seconds, ch06.choose_num_splits)

# %% [markdown]
# ## The roofline
#
# A picture of these limits has the intensity on the horizontal axis and operations per second on the vertical axis, both logarithmic. Memory
# allows (bytes per second) × (operations per byte), which is a straight line. Arithmetic allows a fixed number, which is a flat line. Together they form a roof.
# The corner where they meet is the *ridge*. This is the **roofline** (Williams, Waterman and Patterson, 2009). A kernel is a point under
# the roof. Its distance from the roof is what can be gained. Its place, left or right of the ridge, says what limits it: memory or arithmetic.
#
# The next cells show the engine's own kernels, measured with `pagebrain bench kernels`. On a GPU the cell measures anew, in about a minute. Elsewhere it reads
# a recording.

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
# The slope of the roof is the speed of a plain copy in the same run, and the flat part is the speed of a large matrix product. Both are a little
# less than the data sheet says. On the left, all decode points stand at an intensity of 1, far to the left of the ridge, one above
# the other. On the right each point has a place of its own: a column is a number of sequences, and its three points are contexts of 128, 512 and 960 tokens.
#
# Prefill is elsewhere. There a key is used by every query that comes after it. Both points are prompts of 512 tokens, one prompt alone and
# eight together, so both have the same intensity, about 128: a query sees 256 tokens on average, with 4 operations for each of a head's numbers (two
# multiplications, two additions). For each token four such numbers are moved, of query, K, V and result, and each has 2 bytes. $4 \cdot 256 / (4 \cdot 2)$ is 128.
# Longer prompts would be further to the right. In the recorded run they reach 5 and 21
# percent of the roof. These launches are short (15 and 29 microseconds, and starting and ending takes a good part of that). A single prompt has too few
# tiles to fill 132 multiprocessors: 64 queries each, that is 8 tiles for each of 12 heads. And the kernel is a simple one: between its two products,
# while the softmax is computed, the matrix units wait.
#
# How far are the decodes from the floor?

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
# Read the table from the bottom. A full batch moves so many bytes that everything else is small beside them. (A kernel that only reads may even
# be faster than a copy, which has to write as well, by a percent or two.) For a single sequence the
# floor is below a microsecond, and no kernel is that fast: it has to be started, its first load takes most of a microsecond,
# and then comes the merge. Such a step is not limited by memory's *bandwidth* but by its *latency*. Splitting helps there, and only
# there, because more loads wait at the same time.
#
# Your own kernels are simpler than the engine's: they always merge, load one tile at a time, and look up the block of each token. How much time does that
# cost? This cell measures yours, or the chapter's, on the same shapes. Each launch is repeated from a CUDA graph, which is a recording of launches that
# one call repeats (chapter 07), so Python's part does not count.

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
# (One sequence's 1.5 MB of K and V stay in the GPU's own cache from one launch to the next, so the first lines may be faster than memory allows.
# In a model this would not happen, because twelve layers take turns.)
#
# ## Where are your kernels?
#
# The intensity above is that of the least possible work. What do kernels really move? In the interpreter this can be counted exactly, without a GPU: `watching()` notes
# each load and store of each program, and `num_bytes` adds them up. Here are one sequence of 96 tokens and the kernels with one part:

# %%
if not INTERPRETED:
    print("skipped: compiled kernels cannot be watched; set TRITON_INTERPRET=1 first")
else:
    inputs = scene([96], num_heads=2, head_dim=64, block_size=16, dtype=torch.float16)
    with watching() as watch:
        ch06.paged_decode(*inputs[:5], inputs[-1], num_splits=1)
    for name in ("key_pool_ptr", "value_pool_ptr", "query_ptr", "tables_ptr", "acc_ptr"):
        print(f"{name:15s} {watch.num_bytes(name):7,d} bytes")
    work = ch06.decode_work(1, 96, 2, 64, 2)
    print(
        f"all together    {watch.num_bytes():7,d} bytes; the least is {work.num_bytes:,d}"
    )
    print(
        f"intensity {work.num_operations / watch.num_bytes():.3f}, at best {work.intensity:.3f}"
    )

# %% [markdown]
# ### Exercise 6.6: measure and explain (3 points)
#
# Do the same for 6 parts, in a cell of your own: which intensity do you find? Then explain it. On which side of the ridge is the point, so which of the
# roofline's two limits is above it, bandwidth or arithmetic? Where do the bytes come from that `decode_work` does not count? (That a single sequence does not
# even reach its limit, because of latency, is another matter, and is not asked.) The function returns the number that you found, written as a number, and your
# text. The number is checked, and the text goes to your instructor.

# %%
viz.show_task(ch06.answer_6_6)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch06.answer_6_6)

# %% [markdown]
# ## What the next chapter must fix
#
# A step of GPT-2 small has 12 layers. Each layer writes K and V, attends and merges. There are also the matrix products, the norms and the rest of the layer.
# How many launches does a step need, if each operation is launched from Python?

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
# At some microseconds each, the launches take longer than attention takes on the GPU for the whole batch. The kernel is near the roof, and the GPU waits for
# Python. Chapter 07 keeps the state of a batch on the GPU, records the launches of a step once, and launches all of them with one call.
