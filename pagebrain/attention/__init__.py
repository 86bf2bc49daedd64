"""Paged attention: queries against K and V that lie in pages anywhere in the pool.

:class:`PagedAttention` in :mod:`pagebrain.attention.layer` is what a model layer holds. It calls an
:class:`AttentionBackend`: torch operations on every device (:func:`paged_attention` in
:mod:`pagebrain.attention.torch_backend`), or Triton kernels on a GPU
(:mod:`pagebrain.attention.triton_backend`). :func:`choose_backend` decides.
"""

from pagebrain.attention.backend import AttentionBackend, choose_backend
from pagebrain.attention.batch import ForwardBatch
from pagebrain.attention.kv_pool import KVPool
from pagebrain.attention.layer import PagedAttention
from pagebrain.attention.torch_backend import DEFAULT_PAGES_PER_STEP, paged_attention

__all__ = [
    "DEFAULT_PAGES_PER_STEP",
    "AttentionBackend",
    "ForwardBatch",
    "KVPool",
    "PagedAttention",
    "choose_backend",
    "paged_attention",
]
