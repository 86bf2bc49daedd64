"""GPT-2 over a paged cache, in the order in which data flows: embeddings, blocks, final norm, head.

:class:`PagedGPT2LMHeadModel` takes the weights of a Hugging Face ``GPT2LMHeadModel`` as they are (the modules are shared,
not copied) and replaces what that model does with its cache. Tokens of all sequences lie one after the other in flat rows,
so there is one forward for prefill and decode alike; only attention looks at where one sequence ends and the next begins.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block

from pagebrain.attention import AttentionBackend, ForwardBatch, KVPool, PagedAttention
from pagebrain.attention.torch_backend import TorchBackend
from pagebrain.cache import CacheManager
from pagebrain.devices import on_device
from pagebrain.errors import ConfigError
from pagebrain.models.positions import RowPlan, plan_rows


class PagedGPT2Attention(nn.Module):
    """One layer's attention: the projections of the original, with K and V in pages between them."""

    def __init__(self, base: GPT2Attention, layer: int, pool: KVPool, backend: AttentionBackend) -> None:
        super().__init__()
        self.c_attn: nn.Module = base.c_attn
        self.c_proj: nn.Module = base.c_proj
        self.num_heads: int = base.num_heads
        self.head_dim: int = base.head_dim
        self.paged = PagedAttention(layer, pool, attention_scale(base.config, layer), backend)

    def forward(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """``[num_tokens, n_embd]`` to the same shape; there may be rows of padding at the end, which no attention sees."""
        num_padding = hidden.shape[0] - batch.token_ids.shape[0]  # rows without a token, at the end
        qkv = self.c_attn(hidden).view(-1, 3, self.num_heads, self.head_dim)
        if num_padding:
            qkv = qkv[:-num_padding]
        query, key, value = qkv.unbind(1)  # each [num_tokens, num_heads, head_dim]
        context = self.paged(query, key, value, batch)  # [num_tokens, num_heads, head_dim]
        context = context.reshape(context.shape[0], -1)
        out: Tensor = self.c_proj(F.pad(context, (0, 0, 0, num_padding)) if num_padding else context)
        return out


class PagedGPT2Block(nn.Module):
    """Layer norm, attention, layer norm, MLP, each pair around a residual connection.

    The stream of residuals and its norm travel together, because an addition and the norm after it are one kernel on a GPU.
    """

    def __init__(self, base: GPT2Block, layer: int, pool: KVPool, backend: AttentionBackend) -> None:
        super().__init__()
        self.ln_1 = base.ln_1
        self.attn = PagedGPT2Attention(base.attn, layer, pool, backend)
        self.ln_2 = base.ln_2
        self.c_fc: nn.Module = base.mlp.c_fc
        self.act: nn.Module = base.mlp.act
        self.c_proj: nn.Module = base.mlp.c_proj

    def forward(
        self, hidden: Tensor, normed: Tensor, batch: ForwardBatch, next_norm: nn.LayerNorm, ops: "ResidualOps"
    ) -> tuple[Tensor, Tensor]:
        """``hidden`` and ``normed``, its ``ln_1``, both ``[num_tokens, n_embd]``, to the same of the next layer."""
        hidden, normed = ops.add_norm(hidden, self.attn(normed, batch), self.ln_2)
        return ops.add_norm(hidden, self.c_proj(self.act(self.c_fc(normed))), next_norm)


class ResidualOps:
    """What lies between the matrix products, in torch operations; :mod:`pagebrain.models.triton_norm` has it for GPUs."""

    def embed_norm(
        self, token_ids: Tensor, positions: Tensor, wte: nn.Embedding, wpe: nn.Embedding, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """The embeddings of tokens at positions, both ``[num_tokens]``, and their norm: ``[num_tokens, n_embd]`` each."""
        hidden = wte(token_ids) + wpe(positions)
        return hidden, norm(hidden)

    def add_norm(self, hidden: Tensor, delta: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """``hidden + delta`` and its norm, ``[num_tokens, n_embd]`` each."""
        hidden = hidden + delta
        return hidden, norm(hidden)


class PagedGPT2LMHeadModel(nn.Module):
    """A Hugging Face GPT-2 whose K and V live in a :class:`~pagebrain.cache.CacheManager`. It infers only: no dropout.

    Args:
        base: the model whose weights are used, shared and unchanged.
        cache_manager: pools and block tables, made for the same model.
        backend: what writes and reads K and V; ``None`` is torch operations.

    Raises:
        ConfigError: if the cache was made for a model of another shape, dtype or device.
    """

    def __init__(self, base: GPT2LMHeadModel, cache_manager: CacheManager, backend: AttentionBackend | None = None) -> None:
        super().__init__()
        _check_pool_fits(base, cache_manager.pool)
        self.config = base.config
        self.cache_manager = cache_manager
        self.wte = base.transformer.wte
        self.wpe = base.transformer.wpe
        pool, backend = cache_manager.pool, TorchBackend() if backend is None else backend
        blocks = [
            PagedGPT2Block(cast(GPT2Block, block), layer, pool, backend) for layer, block in enumerate(base.transformer.h)
        ]
        self.h = nn.ModuleList(blocks)
        self.ln_f = base.transformer.ln_f
        self.lm_head = base.lm_head
        self.ops = ResidualOps()
        # Rows that are computed for a number of tokens: as many, but packed weights ask for more.
        self.rows_for: Callable[[int], int] = int
        self._num_cached: dict[int, int] = {}  # what forward() has put in the cache, by sequence id

    @torch.no_grad()
    def forward_tokens(self, batch: ForwardBatch) -> Tensor:
        """The one forward pass. Returns the logits ``[num_logits, vocab_size]`` of ``batch.logits_rows``.

        The sequences' block tables must already cover the batch; K and V of its tokens are written on the way. (On a GPU
        there may be columns past those of the vocabulary, see :mod:`pagebrain.models.fusing`.)
        """
        blocks = cast(list[PagedGPT2Block], list(self.h))
        with on_device(self.wte.weight.device):
            token_ids, positions = self._padded(batch.token_ids), self._padded(batch.positions)
            hidden, normed = self.ops.embed_norm(token_ids, positions, self.wte, self.wpe, blocks[0].ln_1)
            for block, next_norm in zip(blocks, [*(block.ln_1 for block in blocks[1:]), self.ln_f], strict=True):
                hidden, normed = block(hidden, normed, batch, next_norm, self.ops)  # each [num_tokens, n_embd]
            # The head is a third of GPT-2 small's weights, and a row of logits takes 200 kB: only rows that are asked for.
            if batch.logits_rows is None:
                logits: Tensor = self.lm_head(normed)[: batch.token_ids.shape[0]]
            else:
                logits = self.lm_head(normed[self._padded(batch.logits_rows)])[: batch.logits_rows.shape[0]]
        return logits

    def _padded(self, ids: Tensor) -> Tensor:
        """``[n]`` to ``[rows_for(n)]``, with zeros at the end."""
        num_padding = self.rows_for(ids.shape[0]) - ids.shape[0]
        return F.pad(ids, (0, num_padding)) if num_padding else ids

    def forward(
        self, input_ids: Tensor, *, input_pos: Tensor, cache_pos: Tensor, seq_ids: Iterable[int] | None = None
    ) -> CausalLMOutput:
        """Compute new tokens of a batch of sequences, keeping their K and V: an adapter over :meth:`forward_tokens`.

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
        num_positions = self.wpe.num_embeddings
        rows = plan_rows(input_ids, input_pos, cache_pos, seq_ids, self._cached(), self.wte.num_embeddings, num_positions)
        for row in rows:  # counted again when it is computed: a call that fails on the way leaves nothing to go on from
            self._num_cached.pop(row.seq_id, None)
        self._grow_tables(rows)
        batch = self._flat_batch(input_ids, rows)
        flat_logits = self.forward_tokens(batch)[:, : self.wte.num_embeddings]
        logits = flat_logits.new_zeros(*input_ids.shape, flat_logits.shape[-1])
        for index, row in enumerate(rows):
            first = int(batch.query_starts[index])
            logits[index, : row.num_new] = flat_logits[first : first + row.num_new]
            self._num_cached[row.seq_id] = row.num_cached + row.num_new
        return CausalLMOutput(logits=logits)

    def _cached(self) -> dict[int, int]:
        """Tokens in the cache by sequence; those of a sequence that was freed are gone."""
        manager = self.cache_manager
        held = {seq_id: len(manager.block_table(seq_id)) * manager.block_size for seq_id in self._num_cached}
        return {seq_id: min(count, held[seq_id]) for seq_id, count in self._num_cached.items()}

    def _grow_tables(self, rows: list[RowPlan]) -> None:
        restarting = [row for row in rows if row.num_cached == 0]
        self.cache_manager.replace_all([row.seq_id for row in restarting], {row.seq_id: row.context_len for row in rows})

    def _flat_batch(self, input_ids: Tensor, rows: list[RowPlan]) -> ForwardBatch:
        device = self.wte.weight.device
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


def _check_pool_fits(base: GPT2LMHeadModel, pool: KVPool) -> None:
    hf, weight, keys = base.config, base.transformer.wte.weight, pool.key_pools[0]
    needed = (hf.n_layer, hf.n_head, hf.n_embd // hf.n_head, weight.dtype, weight.device)
    got = (len(pool.key_pools), keys.shape[2], keys.shape[3], keys.dtype, keys.device)
    if needed != got:
        raise ConfigError(
            f"the model needs a cache of (layers, heads, head_dim, dtype, device) {needed}, got one of {got}: "
            "make both from the same PageBrainConfig.for_model(base, ...)"
        )


def attention_scale(config: GPT2Config, layer: int) -> float:
    """The factor on the attention scores of one layer, from ``scale_attn_weights`` and ``scale_attn_by_inverse_layer_idx``.

    The third flag, ``reorder_and_upcast_attn``, asks for scores and softmax in float32, which paged attention always uses.
    """
    scale: float = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale
