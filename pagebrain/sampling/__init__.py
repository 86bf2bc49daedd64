"""From logits to tokens: one row of logits per sequence, each with its own sampling parameters.

In reading order: :mod:`.rows` (the parameters of a row), :mod:`.adjustments` (penalties, bias, ``min_tokens``),
:mod:`.ranking` and :mod:`.truncation` (min-p, top-k, top-p), :mod:`.random_bits` (random numbers as a pure function of seed,
sample, position and token), :mod:`.logprobs`, and :mod:`.sampler`, which calls the others.
"""

from pagebrain.sampling.logprobs import LogprobsTensors, gather_logprobs, prompt_logprobs, score_prompt
from pagebrain.sampling.rows import SampleRow
from pagebrain.sampling.sampler import Sampler, SamplerOutput

__all__ = ["LogprobsTensors", "SampleRow", "Sampler", "SamplerOutput", "gather_logprobs", "prompt_logprobs", "score_prompt"]
