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
# values of a sequence into one piece, for every token and in every layer, uses the copy once and throws it away.
#
# The copy is there because softmax seems to need all scores at once. It does not. This chapter computes softmax one page at a
# time. (A *page* is a sequence's block seen from the sequence: page 0 holds its first tokens, wherever the block lies.)
#
# **You need:** chapter 02, and softmax. (One cell counts operations with a tool of PyTorch's; read over it.) **Time:** about six hours with the
# exercises.
#
# *You will be able to* derive the online softmax and prove it right, write attention that follows a block table, do it for
# many queries side by side, and say honestly what that saves and what it does not.
#
# *If this chapter is left to you (a copy from a course), the cells run on your own file in `work/` and stop with a `TodoError`
# where it is not done. Read the page with its stored outputs first; run it when `python -m chapters check 03` passes.*

# %%
import sys

sys.path.insert(0, "..")  # the chapters lie one folder up

import itertools
import math
import random
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

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
# A decode step computes one new token. How many bytes does chapter 02 copy for it? We let PyTorch tell us: this small watcher
# sees every operation and notes each tensor that is *new*, that is, not a view of one that was there before.


# %%
class NewTensors(TorchDispatchMode):
    """Notes what every operation under it creates; counts the operations, too."""

    def __init__(self):
        super().__init__()
        self.num_operations = 0
        self.sizes = []  # of each new tensor: how many numbers, and how many bytes

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs))
        old = {x.untyped_storage().data_ptr() for x in given if isinstance(x, torch.Tensor)}
        self.num_operations += 1
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in old:
                self.sizes.append((x.numel(), x.numel() * x.element_size()))
        return out

    @property
    def num_bytes(self):
        return sum(num_bytes for _, num_bytes in self.sizes)

    @property
    def largest(self):
        return max(numel for numel, _ in self.sizes)


text = (tokenizer.encode("One day a girl met a fox. ") * 150)[:1000]


def before_token(length):
    """A cache that holds ``length - 1`` tokens of the text, and the step that computes the next."""
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
print(f"K and V of the new token itself: {bytes_per_token:,} bytes")
for length, (cache, _) in cached.items():
    with NewTensors() as copies:
        for layer in range(num_layers):
            cache.gather(layer, 0, length)
    times = copies.num_bytes // bytes_per_token
    print(f"token {length:3d}: {copies.num_bytes:>9,} bytes copied, {times} times that")
pages = [-(-length // 16) for length in range(1, 961)]
print(f"for a text of 960 tokens: {sum(pages) * 16 * bytes_per_token / 1e9:.2f} GB in all")

# %% [markdown]
# The new token adds 4 KiB to the cache, and to attend from it, chapter 02 copies everything that is there. Summed over a text,
# that grows with the square of its length: chapter 00's trouble, back in another place. What does it cost in time?


# %%
def best_seconds(run, num_runs=3) -> float:
    """The best of a few runs: whatever else the machine did only ever adds."""
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
# The copy's share grows with the context. And time is only one half. The copy needs *room*, in one piece, as long as the
# longest context: just what chapter 02 had made unnecessary.
#
# ## The idea: softmax piece by piece
#
# For one query of one head, let $s_j$ be the score of token $j$, and $v_j$ its value. Attention is a weighted mean:
#
# $$\mathrm{out} \;=\; \frac{\sum_j e^{s_j}\, v_j}{\sum_j e^{s_j}}$$
#
# These are two sums, and sums can be taken page by page: no page needs another. If that were all, we would be done. But
# nobody computes softmax in this form, for a reason that real numbers show.

# %% tags=["nbval-check-output"]
for score in (10.0, 88.0, 89.0, -80.0, -110.0):
    print(f"exp({score:6.1f}) in float32 = {torch.tensor(score).exp().item():.4g}")

# %% [markdown]
# float32 ends at about $3.4 \cdot 10^{38}$, which is $e^{88.7}$. (float16 ends at 65504, which is $e^{11.1}$.) Above that
# comes `inf`, and `inf / inf` is `nan`. On the other side, if *all* terms become 0, we get `0 / 0`, `nan` again.
#
# So we want the scores near 0. They may be put there, since a constant $c$ taken from all scores falls out of the fraction:
#
# $$\frac{\sum_j e^{s_j - c}\, v_j}{\sum_j e^{s_j - c}}
#   \;=\; \frac{e^{-c}\sum_j e^{s_j}\, v_j}{e^{-c}\sum_j e^{s_j}} \;=\; \mathrm{out}$$
#
# The usual choice is the maximum, $c = m = \max_j s_j$. Then the largest term is $e^0 = 1$, every other is at most 1, and
# the sum of $n$ terms lies between 1 and $n$. No overflow, and no division by zero.
#
# To see it on real scores we need a real query. `ch02.generate` takes the function that makes `attend`, so we can put a
# wrapper around chapter 02's that keeps what passes through. Three stories are written; we keep what the *last* token of the
# second one, B, asked for, in each layer.

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
    print(f"with the maximum taken off {weights[1]:.4f}")

# %% [markdown]
# The second and third lines are the same softmax as the first, by the formula above. Softmax, and so the loss of training,
# does not change if all scores of a query move together; training has no reason to hold them near 0. So we subtract the
# maximum, always.
#
# And there is the obstacle: **the maximum is known only when all scores have been seen.** A page may bring a larger one, when
# many terms with the old one have been summed already.
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
# So the old scores are not needed again. One factor, $e^{m - m'} \le 1$, corrects all that was summed before. With $v_j$
# under the sums nothing changes, and we have the recurrence (Milakov and Gimelshein, 2018, for the sum; FlashAttention, Dao
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
# *Start.* $S$ is empty. Take $m = -\infty$, $\ell = 0$, $a = 0$. The sums are empty, and the largest of no numbers is
# $-\infty$ by convention. *First page.* With $e^{-\infty} = 0$ the factor is 0 and the recurrence leaves just the page's own sums.
# *Step.* Let the invariant hold for $S$. The derivation above shows that the new values are those of the
# definitions for $S \cup P$. *End.* $S$ is all tokens, and $a / \ell$ is the fraction we began with, for $c = m$. $\square$
#
# Two things come for free. Once a token has been seen, $1 \le \ell \le |S|$: the largest term is 1. And among pages with a
# visible token, the proof does not ask in which order they come, nor how many tokens each has.
#
# What of a page of which the query sees *nothing*, all of its scores being $-\infty$? If it comes *later*, $m$ is a number by then.
# So $m' = m$, the factor is $e^0 = 1$, each new term is $e^{-\infty - m} = 0$, and nothing changes, as it should be. If it comes
# *first*, $m' = -\infty$, and the factor is $e^{-\infty - (-\infty)}$. That is `nan` in floating point, and `nan` it stays. So
# the first page must have a visible token. In causal attention it has: every query sees token 0.
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
# The chapter keeps the three in a tuple, for any number of queries and heads at once:

# %%
viz.show_source(ch03.Partial)

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
# > become larger or smaller, and what is it about?

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
# $\ell$ is a sum of positive terms and one more is added, so it should grow: true as long as the maximum stays. But terms are
# measured *relative to the maximum*. A new one a thousand times as large makes all earlier terms a thousand times smaller:
# $2 / 1000 + 1 = 1.002$.
# </details>
#
# <details><summary><b>If you said 1: the new maximum starts afresh</b></summary>
#
# Nearly, and for a score large enough float32 would show you exactly 1. But what came before is not forgotten, it *shrinks*.
# A program that resets $\ell$ and `acc` at a new maximum is right in a test where each new maximum dwarfs the rest, and wrong
# on real scores, as the next picture shows.
# </details>
#
# ## A real query, page by page
#
# Here is the kept query of the story: layer 1, head 1, four full pages and one partly filled. The pieces go through
# `add_page` one after the other.

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
# The bars in the upper part are scores, the line is $m$. The middle part shows the weights in the end. The lower part
# compares `acc / l` after each page with what it will be: a partial output is no estimate of the whole one, it is
# the exact attention over the pages so far. In this head the last page has more than half of the weight, so before it everything is far
# off. The final result is exact all the same.

# %% tags=["nbval-check-output"]
for page, step in enumerate(steps):
    print(f"after page {page}: m = {step.maximum:6.2f}, l = {step.total:5.2f}")

# %% [markdown]
# So $\ell$ goes down and up again on real scores.
#
# ## Pages anywhere
#
# The proof needs a page's scores and values. Where they lie does not matter: the block table says where to read. Let us hand
# out the blocks in a shuffled order and look.


# %%
def logits_with_blocks_shuffled(seed):
    """The stories' next logits, all K and V in blocks that were handed out in random order."""
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
# > **Predict.** Two different changes. (i) The same pages, in the same logical order, lie in other physical blocks. (ii) A
# > query takes its pages in another *order*, say the last one first. Which of the two changes the result? And which changes its
# > last bits?

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
# In exact arithmetic that is right: the invariant speaks of a *set*. Floating-point addition rounds, though, and
# $(x + y) + z$ may round differently from $x + (y + z)$. Another order, other last bits. That is why we compare with Hugging Face to
# a tolerance, and why two correct kernels may differ.
# </details>
#
# <details><summary><b>If you said that (ii) must be wrong, since text has an order</b></summary>
#
# Attention does not know the order. It enters GPT-2 in the embedding of positions, before the first layer; keys and values
# carry it along. Attention itself only needs to know which tokens *may be seen*.
# </details>
#
# <details><summary><b>If you said that (i) changes bits</b></summary>
#
# A block's address is no operand of any sum. The same numbers are added in the same order.
# </details>
#
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
# A zero *value* adds nothing to `acc`. But a zero *key* gives a score of 0, and $e^{0 - m}$ is not 0. It goes into $\ell$, and
# the output comes out too small. To be invisible a slot needs the score $-\infty$, whose term is exactly 0.
# </details>
#
# <details><summary><b>If you said that it does not matter, since softmax weights are small</b></summary>
#
# They are small if $m$ lies far above the scores of the empty slots. Here that holds for the tokens of page 0, by luck, and
# neither for zeros nor for the tokens of page 3. A forgotten mask is a mistake that depends on the head, on the text and on
# who had the block before. Reading the output will not find it. The
# exercise's tests fill all slots that hold no token with a huge number, so that no head gets away with it.
# </details>
#
# ## Many queries at once: lanes
#
# A step has many queries: the decodes of some sequences and a chunk of another's prompt. Each row of `query` is a *lane*: one
# query with a context of its own, which ends at its own token. In step $p$ all lanes take page $p$ of *their* sequence
# together. Here is a small batch with blocks of 4 slots: A computes three prompt tokens, B and C decode. Each entry is the
# block that the lane reads, and in brackets how many of its slots the lane may see.

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
# Read it by columns. In step 0 every lane has a page. In step 1, C stands by. In step 2 lane 2 is the only one of A that has
# a page: its token is the first in that block, and the two before it must not see it. Lane 0 sees one slot less of page 1 than
# lane 1. That is the causal mask, and nothing else is needed for it: the number of visible slots covers both later tokens and empty slots.
#
# The chapter gives you the function that builds these inputs and calls yours:

# %%
viz.show_source(ch03.attend_paged)

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
# The same watcher, now around attention as a whole. What is the largest tensor that attention has to make, in a decode
# step? `attend_one` is asked for one query in one layer, the other two for a whole step.


# %%
def watched(make_attend):
    """The same attention, and the watcher that sees what it makes."""
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
# Gathering needs room that grows with the context. Page by page it stays the same: for `paged_attention` here one page of keys, 16
# tokens of 128 numbers, and for `attend_one` no more than a query. (Another correct solution may make somewhat larger ones,
# but none that grow.) This is the gain, and on a GPU it is a large one.
#
# Now the part that is easily left out.
#
# > **Predict.** The room is constant. Is a decode step of chapter 03 also *faster* than one of chapter 02, here, in PyTorch on
# > a CPU?
#
# (Where the two lines lie far apart, the axis of time is logarithmic: each mark is about twice the one below it.)

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
for name in ("02", "03"):
    more = seen[name, 960].num_operations - seen[name, 64].num_operations
    per_page = more / ((960 - 64) / 16) / num_layers
    print(f"chapter {name}: {per_page:.0f} more operations for each page and layer")

# %% [markdown]
# <details><summary><b>If you said faster, since nothing is copied</b></summary>
#
# Look at the megabytes: about as many are made as before, only in small pieces. When PyTorch picks pages with an index tensor,
# it copies them, one page for each lane; it has no operation that computes with pages at a list of addresses. (`attend_one`
# picks a page with a plain number. That gives a *view*, and no key or value is copied at all. But it handles one query.)
# </details>
#
# <details><summary><b>If you said equal, since the arithmetic is the same</b></summary>
#
# The arithmetic is. The number of *operations* is not: chapter 02 starts the same number for any context, chapter 03
# some dozens more for every page in every layer, as the last line says. Each has a price of some microseconds for being started
# from Python, however little it computes. With 60 pages that price is nearly all of the time.
# </details>
#
# <details><summary><b>If you said slower, because of the indexing</b></summary>
#
# Slower is right, and indexing has a part in it: each page is picked out with an index tensor, and that copies it. But the
# megabytes show that about as much is copied in chapter 02, which picks the same slots, only in one go. What differs is
# *how often* something is started: to pick a page, to score it, to mask it, to take it into the sums, for each page anew. Take the
# indexing away, as `attend_one` does, and most of these operations remain.
# </details>
#
# So on this machine chapter 03 is slower than chapter 02, and the longer the context, the more so. What it gives is a
# *method*. A kernel, which is a program written for the GPU itself, runs this loop inside one operation: it reads a page from
# the pool where it lies, keeps $m$, $\ell$ and `acc` in registers, and goes on to the next. No copy of K and V is written
# to memory, and no operation is started for each page. Such a kernel is short, and it is what serving systems use.
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
# Here our page-by-page version makes the *larger* tensors: a copy of the page for each lane, though all lanes of a prompt read
# the same page. (A loop over the sequences in place of lanes would not.) Gathering makes the matrix of scores, which grows with the square of the prompt. In a kernel a group of
# queries of one sequence reads a page once and shares it.
#
# ## Exercises
#
# `python -m chapters start 03` writes `work/ch03_paged_attention.py` with three gaps, unless it is there already;
# `python -m chapters check 03` checks them.
#
# ### Exercise 3.1: one more page (12 points)
#
# You have the recurrence. Work out the shapes on paper first: one $m$ and one $\ell$ per head, one `acc` per head and
# dimension; which of them needs an extra dimension, and where? Then try the two odd cases of the proof: the first page, where
# $m = -\infty$, and a *later* page that is hidden as a whole. Does your line for the factor give 0 in the one and 1 in the other,
# or `nan`? (That the first page is never hidden as a whole, the task promises.) And the old `partial` is not yours: return new tensors.

# %%
viz.show_task(ch03.add_page)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch03.add_page)

# %% [markdown]
# ### Exercise 3.2: one query over its pages (8 points)
#
# Take a context of 9 tokens in blocks of 4, and the block table `[6, 2, 7, 5]`. Write down which blocks are read and how many
# slots of each. Then do the same for 8 tokens. The table may be longer than the context needs, and its further entries
# may be anything.

# %%
viz.show_task(ch03.attend_one)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch03.attend_one)

# %% [markdown]
# ### Exercise 3.3: all lanes together (15 points)
#
# Draw the table of lanes above for a batch of your own, from nothing but `block_tables`, `context_lens` and `query_starts`.
# Two questions come first for each lane: whose is it, and how many tokens does it see? For a decode the second is
# easy; for the first token of a chunk of three it is the context length less two. Then decide what a lane does in a step in
# which it has no page. Leaving it out and masking it are both right; reading past the end of a block table is not.

# %%
viz.show_task(ch03.paged_attention)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch03.paged_attention)

# %% [markdown]
# ## What the next chapter must fix
#
# Memory is settled: blocks anywhere, read where they lie, given back when a text ends. And attention now takes any mixture of
# prompt chunks and decodes in one call. But the loop does not use that yet: the batch is still the list of prompts with which `generate` was
# called. It must fit into memory as a whole before it starts, it shrinks as answers end, and nobody joins it.
#
# Here is who is in which step when the three stories are told to their end:

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
# All prompts in the first step, then one token for each sequence, and fewer and fewer of them, whoever else may be waiting. Chapter 04 decides anew in
# every step who is in the batch.
