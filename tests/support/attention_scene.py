"""Sequences whose K and V lie in random blocks of a poisoned pool, and what dense attention makes of them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.models import POISON


class Scene:
    """Inputs of a paged attention on the CPU, and dense copies of what is in the pages.

    Args:
        query_lens, context_lens: of each sequence.
        num_kv_heads: heads of the pools; ``None`` is ``num_heads``, fewer are grouped heads.
        heads_first: lay a head's slots of a block side by side, as the engine's pools do.
        poison: what unused slots hold.
    """

    def __init__(
        self,
        query_lens: list[int],
        context_lens: list[int],
        block_size: int = 4,
        num_heads: int = 2,
        head_dim: int = 8,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        heads_first: bool = False,
        num_kv_heads: int | None = None,
        poison: float = POISON,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        kv_heads = num_kv_heads or num_heads
        self.query_lens, self.lens = query_lens, context_lens
        self.pages = [-(-length // block_size) for length in context_lens]
        num_blocks = sum(self.pages) + 3
        order = torch.randperm(num_blocks, generator=generator).tolist()
        shape = (num_blocks, kv_heads, block_size, head_dim) if heads_first else (num_blocks, block_size, kv_heads, head_dim)
        pools = [torch.full(shape, poison, dtype=dtype) for _ in range(2)]
        self.key_pool, self.value_pool = (pool.transpose(1, 2) if heads_first else pool for pool in pools)
        width = max(self.pages) + 2
        self.block_tables = torch.full((len(self.pages), width), order[-1], dtype=torch.int64)
        self.keys, self.values = [], []
        for index, (length, count) in enumerate(zip(context_lens, self.pages, strict=True)):
            table, order = order[:count], order[count:]
            self.block_tables[index, :count] = torch.tensor(table, dtype=torch.int64)
            key, value = (torch.randn(length, kv_heads, head_dim, dtype=dtype, generator=generator) for _ in range(2))
            for position in range(length):
                slot = table[position // block_size], position % block_size
                self.key_pool[slot], self.value_pool[slot] = key[position], value[position]
            self.keys.append(key)
            self.values.append(value)
        self.query = torch.randn(sum(query_lens), num_heads, head_dim, dtype=dtype, generator=generator)
        self.context_lens = torch.tensor(context_lens)
        self.query_starts = torch.tensor([0, *query_lens]).cumsum(0)
        self.scale = 1 / math.sqrt(head_dim)

    def run(self, attention: Callable[..., Tensor], device: str = "cpu", **options: Any) -> Tensor:
        """What an attention part computes on ``device``, on the CPU."""
        tensors = (
            self.query,
            self.key_pool,
            self.value_pool,
            self.block_tables,
            self.context_lens,
            self.query_starts,
        )
        return attention(*(moved(tensor, device) for tensor in tensors), self.scale, **options).cpu()

    def dense(self) -> Tensor:
        """The textbook formula in float64, one sequence at a time; zeros for a context of no tokens."""
        out, start = [], 0
        group = self.query.shape[1] // self.key_pool.shape[2]
        for count, length, key, value in zip(self.query_lens, self.lens, self.keys, self.values, strict=True):
            query = self.query[start : start + count].double()
            start += count
            if length == 0:
                out.append(torch.zeros_like(query))
                continue
            key, value = (part.double().repeat_interleave(group, dim=1) for part in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query, key) * self.scale
            positions = torch.arange(length - count, length)
            scores.masked_fill_(torch.arange(length) > positions[:, None], -math.inf)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
        return torch.cat(out)


def moved(tensor: Tensor, device: str) -> Tensor:
    """``tensor`` on ``device`` with the strides that it has."""
    if device == "cpu":
        return tensor
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return there.copy_(tensor)
