"""A plan in a compact form that can be pickled, for executors in other processes, logs and replays.

A :class:`~pagebrain.engine.sequence.SequenceGroup` refers to the engine's sequences. Besides the id, an executor reads only
fields that are the same in every step. They are sent once, with the first plan that schedules the sequence.
:class:`PlanPacker` remembers which sequences it has sent. :class:`PlanUnpacker`, at the other end, keeps them.
"""

from typing import NamedTuple

from pagebrain.cache import NewBlocks
from pagebrain.engine.sequence import Request, ScheduledSequence, Sequence, SequenceGroup
from pagebrain.sampling_params import SamplingParams


class NewSequence(NamedTuple):
    """The fields of a sequence that an executor reads. ``token_ids`` are its prompt and its output so far."""

    seq_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    max_num_tokens: int
    sample_index: int
    seed: int
    params: SamplingParams


class PackedPlan(NamedTuple):
    """A plan without references. ``scheduled`` holds ``(seq_id, start, num_tokens, samples)``."""

    scheduled: tuple[tuple[int, int, int, bool], ...]
    new_sequences: tuple[NewSequence, ...]
    released: tuple[int, ...]
    new_blocks: tuple[NewBlocks, ...]
    copied_blocks: tuple[tuple[int, int], ...]
    swapped_out: tuple[tuple[int, int], ...]
    swapped_in: tuple[tuple[int, int], ...]


class PlanPacker:
    """Packs all plans of one engine, in order."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def pack(self, group: SequenceGroup) -> PackedPlan:
        """The plan of the next step, packed. The group must be complete: ``CacheManager.complete`` returned it."""
        self._known.difference_update(group.released)
        new = [entry.seq for entry in group if entry.seq.seq_id not in self._known]
        self._known.update(seq.seq_id for seq in new)
        return PackedPlan(
            scheduled=tuple((seq.seq_id, start, num_tokens, samples) for seq, start, num_tokens, samples in group.scheduled),
            new_sequences=tuple(_described(seq) for seq in new),
            released=group.released,
            new_blocks=group.new_blocks,
            copied_blocks=group.copied_blocks,
            swapped_out=group.swapped_out,
            swapped_in=group.swapped_in,
        )


class PlanUnpacker:
    """Turns packed plans back into groups, with sequences of its own."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}

    def unpack(self, plan: PackedPlan) -> SequenceGroup:
        """A group that an executor computes like the one that was packed. ``preempted`` is empty."""
        for seq_id in plan.released:
            self._sequences.pop(seq_id, None)
        for new in plan.new_sequences:
            self._sequences[new.seq_id] = _sequence(new)
        return SequenceGroup(
            scheduled=tuple(
                ScheduledSequence(self._sequences[seq_id], start, num_tokens, samples)
                for seq_id, start, num_tokens, samples in plan.scheduled
            ),
            released=plan.released,
            new_blocks=plan.new_blocks,
            copied_blocks=plan.copied_blocks,
            swapped_out=plan.swapped_out,
            swapped_in=plan.swapped_in,
        )


def _described(seq: Sequence) -> NewSequence:
    return NewSequence(
        seq_id=seq.seq_id,
        token_ids=tuple(seq.token_ids),
        num_prompt_tokens=seq.num_prompt_tokens,
        max_num_tokens=seq.max_num_tokens,
        sample_index=seq.sample_index,
        seed=seq.request.seed,
        params=seq.params,
    )


def _sequence(new: NewSequence) -> Sequence:
    request = Request(
        request_id=str(new.seq_id),
        prompt=None,
        prompt_token_ids=new.token_ids[: new.num_prompt_tokens],
        params=new.params,
        seed=new.seed,
        arrival_index=0,
        arrival_s=0.0,
    )
    return Sequence(new.seq_id, request, new.sample_index, new.max_num_tokens, list(new.token_ids))
