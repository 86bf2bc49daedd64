"""What the engine calls on an executor, and what it gets back.

``launch`` returns at once with an :class:`InFlight`; ``InFlight.wait`` brings the tokens. With async scheduling the engine
launches another step between the two. Executors lie in :mod:`pagebrain.worker`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pagebrain.engine.sequence import SequenceGroup
from pagebrain.outputs import TokenLogprobs


@dataclass(frozen=True)
class StepResult:
    """What a step brought.

    Attributes:
        token_ids: for each scheduled sequence its next tokens: none where the step did not sample, otherwise one or more.
        logprobs: index of the scheduled sequence -> log-probabilities at each of these tokens, where they were asked for.
        prompt_logprobs: index of the scheduled sequence -> ``(first position, log-probabilities of the prompt tokens there
            and after)``, where they were asked for.
    """

    token_ids: Sequence[tuple[int, ...]]
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, tuple[int, tuple[TokenLogprobs, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class InFlight:
    """A step that was launched. ``wait`` brings its results, or raises what the step raised.

    ``num_graph_decodes`` of its sequences were computed by replaying a CUDA graph.
    """

    group: SequenceGroup
    wait: Callable[[], StepResult]
    num_graph_decodes: int = 0


class Executor(Protocol):
    """What the engine calls."""

    def launch(self, group: SequenceGroup) -> InFlight:
        """Apply what the plan changes, and start computing its step."""
        ...
