"""What comes with one row of logits, and how small per-row numbers reach the device.

The executor makes one :class:`SampleRow` per sequence that gets a token in this step; the modules beside this one read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagebrain.sampling_params import SamplingParams


@dataclass(frozen=True, eq=False)
class SampleRow:
    """Everything besides the logits that decides which token a row gets.

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

    An ordinary copy to a GPU waits until the GPU has caught up, which would stop the engine from launching ahead; one from
    pinned memory does not.
    """
    if device.type == "cuda":
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(values, dtype=dtype, device=device)
