"""Attention backends in torch operations, for every device and dtype; one of them around a function of one's own."""

from collections.abc import Callable

from torch import Tensor

from pagebrain.attention.batch import ForwardBatch
from pagebrain.attention.cpu import paged_attention, write_kv
from pagebrain.attention.kv_pool import KVPool


class FunctionBackend:
    """Torch operations write K and V, and a function like :func:`~pagebrain.attention.paged_attention` reads them.

    It supports what ``function.supports`` names, if the function has such an attribute, except for batch rows: the function
    is not told which rows are active.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.supports: frozenset[str] = frozenset(getattr(function, "supports", ())) - {"batch_rows"}

    def write(self, layer: int, pool: KVPool, key: Tensor, value: Tensor, batch: ForwardBatch) -> None:
        """See :class:`~pagebrain.attention.backend.AttentionBackend`."""
        write_kv(key, value, pool.key_pools[layer], pool.value_pools[layer], batch.slot_mapping)

    def attend(self, layer: int, query: Tensor, pool: KVPool, batch: ForwardBatch, scale: float) -> Tensor:
        """See :class:`~pagebrain.attention.backend.AttentionBackend`."""
        pools = pool.key_pools[layer], pool.value_pools[layer]
        return self.function(query, *pools, batch.block_tables, batch.context_lens, batch.query_starts, scale)

    @staticmethod
    def reason_against(*model: object) -> None:
        """``None``: what a function cannot do, it says itself."""


class TorchBackend(FunctionBackend):
    """The engine's own attention where there are no kernels."""

    def __init__(self) -> None:
        super().__init__(paged_attention)
