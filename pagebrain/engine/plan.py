"""Checks a scheduler's plan before it is computed: the scheduler may be somebody's first, wrong plans make wrong text."""

from collections.abc import Container

from pagebrain.config import PageBrainConfig
from pagebrain.engine.sequence import ScheduledSequence, SequenceGroup
from pagebrain.errors import StepError


def check_plan(group: SequenceGroup, config: PageBrainConfig, under_way: Container[str]) -> None:
    """Raise ``StepError`` unless the group can be computed as it stands; ``under_way`` are the ids of unfinished requests.

    That the block tables cover it is seen when the slots are looked up.
    """
    if not group.scheduled:
        raise StepError("the scheduler returned an empty group: return None when there is nothing to compute")
    if len({entry.seq.seq_id for entry in group}) < len(group):
        raise StepError(f"the group names a sequence twice: {[entry.seq.seq_id for entry in group]}")
    for limit, got in (("max_num_seqs", len(group)), ("max_num_batched_tokens", group.num_tokens)):
        if got > getattr(config, limit):
            raise StepError(f"the group has {got} where {limit} allows {getattr(config, limit)}")
    for entry in group:
        if entry.seq.is_finished or entry.seq.request.request_id not in under_way:
            raise StepError(f"sequence {entry.seq.seq_id} has ended and cannot be scheduled")
        _check_entry(entry)


def _check_entry(entry: ScheduledSequence) -> None:
    seq = entry.seq
    wanted = (seq.num_scheduled, entry.context_len == seq.num_tokens)
    if (entry.start, entry.samples) != wanted or not 1 <= entry.num_tokens <= seq.num_unscheduled:
        raise StepError(
            f"sequence {seq.seq_id} was scheduled with (start, samples) = {(entry.start, entry.samples)} and "
            f"{entry.num_tokens} tokens: expected {wanted} and 1 to {seq.num_unscheduled}"
        )
