"""Memory of a step: errors that name the setting to lower, and the bytes that the largest step takes."""

import contextlib
from collections.abc import Iterator

import torch

from pagebrain import machine
from pagebrain.attention import ForwardBatch
from pagebrain.config import PageBrainConfig
from pagebrain.engine.parts import SamplerPart
from pagebrain.errors import ConfigError, is_out_of_memory
from pagebrain.models.model import Model
from pagebrain.sampling import SampleRow
from pagebrain.sampling.logprobs import SCORED_TOGETHER, score_prompt
from pagebrain.sampling_params import MAX_LOGPROBS, SamplingParams


@contextlib.contextmanager
def enough_memory(device: str, what: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error, on a GPU or a CPU, into a ``ConfigError`` that says what needs memory and what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError) or not is_out_of_memory(error):  # a nested call has made the ConfigError
            raise
        if not device.startswith("cuda"):
            raise ConfigError(f"there is not enough memory for {what}: {machine.available_memory()}; {advice}") from error
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(
            f"the GPU has no room for {what}: {free / 1e9:.1f} of its {total / 1e9:.1f} GB are free; {advice}"
        ) from error


def estimate_largest_step(config: PageBrainConfig, vocab_size: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that a step of ``max_num_batched_tokens`` tokens takes on a CPU, besides weights, K and V.

    ``width`` is the size of a hidden state, ``dtype`` the model's. It is an estimate, because computing the step would take
    seconds. All tokens may have logits, which are sampled or scored. Sampling with ``top_p`` takes 17 times the logits of
    its rows. Scoring takes 5 times the logits of the rows that are scored together.
    """
    itemsize = max(4, dtype.itemsize)
    seats = min(config.max_num_seqs, config.max_num_batched_tokens)
    rows = config.max_num_batched_tokens + max(17 * seats, 5 * SCORED_TOGETHER["cpu"])
    return itemsize * (rows * vocab_size + 16 * config.max_num_batched_tokens * width)


@torch.inference_mode()
def measure_largest_step(model: Model, sampler: SamplerPart, config: PageBrainConfig) -> int:
    """Bytes that a step of ``max_num_batched_tokens`` tokens takes at its peak, besides weights, K and V.

    The step has prompts of the largest length, requests all log-probabilities, and all seats sample in the way that takes
    most. The values in the cache do not matter, so all sequences share the blocks of one.
    """
    assert config.max_model_len is not None
    device = torch.device(config.device)
    num_tokens, length = config.max_num_batched_tokens, config.max_model_len
    lengths = [length] * (num_tokens // length) + ([num_tokens % length] if num_tokens % length else [])
    seats = min(config.max_num_seqs, num_tokens)
    positions = torch.cat([torch.arange(count, device=device) for count in lengths])
    batch = ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        slot_mapping=positions,
        block_tables=torch.arange(config.blocks_for(length), device=device).expand(len(lengths), -1).contiguous(),
        context_lens=torch.tensor(lengths, device=device),
        query_starts=torch.tensor([0, *lengths], device=device).cumsum(0),
        logits_rows=positions.new_ones(num_tokens).cumsum(0) - 1,
        num_decodes=lengths.count(1),
    )
    rows = [SampleRow(SamplingParams(top_p=0.9), 0, index, 0, positions[:0], 0) for index in range(seats)]
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    logits = model.forward_tokens(batch)[:, : config.vocab_size]
    sampler.sample(logits[:seats], rows)
    prompt_scores = score_prompt(logits, batch.token_ids, MAX_LOGPROBS)  # noqa: F841  (a step keeps them too)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
