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
# Chapter 00 computed the same rows again for every token. A later token needs only the *key* and the *value* of an earlier one,
# in each layer. If they are kept, a new token costs one row.
#
# This makes the time per token nearly constant, and it takes memory. This chapter uses memory in the simplest way: for each
# request, room for the longest text that it might become is reserved before the first step.
#
# **You need:** chapter 00, scaled dot-product attention, broadcasting. **Time:** about four hours with the exercises.
#
# *You will be able to* write a KV cache and the masked attention that reads it, batch requests of different lengths, and say
# how much of a reserved cache is ever used.
#
# `python -m chapters start 01` makes `work/ch01_naive_kv_cache.py`, unless it is there already. Write your solutions into that
# file, and check them with `python -m chapters check 01`. Each exercise stands below its idea.
#
# *In a copy from a course, the cells use your functions from `work/` for the tasks that you have done, and the course's own,
# called the reference, for the others. The first cell prints which. `python -m chapters check 01` checks your file.*

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
ch00, ch01 = load_stage("00"), load_stage("01")
model = GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, attn_implementation="eager").eval()
exact = GPT2LMHeadModel.from_pretrained(
    BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager"
).eval()
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)

# %% [markdown]
# ## The problem, measured
#
# How long does a token take in chapter 00, and how long if the keys and values of all earlier tokens are kept? Hugging Face's
# own cache keeps them, so it can show the difference.

# %%
text = (tokenizer.encode("One day a girl met a fox. ") * 150)[:960]


def best_seconds(run) -> float:
    """The shortest of five runs: other work of the machine can only make a run longer."""
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
# The formula contains $k_j$ and $v_j$ of the earlier tokens. It contains neither their queries nor the outputs of their MLP.
# And $k_j$ and $v_j$ are final once they are computed, since token $j$ does not depend on later tokens. So a cache has, for each
# sequence and layer, two tensors of shape `[max_len, num_heads, head_dim]`. To decode a token, the program computes its one
# row, *writes* its key and value to the cache, and *attends* over all that was written.
#
# Several requests are computed side by side, as a *batch*. In each step a GPU (and a CPU, too) reads all weights once, for one
# row or for many. The texts differ in length. The first step, the *prefill*, computes all prompts, padded on the right:

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
# The zeros are padding. They are computed like any token, and their keys and values are written too, past the end of a shorter
# prompt. The next tokens of this prompt will overwrite them. Until then attention must not use these places: it has to *mask*
# them.
#
# ### Exercise 1.1: writing to the cache (7 points)
#
# In one call, different sequences write at different positions. One way is to assign to a tensor that is indexed with two
# index tensors, one for the sequences and one for the positions, which broadcast against each other. A loop is another way.

# %%
viz.show_task(ch01.ReservedCache.write)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch01.ReservedCache.write)

# %% [markdown]
# ### Exercise 1.2: attention with a mask (10 points)
#
# Draw the scores of one head for two sequences as matrices: a row for each query, a column for each slot. Shade what a query
# must not see. Two kinds of slots have to be shaded: those of *later* tokens, and those that have no token of this text yet.
# Is there one comparison that covers both?

# %%
viz.show_task(ch01.masked_attention)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch01.masked_attention)

# %% [markdown]
# After prefill come the *decode* steps. Each computes one new row for each text: `decode_inputs` says which token, at which
# position.
#
# ### Exercise 1.3: the inputs of a decode step (8 points)
#
# After the first step, each text has one token whose key and value are not in the cache yet. Which token is it, and what is its
# position? Each text has one row in the flat batch now. So which rows are the last rows of the texts?

# %%
viz.show_task(ch01.decode_inputs)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch01.decode_inputs)

# %% [markdown]
# ### The forward pass
#
# The forward pass is written out here, once for the whole course. It uses the weights of Hugging Face's model. The caller
# passes attention in.

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
# It needs each row's *position*, and this is given for each row. Which sequence the row belongs to does not matter.
# </details>
#
# Only attention needs it. That is why one argument, `attend`, is enough to replace the whole memory system of this engine. The
# next two chapters each do this once.
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
# The picture shows the time per token against the context length, for both chapters. For chapter 01 it is the time of a whole
# step with one sequence.

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
# The time of chapter 00 grows, that of chapter 01 is flat. (The axis is logarithmic, because the two curves are far apart.) It
# does not grow at all, because attention here scores the whole reserved row in every step and masks what is not written yet.
#
# ## What it costs
#
# A token needs a key and a value for each layer and head:

# %% tags=["nbval-check-output"]
config = model.config
bytes_per_token = 2 * config.n_layer * config.n_embd * 4
print(f"this model, float32: {bytes_per_token:,} bytes a token")
gpt2 = 2 * 12 * 768 * 2
print(
    f"GPT-2 124M, bfloat16: {gpt2:,} bytes a token, {gpt2 * 1024 // 2**20} MiB for 1024 tokens"
)

# %% [markdown]
# A place for the key and value of one token is called a *slot*.
#
# > **Predict.** Six requests come at once, with up to 400 new tokens for each. The cache reserves slots for the longest text
# > that each might become. The answers then have between 71 and 266 tokens. On average over the run, what share of the
# > reserved slots has been written?

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
# run ends with the longest *answer*, after 266 tokens. The limit of 400 is never reached.
# </details>
#
# <details><summary><b>If you took the mean answer, about 180 tokens, and said about a fifth</b></summary>
#
# This is near the share that belongs to answers. The picture shows the share that is *written*, about a third: all six rows grow
# to the length of the longest answer, $\tfrac{1}{2} \cdot 266$ tokens on average, of some 410 reserved. A text that is over is
# still computed and written, because its row stays in the batch until the longest answer is complete.
# </details>
#
# <details><summary><b>Where it goes in real serving</b></summary>
#
# The length of an answer is not known in advance. A server may reserve for the model's maximum, 2,048 tokens say. If a typical
# text has a few hundred, most of the cache is wasted. The authors of PagedAttention measured systems of 2023: 20 to 38 % of the
# cache was in use. The 38 % are those of an allocator that is told how long each answer will be (Kwon et al., SOSP 2023).
# Chapter 02 reproduces this comparison.
# </details>
#
# Unused memory has a price: *further requests could run in it*. The larger the batch, the more tokens come out of each step in
# which the weights are read.
#
# ### Exercise 1.4: measure and explain (3 points)
#
# The picture counts every slot that was written. How many of the reserved slots are useful, and where do the others go? Measure
# the number, and explain it in your own words. Your text goes to your instructor.

# %%
viz.show_task(ch01.answer_1_4)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch01.answer_1_4)

# %% [markdown]
# ## A padded batch runs to its end
#
# > **Predict.** Sequence D ends after 71 tokens. Where does its row stop in the timeline of the first 100 steps?

# %%
viz.timeline(traces[:100])

# %% [markdown]
# <details><summary><b>If you said at step 71</b></summary>
#
# It does not stop. A padded batch keeps all the rows that it began with. A finished story is still computed until the longest
# answer is complete, and its further tokens are discarded. A new request that comes in the meantime has to wait. Chapter 04
# changes this.
# </details>

# %% [markdown]
# ## What the next chapter must fix
#
# The time per token is flat. But memory is reserved for texts that never come. It is one piece per request, so two free pieces
# of half the size cannot serve a request. Chapter 02 divides the cache into small blocks that can be anywhere in memory, and
# gives them to the sequences one at a time.
