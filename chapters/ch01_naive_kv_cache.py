"""Chapter 01: one contiguous cache per request, reserved in full, and a padded batch.

Chapter 00 computes the same keys and values again for every token. These never change: token ``i`` depends on earlier tokens
only, so its K and V are final once they are computed. A cache keeps them, and then each new token costs one row instead of
all rows. The cache costs memory. This chapter takes the memory in the simplest way: it reserves room for the longest text
that each request might become. All requests are computed side by side, and short prompts are padded to the longest.

What changes from chapter 00: the forward pass is written out here, with the same weights, because attention has to read the
cache. Its arguments are flat rows of tokens and a function that attends. The loop that recomputes becomes a loop with one
prefill step and many decode steps.

Tasks (28 points, about 4 hours):

- 1.1 (7 points) ``ReservedCache.write``: put new K and V where they belong.
- 1.2 (10 points) ``masked_attention``: attention over a cache that is longer than what has been written.
- 1.3 (8 points) ``decode_inputs``: which tokens, at which positions, the next step computes.
- 1.4 (3 points) ``answer_1_4``: measure and explain where the reserved memory goes.

Know first: chapter 00; scaled dot-product attention; broadcasting.
In the engine: :class:`pagebrain.cache.CacheManager` (which reserves nothing) and :mod:`pagebrain.models.gpt2`. In vLLM: no
such cache; ``vllm/v1/core/kv_cache_manager.py`` replaces it. Hugging Face's ``StaticCache`` is such a cache.
From pagebrain: ``model_config.attention_scale`` and the records of ``pagebrain.engine.trace``.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from chapters.ch00_baseline import OnLogits, check_prompts, greedy_token
from pagebrain.engine.trace import Observer, StepTrace, TraceRow
from pagebrain.model_config import attention_scale

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, query, key, value) -> out``, each ``[num_tokens, num_heads, head_dim]``: what ``forward`` calls."""


@torch.no_grad()
def forward(model: GPT2LMHeadModel, token_ids: Tensor, positions: Tensor, attend: Attend, logits_rows: Tensor) -> Tensor:
    """GPT-2, written out once for all chapters. The caller passes attention in; everything else works row by row.

    Args:
        token_ids, positions: int64 ``[num_tokens]``, the rows of all sequences one after the other.
        attend: stores the rows' K and V and attends; only it knows which rows belong to one sequence.
        logits_rows: int64 ``[num_logits]``, the rows whose scores are returned.

    Returns:
        ``[num_logits, vocab_size]``.
    """
    gpt2 = model.transformer
    num_heads = model.config.n_head
    hidden = gpt2.wte(token_ids) + gpt2.wpe(positions)  # [num_tokens, n_embd]
    for layer, block in enumerate(cast(list[GPT2Block], gpt2.h)):
        qkv = block.attn.c_attn(block.ln_1(hidden)).view(len(hidden), 3, num_heads, -1)
        query, key, value = qkv.unbind(1)  # each [num_tokens, num_heads, head_dim]
        context = attend(layer, query, key, value)
        hidden = hidden + block.attn.c_proj(context.reshape(len(hidden), -1))
        hidden = hidden + block.mlp(block.ln_2(hidden))
    logits: Tensor = model.lm_head(gpt2.ln_f(hidden[logits_rows]))
    return logits


class ReservedCache:
    """Room for ``max_len`` tokens of K and V for each of ``batch_size`` sequences, reserved before the first step.

    ``keys`` and ``values`` are ``[num_layers, batch_size, max_len, num_heads, head_dim]``.
    """

    def __init__(self, model: GPT2LMHeadModel, batch_size: int, max_len: int) -> None:
        config = model.config
        shape = (config.n_layer, batch_size, max_len, config.n_head, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)

    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Task 1.1: store K and V of new tokens in ``keys`` and ``values``.

        ``positions`` is int64 ``[batch_size, num_new]``; ``key`` and ``value`` are ``[batch_size, num_new, num_heads,
        head_dim]``. New token ``t`` of sequence ``b`` belongs at position ``positions[b, t]`` of that sequence. Positions
        are in ``0 .. max_len - 1`` and differ within a sequence; they need not be consecutive, and each sequence has its
        own. What was at these places before is replaced. Everything else stays, and the arguments do not change.

        Only the new tokens are written: ``keys`` and ``values`` stay the same tensors, and no copy is made of a layer, or of
        all that is reserved for a sequence.
        """
        # BEGIN SOLUTION 1.1
        sequences = torch.arange(len(positions), device=positions.device).unsqueeze(1)  # [batch_size, 1]
        self.keys[layer, sequences, positions] = key
        self.values[layer, sequences, positions] = value
        # END SOLUTION

    def trace(self, step: int, starts: Sequence[int], num_new: Sequence[int]) -> StepTrace:
        """The record of a step that computes ``num_new[b]`` tokens of sequence ``b``, after ``starts[b]`` cached ones.

        In the record, this cache is a pool of ``batch_size`` blocks, each with ``max_len`` slots.
        """
        _, batch_size, max_len, _, _ = self.keys.shape
        rows = tuple(
            TraceRow(b, str(b), 0, start, count, True, "decode" if start else "prefill")
            for b, (start, count) in enumerate(zip(starts, num_new))
        )
        tables = {b: (b,) for b in range(batch_size)}
        return StepTrace(step, rows, tables, (), {}, batch_size, max_len, launched_s=time.monotonic())


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Task 1.2: causal attention of new tokens over a cache with room for more than was written.

    Args:
        query: ``[batch_size, num_new, num_heads, head_dim]``.
        keys, values: ``[batch_size, max_len, num_heads, head_dim]``. Slots past a sequence's own tokens hold old numbers,
            of any size for which no score overflows.
        positions: int64 ``[batch_size, num_new]``, the position of each query. A query sees the slots up to its own
            position, this one included.
        scale: positive factor on the scores.

    Scores of visible slots may have any finite size, far below zero too. The arguments do not change, and the result depends
    on nothing else: positions of the same shape may have other values in the next call.

    Returns:
        ``[batch_size, num_new, num_heads, head_dim]``, in the dtype of ``query``.
    """
    # BEGIN SOLUTION 1.2
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    slots = torch.arange(keys.shape[1], device=keys.device)
    hidden = slots > positions.unsqueeze(-1)  # [batch_size, num_new, max_len]
    scores = scores.masked_fill(hidden.unsqueeze(1), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values)
    # END SOLUTION


def attend_reserved(model: GPT2LMHeadModel, cache: ReservedCache, positions: Tensor) -> Attend:
    """Attention for a padded batch whose rows have the positions ``positions`` ``[batch_size, num_new]``."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (rows.view(*positions.shape, *rows.shape[1:]) for rows in (query, key, value))
        cache.write(layer, positions, key, value)
        scale = attention_scale(model.config, layer)
        return masked_attention(query, cache.keys[layer], cache.values[layer], positions, scale).flatten(0, 1)

    return attend


def prefill_inputs(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """The first step: all prompts at once, padded on the right to the longest.

    Returns ``token_ids`` and ``positions`` ``[batch_size, longest]``, and each prompt's last row ``[batch_size]`` in the
    flat batch. K and V of padding are written past the prompt's end. The mask hides them until they are overwritten.
    """
    width = max(map(len, prompts))
    token_ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    positions = torch.arange(width).expand(len(prompts), width)
    last_rows = torch.tensor([index * width + len(prompt) - 1 for index, prompt in enumerate(prompts)])
    return token_ids, positions, last_rows


def decode_inputs(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Task 1.3: the inputs of every later step: the newest token of each text, whose K and V are not in the cache yet.

    ``texts`` are the token ids so far, prompt and answer: sequences of at least one int, tuples or lists, which must not
    change. Returns what :func:`prefill_inputs` returns (int64 tensors of the same meaning and number of axes), with one
    column in place of ``longest``.
    """
    # BEGIN SOLUTION 1.3
    token_ids = torch.tensor([[text[-1]] for text in texts])
    positions = torch.tensor([[len(text) - 1] for text in texts])
    return token_ids, positions, torch.arange(len(texts))
    # END SOLUTION


def generate(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_logits: OnLogits | None = None,
    *,
    on_step: Observer | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, all prompts as one batch that runs until the longest answer is complete.

    ``on_step`` is called with the record of every step.
    """
    check_prompts(model, prompts, max_new_tokens)
    if not prompts:
        return []
    cache = ReservedCache(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    texts = [list(prompt) for prompt in prompts]
    ended = [False] * len(prompts)
    inputs = prefill_inputs(texts)
    num_cached = [0] * len(prompts)
    for step in range(max_new_tokens):
        token_ids, positions, last_rows = (tensor.to(model.device) for tensor in inputs)
        trace = cache.trace(step, num_cached, [len(text) - start for text, start in zip(texts, num_cached)])
        num_cached = [len(text) for text in texts]
        attend = attend_reserved(model, cache, positions)
        logits = forward(model, token_ids.flatten(), positions.flatten(), attend, last_rows)  # [batch_size, vocab_size]
        for index, text in enumerate(texts):
            if not ended[index] and on_logits is not None:
                on_logits(index, logits[index])
            # A text that has ended is still computed: its row stays in the batch until the longest answer is complete.
            text.append(greedy_token(logits[index]))
            ended[index] = ended[index] or text[-1] == model.config.eos_token_id
        if on_step is not None:
            on_step(trace.read())
        if all(ended):
            break
        inputs = decode_inputs(texts)
    answers = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    end = model.config.eos_token_id
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]


def answer_1_4() -> tuple[float, str]:
    """Task 1.4: measure and explain: what share of the reserved slots is useful, on average over the steps of a run?

    The run: the six stories of the notebook, *What it costs*, in float64, with ``max_new_tokens=400``. Their answers have
    different lengths, and the batch runs until the longest is complete. In a step, a slot is *useful* if it holds K and V of
    a text that is not over. A text is over after the step that computes the last token of its answer. All other reserved
    slots are not useful.

    How to measure: pass ``on_step=traces.append`` to ``generate``. A trace's ``rows`` say for each sequence its ``seq_id``
    and ``context_len``, the slots that it has written after this step. A trace has ``num_blocks`` rows of ``block_size``
    slots. The answers that ``generate`` returns say how long each text lives.

    Returns the share in percent, to one decimal, and one to four sentences for your instructor, at least 8 different words:
    where do the other slots go (name the parts and their shares), and which of these parts needs no reservation to be
    avoided, but another way to batch?
    """
    # BEGIN SOLUTION 1.4
    return 17.1, (
        "66 % of the slots are reserved and not written in a step, since the limit of 400 tokens is never reached and texts "
        "start short. 16 % hold K and V of stories that are over: they are computed on until the longest answer is "
        "complete. This part goes away if a story leaves the batch when it ends, which is a matter of scheduling."
    )
    # END SOLUTION
