"""The sampler: one token for each row of logits.

A row goes through these stages in order: penalties, logit bias, ``min_tokens``, temperature, min-p, top-k, top-p, and a draw
from the tokens that are left. A greedy row takes the best token after the first three stages. (vLLM has the same order,
except that it adds the bias before the penalties.) Rows that need the same stages are computed together. The token of a row
does not depend on the other rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pagebrain.errors import ConfigError, StepError
from pagebrain.sampling.adjustments import adjust_logits, needs_adjustment
from pagebrain.sampling.logprobs import LogprobsTensors, gather_logprobs
from pagebrain.sampling.random_bits import gumbel_noise, row_keys, token_hashes
from pagebrain.sampling.rows import SampleRow, per_row
from pagebrain.sampling.truncation import apply_min_p, keep_top_k_top_p, limits_rank

if TYPE_CHECKING:
    from pagebrain.config import PageBrainConfig

MIN_TEMPERATURE = 1e-10
"""Smaller positive temperatures are raised to this: nearly greedy, and a float32 can be divided by it."""

MAX_TEMPERATURE = 1e30
"""Larger temperatures are lowered to this: the distribution is flat, and ``-inf`` divided by it is not NaN."""


@dataclass(frozen=True, eq=False)
class SamplerOutput:
    """The tokens of one step, on the device; ``logprobs`` is ``None`` if no row wants any."""

    token_ids: Tensor  # int64 [num_rows]
    logprobs: LogprobsTensors | None


class Sampler:
    """Draws the next token of each sequence. It keeps no state between steps except a table of hashed token ids.

    Raises:
        ConfigError: the config was not resolved for a model.
    """

    # In a CUDA graph the sampling kernels replace it, for the rows that they support; see pagebrain.worker.cuda_executor.
    supports = frozenset({"cuda_graph", "async_scheduling", "beam_search"})

    def __init__(self, config: "PageBrainConfig") -> None:
        if config.vocab_size is None:
            raise ConfigError("vocab_size is not set: make the config with PageBrainConfig.for_model(base, ...)")
        self.vocab_size = config.vocab_size
        self.eos_token_ids = config.eos_token_ids
        self._hashes: dict[torch.device, Tensor] = {}

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> SamplerOutput:
        """One token for each row.

        Args:
            logits: ``[num_rows, vocab_size]``, any float dtype; not changed. Computed in float32, float64 stays float64.
            rows: the parameters of each row.

        Returns:
            Token ids below ``vocab_size`` for any logits; of equal logits the lower token id wins.

        Raises:
            StepError: the shape is not ``[len(rows), vocab_size]``; or, on the CPU, a logit is NaN or plus infinity. On a
                GPU this is not checked, because the check waits for the GPU: such a row gives a meaningless token.
        """
        if logits.shape != (len(rows), self.vocab_size):
            raise StepError(
                f"logits for {len(rows)} rows must be [{len(rows)}, {self.vocab_size}], got {list(logits.shape)}"
            )
        if not logits.is_cuda:
            _refuse_garbage(logits)
        if all(row.params.greedy and not needs_adjustment(row) for row in rows):
            token_ids = logits.argmax(dim=1)
        else:
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            token_ids = self._choose(adjust_logits(scores, rows, self.eos_token_ids), rows)
        num_top = [row.params.logprobs for row in rows]
        wanted = any(count is not None for count in num_top)
        return SamplerOutput(token_ids, gather_logprobs(logits, token_ids, num_top) if wanted else None)

    def _choose(self, scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """Token ids ``[num_rows]``. Rows are put in three groups; skip the gather if one group covers all rows."""
        greedy: list[int] = []
        unlimited: list[int] = []
        limited: list[int] = []
        for i, row in enumerate(rows):
            group = greedy if row.params.greedy else limited if limits_rank(row.params, self.vocab_size) else unlimited
            group.append(i)
        choices: tuple[tuple[list[int], Callable[[Tensor, Sequence[SampleRow]], Tensor]], ...] = (
            (greedy, lambda scores, rows: scores.argmax(dim=1)),
            (unlimited, self._draw_from_all),
            (limited, self._draw_from_best),
        )
        token_ids = torch.zeros(len(rows), dtype=torch.int64, device=scores.device)
        for group, choose in choices:
            if group and len(group) == len(rows):
                return choose(scores, rows)
            if group:
                index = per_row(group, torch.int64, scores.device)
                token_ids[index] = choose(scores[index], [rows[i] for i in group])
        return token_ids

    def _draw_from_all(self, scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        scores = apply_min_p(_apply_temperature(scores, rows), rows)
        noise = gumbel_noise(row_keys(rows, scores.device), self._token_hashes(scores.device), scores.dtype)
        return noise.add_(scores).argmax(dim=1)

    def _draw_from_best(self, scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        scores = apply_min_p(_apply_temperature(scores, rows), rows)
        kept, token_ids = keep_top_k_top_p(scores, rows)  # [num_rows, width]
        hashes = self._token_hashes(scores.device)[token_ids]
        noise = gumbel_noise(row_keys(rows, scores.device), hashes, scores.dtype)
        return token_ids.gather(1, noise.add_(kept).argmax(dim=1, keepdim=True)).squeeze(1)

    def _token_hashes(self, device: torch.device) -> Tensor:
        if device not in self._hashes:
            self._hashes[device] = token_hashes(self.vocab_size, device)
        return self._hashes[device]


def _apply_temperature(scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Scores divided by temperature, shifted so that each row's maximum is 0. So a low temperature cannot overflow."""
    clamped = [min(max(row.params.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE) for row in rows]
    temperatures = per_row(clamped, scores.dtype, scores.device)
    return (scores - scores.amax(dim=1, keepdim=True)) / temperatures.unsqueeze(1)


def _refuse_garbage(logits: Tensor) -> None:
    # The maximum of numbers with a NaN is NaN: one pass over the logits finds both NaN and infinity.
    if logits.numel() and not bool(logits.amax() < math.inf):
        rows = (~(logits.amax(dim=1) < math.inf)).nonzero().flatten().tolist()
        raise StepError(f"the logits of rows {rows} hold NaN or infinity: look at the model or its attention kernel")
