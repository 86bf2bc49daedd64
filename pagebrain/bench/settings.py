"""What each engine runs with: the settings found best, and for ``--tune`` those to try.

The first candidate of each list is the default. On a CPU, where each engine would otherwise claim a share of the machine's
memory, every cache is made as large as the workload needs; on a GPU each engine sizes its own.
"""

import heapq
from collections.abc import Sequence
from typing import Any

from pagebrain.bench.workload import BenchRequest

ENGINES = ("pagebrain", "hf-static", "hf-continuous")
"""All engines, in the order in which they run and are shown."""

HF_PAGE_SIZE = 32
"""Tokens in a page of Hugging Face's cache. Speed does not depend on it, memory does (its own default is 256)."""


def candidates(engine: str, requests: Sequence[BenchRequest], device: str, max_num_seqs: int | None) -> list[dict[str, Any]]:
    """Settings to run ``engine`` with, best known first. ``max_num_seqs`` limits the sequences in a step of every engine."""
    make = {"pagebrain": _pagebrain, "hf-static": _hf_static, "hf-continuous": _hf_continuous}[engine]
    return make(requests, device, max_num_seqs)


def _pagebrain(requests: Sequence[BenchRequest], device: str, max_num_seqs: int | None) -> list[dict[str, Any]]:
    if device != "cpu":  # the engine's own settings are those for a GPU
        return [{} if max_num_seqs is None else {"max_num_seqs": max_num_seqs}]
    seqs = max_num_seqs or 64
    longest = max(request.num_tokens for request in requests)
    settings: dict[str, Any] = {"max_num_seqs": seqs, "max_num_batched_tokens": max(512, seqs)}
    return [settings | {"num_blocks": _pages(requests, seqs, page_size=16), "max_model_len": longest, "block_size": 16}]


def _hf_static(requests: Sequence[BenchRequest], device: str, max_num_seqs: int | None) -> list[dict[str, Any]]:
    limit = min(len(requests), max_num_seqs or (32 if device == "cpu" else 256))
    best = {
        "attn_implementation": "sdpa",
        # A static cache is not copied at every step; on a GPU it makes generate compile the model anew for each shape.
        "cache": "static" if device == "cpu" else "dynamic",
        "batch_size": limit,
        "sort_by": "output_len",
    }
    half, quarter = limit // 2, limit // 4
    changes: list[dict[str, Any]] = [{}, {"batch_size": half}, {"batch_size": half, "sort_by": "input_len"}]
    changes += [{"batch_size": quarter}, {"attn_implementation": "eager"}]
    if device == "cpu":
        dynamic = {"cache": "dynamic"}
        changes += [dynamic, dynamic | {"batch_size": half}, dynamic | {"batch_size": half, "attn_implementation": "eager"}]
    return [best | change for change in changes if change.get("batch_size", limit) >= min(4, limit)]


def _hf_continuous(requests: Sequence[BenchRequest], device: str, max_num_seqs: int | None) -> list[dict[str, Any]]:
    limit = min(len(requests), max_num_seqs or (32 if device == "cpu" else 256))
    best: dict[str, Any] = {
        "attn_implementation": "sdpa",
        "max_requests_per_batch": limit,
        "max_batch_tokens": 2048,
        "page_size": HF_PAGE_SIZE,
        "scheduler_type": "prefill_first" if device == "cpu" else "fifo",
        "allow_block_sharing": False,  # no two prompts share a prefix
        "auto_switch_to_flash": False,
    }
    if device == "cpu":
        # The first-in-first-out scheduler admits nobody while less than 15 % of the cache is free.
        best["num_blocks"] = int(_pages(requests, limit, HF_PAGE_SIZE) / 0.8) + 1
    changes: list[dict[str, Any]] = [{}]
    changes += [{"max_requests_per_batch": size} for size in (limit * 3 // 4, limit // 2) if size >= 4]
    changes += [
        {"max_batch_tokens": 512},
        {"scheduler_type": "fifo" if device == "cpu" else "prefill_first"},
    ]
    changes += [{"attn_implementation": "eager"}]
    if device != "cpu":
        changes += [{"use_cuda_graph": True}, {"attn_implementation": "flash_attention_2", "page_size": 256}]
    return [best | change for change in changes]


def _pages(requests: Sequence[BenchRequest], max_num_seqs: int, page_size: int) -> int:
    """Pages that the ``max_num_seqs`` longest requests fill."""
    return sum(heapq.nlargest(max_num_seqs, (-(-request.num_tokens // page_size) for request in requests)))
