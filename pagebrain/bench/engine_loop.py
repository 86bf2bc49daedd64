"""A timed engine loop: it adds each request at its arrival time and records every step.

The headline figures are measured with ``LLM.generate``. This loop is for requests that arrive over time, and for measuring
the parts of a step. The record costs a few microseconds a step.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagebrain.bench.workload import BenchRequest
from pagebrain.engine.engine import Engine
from pagebrain.engine.trace import StepTotals
from pagebrain.errors import StepError
from pagebrain.outputs import OutputDelta
from pagebrain.sampling_params import SamplingParams


@dataclass(frozen=True)
class StepRecord:
    """One call of ``Engine.step``.

    Attributes:
        seconds: its duration.
        totals: its part of the engine's totals, for the step that it launched.
        num_decodes: decode rows of the step whose tokens it read.
        context_tokens: tokens that those rows attended to.
        only_decodes: whether there was no prefill in the step that was read and in the one that was launched.
    """

    seconds: float
    totals: StepTotals
    num_decodes: int
    context_tokens: int
    only_decodes: bool


@dataclass
class LoopRun:
    """The result of one run of the loop; times in seconds, ``first_token_s`` since the request's arrival."""

    elapsed_s: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    totals: StepTotals = field(default_factory=StepTotals)


def run_loop(
    engine: Engine,
    requests: Sequence[BenchRequest],
    params: Sequence[SamplingParams],
    arrivals_s: Sequence[float] | None = None,
    before_step: Callable[[int], None] | None = None,
) -> LoopRun:
    """Serve ``requests``, each added ``arrivals_s`` seconds after the start (ascending; ``None`` is all at once).

    ``before_step`` is called with the number of each step before it. No request of this run stays in the engine, even after
    an exception.
    """
    run = LoopRun(first_token_s=[0.0] * len(requests), token_ids=[[] for _ in requests])
    reader = _Reader(requests, run)
    arrivals = [0.0] * len(requests) if arrivals_s is None else arrivals_s
    try:
        _serve(engine, list(zip(arrivals, requests, params)), reader, before_step)
    finally:
        for request_id in reader.under_way:
            engine.abort(request_id)
        if reader.under_way:
            with contextlib.suppress(StepError):  # the requests of a failing step have ended
                engine.drain()
    return run


def _serve(
    engine: Engine,
    asked: list[tuple[float, BenchRequest, SamplingParams]],
    reader: "_Reader",
    before_step: Callable[[int], None] | None,
) -> None:
    """Add the requests that have arrived, take a step, read it. Sleep while the engine has no request."""
    run, to_come = reader.run, deque(enumerate(asked))
    first = before = StepTotals.of(engine.stats())
    had_prefill = False
    began = time.monotonic()
    while to_come or engine.has_unfinished_requests:
        now = time.monotonic() - began
        while to_come and to_come[0][1][0] <= now:
            index, (arrival, request, params) = to_come.popleft()
            added = engine.add_request(request.prompt_token_ids, params)
            reader.started(added.request_id, index, began + arrival)
        if not engine.has_unfinished_requests:
            time.sleep(max(0.0, to_come[0][1][0] - (time.monotonic() - began)))
            continue
        if before_step is not None:
            before_step(len(run.steps))
        step_began = time.monotonic()
        deltas = engine.step()
        step_ended = time.monotonic()
        num_decodes, context_tokens, num_firsts = reader.read(deltas, step_ended)
        after = StepTotals.of(engine.stats())
        added_totals, before = after.since(before), after
        has_prefill = added_totals.num_prefill_tokens > 0
        only_decodes = num_decodes > 0 and not (has_prefill or had_prefill or num_firsts)
        had_prefill = has_prefill
        run.steps.append(StepRecord(step_ended - step_began, added_totals, num_decodes, context_tokens, only_decodes))
    run.elapsed_s = time.monotonic() - began
    run.totals = StepTotals.of(engine.stats()).since(first)


class _Reader:
    """Collects tokens and times of each request from the deltas of the steps."""

    def __init__(self, requests: Sequence[BenchRequest], run: LoopRun) -> None:
        self._requests = requests
        self.run = run
        self.under_way: set[str] = set()
        self._index_of: dict[str, int] = {}
        self._arrived_s: dict[int, float] = {}

    def started(self, request_id: str, index: int, arrived_s: float) -> None:
        self.under_way.add(request_id)
        self._index_of[request_id] = index
        self._arrived_s[index] = arrived_s

    def read(self, deltas: Sequence[OutputDelta], now: float) -> tuple[int, int, int]:
        """Decode rows among ``deltas``, the tokens they attended to, and the number of requests with their first token.

        The decode row of output token ``k`` (from 2) attended to the prompt and to ``k - 1`` output tokens.
        """
        num_decodes = context_tokens = num_firsts = 0
        for delta in deltas:
            index = self._index_of[delta.request_id]
            tokens = self.run.token_ids[index]
            tokens.extend(delta.token_ids)
            if delta.finished is not None:
                self.under_way.remove(delta.request_id)
            if len(tokens) == 1:
                self.run.first_token_s[index] = now - self._arrived_s[index]
                num_firsts += 1
            else:
                num_decodes += 1
                context_tokens += len(self._requests[index].prompt_token_ids) + len(tokens) - 1
        return num_decodes, context_tokens, num_firsts
