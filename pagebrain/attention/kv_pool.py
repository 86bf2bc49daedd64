"""The memory of K and V: for each layer one pool of keys and one of values, divided into blocks.

A :class:`KVPool` holds tensors and knows no sequences. :class:`pagebrain.cache.CacheManager` maps sequences to blocks. An
attention backend writes to the pool and reads from it.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pagebrain.config import PageBrainConfig


class KVPool:
    """K and V of ``num_blocks`` blocks and of one dummy block, for all layers.

    ``key_pools[layer]`` and ``value_pools[layer]`` are logically ``[num_blocks + 1, block_size, num_kv_heads, head_dim]``.
    In memory the slots of one head and block are contiguous, so that a gathered page is a matrix for each head.

    ``dummy_block`` is the last block. It belongs to no sequence: padding writes there.

    The swap space is CPU memory for K and V of preempted sequences, in slots of one block each. With a GPU it is pinned, so
    that copies do not hold up the host. All copies go into the stream that computes the steps, in the order of the plans.
    So a slot or a block can be given to another sequence before the copy was made.

    Args:
        num_layers, num_kv_heads, head_dim: of the model, or of the share of it that this process computes.
        num_blocks, block_size: those of the block manager.
        num_swap_blocks: slots of the swap space.
        dtype: of the stored numbers; it may differ from the model's if the backend converts.
        device: of the pools.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        num_swap_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.dummy_block = num_blocks
        shape = (2, num_layers, num_blocks + 1, num_kv_heads, block_size, head_dim)
        # Zeros, not empty: a masked slot is multiplied by a weight of 0, and 0 * NaN would be NaN.
        self._pools = torch.zeros(shape, dtype=dtype, device=device)
        keys, values = self._pools.transpose(3, 4)
        self.key_pools: tuple[Tensor, ...] = keys.unbind(0)
        self.value_pools: tuple[Tensor, ...] = values.unbind(0)
        slots = (num_swap_blocks, 2, num_layers, num_kv_heads, block_size, head_dim)
        pinned = num_swap_blocks > 0 and self.device.type == "cuda"
        self._swap_slots = torch.empty(slots, dtype=dtype, pin_memory=pinned)

    @classmethod
    def for_config(cls, config: PageBrainConfig, num_blocks: int) -> "KVPool":
        """A pool of the shape, dtype and device of the model that ``config`` was resolved for."""
        num_layers, num_heads, head_dim = config.require_shape()
        return cls(
            num_layers=num_layers,
            num_blocks=num_blocks,
            block_size=config.block_size,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            dtype=config.torch_dtype,
            device=config.device,
            num_swap_blocks=config.num_swap_blocks,
        )

    def apply(
        self,
        swapped_out: Sequence[tuple[int, int]],
        swapped_in: Sequence[tuple[int, int]],
        copied_blocks: Sequence[tuple[int, int]],
    ) -> None:
        """Make the copies of a plan, in this order: blocks that were given away are read before anything is written."""
        self.swap_out(swapped_out)
        self.swap_in(swapped_in)
        self.copy_blocks(copied_blocks)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy K and V of whole blocks, for all layers at once. A pair is ``(from, to)``.

        Each block is a target at most once. All sources are read before a target is written.
        """
        if pairs:
            sources, targets = self._on_device(pairs).unbind(1)  # each [num_pairs]
            self._pools.index_copy_(2, targets, self._pools.index_select(2, sources))

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy K and V of whole blocks into the swap space. A pair is ``(block, slot)``. A slot is a target at most once."""
        if pairs:
            blocks = self._on_device(pairs)[:, 0]
            gathered = self._pools.index_select(2, blocks).movedim(2, 0).contiguous()
            for index, (_, slot) in enumerate(pairs):
                self._swap_slots[slot].copy_(gathered[index], non_blocking=True)

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy K and V back from the swap space. A pair is ``(slot, block)``. A block is a target at most once."""
        if pairs:
            blocks = self._on_device(pairs)[:, 1]
            gathered = torch.empty((len(pairs), *self._swap_slots.shape[1:]), dtype=self.dtype, device=self.device)
            for index, (slot, _) in enumerate(pairs):
                gathered[index].copy_(self._swap_slots[slot], non_blocking=True)
            self._pools.index_copy_(2, blocks, gathered.movedim(0, 2))

    def measure_swap_s(self, num_blocks: int = 8, repeats: int = 3) -> float:
        """Seconds to copy one block out and back: the quickest of ``repeats``, each with up to ``num_blocks`` blocks.

        Call it before the pool is in use. The blocks keep their content.
        """
        count = min(num_blocks, self._swap_slots.shape[0], self.dummy_block)
        pairs = [(index, index) for index in range(count)]
        seconds = []
        for _ in range(repeats):
            self._synchronize()
            began = time.perf_counter()
            self.swap_out(pairs)
            self.swap_in(pairs)
            self._synchronize()
            seconds.append((time.perf_counter() - began) / count)
        return min(seconds)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _on_device(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """The pairs as a tensor ``[num_pairs, 2]``."""
        on_host = torch.tensor(pairs, pin_memory=self.device.type == "cuda")
        return on_host.to(self.device, non_blocking=True)
