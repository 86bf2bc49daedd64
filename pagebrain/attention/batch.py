"""The tensors that describe one forward call, for the model and for attention."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of one forward call, sequence after sequence in flat rows. Prefill and decode differ in length only.

    Attributes:
        token_ids: int64 ``[num_tokens]``.
        positions: int64 ``[num_tokens]``, each token's position in its sequence.
        slot_mapping: int64 ``[num_tokens]``, the slot of each token's K and V.
        block_tables: int64 ``[num_seqs, max_blocks]``.
        context_lens: int64 ``[num_seqs]``, tokens cached plus tokens of this call.
        query_starts: int64 ``[num_seqs + 1]``, the first row of each sequence, then ``num_tokens``.
        logits_rows: int64 ``[num_logits]``, the rows whose logits are wanted; ``None``: all.
        num_decodes: how many sequences have exactly one token; ``None`` if the host does not know. A backend may skip
            kernels that have no sequence.
        active_rows: int ``[num_seqs]``. If given, ``block_tables`` and ``context_lens`` have an entry for every batch row,
            and sequence ``i`` is in row ``active_rows[i]``. Only backends that support ``batch_rows`` get it.
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
