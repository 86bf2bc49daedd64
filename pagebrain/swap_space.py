"""Swap space: CPU memory that keeps K and V of preempted sequences until they continue.

This is bookkeeping on the host: which slot of that memory holds which block. The plans carry the copies, and
:class:`~pagebrain.attention.kv_pool.KVPool` makes them. A slot holds K and V of one block, for all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pagebrain.errors import IntegrityError

PreemptionMode = Literal["auto", "recompute", "swap"]


@dataclass
class PreemptionCosts:
    """What it costs to continue a preempted sequence, as measured. ``None`` is not measured yet.

    Attributes:
        swap_block_s: seconds to copy a block out and back.
        prefill_token_s: seconds to compute a token in a step of prompts: the mean of the last steps, newer ones weigh more.
    """

    swap_block_s: float | None = None
    prefill_token_s: float | None = None

    def learn(self, num_tokens: int, seconds: float) -> None:
        """Take the time of a step of prompts into account."""
        found = seconds / num_tokens
        self.prefill_token_s = found if self.prefill_token_s is None else 0.8 * self.prefill_token_s + 0.2 * found

    def swapping_is_cheaper(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether ``num_blocks`` are copied out and back in less time than it takes to compute ``num_tokens`` again."""
        if self.swap_block_s is None or self.prefill_token_s is None:
            return False
        return num_blocks * self.swap_block_s < num_tokens * self.prefill_token_s


class SwapSpace:
    """The slots, and the sequences that hold them.

    Args:
        num_slots: blocks that the CPU memory holds; 0 for none.
        mode: ``recompute`` swaps no sequence, ``swap`` each that fits, ``auto`` those for which that is cheaper.
    """

    def __init__(self, num_slots: int, mode: PreemptionMode = "auto") -> None:
        self.num_slots = num_slots
        self.mode = mode
        self.costs = PreemptionCosts()
        self._free = list(range(num_slots))
        self._held: dict[int, list[int]] = {}  # sequence id -> slots, in the order of its blocks
        self._leaving: list[int] = []  # slots that are read by the next plan, and free after it
        self._out: list[tuple[int, int]] = []  # (block, slot), of no plan yet
        self._in: list[tuple[int, int]] = []  # (slot, block)

    @property
    def num_held(self) -> int:
        """Slots that are in use."""
        return self.num_slots - len(self._free)

    @property
    def num_sequences(self) -> int:
        """Sequences whose K and V are here."""
        return len(self._held)

    def takes(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether a sequence with so many blocks and tokens should be copied here, and fits."""
        if self.mode == "recompute" or not 0 < num_blocks <= len(self._free):
            return False
        return self.mode == "swap" or self.costs.swapping_is_cheaper(num_blocks, num_tokens)

    def put(self, seq_id: int, block_ids: Sequence[int]) -> None:
        """Copy the blocks of a sequence here. :meth:`takes` has said yes."""
        slots = [self._free.pop() for _ in block_ids]
        self._held[seq_id] = slots
        self._out.extend(zip(block_ids, slots, strict=True))

    def take(self, seq_id: int, first: int, block_ids: Sequence[int]) -> None:
        """Copy a sequence's blocks from number ``first`` on back, into ``block_ids``. Its slots are free after the plan."""
        slots = self._held.pop(seq_id)
        self._in.extend(zip(slots[first:], block_ids, strict=True))
        self._leaving.extend(slots)

    def drop(self, seq_id: int) -> None:
        """Free the slots of a sequence that ended, or that has its tokens from elsewhere."""
        slots = self._held.pop(seq_id, [])
        if self._out and slots:  # a slot that another sequence gets must not be written twice by one plan
            self._out = [(block_id, slot) for block_id, slot in self._out if slot not in slots]
        self._free.extend(slots)

    def drop_all(self) -> None:
        """Free all slots: a step failed, and copies may not have been made."""
        self.take_changes()
        for seq_id in [*self._held]:
            self.drop(seq_id)

    def take_changes(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """Copies since the last call, ``(block, slot)`` out and ``(slot, block)`` in. They belong into the next plan."""
        changes = tuple(self._out), tuple(self._in)
        self._out.clear()
        self._in.clear()
        self._free.extend(self._leaving)
        self._leaving.clear()
        return changes

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless each slot is free or held by one sequence."""
        held = [slot for slots in self._held.values() for slot in slots]
        if sorted(held + self._free + self._leaving) != list(range(self.num_slots)):
            raise IntegrityError(
                f"each of the {self.num_slots} slots of the swap space must be held or free: {sorted(held)} are held, "
                f"{sorted(self._free)} are free, and the next plan reads {self._leaving}"
            )
