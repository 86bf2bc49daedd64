"""What the engine adds up while it runs, and the difference between two moments."""

import dataclasses
from dataclasses import dataclass

from pagebrain.trace import EngineStats


@dataclass(frozen=True)
class Totals:
    """The running totals of :class:`~pagebrain.trace.EngineStats`: steps, tokens by phase, seconds of the host's work."""

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_graph_decode_tokens: int = 0
    num_preemptions: int = 0
    schedule_s: float = 0.0
    launch_s: float = 0.0
    wait_s: float = 0.0
    output_s: float = 0.0

    @classmethod
    def of(cls, stats: EngineStats) -> "Totals":
        """As the engine has them now."""
        return cls(**{field.name: getattr(stats, field.name) for field in dataclasses.fields(cls)})

    def since(self, earlier: "Totals") -> "Totals":
        """What was added since ``earlier``."""
        return Totals(**{name: value - getattr(earlier, name) for name, value in vars(self).items()})

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def graph_share(self) -> float:
        """The share of decode tokens whose step replayed a CUDA graph."""
        return self.num_graph_decode_tokens / self.num_decode_tokens if self.num_decode_tokens else 0.0
