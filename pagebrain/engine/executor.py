"""What the engine calls on an executor, and what the executor returns.

``launch`` returns an :class:`InFlight` at once; ``InFlight.wait`` returns the tokens. With async scheduling the engine
launches another step between the two. The executors are in :mod:`pagebrain.worker`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pagebrain.engine.sequence import SequenceGroup
from pagebrain.outputs import TokenLogprobs


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Attributes:
        token_ids: the next tokens of each scheduled sequence: none if the step did not sample for it, else one or more.
        logprobs: index of the scheduled sequence -> log-probabilities at each of these tokens, if they were requested.
        prompt_logprobs: index of the scheduled sequence -> ``(first position, log-probabilities of the prompt tokens from
            that position on)``, if they were requested.
    """

    token_ids: Sequence[tuple[int, ...]]
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, tuple[int, tuple[TokenLogprobs, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class InFlight:
    """A step that was launched. ``wait`` returns its result, or raises the step's exception.

    A CUDA graph computed ``num_graph_decodes`` of its sequences.
    """

    group: SequenceGroup
    wait: Callable[[], StepResult]
    num_graph_decodes: int = 0


class Executor(Protocol):
    """Computes steps on a device."""

    def launch(self, group: SequenceGroup) -> InFlight:
        """Apply the changes of the plan, and start to compute its step."""
        ...
