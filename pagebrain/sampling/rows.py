"""The parameters that belong to one row of logits, and how per-row numbers are copied to the device.

The executor makes one :class:`SampleRow` for each sequence that gets a token in this step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagebrain.sampling_params import SamplingParams


@dataclass(frozen=True, eq=False)
class SampleRow:
    """Everything besides the logits that determines the token of a row.

    Attributes:
        params: the request's sampling parameters.
        seed: the request's seed, any Python integer.
        sample_index: which of the request's ``n`` samples this is.
        output_position: 0 for the first generated token.
        history: int64 ``[num_tokens]`` on the logits' device, prompt then output so far; read for penalties only.
        num_prompt_tokens: how many of ``history`` are prompt.
    """

    params: SamplingParams
    seed: int
    sample_index: int
    output_position: int
    history: Tensor
    num_prompt_tokens: int


def per_row(
    values: Sequence[float] | Sequence[int] | Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of ``values`` on ``device``, without waiting for the work that is queued there.

    An ordinary copy to a GPU waits for all queued work, which would prevent async scheduling. A copy from pinned memory
    does not wait.
    """
    if device.type == "cuda":
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(values, dtype=dtype, device=device)
