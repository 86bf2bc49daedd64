"""Options that commands share: sampling parameters and engine settings, under their Python names.

An option that is not given is missing in the parsed arguments. So :class:`~pagebrain.sampling_params.SamplingParams` and
:class:`~pagebrain.config.PageBrainConfig` alone hold the defaults and the checks.
"""

import argparse
from dataclasses import fields
from typing import Any

from pagebrain.cli.frame import OneLineParser
from pagebrain.errors import ConfigError, InvalidRequestError
from pagebrain.sampling_params import SamplingParams

_SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
_ENGINE_FIELDS = (
    "model",
    "tokenizer",
    "load_format",
    "dtype",
    "device",
    "block_size",
    "num_blocks",
    "memory_fraction",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "async_scheduling",
    "cuda_graphs",
    "prefix_caching",
    "swap_space_gib",
    "preemption_mode",
    "check_integrity",
)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ``SamplingParams``."""
    group = parser.add_argument_group("how tokens are chosen", argument_default=argparse.SUPPRESS)
    group.add_argument("--temperature", type=float, metavar="X", help="0 always takes the most probable token (default: 1)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="keep the most probable tokens that add up to P (default: 1)"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most probable tokens (default: 0, all)")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the best one's probability")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: avoid tokens of prompt and output")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="-2 to 2: avoid tokens of the output")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="-2 to 2: the same, for each time they occur")
    group.add_argument(
        "--logit-bias", action="append", metavar="ID=X", help="add X (-100 to 100) to a token's logit; repeatable"
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes the output reproducible in any batch")
    group.add_argument("-n", type=int, metavar="N", help="independent samples of the prompt (default: 1)")

    group = parser.add_argument_group("when the text ends", argument_default=argparse.SUPPRESS)
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate (default: all that fit)")
    group.add_argument("--min-tokens", type=int, metavar="N", help="fewest tokens before the text may end")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--stop-token-ids", metavar="ID,ID,...", help="end at one of these tokens")
    group.add_argument("--ignore-eos", action="store_true", help="continue after the end-of-text token")
    group.add_argument("--include-stop-str-in-output", action="store_true", help="keep the text that ended the output")
    group.add_argument(
        "--no-skip-special-tokens",
        action="store_false",
        dest="skip_special_tokens",
        help="show tokens such as <|endoftext|>",
    )


def add_logprobs_arguments(parser: argparse.ArgumentParser) -> None:
    """``--logprobs`` and ``--prompt-logprobs``."""
    group = parser.add_argument_group("log-probabilities (with --json)", argument_default=argparse.SUPPRESS)
    group.add_argument("--logprobs", type=int, metavar="K", help="of each generated token and the K best ones, 0 to 20")
    group.add_argument("--prompt-logprobs", type=int, metavar="K", help="of each prompt token and the K best ones, 0 to 20")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each setting of ``PageBrainConfig`` that a user may set."""
    group = parser.add_argument_group("model", argument_default=argparse.SUPPRESS)
    group.add_argument("--model", metavar="NAME", help="hub name or folder of a GPT-2 (default: the bundled story model)")
    group.add_argument("--tokenizer", metavar="NAME", help="hub name or folder (default: the model's own)")
    group.add_argument("--load-format", metavar="FORMAT", help="auto, or dummy for random weights of a GPT-2 size")
    group.add_argument("--dtype", metavar="NAME", help="auto, float64, float32, bfloat16 or float16 (default: auto)")
    group.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")

    group = parser.add_argument_group("engine", argument_default=argparse.SUPPRESS)
    group.add_argument("--block-size", type=int, metavar="N", help="token slots in a block of the cache (default: 16)")
    group.add_argument("--num-blocks", type=int, metavar="N", help="blocks of the cache (default: what the memory allows)")
    group.add_argument(
        *("--memory-fraction", "--gpu-memory-utilization"),
        type=float,
        metavar="X",
        help="share of the free memory that the cache may take",
    )
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="most sequences in one step")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="most tokens in one step")
    group.add_argument("--max-model-len", type=int, metavar="N", help="most tokens of prompt and output together")
    on_or_off = argparse.BooleanOptionalAction
    group.add_argument(
        "--async-scheduling", action=on_or_off, help="launch each step before the last one is read (default: on a GPU)"
    )
    graphs = group.add_mutually_exclusive_group()
    graphs.add_argument("--cuda-graphs", action=on_or_off, help="replay decode steps as CUDA graphs (default: on a GPU)")
    graphs.add_argument("--enforce-eager", action="store_false", dest="cuda_graphs", help="the same as --no-cuda-graphs")
    group.add_argument("--prefix-caching", action=on_or_off, help="compute a common beginning once (default: on)")
    # vLLM's name of the switch
    group.add_argument("--enable-prefix-caching", action=on_or_off, dest="prefix_caching", help=argparse.SUPPRESS)
    group.add_argument(
        *("--swap-space-gib", "--swap-space"),
        type=float,
        metavar="X",
        help="GiB of CPU memory for the cache of preempted sequences (default: 0)",
    )
    group.add_argument(
        "--preemption-mode",
        choices=("auto", "recompute", "swap"),
        help="how preempted sequences continue (default: what is quicker as measured)",
    )
    group.add_argument("--engine-seed", type=int, metavar="N", help="requests without a --seed derive theirs from this")
    group.add_argument(
        "--check-integrity", action="store_true", help="check the bookkeeping of blocks after every step (slow)"
    )
    group.add_argument(
        "--part",
        action="append",
        dest="parts",
        metavar="PART=path:Name",
        help="use your own block_manager, attention, scheduler or sampler; repeatable",
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The options as ``SamplingParams``. Raises ``InvalidRequestError``."""
    given = {name: value for name, value in vars(args).items() if name in _SAMPLING_FIELDS}
    if "logit_bias" in given:
        given["logit_bias"] = _logit_bias(given["logit_bias"])
    if "stop_token_ids" in given:
        given["stop_token_ids"] = token_ids("--stop-token-ids", given["stop_token_ids"])
    if given.get("max_tokens") == 0:  # only scores the prompt, so there is no text to print
        raise InvalidRequestError("max_tokens must be at least 1 on the command line, got 0, which gives no text")
    return SamplingParams(**given)


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for ``LLM``. Raises ``ConfigError`` for a ``--part`` that cannot be read."""
    given = {name: value for name, value in vars(args).items() if name in _ENGINE_FIELDS}
    if "engine_seed" in args:
        given["seed"] = args.engine_seed
    if "parts" in args:
        given["parts"] = _parts(args.parts)
    return given


def engine_settings_of(arguments: list[str]) -> dict[str, Any]:
    """The engine's settings among arguments for ``pagebrain serve``, as keyword arguments for ``LLM``."""
    parser = OneLineParser(prog="pagebrain serve", add_help=False)
    add_engine_arguments(parser)
    known, _ = parser.parse_known_args(arguments, argparse.Namespace())
    return engine_settings(known)


def token_ids(option: str, text: str) -> list[int]:
    """``1,2,3`` as a list of integers. Raises ``InvalidRequestError``."""
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise InvalidRequestError(f"{option} must look like 1,2,3; got {text!r}") from None


def _logit_bias(items: list[str]) -> dict[int, float]:
    bias: dict[int, float] = {}
    for item in items:
        token_id, _, value = item.partition("=")
        try:
            bias[int(token_id)] = float(value)
        except ValueError:
            raise InvalidRequestError(f"--logit-bias must look like ID=X, a token id and a number; got {item!r}") from None
    return bias


def _parts(items: list[str]) -> dict[str, str]:
    parts: dict[str, str] = {}
    for item in items:
        part, equals, named = item.partition("=")
        if not equals or not part or not named:
            raise ConfigError(f"--part must look like PART=path/to/file.py:Name, got {item!r}")
        if part in parts:
            raise ConfigError(f"--part names {part} twice: {parts[part]!r} and {named!r}")
        parts[part] = named
    return parts
