"""The attention layer of a model: it stores K and V of new tokens in the pool and attends to all that is there."""

from torch import Tensor, nn

from pagebrain.attention.backend import AttentionBackend
from pagebrain.attention.batch import ForwardBatch
from pagebrain.attention.kv_pool import KVPool


class PagedAttention(nn.Module):
    """One layer's attention over the paged cache. ``scale`` is the factor on the scores.

    Pool and backend come by :func:`attach`: how large the pool can be is known only when the model is loaded.
    """

    def __init__(self, layer: int, scale: float) -> None:
        super().__init__()
        self.layer = layer
        self.scale = scale
        self.pool: KVPool | None = None
        self.backend: AttentionBackend | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch) -> Tensor:
        """All of shape ``[num_tokens, num_heads, head_dim]``, rows as in ``batch``."""
        assert self.pool is not None and self.backend is not None
        self.backend.write(self.layer, self.pool, key, value, batch)
        return self.backend.attend(self.layer, query, self.pool, batch, self.scale)


def attach(model: nn.Module, pool: KVPool, backend: AttentionBackend) -> None:
    """Let all attention layers of ``model`` keep K and V in ``pool``, through ``backend``."""
    for layer in model.modules():
        if isinstance(layer, PagedAttention):
            layer.pool, layer.backend = pool, backend


def detach(model: nn.Module) -> None:
    """Drop the pool from all attention layers of ``model``, so that its memory is free again."""
    for layer in model.modules():
        if isinstance(layer, PagedAttention):
            layer.pool = layer.backend = None
