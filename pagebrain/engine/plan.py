"""Checks of a plan. A scheduler may be a part that a user wrote, and a wrong plan would generate wrong text."""

from collections.abc import Container

from pagebrain.cache import CacheManager
from pagebrain.config import PageBrainConfig
from pagebrain.engine.sequence import ScheduledSequence, SequenceGroup
from pagebrain.errors import IntegrityError, StepError


def check_plan(group: SequenceGroup, config: PageBrainConfig, under_way: Container[str]) -> None:
    """Raise ``StepError`` unless the group can be computed; ``under_way`` holds the ids of unfinished requests.

    It does not check block tables: the lookup of slots does.
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


def check_held(group: SequenceGroup, cache_manager: CacheManager) -> None:
    """Raise ``IntegrityError`` unless the sequences of a step in flight hold all blocks that the step reads."""
    for entry in group:
        held = len(cache_manager.block_table(entry.seq.seq_id)) * cache_manager.block_size
        if held < entry.context_len:
            raise IntegrityError(
                f"sequence {entry.seq.seq_id} holds {held} slots, but a step in flight reads {entry.context_len}"
            )


def _check_entry(entry: ScheduledSequence) -> None:
    seq = entry.seq
    wanted = (seq.num_scheduled, entry.context_len == seq.num_tokens)
    if (entry.start, entry.samples) != wanted or not 1 <= entry.num_tokens <= seq.num_unscheduled:
        raise StepError(
            f"sequence {seq.seq_id} was scheduled with (start, samples) = {(entry.start, entry.samples)} and "
            f"{entry.num_tokens} tokens: expected {wanted} and 1 to {seq.num_unscheduled}"
        )
