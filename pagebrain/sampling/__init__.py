"""From logits to tokens: one row of logits per sequence, each with its own sampling parameters.

In reading order: :mod:`.rows` (what comes with a row), :mod:`.adjustments` (penalties, bias, ``min_tokens``),
:mod:`.ranking` and :mod:`.truncation` (min-p, top-k, top-p), :mod:`.random_bits` (random numbers that depend on nothing but
who asks), :mod:`.logprobs`, and :mod:`.sampler`, which strings them together.
"""

from pagebrain.sampling.logprobs import LogprobsTensors, gather_logprobs, prompt_logprobs, score_prompt
from pagebrain.sampling.rows import SampleRow
from pagebrain.sampling.sampler import Sampler, SamplerOutput

__all__ = ["LogprobsTensors", "SampleRow", "Sampler", "SamplerOutput", "gather_logprobs", "prompt_logprobs", "score_prompt"]
