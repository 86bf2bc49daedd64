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
# # Chapter 03: read the pages where they lie
#
# Chapter 02 cut the cache into blocks that may lie anywhere. To attend, it first *gathers* them: it copies all keys and
# values of a sequence into one piece, for every token and in every layer. The copy is used once and thrown away.
#
# The copy is there because softmax seems to need all scores at the same time. It does not. This chapter computes softmax one
# page at a time. (A *page* is a block as its sequence sees it: page 0 holds the sequence's first tokens, wherever the block
# lies.)
#
# **You need:** chapter 02, and softmax. **Time:** about six hours, exercises included.
#
# *After this chapter you can* derive the online softmax and prove it right, write attention that follows a block table, do it
# for many queries side by side, and say what that saves and what it does not save.
#
# *If this chapter is left to you (a copy from a course), the cells use your own file in `work/` for the tasks that are done, and
# lent functions for the others. So the page runs from the beginning, and each exercise stands right after its idea.
# `python -m chapters start 03` writes `work/ch03_paged_attention.py`, unless it is there already; `python -m chapters check 03`
# checks it.*

# %%
import sys

sys.path.insert(0, "..")  # the chapters lie one folder up

import itertools
import math
import random
import time

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

from chapters.aids.new_tensors import NewTensors
from chapters.course import load_stage
from pagebrain import PageBrainConfig, viz
from pagebrain.assets import BUNDLED_MODEL
from pagebrain.model_config import attention_scale

logging.disable_progress_bar()
torch.set_num_threads(1)
ch01, ch02, ch03 = load_stage("01"), load_stage("02"), load_stage("03")
model = GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, attn_implementation="eager").eval()
exact = GPT2LMHeadModel.from_pretrained(
    BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager"
).eval()
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)

# %% [markdown]
# ## The problem, measured
#
# A decode step computes one new token. How many bytes does chapter 02 copy for it? PyTorch can tell us. Inside
# `with NewTensors() as made:`, each operation is counted, and each tensor that is *new* is noted. A tensor is new if it is no
# view of a tensor that was there before. This is all that you need to know of it:

# %%
print(NewTensors.__doc__)

# %%
text = (tokenizer.encode("One day a girl met a fox. ") * 150)[:1000]


def before_token(length):
    """A cache that holds ``length - 1`` tokens of the text, and the step that computes the next one."""
    config = PageBrainConfig.for_model(model, num_blocks=64)
    cache = ch02.PagedCache(ch02.BlockManager(config), config)
    cache.grow(0, length)
    rows = ch02.Rows(cache, [(0, 0, text[: length - 1])])
    run_step(cache, rows, ch02.attend_gathered)
    return cache, ch02.Rows(cache, [(0, length - 1, text[length - 1 : length])])


def run_step(cache, rows, make_attend):
    attend = make_attend(model, cache, rows)
    return ch01.forward(model, rows.token_ids, rows.positions, attend, rows.last_rows)


num_layers = model.config.n_layer
bytes_per_token = 2 * num_layers * model.config.n_embd * 4
cached = {length: before_token(length) for length in (64, 256, 960)}

# %%
print(f"K and V of the new token: {bytes_per_token:,} bytes")
for length, (cache, _) in cached.items():
    with NewTensors() as copies:
        for layer in range(num_layers):
            cache.gather(layer, 0, length)
    times = copies.num_bytes // bytes_per_token
    print(f"token {length:3d}: {copies.num_bytes:>9,} bytes copied, {times} times that")
pages = [-(-length // 16) for length in range(1, 961)]
print(f"for a text of 960 tokens: {sum(pages) * 16 * bytes_per_token / 1e9:.2f} GB in all")

# %% [markdown]
# The new token adds 4 KiB to the cache. To attend from it, chapter 02 copies everything that the cache holds. Summed over a
# text, these copies grow with the square of its length. Chapter 00 had the same problem in another place. What does it cost in
# time?


# %%
def best_seconds(run, num_runs=3) -> float:
    """The shortest of a few runs: other work on the machine can only make a run longer."""
    times = []
    for _ in range(num_runs):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


for length, (cache, rows) in cached.items():
    step = best_seconds(lambda: run_step(cache, rows, ch02.attend_gathered), 30)
    copy = best_seconds(
        lambda: [cache.gather(layer, 0, length) for layer in range(num_layers)], 30
    )
    print(f"token {length:3d}: step {step * 1e3:5.2f} ms", end=", ")
    print(f"of which copying {copy * 1e3:5.2f} ms ({copy / step:.0%})")

# %% [markdown]
# The copy's share of the time grows with the context. The copy also needs *memory*: one piece, as long as the longest context.
# Chapter 02 had made such pieces unnecessary.
#
# ## The idea: softmax piece by piece
#
# For one query of one head, let $s_j$ be the score of token $j$, and $v_j$ its value. Attention is a weighted mean:
#
# $$\mathrm{out} \;=\; \frac{\sum_j e^{s_j}\, v_j}{\sum_j e^{s_j}}$$
#
# These are two sums, and sums can be computed page by page: no page needs another. If that were all, we would be done. But
# softmax is not computed in this form, for a reason that a few numbers show.

# %% tags=["nbval-check-output"]
for score in (10.0, 88.0, 89.0, -80.0, -110.0):
    print(f"exp({score:6.1f}) in float32 = {torch.tensor(score).exp().item():.4g}")

# %% [markdown]
# float32 ends at about $3.4 \cdot 10^{38}$, which is $e^{88.7}$. (float16 ends at 65504, which is $e^{11.1}$.) Above that
# comes `inf`, and `inf / inf` is `nan`. On the other side, if *all* terms become 0, we get `0 / 0`, `nan` again.
#
# So we want the scores near 0. They can be moved there, because a constant $c$ that is subtracted from all scores cancels:
#
# $$\frac{\sum_j e^{s_j - c}\, v_j}{\sum_j e^{s_j - c}}
#   \;=\; \frac{e^{-c}\sum_j e^{s_j}\, v_j}{e^{-c}\sum_j e^{s_j}} \;=\; \mathrm{out}$$
#
# The usual choice is the maximum, $c = m = \max_j s_j$. Then the largest term is $e^0 = 1$, every other is at most 1, and
# the sum of $n$ terms lies between 1 and $n$. No overflow, and no division by zero.
#
# To see it on real scores we need a real query. `ch02.generate` takes the function that makes `attend`, so a wrapper around
# chapter 02's function can keep what passes through it. Three stories are generated. We keep the query of the *last* token of
# the second story, B, in each layer.

# %% tags=["nbval-check-output"]
prompts = [
    tokenizer.encode(line)
    for line in ("One day", "One day a girl met a fox.", "The fox said")
]
kept = {}


def gather_and_keep(model, cache, rows):
    attend = ch02.attend_gathered(model, cache, rows)

    def attend_and_keep(layer, query, key, value):
        out = attend(layer, query, key, value)
        index = rows.seq_ids.index(1)
        last = rows.last_rows[index]
        kept[layer] = {
            "query": query[last],
            "key_pool": cache.key_pools[layer],
            "value_pool": cache.value_pools[layer],
            "context_len": rows.context_lens[index],
            "gathered": cache.gather(layer, 1, rows.context_lens[index]),
            "out": out[last],
            "scale": attention_scale(model.config, layer),
        }
        return out

    return attend_and_keep


traces = []
answers = ch02.generate(
    exact, prompts, 62, make_attend=gather_and_keep, on_step=traces.append
)
block_table = traces[-1].block_tables[1]
print(tokenizer.decode(prompts[1] + answers[1]))


def real_scores(layer):
    """What the kept query scores with every token of its context, ``[num_heads, context_len]``."""
    keys, _ = kept[layer]["gathered"]
    return torch.einsum("hd,khd->hk", kept[layer]["query"], keys) * kept[layer]["scale"]


LAYER, HEAD = 1, 1
scores = real_scores(LAYER)[HEAD].float()
print(f"\nscores of {len(scores)} tokens, from {scores.min():.2f} to {scores.max():.2f}")
for shift in (0, 100, -200):
    plain = (scores + shift).exp()
    safe = (scores + shift - (scores + shift).max()).exp()
    weights = [(terms / terms.sum()).max().item() for terms in (plain, safe)]
    print(f"all scores {shift:+4d}: largest weight {weights[0]:.4f}", end=", ")
    print(f"with the maximum subtracted {weights[1]:.4f}")

# %% [markdown]
# By the formula above, the second and third lines are the same softmax as the first. Softmax, and with it the loss of training,
# does not change if all scores of a query move together. So training has no reason to keep them near 0, and we subtract the
# maximum, always.
#
# Here is the obstacle: **the maximum is known only when all scores have been seen.** A page may bring a larger maximum after
# many terms have been summed with the old one.
#
# ### The way out
#
# Let $S$ be the tokens seen so far, and keep three things about them:
#
# $$m = \max_{j \in S} s_j, \qquad \ell = \sum_{j \in S} e^{s_j - m}, \qquad a = \sum_{j \in S} e^{s_j - m}\, v_j$$
#
# ($a$ is `acc` in the code, $\ell$ is `total`, $m$ is `maximum`.) Now a page with tokens $P$ comes. The new maximum is
# $m' = \max(m, \max_{j \in P} s_j)$. What must $\ell$ become? Write down what it should be, and split the sum:
#
# $$\ell' \;=\; \sum_{j \in S \cup P} e^{s_j - m'} \;=\; \sum_{j \in S} e^{s_j - m'} \;+\; \sum_{j \in P} e^{s_j - m'}$$
#
# In the first sum, $s_j - m' = (s_j - m) + (m - m')$, and the second bracket is the same for all $j$:
#
# $$\sum_{j \in S} e^{s_j - m'} \;=\; e^{m - m'} \sum_{j \in S} e^{s_j - m} \;=\; e^{m - m'}\, \ell$$
#
# So the old scores are not needed again. One factor, $e^{m - m'} \le 1$, corrects everything that was summed before. With $v_j$
# in the sums the derivation is the same, and this is the recurrence (Milakov and Gimelshein, 2018, for the sum; FlashAttention, Dao
# et al., 2022, for the values):
#
# $$\begin{aligned}
#   m' &= \max\bigl(m, \max_{j \in P} s_j\bigr) \\
#   \ell' &= e^{m - m'}\, \ell + \sum_{j \in P} e^{s_j - m'} \\
#   a' &= e^{m - m'}\, a + \sum_{j \in P} e^{s_j - m'}\, v_j
# \end{aligned}
# \qquad\text{and at the end}\qquad \mathrm{out} = \frac{a}{\ell}$$
#
# ### The proof
#
# *Invariant:* after each page, $m$, $\ell$ and $a$ are what the three definitions say for the set $S$ of all tokens seen.
#
# *Start.* $S$ is empty. Take $m = -\infty$, $\ell = 0$, $a = 0$. The sums are empty, and the maximum of an empty set is
# $-\infty$ by convention. *First page.* With $e^{-\infty} = 0$ the factor is 0, and the recurrence leaves only the page's own
# sums. *Step.* Let the invariant hold for $S$. The derivation above shows that the new values are those of the
# definitions for $S \cup P$. *End.* $S$ is all tokens, and $a / \ell$ is the fraction we began with, for $c = m$. $\square$
#
# Two things follow. Once a token has been seen, $1 \le \ell \le |S|$, because the largest term is 1. And the proof does not
# depend on the order of the pages, nor on the number of tokens in each, as long as each has a visible token.
#
# What happens with a page of which the query sees *nothing*, so that all of its scores are $-\infty$? If it comes *later*, $m$ is
# already a number. So $m' = m$, the factor is $e^0 = 1$, each new term is $e^{-\infty - m} = 0$, and nothing changes, as it
# should be. If it comes *first*, $m' = -\infty$, and the factor is $e^{-\infty - (-\infty)}$. In floating point that is `nan`,
# and every later result is `nan` too. So the first page must have a visible token. In causal attention it has one: every query
# sees token 0.
#
# ### By hand
#
# Two pages with two tokens each, one head, values that are single numbers:
#
# | page | scores | values |
# |---|---|---|
# | 0 | $\ln 1,\ \ln 2$ | $4,\ 1$ |
# | 1 | $\ln 4,\ \ln 1$ | $1,\ 8$ |
#
# *Page 0:* $m = \ln 2$. The terms are $\tfrac{1}{2}$ and $1$, so $\ell = \tfrac{3}{2}$ and $a = \tfrac{1}{2} \cdot 4 + 1 \cdot 1 = 3$.
#
# *Page 1:* $m' = \ln 4$, and the factor is $e^{\ln 2 - \ln 4} = \tfrac{1}{2}$. The new terms are $1$ and $\tfrac{1}{4}$. So
# $\ell' = \tfrac{1}{2} \cdot \tfrac{3}{2} + \tfrac{5}{4} = 2$ and $a' = \tfrac{1}{2} \cdot 3 + 1 \cdot 1 + \tfrac{1}{4} \cdot 8 = \tfrac{9}{2}$.
#
# *End:* $\mathrm{out} = \tfrac{9}{2} / 2 = 2.25$. All at once: $(1 \cdot 4 + 2 \cdot 1 + 4 \cdot 1 + 1 \cdot 8) / (1 + 2 + 4 + 1)
# = 18 / 8 = 2.25$.
#
# The chapter keeps the three numbers in a tuple, for any number of queries and heads at once:

# %%
viz.show_source(ch03.Partial)

# %% [markdown]
# ### Exercise 3.1: one more page (12 points)
#
# You have the recurrence. First work out the shapes on paper: there is one $m$ and one $\ell$ for each head, and one `acc` for
# each head and dimension. Which of them needs an extra dimension, and where? Then try the two special cases of the proof: the
# first page, where $m = -\infty$, and a *later* page that is hidden as a whole. Does your expression for the factor give 0 in the
# one case and 1 in the other, or `nan`? (The task promises that the first page is never hidden as a whole.) The old `partial`
# belongs to the caller: return new tensors. `python -m chapters check 03` checks what you have done so far.

# %%
viz.show_task(ch03.add_page)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch03.add_page)

# %% [markdown]
# The next cell repeats the calculation by hand with `add_page`.

# %% tags=["nbval-check-output"]
hand_scores = torch.tensor([[1.0, 2.0], [4.0, 1.0]], dtype=torch.float64).log()
hand_values = torch.tensor([[4.0, 1.0], [1.0, 8.0]], dtype=torch.float64)

partial = ch03.Partial.start(torch.zeros(1, 1, dtype=torch.float64))  # one head, head_dim 1
for page in range(2):
    partial = ch03.add_page(
        partial, hand_scores[page][None], hand_values[page][:, None, None]
    )
    m, total, acc = (x.item() for x in partial)
    print(
        f"after page {page}: exp(m) = {math.exp(m):.2f}, l = {total:.2f}, acc = {acc:.2f}"
    )
at_once = hand_scores.flatten().softmax(0) @ hand_values.flatten()
print(f"acc / l = {acc / total:.4f}, softmax over all four = {at_once:.4f}")

# %% [markdown]
# > **Predict.** Go on by hand. After page 1, $\ell = 2$. Page 2 has one visible token, with a score of $\ln 4000$. Does $\ell$
# > become larger or smaller, and what is it, roughly?

# %% tags=["nbval-check-output"]
new_score, new_value = (
    torch.tensor([[4000.0]]).double().log(),
    torch.zeros(1, 1, 1).double(),
)
after = ch03.add_page(partial, new_score, new_value)
print(f"l was {partial.total.item():.3f} and is {after.total.item():.3f}")

# %% [markdown]
# <details><summary><b>If you said larger, about 3</b></summary>
#
# $\ell$ is a sum of positive terms, and one more term is added. So it grows, as long as the maximum stays. But the terms are
# relative to the *maximum*. A new maximum that is a thousand times as large makes all earlier terms a thousand times smaller:
# $2 / 1000 + 1 = 1.002$.
# </details>
#
# <details><summary><b>If you said 1: the new maximum starts afresh</b></summary>
#
# Nearly, and with a score that is large enough float32 would show exactly 1. But the earlier sums are not dropped, they
# *shrink*. A program that resets $\ell$ and `acc` at a new maximum is right in a test in which each new maximum is far larger
# than all earlier ones. On real scores it is wrong, as the next picture shows.
# </details>
#
# ## A real query, page by page
#
# Here is the query of story B that was kept: layer 1, head 1, four full pages and one that is partly filled. The pages go
# through `add_page` one after the other.

# %%
keys, values = kept[LAYER]["gathered"]
partial, steps = ch03.Partial.start(kept[LAYER]["query"]), []
for page_scores, page_values in zip(
    real_scores(LAYER).split(16, dim=-1), values.split(16), strict=True
):
    partial = ch03.add_page(partial, page_scores, page_values)
    steps.append(viz.PageStep(page_scores[HEAD], *(x[HEAD] for x in partial)))

assert torch.allclose(
    partial.acc / partial.total.unsqueeze(-1), kept[LAYER]["out"], atol=1e-12, rtol=0
)
viz.attention_by_page(steps, block_table)

# %% [markdown]
# The bars in the upper part are scores, and the line is $m$. The middle part shows the final weights. The lower part compares
# `acc / l` after each page with its final value. A partial output is no estimate of the final one: it is the exact attention
# over the pages so far. In this head the last page has more than half of the weight, so all earlier outputs are far from the
# final one. The final output is exact all the same.

# %% tags=["nbval-check-output"]
for page, step in enumerate(steps):
    print(f"after page {page}: m = {step.maximum:6.2f}, l = {step.total:5.2f}")

# %% [markdown]
# So on real scores $\ell$ goes down and up again.
#
# ## Pages anywhere
#
# The proof needs the scores and values of a page. Their place in memory does not matter: the block table says where to read. To
# see this, we hand out the blocks in a shuffled order.


# %%
def logits_with_blocks_shuffled(seed):
    """The next logits of the stories, with all K and V in blocks that were handed out in random order."""
    config = PageBrainConfig.for_model(exact, num_blocks=16)
    manager = ch02.BlockManager(config)
    block_ids = manager.allocate(config.num_blocks)
    random.Random(seed).shuffle(block_ids)
    manager.free(block_ids)  # they are free again, in another order
    cache = ch02.PagedCache(manager, config)
    for seq_id, story in enumerate(stories):
        cache.grow(seq_id, len(story))
    rows = ch02.Rows(cache, [(seq_id, 0, story) for seq_id, story in enumerate(stories)])
    attend = ch03.attend_paged(exact, cache, rows)
    logits = ch01.forward(exact, rows.token_ids, rows.positions, attend, rows.last_rows)
    return logits, rows.trace(0, cache)


stories = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
stories[2] = stories[2][:25]
shuffled = [logits_with_blocks_shuffled(seed) for seed in range(5)]
viz.block_tables(shuffled[0][1], with_pool=True)

# %% [markdown]
# > **Predict.** Compare two changes. (i) The same pages, in the same logical order, lie in other physical blocks. (ii) A query
# > takes its pages in another *order*, for example the last one first. Which of the two changes the result? Which of them
# > changes its last bits?

# %%
with torch.no_grad():
    theirs = torch.stack([exact(torch.tensor([story])).logits[0, -1] for story in stories])
for logits, _ in shuffled:
    assert torch.allclose(logits, theirs, atol=1e-9, rtol=0)
same = all(torch.equal(logits, shuffled[0][0]) for logits, _ in shuffled)
print(f"(i)  5 placements: equal to Hugging Face; equal to each other in every bit: {same}")

pieces = list(
    zip(real_scores(LAYER).float().split(16, -1), values.float().split(16), strict=True)
)
outs = []
for order in itertools.permutations(pieces):
    partial = ch03.Partial.start(kept[LAYER]["query"].float())
    for page_scores, page_values in order:
        partial = ch03.add_page(partial, page_scores, page_values)
    outs.append(partial.acc / partial.total.unsqueeze(-1))
close = all(torch.allclose(out, outs[0], atol=1e-5) for out in outs)
same = all(torch.equal(out, outs[0]) for out in outs)
print(f"(ii) {len(outs)} orders: equal to 5 digits: {close}; equal in every bit: {same}")

# %% [markdown]
# <details><summary><b>If you said that neither changes anything</b></summary>
#
# In exact arithmetic that is right: the invariant is about a *set*. But floating-point addition rounds, and $(x + y) + z$ may
# round differently from $x + (y + z)$. So another order gives other last bits. For this reason we compare with Hugging Face up
# to a tolerance, and two correct kernels may differ.
# </details>
#
# <details><summary><b>If you said that (ii) must be wrong, since text has an order</b></summary>
#
# The order of the tokens enters GPT-2 in the embedding of positions, before the first layer, and so it is already part of the
# keys and values. Attention itself only needs to know which tokens *may be seen*.
# </details>
#
# <details><summary><b>If you said that (i) changes bits</b></summary>
#
# The address of a block does not enter any sum. The same numbers are added in the same order.
# </details>

# %% [markdown]
# ### Exercise 3.2: one query over its pages (8 points)
#
# Take a context of 9 tokens in blocks of 4, and the block table `[6, 2, 7, 5]`. Write down which blocks are read, and how many
# slots of each. Then do the same for 8 tokens. The table may be longer than the context needs, and the entries after that may
# be anything. `add_page` does the rest, if you give it one page at a time. Gathering the whole context first would give the same
# numbers, but that is chapter 02: the tests watch how much is copied at a time.

# %%
viz.show_task(ch03.attend_one)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch03.attend_one)

# %% [markdown]
# > **Predict.** B's last page is not full: some of its 16 slots hold no token of B. Suppose we forget to mask and attend
# > over the whole page. The pool is filled with zeros at the start. Is the result right as long as these slots are zero?

# %% tags=["nbval-check-output"]
own = kept[LAYER]
context_len = own["context_len"]
whole_pages = 16 * len(block_table)
used = context_len % 16
print(f"{context_len} tokens: {used} of the last page's 16 slots hold a token")


def distance(key_pool, value_pool, num_tokens):
    """How far head 1's output is from the right one, relative to its length."""
    out = ch03.attend_one(
        own["query"], key_pool, value_pool, block_table, num_tokens, own["scale"]
    )
    return ((out - own["out"])[HEAD].norm() / own["out"][HEAD].norm()).item()


key_pool, value_pool = own["key_pool"].clone(), own["value_pool"].clone()
last = block_table[-1]
key_pool[last, used:], value_pool[last, used:] = 0, 0
print(
    f"masked, zeros there:        off by {distance(key_pool, value_pool, context_len):.1%}"
)
print(
    f"not masked, zeros there:    off by {distance(key_pool, value_pool, whole_pages):.1%}"
)
for page in (0, 3):  # as if the block had held other tokens before
    for pool in (key_pool, value_pool):
        pool[last, used:] = pool[block_table[page], used:]
    off = distance(key_pool, value_pool, whole_pages)
    print(f"not masked, page {page}'s there: off by {off:.1%}")
print(
    f"masked, page 3's there:     off by {distance(key_pool, value_pool, context_len):.1%}"
)

# %% [markdown]
# <details><summary><b>If you said yes: zeros add nothing</b></summary>
#
# A zero *value* adds nothing to `acc`. But a zero *key* gives a score of 0, and $e^{0 - m}$ is not 0. This term is added to
# $\ell$, and the output becomes too small. A slot is invisible only with the score $-\infty$, whose term is exactly 0.
# </details>
#
# <details><summary><b>If you said that it does not matter, since softmax weights are small</b></summary>
#
# They are small if $m$ is far above the scores of the empty slots. Here that happens to be true for the tokens of page 0. It is
# not true for zeros, nor for the tokens of page 3. A forgotten mask is a mistake that depends on the head, on the text and on
# the tokens that the block held before. Reading the output will not find it. The tests fill all slots that hold no token with a
# huge number, so that the mistake is seen in every head.
# </details>
#
# ## Many queries at once: lanes
#
# A step of the engine has many queries: the decodes of some sequences, and a chunk of the prompt of another one. Each row of
# `query` is a *lane*: one query with a context of its own, which ends at its own token. In step $p$ of the loop all lanes take
# page $p$ of *their* sequence together. Here is a small batch with blocks of 4 slots: A computes three prompt tokens, B and C
# decode. Each entry is the block that the lane reads, and in brackets how many of its slots the lane may see.

# %%
config = PageBrainConfig.for_model(exact, block_size=4, num_blocks=8)
cache = ch02.PagedCache(ch02.BlockManager(config), config)
before, new = {0: 6, 1: 13, 2: 2}, {0: 3, 1: 1, 2: 1}
for length in range(1, 15):  # token by token, so that the blocks come in turn
    for seq_id in before:
        if length <= before[seq_id] + new[seq_id]:
            cache.grow(seq_id, length)
earlier = ch02.Rows(cache, [(i, 0, stories[i][: before[i]]) for i in before])
batch = ch02.Rows(
    cache, [(i, before[i], stories[i][before[i] :][: new[i]]) for i in before]
)

print("lane  token   step 0   step 1   step 2   step 3")
owners = [seq_id for seq_id in before for _ in range(new[seq_id])]
for lane, (seq_id, position) in enumerate(
    zip(owners, batch.positions.tolist(), strict=True)
):
    entries = ["-"] * 4
    for seen in range(position + 1):
        entries[seen // 4] = f"{cache.block_table(seq_id)[seen // 4]} ({seen % 4 + 1})"
    print(f"{lane:4d}  {'ABC'[seq_id]}{position:<5d}" + "".join(f"{e:>9}" for e in entries))

# %% [markdown]
# Read it column by column. In step 0 every lane has a page. In step 1, C has none. In step 2, lane 2 is the only lane of A that
# has a page: its token is the first in that block, and the two tokens before it must not see it. Lane 0 sees one slot less of
# page 1 than lane 1. This is the causal mask, and nothing else is needed for it: the number of visible slots hides both later
# tokens and empty slots.
#
# The chapter contains the function that makes these inputs and calls yours:

# %%
viz.show_source(ch03.attend_paged)

# %% [markdown]
# ### Exercise 3.3: all lanes together (15 points)
#
# Draw the table of lanes above for a batch of your own, from `block_tables`, `context_lens` and `query_starts` alone. Two
# questions come first for each lane: to which sequence does it belong, and how many tokens does it see? For a decode the second
# answer is the context length. For the first token of a chunk of three it is the context length less two. Then decide what a
# lane does in a step in which it has no page. Leaving it out and masking it are both right. Reading past the end of a block
# table is not. A loop over the rows would be short, but it starts as many operations as there are rows: let all lanes take
# their page together.

# %%
viz.show_task(ch03.paged_attention)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch03.paged_attention)

# %% [markdown]
# The batch of the table, computed in both ways:

# %% tags=["nbval-check-output"]
results = {}
for name, make_attend in (
    ("gathered", ch02.attend_gathered),
    ("page by page", ch03.attend_paged),
):
    for rows in (earlier, batch):
        attend = make_attend(exact, cache, rows)
        results[name] = ch01.forward(
            exact, rows.token_ids, rows.positions, attend, rows.last_rows
        )
assert torch.allclose(results["gathered"], results["page by page"], atol=1e-9, rtol=0)
print("5 lanes: the logits of A, B and C are those of chapter 02")

# %% [markdown]
# ## The whole generation, compared with Hugging Face

# %% tags=["nbval-check-output"]
mine = {}


def note(index, scores):
    mine.setdefault(index, []).append(scores)


answers = ch03.generate(exact, prompts, 40, on_logits=note)
with torch.no_grad():
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        theirs = exact(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(torch.stack(mine[index]), theirs, atol=1e-9, rtol=0)
        assert answer == theirs.argmax(-1).tolist()
assert answers == ch02.generate(exact, prompts, 40)
compared = sum(len(scores) for scores in mine.values()) * exact.config.vocab_size
print(f"3 answers of 40 tokens, {compared:,} logits equal to Hugging Face's")

# %% [markdown]
# ## What was gained, and what was not
#
# `NewTensors` again, now around attention as a whole. What is the largest tensor that attention makes in a decode step?
# `attend_one` computes one query in one layer, the other two a whole step.


# %%
def watched(make_attend):
    """The same attention, and the ``NewTensors`` that watches it."""
    made = NewTensors()

    def make(model, cache, rows):
        attend = make_attend(model, cache, rows)

        def attend_watched(*args):
            with made:
                return attend(*args)

        return attend_watched

    return make, made


seen = {}
for length, (cache, rows) in cached.items():
    for name, make_attend in (("02", ch02.attend_gathered), ("03", ch03.attend_paged)):
        make, made = watched(make_attend)
        run_step(cache, rows, make)
        seen[name, length] = made
    with NewTensors() as made:
        pools, scale = (
            (cache.key_pools[0], cache.value_pools[0]),
            attention_scale(model.config, 0),
        )
        query = torch.ones(pools[0].shape[2:])  # [num_heads, head_dim]
        ch03.attend_one(query, *pools, cache.block_table(0), length, scale)
    seen["one", length] = made

# %%
print("largest tensor made, in numbers")
print("context   gathered   paged_attention   attend_one")
for length in cached:
    sizes = [seen[name, length].largest for name in ("02", "03", "one")]
    print(f"{length:7d} {sizes[0]:>10,} {sizes[1]:>17,} {sizes[2]:>12,}")

# %% [markdown]
# Gathering needs memory that grows with the context. Page by page, the size stays the same: for `paged_attention` here it is one
# page of keys, 16 tokens of 128 numbers, and for `attend_one` it is no more than a query. (Another correct solution may make
# somewhat larger tensors, but none that grow.) This is the gain, and on a GPU it is a large one.
#
# Now the other side.
#
# > **Predict.** The memory is constant. Is a decode step of chapter 03 also *faster* than one of chapter 02, here, in PyTorch on
# > a CPU?
#
# (The axis of time is logarithmic where the two lines are far apart: each mark is about twice the one below it.)

# %%
context_lens = [16, 128, 256, 512, 960]
prepared = [before_token(length) for length in context_lens]
viz.latency_by_context(
    {
        label: (
            context_lens,
            [best_seconds(lambda: run_step(*step, make_attend)) for step in prepared],
        )
        for label, make_attend in (
            ("02 gathered", ch02.attend_gathered),
            ("03 page by page, in Python", ch03.attend_paged),
        )
    }
)

# %%
for length, (cache, rows) in cached.items():
    for name, make_attend in (("02", ch02.attend_gathered), ("03", ch03.attend_paged)):
        seconds = best_seconds(lambda: run_step(cache, rows, make_attend))
        made = seen[name, length]
        print(
            f"context {length:3d}, chapter {name}: {made.num_operations:5,} operations in attention,"
            f" {made.num_bytes / 1e6:4.2f} MB made, step {seconds * 1e3:5.1f} ms"
        )

# %% [markdown]
# <details><summary><b>If you said faster, since nothing is copied</b></summary>
#
# Look at the megabytes: about as many are made as before, in smaller pieces. When PyTorch picks pages with an index tensor, it
# copies them, one page for each lane. It has no operation that computes with pages at a list of addresses. (`attend_one` picks a
# page with a plain number. That gives a *view*, and no key or value is copied at all. But it computes one query.)
# </details>
#
# <details><summary><b>If you said equal, since the arithmetic is the same</b></summary>
#
# The arithmetic is equal. The number of *operations* is not, as the column says: chapter 02 starts the same number for any
# context, and in chapter 03 the number grows with the pages. To start an operation from Python costs some microseconds, however
# little it computes. With 60 pages this cost is nearly all of the time.
# </details>
#
# <details><summary><b>If you said slower, because of the indexing</b></summary>
#
# Slower is right, and indexing is a part of the reason: each page is picked with an index tensor, and that copies it. But the
# megabytes show that chapter 02 copies about as much, because it picks the same slots in one operation. The difference is *how
# many operations* are started for each page: to pick it, to score it, to mask it, and to add it to the sums. Without the
# indexing, as in `attend_one`, most of these operations remain.
# </details>

# %% [markdown]
# ### Exercise 3.4: measure and explain (3 points)
#
# How many operations does *your* `paged_attention` start for one more page of context? Use `NewTensors` as above, with two
# contexts, and divide what differs. Then say in one to four sentences why chapter 03 is slower than chapter 02 on this machine,
# and what a kernel changes. The number is checked, and your instructor reads the text. The next section has a part of the
# answer.

# %%
viz.show_task(ch03.answer_3_4)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch03.answer_3_4)

# %% [markdown]
# ### What a kernel changes
#
# On this machine chapter 03 is slower than chapter 02, and the difference grows with the context. What it gives is a *method*. A
# kernel is a program for the GPU itself. It runs this loop inside one operation: it reads a page from the pool where it lies,
# keeps $m$, $\ell$ and `acc` in registers, and goes on to the next page. No copy of K and V is written to memory, and no
# operation is started for each page. Such a kernel is short, and serving systems use it.
#
# One more number, for the prompt. There each of its tokens is a lane:

# %%
config = PageBrainConfig.for_model(model, num_blocks=64)
for length in (64, 512):
    cache = ch02.PagedCache(ch02.BlockManager(config), config)
    cache.grow(0, length)
    rows = ch02.Rows(cache, [(0, 0, text[:length])])
    sizes = []
    for make_attend in (ch02.attend_gathered, ch03.attend_paged):
        make, made = watched(make_attend)
        run_step(cache, rows, make)
        sizes.append(made.largest)
    print(
        f"prompt of {length:3d} tokens: largest tensor {sizes[0]:>9,} gathered, {sizes[1]:>9,} page by page"
    )

# %% [markdown]
# Here our page-by-page version makes the *larger* tensors: a copy of the page for each lane, although all lanes of a prompt
# read the same page. (A loop over the sequences, with all queries of a sequence together, needs no such copies.) Gathering makes
# the matrix of scores, which grows with the square of the prompt. In a kernel, a group of queries of one sequence reads a page
# once and shares it.

# %% [markdown]
# ## What the next chapter must fix
#
# The memory is now used well: blocks lie anywhere, are read where they lie, and are given back when a text ends. And attention
# computes any mixture of prompt chunks and decodes in one call. But the loop does not use this yet: the batch is still the list
# of prompts with which `generate` was called. It must fit into memory as a whole before it starts, it shrinks as answers end, and
# no request can join it.
#
# These are the sequences in each step when the three stories are generated to their end:

# %%
traces = []
ch02.generate(
    model, prompts, 300, on_step=traces.append
)  # chapter 03's loop, but faster here
print("tokens in the first steps:", [trace.num_tokens for trace in traces[:6]])
for trace in traces:
    if trace.finished or trace.step == 0:
        print(
            f"step {trace.step:3d}: {len(trace.rows)} sequences, {len(trace.finished)} of them end"
        )

# %% [markdown]
# All prompts are computed in the first step. Then each sequence gets one token a step, and there are fewer and fewer sequences,
# even if other requests wait. Chapter 04 decides anew in every step which sequences are in the batch.
