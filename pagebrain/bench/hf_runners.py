"""Hugging Face on the benchmark's requests: ``generate`` on static batches, and continuous batching.

Both use the weights that PageBrain loads, sample greedily, and get each request's output length. Their settings (attention,
batch size, page size) are in the :class:`~pagebrain.bench.child.RunSpec`; :mod:`~pagebrain.bench.offline` chooses them.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from pagebrain.bench.child import Mark, RunResult, RunSpec, no_mark, synchronize
from pagebrain.bench.workload import BenchRequest
from pagebrain.config import PageBrainConfig
from pagebrain.errors import ConfigError
from pagebrain.models.loading import load_model

_GENERATION_CONFIG: Any = GenerationConfig  # transformers leaves it untyped
_NO_EOS = -1
"""Means "no end-of-sequence token" in continuous batching."""

# Hugging Face generate ------------------------------------------------------------------------------------------------


class _FirstTokenClock(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Never stops; records the time of the first token."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.first_token_s: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first_token_s is None:
            synchronize(self.device)
            self.first_token_s = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run_hf_static(spec: RunSpec, mark: Mark = no_mark) -> RunResult:
    """``generate`` on left-padded batches, each up to its longest output. Surplus tokens are not counted."""
    model, device = _hf_model(spec, spec.settings["attn_implementation"])
    mark("ready")
    order = _static_order(spec.requests, spec.settings["sort_by"])
    batch_size = int(spec.settings["batch_size"])

    def generate(requests: Sequence[BenchRequest], indices: Sequence[int]) -> tuple[dict[int, float], dict[int, list[int]]]:
        first: dict[int, float] = {}
        tokens: dict[int, list[int]] = {}
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            clock = _FirstTokenClock(device)
            rows = _generate_padded(model, [requests[index] for index in batch], clock, spec.settings["cache"])
            for index, row in zip(batch, rows):
                assert clock.first_token_s is not None
                first[index], tokens[index] = clock.first_token_s, row[: requests[index].output_len]
        return first, tokens

    generate(spec.warmup, _static_order(spec.warmup, spec.settings["sort_by"])[:batch_size])
    synchronize(device)
    mark("warm")
    began = time.perf_counter()
    first, tokens = generate(spec.requests, order)
    elapsed = time.perf_counter() - began
    return RunResult(
        elapsed_s=elapsed,
        first_token_s=[first[index] - began for index in range(len(spec.requests))],
        token_ids=[tokens[index] for index in range(len(spec.requests))],
        configuration=dict(spec.settings),
        detokenization="none: token ids only",
    )


def _generate_padded(model: Any, batch: Sequence[BenchRequest], clock: _FirstTokenClock, cache: str) -> list[list[int]]:
    """Greedy tokens ``[len(batch)][longest output]``; pads are masked, so their id does not matter."""
    width = max(len(request.prompt_token_ids) for request in batch)
    padding = [width - len(request.prompt_token_ids) for request in batch]
    rows = [[0] * pad + list(request.prompt_token_ids) for pad, request in zip(padding, batch)]
    input_ids = torch.tensor(rows, device=clock.device)  # [len(batch), width]
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=clock.device)
    longest = max(request.output_len for request in batch)
    output = model.generate(
        input_ids,
        attention_mask=mask,
        generation_config=_GENERATION_CONFIG(
            do_sample=False,
            min_new_tokens=longest,
            max_new_tokens=longest,
            pad_token_id=0,
            eos_token_id=None,
            cache_implementation=cache,
        ),
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return [[int(token) for token in row] for row in output[:, width:].tolist()]


def _static_order(requests: Sequence[BenchRequest], sort_by: str) -> list[int]:
    """Request indices in the order of the batches."""
    keys: dict[str, Callable[[int], int]] = {
        "arrival": lambda index: index,
        "input_len": lambda index: len(requests[index].prompt_token_ids),
        "output_len": lambda index: requests[index].output_len,
    }
    return sorted(range(len(requests)), key=keys[sort_by])


# Hugging Face continuous batching -------------------------------------------------------------------------------------


def run_hf_continuous(spec: RunSpec, mark: Mark = no_mark) -> RunResult:
    """Hugging Face's continuous batching manager. Only this takes a ``max_new_tokens`` for each request."""
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError as error:
        needed = "install 5.17 or newer, or leave out hf-continuous"
        raise ConfigError(f"this transformers has no ContinuousBatchingConfig: {needed}") from error
    settings = dict(spec.settings)
    model, device = _hf_model(spec, settings.pop("attn_implementation"))
    longest = max(request.output_len for request in spec.requests)
    generation = _GENERATION_CONFIG(do_sample=False, max_new_tokens=longest, pad_token_id=0, eos_token_id=_NO_EOS)
    batching = ContinuousBatchingConfig(**_known(ContinuousBatchingConfig, settings))
    configs = {"generation_config": generation, "continuous_batching_config": batching}
    with model.continuous_batching_context_manager(**configs) as manager:
        mark("ready")
        _serve(manager, spec.warmup, "warmup")
        synchronize(device)
        mark("warm")
        began = time.perf_counter()
        outputs = _serve(manager, spec.requests, "timed")
        elapsed = time.perf_counter() - began
        used = {"attn_implementation": model.config._attn_implementation}
    return RunResult(
        elapsed_s=elapsed,
        first_token_s=[output.timestamps[0] - began for output in outputs],
        token_ids=[list(output.generated_tokens) for output in outputs],
        configuration=spec.settings | used,
        detokenization="none: token ids only",
    )


def _serve(manager: Any, requests: Sequence[BenchRequest], name: str) -> list[Any]:
    """Add all requests, wait for all outputs, return them in the order of the requests."""
    for index, request in enumerate(requests):
        manager.add_request(
            list(request.prompt_token_ids),
            request_id=f"{name}-{index}",
            max_new_tokens=request.output_len,
            record_timestamps=True,
            eos_token_id=_NO_EOS,
        )
    finished: dict[str, Any] = {}
    while len(finished) < len(requests):
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            if output.error is not None:
                raise RuntimeError(f"continuous batching failed on request {output.request_id}: {output.error}")
            finished[output.request_id] = output
        elif output is None and not manager.is_running():
            raise RuntimeError("the continuous batching thread ended before all requests were done")
    return [finished[f"{name}-{index}"] for index in range(len(requests))]


def _known(config_class: type, settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` under the names of this version of transformers: ``page_size`` was ``block_size`` before 5.17."""
    names = inspect.signature(config_class).parameters
    if "page_size" not in names and "page_size" in settings:
        settings = {("block_size" if name == "page_size" else name): value for name, value in settings.items()}
    if "auto_switch_to_flash" not in names:  # 5.17 takes flash attention wherever it is installed
        settings = {name: value for name, value in settings.items() if name != "auto_switch_to_flash"}
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise ConfigError(f"this transformers' ContinuousBatchingConfig does not know {', '.join(unknown)}")
    return settings


def _hf_model(spec: RunSpec, attn_implementation: str) -> tuple[Any, str]:
    """PageBrain's weights in Hugging Face's model, with this attention, and their device."""
    model: Any = load_model(PageBrainConfig(**spec.model))
    model.set_attn_implementation(attn_implementation)
    model.generation_config = _GENERATION_CONFIG(pad_token_id=0)  # otherwise GPT-2's end-of-sequence token would be used
    return model, str(model.device)
