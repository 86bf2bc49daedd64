"""The attention backend of the Triton kernels. Triton is imported when a :class:`TritonBackend` is made."""

import torch
from torch import Tensor

from pagebrain.attention.batch import ForwardBatch
from pagebrain.attention.kv_pool import KVPool
from pagebrain.kernels.inputs import unsupported
from pagebrain.kernels.version import MIN_TRITON, available


class TritonBackend:
    """Triton kernels write K and V and read them. They support batch rows, and run on a GPU or slowly in the interpreter.

    Raises ``ConfigError`` if Triton is missing or too old.
    """

    supports = frozenset({"batch_rows", "cuda_graph", "async_scheduling"})

    def __init__(self) -> None:
        from pagebrain.kernels import paged

        self._kernels = paged

    def write(self, layer: int, pool: KVPool, key: Tensor, value: Tensor, batch: ForwardBatch) -> None:
        """See :class:`~pagebrain.attention.backend.AttentionBackend`."""
        self._kernels.write_kv(key, value, pool.key_pools[layer], pool.value_pools[layer], batch.slot_mapping)

    def attend(self, layer: int, query: Tensor, pool: KVPool, batch: ForwardBatch, scale: float) -> Tensor:
        """See :class:`~pagebrain.attention.backend.AttentionBackend`."""
        return self._kernels.paged_attention(
            query,
            pool.key_pools[layer],
            pool.value_pools[layer],
            batch.block_tables,
            batch.context_lens,
            batch.query_starts,
            scale,
            num_decodes=batch.num_decodes,
            active_rows=batch.active_rows,
        )

    @staticmethod
    def reason_against(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """See :class:`~pagebrain.attention.backend.AttentionBackend`."""
        if not available():
            wanted = ".".join(map(str, MIN_TRITON))
            return f"there is no Triton {wanted} or later: pip install 'triton>={wanted}' for a much faster GPU engine"
        if device.type != "cuda":
            from pagebrain.kernels.common import is_interpreted

            if not is_interpreted():
                return (
                    f"the model is on {device}, and the Triton kernels were compiled for a GPU: use device='cuda', or set "
                    "TRITON_INTERPRET=1 before Python starts to run them, slowly, in Triton's interpreter"
                )
        return unsupported(dtype, head_dim)
