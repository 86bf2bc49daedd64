"""The attention layer of a model: it stores K and V of new tokens in the pool and attends to all that is there."""

from torch import Tensor, nn

from pagebrain.attention.backend import AttentionBackend
from pagebrain.attention.batch import ForwardBatch
from pagebrain.attention.kv_pool import KVPool


class PagedAttention(nn.Module):
    """One layer's attention over the paged cache. ``scale`` is the factor on the scores."""

    def __init__(self, layer: int, pool: KVPool, scale: float, backend: AttentionBackend) -> None:
        super().__init__()
        self.layer = layer
        self.pool = pool
        self.scale = scale
        self.backend = backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch) -> Tensor:
        """All of shape ``[num_tokens, num_heads, head_dim]``, rows as in ``batch``."""
        self.backend.write(self.layer, self.pool, key, value, batch)
        return self.backend.attend(self.layer, query, self.pool, batch, self.scale)
