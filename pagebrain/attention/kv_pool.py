"""The memory of K and V: for each layer one pool of keys and one of values, divided into blocks.

A :class:`KVPool` holds tensors and knows no sequences. :class:`pagebrain.cache.CacheManager` maps sequences to blocks. An
attention backend writes to the pool and reads from it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pagebrain.config import PageBrainConfig


class KVPool:
    """K and V of ``num_blocks`` blocks and of one dummy block, for all layers.

    ``key_pools[layer]`` and ``value_pools[layer]`` are logically ``[num_blocks + 1, block_size, num_kv_heads, head_dim]``.
    In memory the slots of one head and block are contiguous, so that a gathered page is a matrix for each head.

    ``dummy_block`` is the last block. It belongs to no sequence: padding writes there.

    Args:
        num_layers, num_kv_heads, head_dim: of the model, or of the share of it that this process computes.
        num_blocks, block_size: those of the block manager.
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
        )

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy K and V of whole blocks, for all layers at once. A pair is ``(from, to)``.

        Each block is a target at most once. All sources are read before a target is written.
        """
        if pairs:
            on_host = torch.tensor(pairs, pin_memory=self.device.type == "cuda")
            sources, targets = on_host.to(self.device, non_blocking=True).unbind(1)  # each [num_pairs]
            self._pools.index_copy_(2, targets, self._pools.index_select(2, sources))
