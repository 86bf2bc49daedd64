"""Batch rows: a fixed place for each running sequence, where a step finds the tokens that the step before sampled.

The engine may launch a step before it has read the one before. The engine does not know the newest input tokens then; the
rows hold them.
"""

import torch

from pagebrain.cache import BlockTables
from pagebrain.engine.sequence import Sequence, SequenceGroup


class SequenceRows:
    """Which sequence holds which row, and the sequences' block tables. Both follow the plans.

    There are twice as many rows as seats: a sequence that ended keeps its row until its last step was read, and another
    sequence may take its seat before that.
    """

    def __init__(self, max_num_seqs: int, block_size: int) -> None:
        self.num_rows = 2 * max_num_seqs
        self.tables = BlockTables(block_size)
        self._row_of: dict[int, int] = {}
        self._free = list(range(self.num_rows))

    def apply(self, group: SequenceGroup) -> None:
        """Apply the changes of a plan: free rows, extend block tables."""
        self.tables.apply(group.released, group.new_blocks)
        for seq_id in group.released:
            if seq_id in self._row_of:
                self._free.append(self._row_of.pop(seq_id))

    def _take(self, seq_id: int) -> int:
        row = self._row_of[seq_id] = self._free.pop()
        return row


class TokenRows(SequenceRows):
    """Rows that hold only tokens.

    Attributes:
        token_ids: int64 ``[num_rows, max_model_len + 1]``; the last column is written, never read.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: str) -> None:
        super().__init__(max_num_seqs, block_size)
        self.token_ids = torch.zeros(self.num_rows, max_model_len + 1, dtype=torch.int64, device=device)

    def row_of(self, seq: Sequence) -> int:
        """The sequence's row; a new row is filled with the known tokens."""
        row = self._row_of.get(seq.seq_id)
        if row is None:
            row = self._take(seq.seq_id)
            self.token_ids[row, : len(seq.token_ids)] = torch.tensor(seq.token_ids)
        return row
