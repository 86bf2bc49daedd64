"""What one forward call computes, as tensors, and the attention layer that stores new K and V and reads all of it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pagebrain.attention.cpu import paged_attention
from pagebrain.cache import CacheManager
from pagebrain.parts import AttentionPart, takes_argument


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of one forward call, sequence after sequence in flat rows; prefill and decode differ in length only.

    Attributes:
        token_ids: int64 ``[num_tokens]``.
        positions: int64 ``[num_tokens]``, each token's position in its sequence.
        slot_mapping: int64 ``[num_tokens]``, where each token's K and V go.
        block_tables: int64 ``[num_seqs, max_blocks]``.
        context_lens: int64 ``[num_seqs]``, tokens cached including this call's.
        query_starts: int64 ``[num_seqs + 1]``, where each sequence's rows start.
        logits_rows: int64 ``[num_logits]``, the rows whose logits are wanted; ``None``: all.
        num_decodes: how many sequences have exactly one token, if the host knows; it saves attention kernels a look.
        active_rows: int ``[num_seqs]``; if given, ``block_tables`` and ``context_lens`` have an entry for every batch row,
            and sequence ``i``'s are those of row ``active_rows[i]``. Only the kernels take it.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    logits_rows: Tensor | None
    num_decodes: int | None = None
    active_rows: Tensor | None = None


class PagedAttention(nn.Module):
    """One layer's attention over the paged cache: write this step's K and V to their slots, then attend to every token."""

    def __init__(
        self, layer: int, cache_manager: CacheManager, scale: float, attention: AttentionPart = paged_attention
    ) -> None:
        super().__init__()
        self.layer = layer
        self.cache_manager = cache_manager
        self.scale = scale
        self.attention = attention
        self._takes_num_decodes = takes_argument(attention, "num_decodes")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch) -> Tensor:
        """All of shape ``[num_tokens, num_heads, head_dim]``, rows as in ``batch``."""
        self.cache_manager.write(self.layer, batch.slot_mapping, key, value)
        key_pool, value_pool = self.cache_manager.key_pools[self.layer], self.cache_manager.value_pools[self.layer]
        hints: dict[str, Any] = {"num_decodes": batch.num_decodes} if self._takes_num_decodes else {}
        if batch.active_rows is not None:
            hints["active_rows"] = batch.active_rows
        return self.attention(
            query, key_pool, value_pool, batch.block_tables, batch.context_lens, batch.query_starts, self.scale, **hints
        )
