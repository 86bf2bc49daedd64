"""Paged attention: queries against K and V that lie in pages anywhere in the pool.

:func:`paged_attention` in :mod:`pagebrain.attention.cpu` is written in torch operations and runs on every device.
:class:`PagedAttention` in :mod:`pagebrain.attention.layer` is what a model layer holds. For GPUs the Triton kernels of
:mod:`pagebrain.attention.kernels` do the same; :mod:`pagebrain.attention.choice` decides.
"""

from pagebrain.attention.cpu import DEFAULT_PAGES_PER_STEP, paged_attention
from pagebrain.attention.layer import ForwardBatch, PagedAttention

__all__ = ["DEFAULT_PAGES_PER_STEP", "ForwardBatch", "PagedAttention", "paged_attention"]
