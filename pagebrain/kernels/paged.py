"""Paged attention by the Triton kernels, for GPUs.

Sequences with one query belong to the decode kernel and the others to the prefill kernel. ``query_starts`` says which, but
it is on the GPU, and reading it to the host would delay the step. So each kernel reads it and skips the sequences of the
other. The host's counts only save launches for which there is no sequence.
"""

from torch import Tensor

from pagebrain.kernels.version import require_triton

require_triton()

from pagebrain.kernels.decode import paged_decode  # noqa: E402  (only where there is Triton)
from pagebrain.kernels.prefill import paged_prefill  # noqa: E402
from pagebrain.kernels.write import write_kv  # noqa: E402

__all__ = ["paged_attention", "paged_decode", "paged_prefill", "write_kv"]


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    *,
    num_decodes: int | None = None,
    active_rows: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's newest tokens over all its tokens; the same result as the torch path.

    Args:
        query, key_pool, value_pool, block_tables, context_lens, query_starts, scale: see
            :func:`pagebrain.attention.paged_attention`. Float16, bfloat16 or float32, head dimensions up to 128; integers of
            32 or 64 bits; the pools may have fewer heads than the query (grouped heads).
        num_decodes: how many sequences have exactly one query, if the caller knows; ``None`` launches both kernels. Then
            rows of the query that belong to no sequence give zeros.
        active_rows: int ``[num_seqs]``, each sequence's row of ``block_tables`` and ``context_lens``; ``None``: row ``i``.

    Returns:
        ``[num_tokens, num_heads, head_dim]`` in the query's dtype; scores and sums are float32.

    Raises:
        KernelError: for tensors that the kernels do not support; nothing was computed.
    """
    num_seqs = query_starts.shape[0] - 1
    out = query.new_zeros(query.shape) if num_decodes is None else query.new_empty(query.shape)
    if num_decodes != num_seqs:
        inputs = (query, key_pool, value_pool, block_tables, context_lens, query_starts, scale)
        paged_prefill(*inputs, skip_decodes=True, active_rows=active_rows, out=out)
    if num_decodes != 0:
        inputs_of_decode = (query, key_pool, value_pool, block_tables, context_lens, scale)
        starts = None if num_decodes == num_seqs else query_starts  # with one query each, sequence i's is row i
        paged_decode(*inputs_of_decode, query_starts=starts, active_rows=active_rows, out=out)
    return out


paged_attention.supports = frozenset({"async_scheduling"})  # type: ignore[attr-defined]
