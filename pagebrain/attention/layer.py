"""The attention layer of a model: it writes K and V of new tokens to the pool and attends to all tokens of a sequence."""

from torch import Tensor, nn

from pagebrain.attention.backend import AttentionBackend
from pagebrain.attention.batch import ForwardBatch
from pagebrain.attention.kv_pool import KVPool


class PagedAttention(nn.Module):
    """One layer's attention over the paged cache. ``scale`` is the factor on the scores.

    :func:`attach` sets pool and backend, because the pool's size is known only after the model was loaded.
    """

    def __init__(self, layer: int, scale: float) -> None:
        super().__init__()
        self.layer = layer
        self.scale = scale
        self.pool: KVPool | None = None
        self.backend: AttentionBackend | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, batch: ForwardBatch) -> Tensor:
        """Arguments and result are ``[num_tokens, num_heads, head_dim]``, rows as in ``batch``."""
        assert self.pool is not None and self.backend is not None
        self.backend.write(self.layer, self.pool, key, value, batch)
        return self.backend.attend(self.layer, query, self.pool, batch, self.scale)


def attach(model: nn.Module, pool: KVPool, backend: AttentionBackend) -> None:
    """Set the pool and the backend of all attention layers of ``model``."""
    for layer in model.modules():
        if isinstance(layer, PagedAttention):
            layer.pool, layer.backend = pool, backend


def detach(model: nn.Module) -> None:
    """Remove pool and backend from all attention layers of ``model``, so that the pool's memory can be freed."""
    for layer in model.modules():
        if isinstance(layer, PagedAttention):
            layer.pool = layer.backend = None
