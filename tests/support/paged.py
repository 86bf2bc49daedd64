"""A paged model over poisoned slots, and a driver that computes sequences in pieces of any size."""

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from pagebrain.block import BlockManager
from pagebrain.cache import CacheManager
from pagebrain.config import PageBrainConfig
from pagebrain.models.gpt2 import PagedGPT2LMHeadModel
from tests.support.models import poison


def paged(base: GPT2LMHeadModel, shuffle: int | None = None, **settings: Any) -> PagedGPT2LMHeadModel:
    """A paged model over poisoned slots; with ``shuffle`` the blocks are handed out in random order."""
    config = PageBrainConfig.for_model(base, **settings)
    block_manager = BlockManager(config)
    if shuffle is not None:
        generator = torch.Generator().manual_seed(shuffle)
        order = torch.randperm(block_manager.num_blocks, generator=generator).tolist()
        taken = block_manager.allocate(block_manager.num_blocks)
        block_manager.free([taken[index] for index in order])
    cache_manager = CacheManager(block_manager, config)
    poison(cache_manager.pool)
    return PagedGPT2LMHeadModel(base, cache_manager).eval()


def pairs(*values: tuple[int, int]) -> Tensor:
    return torch.tensor(values)


def run_in_chunks(model: PagedGPT2LMHeadModel, sequences: list[list[int]], cuts: list[list[int]]) -> list[Tensor]:
    """Logits of all tokens of all sequences, computed together, sequence ``b`` in pieces of ``cuts[b]`` tokens."""
    logits: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for turn in range(max(map(len, cuts))):
        active = [b for b in range(len(sequences)) if turn < len(cuts[b])]
        counts = [cuts[b][turn] for b in active]
        input_ids = torch.full((len(active), max(counts)), -7)
        for row, (b, count) in enumerate(zip(active, counts, strict=True)):
            input_ids[row, :count] = torch.tensor(sequences[b][done[b] : done[b] + count])
        input_pos = pairs(*((done[b], count) for b, count in zip(active, counts, strict=True)))
        cache_pos = pairs(*((0, done[b]) for b in active))
        out = model(input_ids, input_pos=input_pos, cache_pos=cache_pos, seq_ids=active).logits
        for row, (b, count) in enumerate(zip(active, counts, strict=True)):
            logits[b].append(out[row, :count])
            assert not out[row, count:].any(), "padding rows must be zero"
            done[b] += count
    return [torch.cat(pieces) for pieces in logits]
