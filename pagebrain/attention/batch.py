"""The tensors that describe one forward call, for the model and for attention."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of one forward call, sequence after sequence in flat rows; prefill and decode differ in length only.

    Attributes:
        token_ids: int64 ``[num_tokens]``.
        positions: int64 ``[num_tokens]``, each token's position in its sequence.
        slot_mapping: int64 ``[num_tokens]``, where each token's K and V go.
        block_tables: int64 ``[num_seqs, max_blocks]``.
        context_lens: int64 ``[num_seqs]``, tokens cached including this call's.
        query_starts: int64 ``[num_seqs + 1]``, where each sequence's rows start.
        logits_rows: int64 ``[num_logits]``, the rows whose logits are wanted; ``None``: all.
        num_decodes: how many sequences have exactly one token, ``None`` if the host does not know; it saves launches of
            kernels that would find nothing to do.
        active_rows: int ``[num_seqs]``; if given, ``block_tables`` and ``context_lens`` have an entry for every batch row,
            and sequence ``i``'s are those of row ``active_rows[i]``. Only backends that support ``batch_rows`` get it.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    logits_rows: Tensor | None
    num_decodes: int | None = None
    active_rows: Tensor | None = None
