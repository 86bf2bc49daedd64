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
# # Chapter 00: recompute everything
#
# A language model does one thing: it reads tokens and says how likely every token of its vocabulary is to come next. Text
# comes out of it because somebody calls it in a loop. This chapter is that loop in its plainest form. It is correct, and it
# is slow in a particular way. Everything after it is about that slowness and about what curing it costs.
#
# **You need:** what a forward pass of a transformer returns, and how to index a torch tensor. **Time:** about an hour.
#
# *You will be able to* write greedy generation, say what each new token costs and why, and check your code against Hugging
# Face logit by logit.
#
# *If this chapter is left to you (a copy from a course), the cells run on your own file in `work/` and stop with a `TodoError`
# where it is not done. Read the page with its stored outputs first; run it when `python -m chapters check 00` passes.*

# %%
import sys

sys.path.insert(0, "..")  # the chapters lie one folder up

import time

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

from chapters.course import load_stage
from pagebrain import viz
from pagebrain.assets import BUNDLED_MODEL

logging.disable_progress_bar()
torch.set_num_threads(1)
ch00 = load_stage("00")
model = GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, attn_implementation="eager").eval()
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)

# %% [markdown]
# The model is a GPT-2 with about a million parameters that was trained on small made-up stories. It is the same architecture
# as the GPT-2 with 124 million, and every line below works with that one too: put `"openai-community/gpt2"` in place of
# `BUNDLED_MODEL`.
#
# ## What one forward pass gives
#
# Five words go in. What comes out?

# %% tags=["nbval-check-output"]
prompt = tokenizer.encode("Once upon a time, a")
logits = ch00.compute_logits(model, prompt)
print(f"{len(prompt)} tokens in: {[tokenizer.decode([token_id]) for token_id in prompt]}")
print(f"logits out: {list(logits.shape)}")

# %% [markdown]
# One row of scores for *each* token, not one for the whole text. Row $i$ has seen tokens $0 \dots i$ and says what may come
# after token $i$. During training all rows are used. To continue the text we want the last one only.

# %% tags=["nbval-check-output"]
best = logits[-1].topk(5)
for score, token_id in zip(best.values.tolist(), best.indices.tolist(), strict=True):
    print(f"{score:7.2f}  {tokenizer.decode([token_id])!r}")

# %% [markdown]
# *Greedy* decoding takes the first line of this list, always. It is the dullest way to choose, and for this course the most
# useful one: it is the same every time, so two programs that should do the same can be compared token by token.
#
# ## The loop
#
# Here is what the chapter gives you, shown from the live module. `generate_one` is yours to write (exercise 0.2).

# %%
viz.show_task(ch00.generate_one)

# %%
[answer] = ch00.generate(model, [prompt], max_new_tokens=60)
print(tokenizer.decode(prompt + answer))

# %% [markdown]
# ### Is that what Hugging Face would have written?
#
# Looking right is not being right. A model with a wrong mask or a position off by one still writes fluent text. So from here
# to the last chapter, everything is held to `GPT2LMHeadModel` from the same weights: the same tokens, and the same *logits*
# at every position, in double precision, to nine digits.

# %% tags=["nbval-check-output"]
exact = GPT2LMHeadModel.from_pretrained(
    BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager"
).eval()
mine = []
[answer] = ch00.generate(
    exact, [prompt], 30, on_logits=lambda _, scores: mine.append(scores)
)

theirs = exact.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)
theirs = theirs[0].tolist()
with torch.no_grad():
    their_logits = exact(torch.tensor([theirs])).logits[0, len(prompt) - 1 : -1]

assert prompt + answer == theirs
assert torch.allclose(torch.stack(mine), their_logits, atol=1e-9, rtol=0)
print(f"{len(answer)} tokens and {torch.stack(mine).numel():,} logits equal")

# %% [markdown]
# ## What it costs
#
# > **Predict.** The prompt has 6 tokens. Suppose one new token takes 2 milliseconds now. How long does a token take when the
# > text has grown to 600 tokens? Write down a number before you run the next cell.

# %%
text = (tokenizer.encode("One day a girl met a fox. ") * 150)[:960]
context_lens = list(range(16, 961, 59))


def seconds_for_next_token(num_tokens: int) -> float:
    """The best of three runs: whatever else the machine did only ever adds."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        ch00.compute_logits(model, text[:num_tokens])
        times.append(time.perf_counter() - began)
    return min(times)


seconds_for_next_token(960)  # the first run also warms the machine up
seconds = [seconds_for_next_token(num_tokens) for num_tokens in context_lens]
viz.latency_by_context({"recompute everything": (context_lens, seconds)})

# %% [markdown]
# <details><summary><b>If you said 2 milliseconds</b></summary>
#
# You thought of the token as the work: one token more, one token's worth of computing. But this loop hands the model the
# *whole text* again. All 600 rows go through all layers, and the logits of 599 of them are thrown away.
# </details>
#
# <details><summary><b>If you said 200 milliseconds</b></summary>
#
# A hundred times the rows, a hundred times the work: that is the right thought, and for a large model it is close. This small
# model has a floor: a call costs something before any arithmetic, in Python and in starting operations, and with 6 rows that
# is most of it. So the ratio is far below a hundred. Once the text is long, you see the growth itself, and a bit *more* than
# in proportion, because attention compares every row with every earlier one.
# </details>
#
# So the cost of one token grows with the length of the text, and the cost of a *whole answer* grows with its square:
#
# $$\sum_{i=0}^{n-1} (p + i)\,c \;=\; c\left(p\,n + \tfrac{n(n-1)}{2}\right) \;\approx\; \tfrac{c}{2}\,n^2 \quad\text{for } n \gg p$$
#
# for a prompt of $p$ tokens, an answer of $n$, and a cost of $c$ per row. (Attention's own growth comes on top.)
#
# > **Predict.** Among all the rows that are computed for an answer of 60 tokens after a prompt of 6, what share had been
# > computed before, with exactly the same result?

# %% tags=["nbval-check-output"]
num_prompt, num_new = 6, 60
rows = [num_prompt + step for step in range(num_new)]
new_rows = [num_prompt] + [1] * (num_new - 1)
print(f"rows computed: {sum(rows)}, rows that were new: {sum(new_rows)}")
print(f"computed again: {1 - sum(new_rows) / sum(rows):.1%}")

# %% [markdown]
# <details><summary><b>If you said about a half</b></summary>
#
# That would be two computations of each row on average. The first rows are computed once for *every* new token, 60 times in
# all; only the last one is new when it comes.
# </details>
#
# <details><summary><b>Why "exactly the same result"?</b></summary>
#
# GPT-2 is causal: token $i$ looks at tokens $0 \dots i$ and at nothing later. Appending a token cannot change what an earlier
# one computed, in any layer. If the model looked both ways, as BERT does, nothing could be kept, and this course would not
# exist.
# </details>
#
# Let us not take that on trust. The last rows of two runs differ in length, but where both have a row, it is the same row:

# %% tags=["nbval-check-output"]
short, long = ch00.compute_logits(exact, text[:100]), ch00.compute_logits(exact, text[:101])
assert torch.allclose(short, long[:100], atol=1e-9, rtol=0)
print("100 rows of logits did not change when the text grew by a token")

# %% [markdown]
# ## Exercises
#
# `python -m chapters start 00` makes `work/ch00_baseline.py`, unless it is there already. Write your solution into that file,
# and check it with `python -m chapters check 00`.
#
# ### Exercise 0.1: the greedy token (4 points)
#
# One line. What should happen when two tokens have the same score?

# %%
viz.show_task(ch00.greedy_token)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch00.greedy_token)

# %% [markdown]
# ### Exercise 0.2: the loop (6 points)
#
# The description stands above, at *The loop*. Think about the two ways in which an answer can end, and about what belongs to
# the answer in each of them.

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch00.generate_one)

# %% [markdown]
# ## What the next chapter must fix
#
# In this loop 97 % of the rows were computed for nothing. What a later token needs of an earlier one is small: in each layer
# its *key* and its *value*, which attention reads. Chapter 01 keeps them. The curve above becomes flat, and a new question
# appears: where do we put all these keys and values, and how much room do they take?
