"""The memory roof of a decode step: the bytes that it must move, over the speed at which this device's memory moves bytes.

A decode step reads every weight once, and the K and V of every sequence in it; activations are small beside these. No step
can be faster than a copy of as many bytes, so that time over the time of the step is the share of the roof that it reached.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pagebrain.bench.engine_loop import StepRecord

if TYPE_CHECKING:
    from transformers import GPT2Config

_GPU_COPY_BYTES, _CPU_COPY_BYTES = 2**30, 2**27
"""Several times any cache."""

_COPIES = 11


@dataclass(frozen=True)
class ModelBytes:
    """What a decode step moves: ``weights`` once, ``kv_token`` for each token of context of each sequence."""

    weights: int
    kv_token: int

    @classmethod
    def of(cls, hf_config: "GPT2Config", itemsize: int) -> "ModelBytes":
        """Of a model with numbers of ``itemsize`` bytes, as Hugging Face describes it; the tied head counts once."""
        import torch
        from transformers import GPT2LMHeadModel

        with torch.device("meta"):  # shapes only
            num_weights = sum(parameter.numel() for parameter in GPT2LMHeadModel(hf_config).parameters())
        return cls(num_weights * itemsize, 2 * hf_config.n_layer * hf_config.n_embd * itemsize)

    def of_steps(self, num_steps: int, context_tokens: int) -> int:
        """Bytes that ``num_steps`` decode steps must move whose rows attended to ``context_tokens`` tokens in all."""
        return num_steps * self.weights + context_tokens * self.kv_token


def decode_roof(steps: Sequence[StepRecord], model: ModelBytes, copy_bytes_per_s: float | None) -> dict[str, Any] | None:
    """What the steps without prefill moved, and their share of the roof; ``None`` if there was no such step.

    ``share`` is missing where the speed of a copy was not measured.
    """
    decodes = [step for step in steps if step.only_decodes]
    if not decodes:
        return None
    seconds = sum(step.seconds for step in decodes)
    context_tokens = sum(step.context_tokens for step in decodes)
    moved = model.of_steps(len(decodes), context_tokens)
    report: dict[str, Any] = {
        "num_steps": len(decodes),
        "num_seqs_mean": sum(step.num_decodes for step in decodes) / len(decodes),
        "context_tokens_mean": context_tokens / sum(step.num_decodes for step in decodes),
        "seconds": seconds,
        "bytes": moved,
        "weight_bytes": model.weights,
        "kv_bytes_per_token": model.kv_token,
        "bytes_per_s": moved / seconds,
        "copy_bytes_per_s": copy_bytes_per_s,
    }
    if copy_bytes_per_s is not None:
        report["share"] = moved / seconds / copy_bytes_per_s
    return report


def measure_copy(device: str) -> float | None:
    """Bytes read plus bytes written per second by a copy in ``device``'s memory; ``None`` if there is no room to measure."""
    import torch

    size = _GPU_COPY_BYTES if device.startswith("cuda") else _CPU_COPY_BYTES
    try:
        source = torch.ones(size // 4, dtype=torch.int32, device=device)
        target = torch.zeros_like(source)
    except RuntimeError:  # out of memory: the engine's blocks may take nearly all
        return None
    clock = _gpu_seconds if device.startswith("cuda") else _cpu_seconds
    return 2 * size / statistics.median(clock(source, target) for _ in range(_COPIES))


def _gpu_seconds(source: Any, target: Any) -> float:
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _cpu_seconds(source: Any, target: Any) -> float:
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began
