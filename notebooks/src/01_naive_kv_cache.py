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
# # Chapter 01: keep the keys and values
#
# Chapter 00 computed the same rows again for every token. What a later token needs of an earlier one is only its *key* and
# its *value* in each layer. Keep these, and a new token costs one row.
#
# That settles the time. It opens a question of memory, and this chapter gives the plainest answer: for each request, set
# aside room for the longest text that it might become, before its first token is computed.
#
# **You need:** chapter 00, scaled dot-product attention, broadcasting. **Time:** about four hours with the exercises.
#
# *You will be able to* write a KV cache and the masked attention that reads it, batch requests of different lengths, and say
# how much of a reserved cache is ever used.
#
# *If this chapter is left to you (a copy from a course), the cells run on your own file in `work/` and stop with a `TodoError`
# where it is not done. Read the page with its stored outputs first; run it when `python -m chapters check 01` passes.*

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
ch00, ch01 = load_stage("00"), load_stage("01")
model = GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, attn_implementation="eager").eval()
exact = GPT2LMHeadModel.from_pretrained(
    BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager"
).eval()
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)

# %% [markdown]
# ## The problem, measured
#
# How long does a token take in chapter 00, and what part of that would be left if all earlier rows were kept? We can ask the
# model itself: Hugging Face's own cache keeps keys and values too.

# %%
text = (tokenizer.encode("One day a girl met a fox. ") * 150)[:960]


def best_seconds(run) -> float:
    """The best of five runs: whatever else the machine did only ever adds."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


with torch.no_grad():
    for length in (100, 400, 900):
        cache = model(torch.tensor([text[:length]]), use_cache=True).past_key_values
        again = best_seconds(lambda: ch00.compute_logits(model, text[: length + 1]))
        row = torch.tensor([text[length : length + 1]])
        kept = best_seconds(lambda: (model(row, past_key_values=cache), cache.crop(-1)))
        print(
            f"token {length + 1:4d}: recomputed {again * 1e3:6.1f} ms, with keys and values kept {kept * 1e3:5.1f} ms"
        )

# %% [markdown]
# ## The idea
#
# In every layer, attention computes for a query at position $i$
#
# $$\mathrm{out}_i = \sum_{j \le i} \mathrm{softmax}_j\!\left(\frac{q_i \cdot k_j}{\sqrt d}\right) v_j .$$
#
# Of the earlier tokens, only $k_j$ and $v_j$ stand in this formula. Their queries do not, nor their MLP outputs. And $k_j$,
# $v_j$ are final once computed, since token $j$ never looks ahead. So a cache holds, for each layer, two tensors of shape
# `[max_len, num_heads, head_dim]`, and decoding a token is: compute its one row, *write* its key and value, *attend* over all
# that was written.
#
# Several requests are computed side by side, since a GPU (and a CPU, too) reads all weights anyway, for one row or for many.
# Their texts differ in length. The first step pads them on the right:

# %% tags=["nbval-check-output"]
prompts = [
    tokenizer.encode(line)
    for line in ("One day", "Once upon a time there was a", "The fox said")
]
token_ids, positions, last_rows = ch01.prefill_inputs(prompts)
print("token ids\n", token_ids)
print("positions\n", positions)
print("the last row of each prompt, in the flat batch:", last_rows.tolist())

# %% [markdown]
# The zeros are padding. They are computed like any token, and their keys and values are written, too: past the end of a
# shorter prompt, at places that the prompt's own next tokens will overwrite. Until then nobody must look there. Whoever
# attends has to *mask*.
#
# The forward pass is written out here, once for the whole course. It has the weights of Hugging Face's model; only attention
# is handed in from outside.

# %%
viz.show_source(ch01.forward)

# %% [markdown]
# > **Predict.** `forward` takes `token_ids` as one flat row of tokens of all sequences, with no batch dimension. Which
# > of the following need to know which row belongs to which sequence: the embedding, LayerNorm, the MLP, attention?
#
# <details><summary><b>If you named LayerNorm</b></summary>
#
# It normalises *within* a row, over the `n_embd` numbers of one token. BatchNorm would mix rows; LayerNorm does not.
# </details>
#
# <details><summary><b>If you named the embedding</b></summary>
#
# It needs each row's *position*, which comes with the row. Whose position it is does not matter.
# </details>
#
# Only attention does. That is why one argument, `attend`, is enough to replace the whole memory system of this engine, twice in
# the next two chapters.
#
# ## Run it, and compare

# %% tags=["nbval-check-output"]
mine = {}


def note(index, scores):
    mine.setdefault(index, []).append(scores)


answers = ch01.generate(exact, prompts, 30, on_logits=note)

with torch.no_grad():
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        theirs = exact(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(torch.stack(mine[index]), theirs, atol=1e-9, rtol=0)
        assert answer == theirs.argmax(-1).tolist()
assert answers == ch00.generate(exact, prompts, 30)
print(
    "3 answers of 30 tokens: the same as chapter 00's, and every logit equal to Hugging Face's"
)

# %% [markdown]
# ## What was gained
#
# Time per token against context length, in both chapters. Chapter 01's time is that of whole steps with one sequence.

# %%
context_lens = list(range(16, 961, 59))
recomputed = [
    best_seconds(lambda n=n: ch00.compute_logits(model, text[:n])) for n in context_lens
]

traces = []
model.config.eos_token_id = None  # or the story would end before the context is long
ch01.generate(model, [text[:16]], 945, on_step=traces.append)
model.config.eos_token_id = tokenizer.eos_token_id
steps = {trace.rows[0].context_len: trace.read_s - trace.launched_s for trace in traces}
cached = [min(steps[n + i] for i in range(-4, 5) if n + i in steps) for n in context_lens]
viz.latency_by_context(
    {
        "00 recompute everything": (context_lens, recomputed),
        "01 KV cache": (context_lens, cached),
    }
)

# %% [markdown]
# Flat, where chapter 00 climbs. (Mind the axis: with two curves so far apart it is logarithmic.) It is as flat as this because
# attention here scores the whole reserved row in every step, and masks what is not written yet.
#
# ## What it costs
#
# A key and a value, for each layer and head:

# %% tags=["nbval-check-output"]
config = model.config
bytes_per_token = 2 * config.n_layer * config.n_embd * 4
print(f"this model, float32: {bytes_per_token:,} bytes a token")
gpt2 = 2 * 12 * 768 * 2
print(
    f"GPT-2 124M, bfloat16: {gpt2:,} bytes a token, {gpt2 * 1024 // 2**20} MiB for 1024 tokens"
)

# %% [markdown]
# > **Predict.** Six requests come in at once, with up to 400 new tokens for each. The cache reserves for the longest text that
# > might come. Their answers turn out to have between 71 and 266 tokens. On average over the run, what share of the reserved
# > slots has been written?

# %%
starts = [
    "One day",
    "And so they went home.",
    "The fox said",
    "It was a good day.",
    "A boy",
    '"Thank you," said the fox',
]
prompts = [tokenizer.encode(line) for line in starts]
traces = []
answers = ch01.generate(model, prompts, 400, on_step=traces.append)
print("tokens in each answer:", [len(answer) for answer in answers])
viz.memory_over_time(traces)

# %% [markdown]
# <details><summary><b>If you said about a half</b></summary>
#
# That would be right if every text grew to its limit: a cache that fills at a steady rate is half full on average. But the
# run ends when the longest *answer* ends, after 266 tokens, and the limit of 400 is never reached.
# </details>
#
# <details><summary><b>If you took the mean answer, about 180 tokens, and said about a fifth</b></summary>
#
# A good thought, and near the share of what anybody will *read*. The picture shows what is *written*, about a third: all six rows
# grow to the length of the longest answer, $\tfrac{1}{2} \cdot 266$ tokens on average, of some 410 reserved. Texts that are over
# are computed and written on, because their row in the batch is there until the last one is done.
# </details>
#
# <details><summary><b>Where it goes in real serving</b></summary>
#
# Nobody knows how long an answer will be. A server that reserves for the model's maximum, 2,048 tokens say, when the typical
# text has a few hundred, wastes most of what it has. The authors of PagedAttention found 20 to 38 % of the cache in use in
# the systems of their day, the upper figure with an allocator that is told how long each answer will be (Kwon et al., SOSP 2023). Chapter 02 reproduces that comparison.
# </details>
#
# Memory that nobody uses is not merely a loss. It is *requests that could have run*: the larger the batch, the more tokens each
# reading of the weights brings.
#
# > **Predict.** Sequence D ends after 71 tokens. Where does its row stop in the timeline of the first 100 steps?

# %%
viz.timeline(traces[:100])

# %% [markdown]
# <details><summary><b>If you said at step 71</b></summary>
#
# It does not stop. A padded batch has as many rows as it began with. A finished story is computed to the end, its tokens are thrown
# away, and a new request that comes meanwhile waits for the longest. Chapter 04 is about that.
# </details>
#
# ## Exercises
#
# `python -m chapters start 01` writes `work/ch01_naive_kv_cache.py` with three gaps, unless it is there already;
# `python -m chapters check 01` checks them.
#
# ### Exercise 1.1: writing to the cache (7 points)
#
# The batch is padded, so in one call different sequences write at different positions. Assigning to a tensor that is indexed
# with two index tensors, one for the sequences and one for the positions, which broadcast against each other, is one way; a
# loop is another.

# %%
viz.show_task(ch01.ReservedCache.write)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch01.ReservedCache.write)

# %% [markdown]
# ### Exercise 1.2: attention with a mask (10 points)
#
# Draw the scores of one head for two sequences as matrices, queries down, slots across, and shade what a query must not see.
# Two kinds of slots have to be shaded: those that hold *later* tokens, and those that hold nothing of this text at all.
# Is there one comparison that covers both?

# %%
viz.show_task(ch01.masked_attention)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch01.masked_attention)

# %% [markdown]
# ### Exercise 1.3: the inputs of a decode step (8 points)
#
# After the first step each text has one token whose key and value nobody has computed yet. Which one, and where does it
# stand? And with one row for each text, which rows of the flat batch are the last ones?

# %%
viz.show_task(ch01.decode_inputs)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch01.decode_inputs)

# %% [markdown]
# ## What the next chapter must fix
#
# Time per token is flat. Memory is reserved for texts that never come, in one piece per request, so that two free pieces of
# half the size are no use to anyone. Chapter 02 cuts the cache into small blocks that can lie anywhere, and hands them out one
# at a time.
