"""``pagebrain generate``: prints the continuation of one prompt, streamed or as JSON."""

import argparse
import json
import math
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagebrain.cli import arguments
from pagebrain.errors import InvalidRequestError

if TYPE_CHECKING:
    from pagebrain.engine.requests import Prompt
    from pagebrain.llm import LLM
    from pagebrain.outputs import OutputDelta, RequestOutput
    from pagebrain.sampling_params import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.usage = "pagebrain generate [PROMPT] [options]"
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; - or nothing reads standard input")
    parser.add_argument(
        "--prompt-token-ids", metavar="ID,ID,...", help="the prompt as token ids (a model without a tokenizer)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object when all is done, instead of streaming")
    arguments.add_sampling_arguments(parser)
    arguments.add_logprobs_arguments(parser)
    arguments.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Generate and print. All checks that need no model come first."""
    params = arguments.sampling_params(args)
    settings = arguments.engine_settings(args)
    if not args.json and (params.logprobs is not None or params.prompt_logprobs is not None):
        raise InvalidRequestError("--logprobs and --prompt-logprobs are shown with --json only: add it")
    prompt = read_prompt(args)

    if sys.stderr.isatty():
        _announce_download(settings)

    from pagebrain.llm import LLM

    llm = LLM(**settings)
    for notice in llm.notices:
        print(f"pagebrain: {notice}", file=sys.stderr)
    if args.json:
        output = llm.generate([prompt], params, use_tqdm=False)[0]
        print(json.dumps(as_json(llm, output), ensure_ascii=False, indent=2, allow_nan=False))
    elif params.n == 1:
        stream(llm, prompt, params)
    else:
        print_samples(llm, prompt, params)
    return 0


def _announce_download(settings: dict[str, Any]) -> None:
    """Print a line if the model may have to be downloaded, which can take minutes or fail after minutes."""
    name = settings.get("model")
    if name is not None and settings.get("load_format") != "dummy" and not Path(name).expanduser().is_dir():
        print(f"pagebrain: looking for {name} in the local cache and on the Hugging Face hub", file=sys.stderr)


def read_prompt(args: argparse.Namespace) -> "Prompt":
    """The prompt from the command line or standard input, where one newline at the end is removed.

    Raises ``InvalidRequestError`` if there is no prompt, or two.
    """
    if args.prompt_token_ids is not None:
        if args.prompt is not None:
            raise InvalidRequestError("give either PROMPT or --prompt-token-ids, not both")
        return arguments.token_ids("--prompt-token-ids", args.prompt_token_ids)
    if args.prompt is not None and args.prompt != "-":
        return str(args.prompt)
    if sys.stdin is None or (args.prompt is None and sys.stdin.isatty()):
        raise InvalidRequestError('no prompt: give one as in pagebrain generate "Once upon a time", or pipe it in')
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"standard input is not UTF-8 text: byte {error.start} cannot be read") from None
    return text.removesuffix("\n").removesuffix("\r")


def stream(llm: "LLM", prompt: "Prompt", params: "SamplingParams") -> None:
    """Print text (token ids without a tokenizer) as it is generated. The request ends with this call."""
    last = "\n"
    try:
        with started(llm, prompt, params) as deltas:
            for piece in pieces(llm, deltas):
                if piece:
                    print(piece, end="", flush=True)
                    last = piece[-1]
    finally:
        if last != "\n":
            print(flush=True)


def started(llm: "LLM", prompt: "Prompt", params: "SamplingParams") -> "closing[Generator[OutputDelta, None, None]]":
    """The deltas of a request as a context manager. At the end of the block, the request is aborted if it has not ended."""
    return closing(llm.stream(prompt, params))


def pieces(llm: "LLM", deltas: "Iterator[OutputDelta]") -> Iterator[str]:
    """The text that each delta adds to the output of a single sample."""
    for number, delta in enumerate(deltas):
        yield delta.text if llm.tokenizer is not None else " " * (number > 0) + _ids(delta.token_ids)


def print_samples(llm: "LLM", prompt: "Prompt", params: "SamplingParams") -> None:
    """Print each sample under a header, in order, as soon as it and the samples before it are complete."""
    texts = [""] * params.n
    ids: list[list[int]] = [[] for _ in texts]
    complete: dict[int, str] = {}
    num_printed = 0
    with started(llm, prompt, params) as deltas:
        for delta in deltas:
            texts[delta.index] += delta.text
            ids[delta.index] += delta.token_ids
            if delta.finish_reason is not None:
                complete[delta.index] = delta.finish_reason
            while num_printed in complete:
                text = texts[num_printed] if llm.tokenizer is not None else _ids(ids[num_printed])
                header = f"sample {num_printed + 1} of {params.n}: {len(ids[num_printed])} tokens, {complete[num_printed]}"
                print(f"{'' if num_printed == 0 else chr(10)}--- {header} ---\n{text}", flush=True)
                num_printed += 1


def as_json(llm: "LLM", output: "RequestOutput") -> dict[str, Any]:
    """A request's output with usage and timings, as plain JSON values."""
    num_prompt = len(output.prompt_token_ids)
    num_generated = sum(len(sample.token_ids) for sample in output.outputs)
    times = output.metrics
    started, first, finished = times.first_scheduled_s, times.first_token_s, times.finished_s
    total_s = None if finished is None else finished - times.arrival_s
    plain = {
        "request_id": output.request_id,
        "model": llm.config.model or "bundled",
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "outputs": [asdict(sample) | {"token_ids": list(sample.token_ids)} for sample in output.outputs],
        "prompt_logprobs": None if output.prompt_logprobs is None else [x and asdict(x) for x in output.prompt_logprobs],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        },
        "timings": {
            "queued_s": None if started is None else started - times.arrival_s,
            "first_token_s": None if first is None else first - times.arrival_s,
            "total_s": total_s,
            "tokens_per_s": num_generated / total_s if total_s else None,
            "num_preemptions": times.num_preemptions,
            "num_cached_tokens": times.num_cached_tokens,
        },
        "notices": list(llm.notices),
    }
    return {name: _finite(value) for name, value in plain.items()}


def _finite(value: Any) -> Any:
    """``value`` with ``None`` for infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ids(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))
