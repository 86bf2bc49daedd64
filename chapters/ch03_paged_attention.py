r"""Chapter 03: attention that reads pages where they lie.

Chapter 02 copies a sequence's whole K and V together for every token it generates. That is not needed: softmax can be
computed piece by piece. Keep three numbers for each query: the largest score so far ``m``, the sum ``l`` of
``exp(score - m)``, and the weighted sum of values ``acc``. A new page may bring a larger maximum ``m'``; then what was
summed before shrinks by ``exp(m - m')``, and nothing else changes (Milakov and Gimelshein, 2018; with values Dao et al.,
2022):

    l   <- l * exp(m - m') + sum_j exp(s_j - m')
    acc <- acc * exp(m - m') + sum_j exp(s_j - m') * v_j        and at the end  out = acc / l

So a page is read where it lies. Of keys and values nothing larger than a page is held for each query. A GPU runs many such
loops at the same time, one for each query. Here all queries take their first page together, then their second, and so on.
A query whose pages are used up waits, or reads a page and masks all of it.

What changes from chapter 02: attention. Keys and values are no longer gathered into one piece.

Tasks (38 points, about 6 hours):

- 3.1 (12 points) ``add_page``: one step of the online softmax.
- 3.2 (8 points) ``attend_one``: one query, page by page.
- 3.3 (15 points) ``paged_attention``: all queries of a batch, page by page side by side.
- 3.4 (3 points) ``answer_3_4``: measure and explain: why is this slower than chapter 02 here?

Know first: chapter 02; why softmax subtracts the maximum.
In the engine: :func:`pagebrain.attention.paged_attention`. In vLLM: ``vllm/attention/ops`` and FlashAttention's
``flash_attn_varlen_func`` with a block table.
From pagebrain: ``model_config.attention_scale`` and the ``Observer`` of ``pagebrain.engine.trace``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from chapters import ch02_block_table
from chapters.ch00_baseline import OnLogits
from chapters.ch01_naive_kv_cache import Attend
from chapters.ch02_block_table import PagedCache, Rows
from pagebrain.engine.trace import Observer
from pagebrain.model_config import attention_scale


class Partial(NamedTuple):
    """An unfinished softmax: the three numbers of each query and head, over the pages seen so far.

    Attributes:
        maximum: ``[..., num_heads]``, the largest score, minus infinity before the first page.
        total: ``[..., num_heads]``, the sum of ``exp(score - maximum)``.
        acc: ``[..., num_heads, head_dim]``, the values weighted by ``exp(score - maximum)``.
    """

    maximum: Tensor
    total: Tensor
    acc: Tensor

    @classmethod
    def start(cls, query: Tensor) -> "Partial":
        """Before the first page, for queries ``[..., num_heads, head_dim]``."""
        heads = query[..., 0]
        return cls(torch.full_like(heads, -math.inf), torch.zeros_like(heads), torch.zeros_like(query))


def add_page(partial: Partial, scores: Tensor, values: Tensor) -> Partial:
    """Task 3.1: add one more page to an unfinished softmax.

    Args:
        partial: of the pages before, for any number of queries ``...``.
        scores: ``[..., num_heads, block_size]``; minus infinity for a slot that the query must not see. A query sees at
            least one slot of the first page. It may see no slot of a later page. Visible scores are finite, of either sign,
            and may be large: the tests go to 100,000, and to 200 in float32, where ``exp(89)`` is ``inf``.
        values: ``[..., block_size, num_heads, head_dim]``; those of hidden slots are any finite numbers.

    Returns:
        A new ``Partial``, in the dtype of the arguments. The arguments stay as they were: the caller may use ``partial``
        again, and ``scores`` and ``values`` may be views of tensors that are read elsewhere.
    """
    # BEGIN SOLUTION 3.1
    maximum = torch.maximum(partial.maximum, scores.amax(dim=-1))
    shrink = torch.exp(partial.maximum - maximum)
    weights = torch.exp(scores - maximum.unsqueeze(-1))  # [..., num_heads, block_size]
    total = partial.total * shrink + weights.sum(dim=-1)
    acc = partial.acc * shrink.unsqueeze(-1) + torch.einsum("...hk,...khd->...hd", weights, values)
    return Partial(maximum, total, acc)
    # END SOLUTION


def attend_one(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, block_table: Sequence[int], context_len: int, scale: float
) -> Tensor:
    """Task 3.2: one query over its context, a page at a time.

    Keys and values are read where they lie: at no time do copies of more than about a page exist. (Scores are small and may
    be kept.) The pools are read anew in each call, because their slots are written between calls.

    Args:
        query: ``[num_heads, head_dim]``, of the token at position ``context_len - 1``.
        key_pool, value_pool: ``[num_blocks, block_size, num_heads, head_dim]``, only read; unused slots hold any finite
            numbers. A block has any number of slots, not only powers of two.
        block_table: physical blocks in logical order. Entries past the context must not be followed: such blocks need not
            exist.
        context_len: tokens that the query sees, at least 1. The last page may hold fewer than ``block_size`` of them.
        scale: factor on the scores.

    Returns:
        ``[num_heads, head_dim]``, in the dtype of the query.
    """
    # BEGIN SOLUTION 3.2
    block_size = key_pool.shape[1]
    partial = Partial.start(query)
    for page in range(-(-context_len // block_size)):
        block_id = block_table[page]
        filled = min(block_size, context_len - page * block_size)
        keys, values = key_pool[block_id, :filled], value_pool[block_id, :filled]
        partial = add_page(partial, torch.einsum("hd,khd->hk", query, keys) * scale, values)
    return partial.acc / partial.total.unsqueeze(-1)
    # END SOLUTION


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    """Task 3.3: causal attention for a batch of sequences, all queries side by side.

    Every row of ``query`` is a *lane*: a query with a context of its own, which ends with its own token. In step ``p`` each
    lane reads page ``p`` of its sequence. A lane whose context is shorter waits, or reads a page and masks all of it.

    At no time are keys and values of more than a page for each lane copied; scores may be kept. The number of PyTorch
    operations depends on the pages and the sequences, and does not grow with the rows: rows of a sequence are computed
    together. Nothing is kept between calls: the same tensors may hold other numbers in the next one.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``; rows ``query_starts[i] .. query_starts[i + 1] - 1`` are the newest
            tokens of sequence ``i``, in order. There is at least one row.
        key_pool, value_pool: ``[num_blocks, block_size, num_heads, head_dim]``, with any strides and any block size, only
            read; unused slots hold any finite numbers.
        block_tables: int64 ``[num_seqs, max_blocks]``; entries past a sequence's pages may be any block. The longest
            sequence may fill the width.
        context_lens: int64 ``[num_seqs]``, tokens in the cache including the newest.
        query_starts: int64 ``[num_seqs + 1]``. A sequence may have no rows: then two neighbouring entries are equal, and its
            context length may be anything, 0 included.
        scale: factor on the scores.

    Returns:
        ``[num_tokens, num_heads, head_dim]``, in the dtype of the query.
    """
    # BEGIN SOLUTION 3.3
    block_size = key_pool.shape[1]
    query_lens = query_starts.diff()
    seq_of_lane = torch.repeat_interleave(torch.arange(len(query_lens), device=query.device), query_lens)
    # The last query of a sequence sees all of its context, the one before it one token less, and so on.
    from_end = query_starts[1:][seq_of_lane] - torch.arange(len(query), device=query.device) - 1
    lens = context_lens[seq_of_lane] - from_end  # [num_tokens]
    partial = Partial.start(query)
    for page in range(-(-int(lens.max()) // block_size)):
        lanes = torch.nonzero(lens > page * block_size).flatten()  # those that have such a page
        block_ids = block_tables[seq_of_lane[lanes], page]
        scores = torch.einsum("nhd,nkhd->nhk", query[lanes], key_pool[block_ids]) * scale
        slots = page * block_size + torch.arange(block_size, device=query.device)
        scores = scores.masked_fill((slots >= lens[lanes, None])[:, None], -math.inf)
        before = Partial(*(tensor[lanes] for tensor in partial))
        after = add_page(before, scores, value_pool[block_ids])
        for whole, part in zip(partial, after, strict=True):
            whole[lanes] = part
    return partial.acc / partial.total.unsqueeze(-1)
    # END SOLUTION


def answer_3_4() -> tuple[float, str]:
    """Task 3.4: why is a decode step slower here than in chapter 02, although no context is copied into one piece?

    Measure: how many operations does *your* ``paged_attention`` start for one more page of context, in one decode of one
    sequence and one layer? ``chapters.aids.new_tensors.NewTensors`` counts them: it is used as in the notebook. Two contexts
    that differ by a known number of pages are enough. The number may differ by 1 from what the check counts.

    Returns the number, and one to four sentences, at least 8 different words, that say why chapter 03 is slower than chapter
    02 on this machine, and what a kernel changes. The text goes to the instructor.
    """
    # BEGIN SOLUTION 3.4
    text = (
        "Each page of each layer starts dozens of small operations from Python, and each of them costs microseconds however "
        "little it computes; chapter 02 starts the same number for any context and copies everything in one operation. "
        "A kernel runs the loop over the pages inside one operation and keeps the three numbers in registers."
    )
    return 61.0, text
    # END SOLUTION


def attend_paged(model: GPT2LMHeadModel, cache: PagedCache, rows: Rows) -> Attend:
    """Attention of a step that writes its K and V to their slots and reads pages through the block tables."""
    tables = [cache.block_table(seq_id) for seq_id in rows.seq_ids]
    width = max(map(len, tables))
    device = cache.key_pools.device
    block_tables = torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], device=device)
    context_lens = torch.tensor(rows.context_lens, device=device)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.write(layer, rows.slots, key, value)
        pools = cache.key_pools[layer], cache.value_pools[layer]
        scale = attention_scale(model.config, layer)
        return paged_attention(query, *pools, block_tables, context_lens, rows.query_starts, scale)

    return attend


def generate(
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_logits: OnLogits | None = None,
    *,
    block_size: int = 16,
    on_step: Observer | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt: the loop of chapter 02 around this chapter's attention."""
    return ch02_block_table.generate(
        model, prompts, max_new_tokens, on_logits, block_size=block_size, make_attend=attend_paged, on_step=on_step
    )
