"""Batch rows: a fixed place for each running sequence, in which a step finds what the step before it sampled.

The engine may launch a step before it has read the one before. That step's newest input tokens are not known to the engine
then; a row has them.
"""

import torch

from pagebrain.cache import BlockTables
from pagebrain.engine.sequence import Sequence, SequenceGroup


class SequenceRows:
    """Which sequence holds which row, and the sequences' block tables. Both follow the plans.

    There are twice as many rows as seats. A sequence that ended keeps its row until the last step with it was read; another
    sequence takes its seat before that.
    """

    def __init__(self, max_num_seqs: int, block_size: int) -> None:
        self.num_rows = 2 * max_num_seqs
        self.tables = BlockTables(block_size)
        self._row_of: dict[int, int] = {}
        self._free = list(range(self.num_rows))

    def apply(self, group: SequenceGroup) -> None:
        """Make the changes that a plan carries: rows that come back, blocks that were added."""
        self.tables.apply(group)
        for seq_id in group.released:
            if seq_id in self._row_of:
                self._free.append(self._row_of.pop(seq_id))

    def _take(self, seq_id: int) -> int:
        row = self._row_of[seq_id] = self._free.pop()
        return row


class TokenRows(SequenceRows):
    """Rows that hold tokens alone.

    Attributes:
        token_ids: int64 ``[num_rows, max_model_len + 1]``; the last place is written, never read.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: str) -> None:
        super().__init__(max_num_seqs, block_size)
        self.token_ids = torch.zeros(self.num_rows, max_model_len + 1, dtype=torch.int64, device=device)

    def row_of(self, seq: Sequence) -> int:
        """The sequence's row; a new one is filled with the tokens known so far."""
        row = self._row_of.get(seq.seq_id)
        if row is None:
            row = self._take(seq.seq_id)
            self.token_ids[row, : len(seq.token_ids)] = torch.tensor(seq.token_ids)
        return row
