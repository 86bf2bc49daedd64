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
# # Chapter 08: blocks that several sequences hold
#
# Each request computes its whole prompt, also if an earlier request began with the same tokens. In a chat every request begins
# with the same system prompt, and every turn begins with all turns before it. This chapter lets sequences share the blocks of
# what they have in common.
#
# **You need:** chapter 04, dictionaries that keep an order, and what a hash is. **Time:** about four hours, reading and exercises
# together.
#
# *After this chapter you can* say what a block's number of holders is for, copy a block only when it is written, find the
# beginning of a prompt in the cache, and say which content is lost first when memory runs out.
#
# *If this chapter is left to you (a copy from a course), the cells use your own file in `work/` for the tasks that are done, and
# lent functions for the others. So the page runs from the beginning, and each exercise stands right after its idea.
# `python -m chapters start 08` writes `work/ch08_sharing.py`, unless it is there already; `python -m chapters check 08` checks it.*

# %%
import sys

sys.path.insert(0, "..")  # the chapters lie one folder up

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

from chapters.course import load_stage
from pagebrain import PageBrainConfig, viz
from pagebrain.assets import BUNDLED_MODEL

logging.disable_progress_bar()
torch.set_num_threads(1)
ch04 = load_stage("04")
ch08 = load_stage("08")
exact = GPT2LMHeadModel.from_pretrained(
    BUNDLED_MODEL, dtype=torch.float64, attn_implementation="eager"
).eval()
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
exact.config.eos_token_id = None  # every answer has the length that was asked for

# %% [markdown]
# ## The problem, measured
#
# Four users talk to the same assistant. Its system prompt has 48 tokens, and each question a few more. Each answer has 6 tokens. A
# request arrives every third step. This is the engine of chapter 04, with blocks of 16 slots:

# %% tags=["nbval-check-output"]
text = (
    "Once upon a time there was an old mill by the river. A fox, an owl and a little bird lived "
    "there. Every evening they told each other a story about what they had seen in the garden, "
    "in the forest and in the village behind the hill. This is one of the stories."
)
system = tokenizer.encode(text)[:48]
questions = ["The fox said", "One morning Mia", "The owl", "In the garden, a little bird"]
prompts = [system + tokenizer.encode(line) for line in questions]
assert len(system) == 48


def play(engine, prompts, n=6, every=3):
    """Serve requests that arrive every few steps; return the traces of the steps."""
    coming, steps = list(prompts), 0
    while True:
        if coming and steps % every == 0:
            engine.add_request(coming.pop(0), n)
        if engine.step() is None and not coming:
            return engine.history
        steps += 1


def prompt_tokens(history, prompts):
    """For each request, the tokens of its prompt that were computed."""
    found = [0] * len(prompts)
    for trace in history:
        for row in trace.rows:
            found[row.seq_id] += min(row.context_len, len(prompts[row.seq_id])) - min(
                row.start, len(prompts[row.seq_id])
            )
    return found


room = {"block_size": 16, "num_blocks": 24, "max_num_seqs": 4}
config = PageBrainConfig.for_model(exact, **room)
before = play(ch04.Engine(exact, config), prompts)
computed = prompt_tokens(before, prompts)
for name, prompt, count in zip("ABCD", prompts, computed, strict=True):
    print(f"{name}: {len(prompt)} tokens in the prompt, {count} computed")
print(
    f"together {sum(computed)}, of which {len(system)} different ones are the system prompt's"
)

# %% [markdown]
# The same 48 tokens are computed four times, and their K and V lie in memory four times:

# %%
fullest = max(before, key=lambda trace: trace.num_blocks - len(trace.free_blocks))
viz.block_tables(fullest, with_pool=True)

# %% [markdown]
# ## The idea
#
# K and V of a token depend on the tokens up to it, and on nothing else. Two texts with the same beginning have the same K and V
# there. A block table may name any block, also one that another table names, and attention only reads. So nothing in chapter 03
# must change. Three questions remain:
#
# - When is a block free, if several tables name it? It counts its *holders*.
# - What if a holder writes into it? It gets a copy first: *copy-on-write*.
# - How is a block found that holds the wanted tokens? By a *hash* of all tokens up to its end.
#
# ### Exercise 8.1: holders, and the fork (7 points)
#
# `allocate` gives a block one holder, `share` adds one, `free` removes one. A block without holders is free. A *fork* begins a new
# sequence behind the first tokens of another one: it shares all of their blocks, also the last one if it is not full.
#
# Play it first: sequence A has 6 tokens in blocks of 4. B forks from it behind 5 tokens, C behind 4. How many holders has each block?
#
# <details><summary><b>The answer, when you have yours</b></summary>
#
# A has two blocks. Tokens 0 to 3 are in the first, which B and C hold too: three holders. Token 4 is in the second one. B holds it,
# C does not: two holders.
# </details>

# %%
viz.show_task(ch08.BlockManager.share)

# %%
viz.show_task(ch08.BlockManager.free)

# %%
viz.show_task(ch08.SharedCache.fork)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch08.BlockManager.share, ch08.BlockManager.free, ch08.SharedCache.fork)

# %% [markdown]
# ## Copy-on-write
#
# After a fork both sequences want to write their next token into the same slot. The sequence that writes first takes a new block,
# copies the old one's K and V into it, and names the new one in its table. The last holder needs no copy, because nothing else
# reads the block.
#
# ### Exercise 8.2: copy before you write (6 points)
#
# > **Predict.** A sequence has 6 tokens in blocks of 4, and is forked twice behind all of them. Then all three write their seventh
# > token. How many blocks are copied? And if there had been 8 tokens?
#
# <details><summary><b>The answer, when you have yours</b></summary>
#
# Two: the first writer copies, the second copies, and the third is the only holder that is left. With 8 tokens none is copied: the
# ninth token goes to a new block.
# </details>

# %%
viz.show_task(ch08.SharedCache.must_copy)

# %%
viz.show_task(ch08.SharedCache.grow)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch08.SharedCache.must_copy, ch08.SharedCache.grow)

# %% tags=["nbval-check-output"]
small = PageBrainConfig.for_model(exact, block_size=4, num_blocks=8)
for num_tokens in (6, 8):
    cache = ch08.SharedCache(ch08.BlockManager(small), small)
    cache.grow(0, num_tokens)
    cache.lengths[0] = num_tokens
    cache.fork(0, 1, num_tokens)
    cache.fork(0, 2, num_tokens)
    print(f"{num_tokens} tokens, forked twice: {[cache.block_table(i) for i in range(3)]}")
    for seq_id in range(3):
        copies = cache.must_copy(seq_id)
        cache.grow(seq_id, num_tokens + 1)
        print(
            f"   sequence {seq_id} writes: copies {int(copies)}, table {cache.block_table(seq_id)}"
        )

# %% [markdown]
# ## Find the beginning of a prompt
#
# To find a block by its own tokens is not enough: "the fox" after "Once upon a time" has other K and V than "the fox" after "The owl
# and". So the key of a block holds its own tokens and a hash of *all* tokens up to its end. The hash is made of the hash of the
# block before and of the block's tokens, so each block costs the same, however long the text is. This is a chain: if the
# hashes of two blocks are equal, so are all blocks before them. The tokens are compared as well, since two texts *can* have one hash.
#
# Three rules, each of which has been broken in real engines:
#
# 1. **A token must be left to compute.** The next token is chosen from the logits of the last one, and K and V in a cache give no
#    logits.
# 2. **The budget is counted after the hit.** What is found costs nothing.
# 3. **A found block can be free.** Then it must not be counted as a block that can be taken, and it must be held before others are
#    taken.
#
# ### Exercise 8.3: the chain, the match, and what a hit skips (9 points)
#
# > **Predict.** Blocks have 16 slots. A prompt was computed before, and the same prompt comes again. What does the hit save if it has
# > 15 tokens? 16? 17? 33?

# %%
viz.show_task(ch08.SharedCache.block_keys)

# %%
viz.show_task(ch08.BlockManager.find)

# %%
viz.show_task(ch08.SharedCache.match)

# %%
viz.show_task(ch08.Scheduler.admit)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(
    ch08.SharedCache.block_keys,
    ch08.BlockManager.find,
    ch08.SharedCache.match,
    ch08.Scheduler.admit,
)

# %% tags=["nbval-check-output"]
long_text = tokenizer.encode(text)
for length in (15, 16, 17, 33):
    engine = ch08.Engine(exact, config)
    play(engine, [long_text[:length]] * 2, n=1)
    first, second = prompt_tokens(engine.history, [long_text[:length]] * 2)
    print(
        f"{length} tokens: {first} computed at first, {second} again, {first - second} saved"
    )

# %% [markdown]
# <details><summary><b>If you said 16 for the prompt of 16 tokens</b></summary>
#
# All of its tokens are in the cache, in one full block. But one token must be computed for its logits, and a hit consists of whole
# blocks. So the block cannot be used. Only from the 17th token on does its content help.
# </details>
#
# One hit, step by step: the keys of a prompt, and what is found for each.

# %% tags=["nbval-check-output"]
engine = ch08.Engine(exact, config)
play(engine, prompts[:1])
asked = engine.add_request(prompts[1], 6)
for index, key in enumerate(engine.cache.block_keys(asked, 3)):
    found = engine.cache.block_manager.find(key)
    start = tokenizer.decode(system[16 * index : 16 * index + 4])
    print(
        f"block {index}, {start!r} ...: hash {key.chain_hash.hex()[:8]}, found in block {found}"
    )
print(
    "free now:",
    [
        block
        for block in engine.cache.match(asked)
        if block in engine.cache.block_manager.free_blocks
    ],
)
engine.step()
row = engine.history[-1].rows[0]
print(
    f"the first step computes tokens {row.start} to {row.context_len - 1} of {len(prompts[1])}"
)

# %% [markdown]
# The blocks are free: their sequence has ended. They keep their content, because nothing needed their memory yet.
#
# ## What is kept, and what is lost first
#
# A block is registered when it is full and *computed*: a block that was only handed out holds nothing yet. If two sequences computed
# the same block at the same time, one of them is a duplicate. Its table then names the other block, and only after that the
# duplicate is freed: a table must never name a free block.
#
# When a block is needed and none is free without a content, a content is lost (*evicted*): that of the block which has been free for
# the longest time (least recently used). The end of a chain must go before its head, since nothing finds a block without those
# before it.
#
# ### Exercise 8.4: register and evict (8 points)
#
# A sequence with blocks 5, 2, 7 ends. In which order are they freed, so that the right one is evicted first?
#
# <details><summary><b>The answer, when you have yours</b></summary>
#
# 7, 2, 5. The block that was put back first is taken first, and 7 is the end of the chain.
# </details>

# %%
viz.show_task(ch08.BlockManager.register)

# %%
viz.show_task(ch08.BlockManager.put_back)

# %%
viz.show_task(ch08.BlockManager.take_free)

# %%
viz.show_task(ch08.SharedCache.register)

# %%
viz.show_task(ch08.SharedCache.free)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(
    ch08.BlockManager.register,
    ch08.BlockManager.put_back,
    ch08.BlockManager.take_free,
    ch08.SharedCache.register,
    ch08.SharedCache.free,
)

# %% [markdown]
# > **Predict.** A prompt of 65 tokens (its first 4 blocks can be found later) has its answer. Then requests with other prompts come,
# > and at last the first prompt again. How many of its tokens are found if the others need all blocks of the pool but 2? All?

# %% tags=["nbval-check-output"]
for others in (0, 7, 8, 9, 11):
    engine = ch08.Engine(
        exact, PageBrainConfig.for_model(exact, block_size=16, num_blocks=11)
    )
    play(engine, [(long_text * 2)[:65]], n=1)
    if others:
        play(engine, [[300 + others] * (16 * others - 1)], n=1)
    again = engine.add_request((long_text * 2)[:65], 1)
    hit, evicted = len(engine.cache.match(again)), engine.cache.block_manager.num_evicted
    print(
        f"others took {others:2d} of 11 blocks: {evicted} contents evicted, {16 * hit} tokens found"
    )

# %% [markdown]
# The head of the chain is found as long as it is there. So a full pool costs a part of the hit at first, and the whole hit only
# when all of the memory was needed.
#
# ## The four users again

# %% tags=["nbval-check-output"]
engine = ch08.Engine(exact, config)
after = play(engine, prompts)
shared = prompt_tokens(after, prompts)
for name, prompt, count in zip("ABCD", prompts, shared, strict=True):
    print(f"{name}: {len(prompt)} tokens in the prompt, {count} computed")
print(f"together {sum(shared)}, before {sum(computed)}")

# %%
viz.block_tables(
    max(after, key=lambda trace: trace.num_blocks - len(trace.free_blocks)), with_pool=True
)

# %% [markdown]
# Three blocks have a corner: several tables name them. The steps are fewer tokens long now. To see which rows disappear, let a
# step compute at most 16 tokens, so that a prompt takes several steps. Both runs serve the same requests:

# %%
narrow = PageBrainConfig.for_model(exact, **room, max_num_batched_tokens=16)
off = play(ch04.Engine(exact, narrow), prompts)
on = play(ch08.Engine(exact, narrow), prompts)
viz.compare_traces(off, on, titles=("without the cache", "with the cache"))

# %% [markdown]
# The numbers at the right are the tokens that were computed. A's row is the same: it is the first. The chunks of the system prompt
# are missing for each request whose turn came after A had computed them, and so the later requests begin earlier.
#
# The answers are the same, and so are all logits, compared with Hugging Face:

# %% tags=["nbval-check-output"]
logits = {}
answers = ch08.generate(
    exact,
    prompts,
    6,
    lambda index, scores: logits.setdefault(index, []).append(scores),
    config=narrow,
)
worst = 0.0
for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    with torch.no_grad():
        theirs = exact(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    worst = max(worst, float((torch.stack(logits[index]) - theirs).abs().max()))
assert worst < 1e-9
print("largest difference below 1e-9: True")

# %% [markdown]
# ## Several answers to one prompt
#
# A request may ask for `n` samples. They have the prompt in common, and each goes on in its own way. The first sample computes the
# prompt. Its last logits give the first token of *every* sample, each drawn with other random numbers. Then the others are forks.
#
# ### Exercise 8.5: n samples for one prefill (5 points)
#
# A sample without a seat waits, and holds no blocks meanwhile. How does it get the prompt later, and how much of it is computed again?
#
# <details><summary><b>The answer, when you have yours</b></summary>
#
# `admit` finds the prompt's full blocks for it. What is behind them, at most a block, is computed again.
# </details>

# %%
viz.show_task(ch08.Engine.fork_samples)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch08.Engine.fork_samples)

# %% [markdown]
# > **Predict.** A prompt of 50 tokens, four samples of 6 tokens each, and seats for all. How many tokens are computed in all?

# %% tags=["nbval-check-output"]
engine = ch08.Engine(exact, config)
engine.add_request((system + long_text)[:50], 6, n=4, temperature=1.0, seed=8)
while engine.step() is not None:
    pass
print("computed in each step:", [trace.num_tokens for trace in engine.history])
print("together:", sum(trace.num_tokens for trace in engine.history))
texts = {tuple(seq.output_token_ids) for seq in engine.samples["0"]}
print(f"{len(texts)} different answers")

# %% [markdown]
# <details><summary><b>If you said 74</b></summary>
#
# You counted 6 tokens for each sample. But the last token of an answer is never computed: 50 + 4 * 5 = 70.
# </details>

# %%
viz.block_tables(engine.history[1], with_pool=True)

# %% [markdown]
# Step 1: three full blocks have four holders. The fourth block of the prompt was copied when the samples wrote into it.
#
# ### Exercise 8.6: what does a prompt cost that is wholly cached? (3 points)

# %%
viz.show_task(ch08.answer_8_6)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true, "outputs_hidden": true}
viz.show_source(ch08.answer_8_6)

# %% [markdown]
# ## Your blocks in PageBrain's own engine
#
# `python -m chapters try 08` runs PageBrain's engine with your `BlockManager`. This command serves with it:
#
# ```
# pagebrain serve --part block_manager=work/ch08_sharing.py:BlockManager
# ```
#
# The engine does a little more than this chapter. A request that arrived just behind its twin waits for the blocks that the twin is
# computing, and `cache_salt` keeps the blocks of tenants apart.
