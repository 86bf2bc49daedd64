"""The one way out for blocks: whoever finishes, is aborted or is preempted gives them back here.

A step that was launched and not read may still be reading a sequence's blocks. They go back to the block manager, and the
sequence's batch row to the executor, once no such step is left; at depth 0 that is at once.
"""

from collections.abc import Callable

from pagebrain.sequence import Sequence


class RetirementQueue:
    """Releases what sequences held as soon as nothing in flight uses it.

    Args:
        release: gives back what one sequence holds; called once when nothing in flight uses it.
        num_blocks_of: how many blocks a sequence holds.
    """

    def __init__(self, release: Callable[[Sequence], None], num_blocks_of: Callable[[Sequence], int]) -> None:
        self._release = release
        self._num_blocks_of = num_blocks_of
        self._pending: dict[int, Sequence] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks that will be free when the steps in flight have been read."""
        return sum(self._num_blocks_of(seq) for seq in self._pending.values())

    def retire(self, seq: Sequence) -> None:
        """Release the sequence's blocks now, or when its last step under way has been read."""
        self._pending[seq.seq_id] = seq
        self.collect()

    def collect(self) -> None:
        """Release what no step in flight uses any more; called after each step that was read."""
        for seq in [seq for seq in self._pending.values() if seq.num_unread_steps == 0]:
            del self._pending[seq.seq_id]
            self._release(seq)
