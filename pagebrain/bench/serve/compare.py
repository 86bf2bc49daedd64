"""``--against-offline``: the same requests through the server and through ``LLM.generate``, in interleaved rounds.

What is fair: a server with N clients never runs more than N sequences at once, so offline runs with ``max_num_seqs`` of at
most N, all its requests there from the start. Both get the same model, engine settings and threads. Each round has requests
of its own; each side of it has processes of its own, which end before the next begin, so that neither takes memory or cores
from the other. The clients run on the same machine as the server, and the cores they take are the server's loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pagebrain.bench.report import summarize
from pagebrain.bench.spec import RunResult, RunSpec
from pagebrain.bench.workload import BenchRequest
from pagebrain.errors import PageBrainError

_MODEL_FIELDS = ("model", "load_format", "dtype", "device", "seed")
_DEFAULT_MAX_NUM_SEQS = 64


def offline_spec(
    engine: Mapping[str, Any], concurrency: int, threads: int, requests: list[BenchRequest], warmup: list[BenchRequest]
) -> RunSpec:
    """What the offline side of a round runs: ``engine`` as the server has it, but no more sequences than clients."""
    settings = {name: value for name, value in engine.items() if name not in _MODEL_FIELDS}
    settings["max_num_seqs"] = min(concurrency, settings.get("max_num_seqs", _DEFAULT_MAX_NUM_SEQS))
    model = {name: engine[name] for name in _MODEL_FIELDS if name in engine}
    return RunSpec("pagebrain", model, threads, requests, warmup, settings)


def check_all_done(metrics: Mapping[str, Any], requests: Sequence[BenchRequest]) -> None:
    """Raise ``PageBrainError`` unless the server did all that offline does; a ratio would compare different work."""
    asked = sum(request.output_len for request in requests)
    if metrics["done"] != len(requests) or metrics["output_tokens"] != asked:
        reasons = "; ".join(f"{count} times {reason}" for reason, count in metrics["reasons"].items())
        raise PageBrainError(
            f"the server did {metrics['done']} of {len(requests)} requests, {metrics['output_tokens']} of {asked} tokens: "
            f"that cannot be compared with offline ({reasons or 'outputs were too short'})"
        )


def compare(
    served: Sequence[Mapping[str, Any]], offline: Sequence[RunResult], concurrency: int, threads: int
) -> dict[str, Any]:
    """Tokens per second of both and their ratio, round by round. ``served`` are the metrics of the server's rounds."""
    tokens = [sum(map(len, result.token_ids)) for result in offline]
    served_speed = [metrics["output_tokens_per_s"] for metrics in served]
    offline_speed = [count / result.elapsed_s for count, result in zip(tokens, offline)]
    configuration = offline[0].configuration
    return {
        "what": (
            f"served: {concurrency} streaming clients in a closed loop, over HTTP on this machine. offline: LLM.generate, "
            f"all requests at once, max_num_seqs={configuration['max_num_seqs']}. In each round the same requests for both "
            f"({served[0]['requests']}, greedy, end of sequence ignored), the same model and engine settings, {threads} "
            f"thread{'s' * (threads > 1)} for each engine; each in processes of its own, one after the other, after a "
            "warm-up. Clients and HTTP take their share of the same cores. Output tokens by the time from the first request "
            "to the last token."
        ),
        "served_tokens_per_s": summarize(served_speed),
        "offline_tokens_per_s": summarize(offline_speed),
        "ratio": summarize([ours / theirs for ours, theirs in zip(served_speed, offline_speed)]),
        "offline_configuration": configuration,
        "offline_detokenization": offline[0].detokenization,
        "threads": threads,
    }
