"""Runs a chapter or the engine on the same prompts, and records the tokens, the steps and the times."""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from transformers import GPT2LMHeadModel

from pagebrain import LLM, PageBrainConfig, SamplingParams
from pagebrain.engine.trace import StepTrace

PROMPTS = (
    "Once upon a time",
    "One morning Mia",
    "Once upon a time, in the old mill,",
    "There was a small",
    "The fox and the owl",
    "In the garden, a little bird",
    "Every evening",
    "It was raining, and",
)
"""Beginnings of stories, of different lengths."""

INTERPRETED = ("06",)
"""Chapters whose kernels Triton's interpreter runs where there is no GPU, some hundred times slower."""

Generate = Callable[..., list[list[int]]]


@dataclass
class Record:
    """What a run did.

    Attributes:
        answers: the tokens generated for each prompt.
        seconds: the time for all, from the first step on where there are traces: what is made once, such as a CUDA graph,
            does not count.
        traces: of every step, if the stage makes traces.
        token_times: prompt -> when each of its tokens was there, in seconds since the start.
        spans: where single tokens were not timed: seconds from the first token of an answer to its last, and how many came
            after the first.
    """

    answers: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    traces: list[StepTrace] = field(default_factory=list)
    token_times: dict[int, list[float]] = field(default_factory=dict)
    spans: list[tuple[float, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return sum(map(len, self.answers))

    @property
    def seconds_per_token(self) -> float | None:
        """From one token of an answer to its next, on average; ``None`` if no answer has two."""
        spans = self.spans or [(times[-1] - times[0], len(times) - 1) for times in self.token_times.values()]
        spans = [(span, count) for span, count in spans if count > 0]
        return sum(span for span, _ in spans) / sum(count for _, count in spans) if spans else None

    @property
    def peak_cache_tokens(self) -> int:
        """Most token slots that were held at once."""
        held = (len(set(chain(*trace.block_tables.values()))) * trace.block_size for trace in self.traces)
        return max(held, default=0)


def run_chapter(
    generate: Generate,
    model: GPT2LMHeadModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    config: PageBrainConfig | None = None,
) -> Record:
    """Run a chapter's ``generate``, with ``config`` if it takes one; where it does not, its batch is all prompts anyway."""
    record = Record()
    started = time.monotonic()

    def on_logits(index: int, logits: Any) -> None:
        record.token_times.setdefault(index, []).append(time.monotonic() - started)

    taken = inspect.signature(generate).parameters
    more: dict[str, Any] = {"on_step": record.traces.append} if "on_step" in taken else {}
    if config is not None and "config" in taken:
        more["config"] = config
    record.answers = generate(model, prompts, max_new_tokens, on_logits, **more)
    first_step = record.traces[0].launched_s if record.traces else started
    record.seconds = time.monotonic() - first_step
    return record


def room_for_all(model: GPT2LMHeadModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> PageBrainConfig:
    """A config in which all requests run at once, with steps launched ahead where possible; else the usual settings."""
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    usual = PageBrainConfig(device=str(model.device))
    return PageBrainConfig.for_model(
        model,
        num_blocks=sum(map(usual.blocks_for, lengths)),
        max_num_seqs=min(len(prompts), usual.max_num_seqs),
        max_num_batched_tokens=usual.max_num_batched_tokens,
        max_model_len=max(lengths),
        async_scheduling=True,
    )


def run_engine(llm: LLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, watch: bool = True) -> Record:
    """Run the engine, greedily as the chapters do.

    With ``watch`` every step is traced and every token timed, which costs a fast engine a good part of its speed; without,
    the record has no traces, and times of first and last tokens only.
    """
    record = Record()
    number_of: dict[int, int] = {}
    started = time.perf_counter()

    def observe(trace: StepTrace) -> None:
        record.traces.append(trace)
        for row in trace.rows:
            number = number_of.setdefault(row.seq_id, len(number_of))
            if row.samples:
                record.token_times.setdefault(number, []).append(time.perf_counter() - started)

    if watch:
        llm.engine.observers.append(observe)
    try:
        params = SamplingParams(temperature=0, max_tokens=max_new_tokens)
        outputs = llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
    finally:
        if watch:
            llm.engine.observers.remove(observe)
    record.seconds = time.perf_counter() - started
    record.answers = [list(output.outputs[0].token_ids) for output in outputs]
    for output, answer in zip(outputs, record.answers):
        first, last = output.metrics.first_token_s, output.metrics.finished_s
        if not watch and first is not None and last is not None:
            record.spans.append((last - first, len(answer) - 1))
    return record
