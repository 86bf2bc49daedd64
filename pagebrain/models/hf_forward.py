"""A model that is called by hand like a Hugging Face model: rows of token ids in, logits of every position out.

:class:`HFForward` is an adapter over ``forward_tokens``. The engine does not use it.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pagebrain.attention import AttentionBackend, ForwardBatch, KVPool
from pagebrain.attention.layer import attach
from pagebrain.attention.torch_backend import TorchBackend
from pagebrain.cache import CacheManager
from pagebrain.errors import ConfigError
from pagebrain.model_config import ModelConfig
from pagebrain.models.model import Model
from pagebrain.models.positions import RowPlan, plan_rows
from pagebrain.models.weights import Checkpoint, TensorNames, load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput


class HFForward(Model):
    """A model with a ``forward`` like Hugging Face's. List it after the model's class: ``class X(GPT2, HFForward)``."""

    cache_manager: CacheManager

    def set_up(
        self,
        base: "PreTrainedModel",
        names: TensorNames,
        cache_manager: CacheManager,
        backend: AttentionBackend | None = None,
    ) -> None:
        """Share the weights of ``base``, found by their ``names``, and keep K and V in the pool of ``cache_manager``."""
        _check_pool_fits(self.config, base, cache_manager.pool)
        load_weights(self, Checkpoint.of(base).tensors, names, self.config.tied_head)
        attach(self, cache_manager.pool, TorchBackend() if backend is None else backend)
        self.cache_manager = cache_manager
        self._num_cached: dict[int, int] = {}  # tokens that forward() has written to the cache, by sequence id

    def forward(
        self, input_ids: Tensor, *, input_pos: Tensor, cache_pos: Tensor, seq_ids: Iterable[int] | None = None
    ) -> "CausalLMOutput":
        """Compute new tokens of a batch of sequences, keeping their K and V: an adapter over ``forward_tokens``.

        Args:
            input_ids: int ``[B, T]``, new tokens of each row first, padding (of any value) after them.
            input_pos: int ``[B, 2]``: position of the row's first new token, and how many new tokens it has.
            cache_pos: int ``[B, 2]``: position of the first cached token, which is 0, and how many are cached.
                ``(0, 0)`` starts a row afresh.
            seq_ids: the sequence of each row; ``None`` means 0 to B - 1.

        Returns:
            ``.logits`` ``[B, T, vocab_size]``, zero where a row is padding.

        Raises:
            InvalidRequestError: for positions, tokens or shapes that do not fit together; nothing was changed.
            OutOfBlocksError: if too few blocks are free; nothing was changed.
        """
        vocab_size, num_positions = self.config.vocab_size, self.config.max_positions
        rows = plan_rows(input_ids, input_pos, cache_pos, seq_ids, self._cached(), vocab_size, num_positions)
        for row in rows:  # each row is counted again when it is computed, so a call that fails leaves no count
            self._num_cached.pop(row.seq_id, None)
        self._grow_tables(rows)
        batch = self._flat_batch(input_ids, rows)
        flat_logits = self.forward_tokens(batch)[:, :vocab_size]
        logits = flat_logits.new_zeros(*input_ids.shape, flat_logits.shape[-1])
        for index, row in enumerate(rows):
            first = int(batch.query_starts[index])
            logits[index, : row.num_new] = flat_logits[first : first + row.num_new]
            self._num_cached[row.seq_id] = row.num_cached + row.num_new
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=logits)

    def _cached(self) -> dict[int, int]:
        """Tokens in the cache by sequence id; a freed sequence has none."""
        manager = self.cache_manager
        held = {seq_id: len(manager.block_table(seq_id)) * manager.block_size for seq_id in self._num_cached}
        return {seq_id: min(count, held[seq_id]) for seq_id, count in self._num_cached.items()}

    def _grow_tables(self, rows: list[RowPlan]) -> None:
        restarting = [row for row in rows if row.num_cached == 0]
        self.cache_manager.replace_all([row.seq_id for row in restarting], {row.seq_id: row.context_len for row in rows})

    def _flat_batch(self, input_ids: Tensor, rows: list[RowPlan]) -> ForwardBatch:
        device = self.cache_manager.pool.device
        manager = self.cache_manager
        positions = torch.cat([torch.arange(row.num_cached, row.context_len) for row in rows])
        slots = torch.cat([manager.slot_mapping(row.seq_id, row.num_cached, row.num_new) for row in rows])
        query_lens = torch.tensor([0, *(row.num_new for row in rows)])
        return ForwardBatch(
            token_ids=torch.cat([input_ids[index, : row.num_new] for index, row in enumerate(rows)]).to(device),
            positions=positions.to(device),
            slot_mapping=slots.to(device),
            block_tables=manager.block_tables(row.seq_id for row in rows).to(device),
            context_lens=torch.tensor([row.context_len for row in rows], device=device),
            query_starts=query_lens.cumsum(0).to(device),
            logits_rows=torch.arange(len(positions), device=device),
            num_decodes=sum(row.num_new == 1 for row in rows),
        )


def _check_pool_fits(config: ModelConfig, base: "PreTrainedModel", pool: KVPool) -> None:
    keys = pool.key_pools[0]
    needed = (config.num_layers, config.num_kv_heads, config.head_dim, base.dtype, base.device)
    got = (len(pool.key_pools), keys.shape[2], keys.shape[3], keys.dtype, keys.device)
    if needed != got:
        raise ConfigError(
            f"the model needs a cache of (layers, heads, head_dim, dtype, device) {needed}, got one of {got}: "
            "make both from the same PageBrainConfig.for_model(base, ...)"
        )
