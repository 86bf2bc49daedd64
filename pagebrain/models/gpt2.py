"""GPT-2 over a paged cache, as a list of layers: embeddings, transformer layers, final norm, head.

Tokens of all sequences lie one after the other in flat rows, so prefill and decode are the same forward pass. Attention
alone looks at where one sequence ends and the next begins.

Two values go from layer to layer. ``residual`` is the residual stream. ``hidden`` is the output of the last sublayer, which
the next norm adds to the stream. The names of the layers are those of GPT-2's checkpoints, except for ``layers``, which they
call ``h``.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pagebrain.attention import AttentionBackend, ForwardBatch, PagedAttention
from pagebrain.cache import CacheManager
from pagebrain.devices import on_device
from pagebrain.layers import Embedding, LayerNorm, Linear
from pagebrain.model_config import ModelConfig
from pagebrain.models.hf_forward import HFForward
from pagebrain.models.model import Model
from pagebrain.models.weights import TensorNames

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

TENSOR_NAMES: TensorNames = {
    "wte": "transformer.wte",
    "wpe": "transformer.wpe",
    "layers.*.ln_1": "transformer.h.*.ln_1",
    "layers.*.attn.c_attn": "transformer.h.*.attn.c_attn",
    "layers.*.attn.c_proj": "transformer.h.*.attn.c_proj",
    "layers.*.ln_2": "transformer.h.*.ln_2",
    "layers.*.mlp.c_fc": "transformer.h.*.mlp.c_fc",
    "layers.*.mlp.c_proj": "transformer.h.*.mlp.c_proj",
    "ln_f": "transformer.ln_f",
    "lm_head": "lm_head",
}
"""The names of each layer's weights in a checkpoint."""


class GPT2Attention(nn.Module):
    """Query, key and value of each token, attention through the block tables, and the projection of the heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.c_attn = Linear(config.hidden_size, 3 * width, in_out=True)
        self.attention = PagedAttention(layer, config.attention_scales[layer])
        self.c_proj = Linear(width, config.hidden_size, in_out=True)

    def forward(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """``[num_tokens, hidden_size]`` to the same shape."""
        qkv = self.c_attn(hidden).view(-1, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.unbind(1)  # each [num_tokens, num_heads, head_dim]
        context = self.attention(query, key, value, batch)  # [num_tokens, num_heads, head_dim]
        out: Tensor = self.c_proj(context.reshape(hidden.shape[0], -1))
        return out


class GPT2MLP(nn.Module):
    """Two products with an activation between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.hidden_size, config.intermediate_size, activation=config.activation, in_out=True)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size, in_out=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[num_tokens, hidden_size]`` to the same shape."""
        out: Tensor = self.c_proj(self.c_fc(hidden))
        return out


class GPT2Layer(nn.Module):
    """Norm, attention, norm, MLP. Each norm first adds its input to the residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = GPT2MLP(config)

    def forward(self, hidden: Tensor, residual: Tensor, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """``hidden`` and ``residual``, ``[num_tokens, hidden_size]`` each, to the same of the next layer."""
        hidden, residual = self.ln_1(hidden, residual)
        hidden = self.attn(hidden, batch)
        hidden, residual = self.ln_2(hidden, residual)
        return self.mlp(hidden), residual


class GPT2(Model):
    """Embeddings of tokens and positions, the transformer layers, the final norm, and the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.wpe = Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(GPT2Layer(config, layer) for layer in range(config.num_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, padded=True)

    @torch.no_grad()
    def forward_tokens(self, batch: ForwardBatch) -> Tensor:
        """See :meth:`pagebrain.models.model.Model.forward_tokens`."""
        with on_device(self.wte.weight.device):
            hidden, residual = self.wte(batch.token_ids), self.wpe(batch.positions)  # the first norm adds the two
            for layer in self.layers:
                hidden, residual = layer(hidden, residual, batch)
            hidden, _ = self.ln_f(hidden, residual)  # [num_tokens, hidden_size]
            # The head is a third of GPT-2 small's weights, and a row of logits takes 200 kB: only the requested rows.
            logits: Tensor = self.lm_head(hidden if batch.logits_rows is None else hidden[batch.logits_rows])
        return logits


class PagedGPT2LMHeadModel(GPT2, HFForward):
    """A Hugging Face GPT-2 whose K and V live in a :class:`~pagebrain.cache.CacheManager`.

    Args:
        base: the model whose weights are used, shared and unchanged.
        cache_manager: pools and block tables, made for the same model.
        backend: writes and reads K and V; ``None`` is torch operations.

    Raises:
        ConfigError: if the cache was made for a model of another shape, dtype or device.
    """

    def __init__(
        self, base: "GPT2LMHeadModel", cache_manager: CacheManager, backend: AttentionBackend | None = None
    ) -> None:
        super().__init__(ModelConfig.of(base))
        self.set_up(base, TENSOR_NAMES, cache_manager, backend)
