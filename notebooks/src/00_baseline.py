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
# A language model reads tokens and gives every token of its vocabulary a score: how likely it is to come next. A loop that
# calls the model again and again makes a text. This chapter is that loop in its simplest form. It is correct, and it is slow:
# each new token costs more than the one before. The later chapters remove this cost, and show what that takes.
#
# **You need:** what a forward pass of a transformer returns, and how to index a torch tensor. **Time:** about an hour.
#
# *You will be able to* write greedy generation, say what each new token costs and why, and check your code against Hugging
# Face logit by logit.
#
# `python -m chapters start 00` makes `work/ch00_baseline.py`, unless it is there already. Write your solutions into that file,
# and check them with `python -m chapters check 00`. Each exercise stands below its idea.
#
# *In a copy from a course, the cells use your functions from `work/` for the tasks that you have done, and the course's own,
# called the reference, for the others. The first cell prints which. `python -m chapters check 00` checks your file.*

# %%
import sys

sys.path.insert(0, "..")  # the folder that has the chapters

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
# The model is a GPT-2 with about a million parameters, trained on short invented stories. It has the architecture of the GPT-2
# with 124 million parameters. Every line below works with that model too: put `"openai-community/gpt2"` in place of
# `BUNDLED_MODEL`.
#
# ## What one forward pass gives
#
# The input is the beginning of a story. What is the output?

# %% tags=["nbval-check-output"]
prompt = tokenizer.encode("Once upon a time, a")
logits = ch00.compute_logits(model, prompt)
print(f"{len(prompt)} tokens in: {[tokenizer.decode([token_id]) for token_id in prompt]}")
print(f"logits out: {list(logits.shape)}")

# %% [markdown]
# The output has one row of scores for *each* token. Row $i$ depends on tokens $0 \dots i$ and scores the tokens that may come
# after token $i$. Training uses all rows. To continue the text, only the last row is needed.

# %% tags=["nbval-check-output"]
best = logits[-1].topk(5)
for score, token_id in zip(best.values.tolist(), best.indices.tolist(), strict=True):
    print(f"{score:7.2f}  {tokenizer.decode([token_id])!r}")

# %% [markdown]
# *Greedy* decoding always takes the first line of this list: the token with the highest score. The choice is the same every
# time. So two programs that should do the same can be compared token by token.
#
# ### Exercise 0.1: the greedy token (4 points)
#
# One line is enough. Which token should be the answer if two tokens have the same score?

# %%
viz.show_task(ch00.greedy_token)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch00.greedy_token)

# %% [markdown]
# ## The loop
#
# To generate, compute the scores of the text so far, take the greedy token, append it, and start again. A text ends in one of
# two ways: the answer has `max_new_tokens` tokens, or the model chose its *end-of-sequence* token, which it has learned to put
# at the end of a story.
#
# ### Exercise 0.2: the loop (6 points)
#
# Consider both ways in which an answer can end. Which tokens belong to the answer in each of them? How many forward passes
# does an answer of $n$ tokens need?

# %%
viz.show_task(ch00.generate_one)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch00.generate_one)

# %% [markdown]
# With the loop, the model tells a story:

# %%
[answer] = ch00.generate(model, [prompt], max_new_tokens=60)
print(tokenizer.decode(prompt + answer))

# %% [markdown]
# ### Does Hugging Face's model write the same?
#
# A text that looks right can still be wrong. A model with a wrong mask, or with positions that are off by one, still writes
# fluent text. So every chapter is compared with `GPT2LMHeadModel` with the same weights: the tokens must be the same, and so
# must the *logits* (the scores) at every position, in double precision, to nine digits.

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
# > **Predict.** The prompt has 6 tokens. Suppose that one new token takes 2 milliseconds now. How long does a token take when
# > the text has grown to 600 tokens? Write down a number before you run the next cell.

# %%
text = (tokenizer.encode("One day a girl met a fox. ") * 150)[:960]
context_lens = list(range(16, 961, 59))


def seconds_for_next_token(num_tokens: int) -> float:
    """The shortest of three runs: other work of the machine can only make a run longer."""
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
# That would be right if a new token cost one row. But this loop gives the model the *whole text* again. All 600 rows go
# through all layers, and the logits of 599 of them are discarded.
# </details>
#
# <details><summary><b>If you said 200 milliseconds</b></summary>
#
# A hundred times the rows means a hundred times the arithmetic, and for a large model the time is close to that. This model is
# small, and each call has a fixed cost in Python and in starting operations. With 6 rows, most of the time is this fixed cost.
# So the ratio is far below a hundred. For long texts the time grows a little *faster* than the number of rows, because
# attention compares every row with every earlier one.
# </details>
#
# The cost of one token grows with the length of the text. The cost of a *whole answer* grows with the square of its length:
#
# $$\sum_{i=0}^{n-1} (p + i)\,c \;=\; c\left(p\,n + \tfrac{n(n-1)}{2}\right) \;\approx\; \tfrac{c}{2}\,n^2 \quad\text{for } n \gg p$$
#
# for a prompt of $p$ tokens, an answer of $n$ tokens, and a cost of $c$ per row. (The growth of attention comes on top.)
#
# > **Predict.** An answer of 60 tokens follows a prompt of 6. Of all rows that are computed for it, what share was computed
# > before, with exactly the same result?

# %% tags=["nbval-check-output"]
num_prompt, num_new = 6, 60
rows = [num_prompt + step for step in range(num_new)]
new_rows = [num_prompt] + [1] * (num_new - 1)
print(f"rows computed: {sum(rows)}, rows that were new: {sum(new_rows)}")
print(f"computed again: {1 - sum(new_rows) / sum(rows):.1%}")

# %% [markdown]
# <details><summary><b>If you said about a half</b></summary>
#
# Then each row would be computed twice on average. But the first rows are computed once for *every* new token, 60 times in
# all. Only the last row of each pass is new.
# </details>
#
# <details><summary><b>Why "exactly the same result"?</b></summary>
#
# GPT-2 is causal: the row of token $i$ depends on tokens $0 \dots i$ and on no later token. An appended token cannot change
# what was computed for an earlier one, in any layer. In a model whose rows depend on later tokens too, such as BERT, every row
# would change, and nothing could be kept.
# </details>
#
# The next cell checks this. One text has a token more than the other. The rows that both texts have are the same:

# %% tags=["nbval-check-output"]
short, long = ch00.compute_logits(exact, text[:100]), ch00.compute_logits(exact, text[:101])
assert torch.allclose(short, long[:100], atol=1e-9, rtol=0)
print("100 rows of logits did not change when the text grew by a token")

# %% [markdown]
# ### Exercise 0.3: measure and explain (2 points)
#
# How much more does the second half of an answer cost than the first? Measure the number, and explain it in your own words.
# Your text goes to your instructor.

# %%
viz.show_task(ch00.answer_0_3)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch00.answer_0_3)

# %% [markdown]
# ## What the next chapter must fix
#
# In this loop, 97 % of the rows were computed before. A later token needs little of an earlier one: in each layer its *key*
# and its *value*, which attention reads. Chapter 01 keeps them. The curve above becomes flat, and there is a new question:
# where are all these keys and values stored, and how much memory do they take?
