"""The engine: requests in, tokens out, one step at a time.

:class:`Engine` owns the loop and nothing else. The scheduler decides, the cache manager finds room, the executor computes,
the output processor makes text and deltas of the tokens; the engine launches steps, reads them, retires sequences that ended
and tells observers. The loop is written once. Without ``async_scheduling`` each step is read before the next is planned
(depth 0); with it the next is launched first (depth 1).
"""

import dataclasses
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable

from pagebrain.cache import CacheManager
from pagebrain.config import PageBrainConfig
from pagebrain.engine.detokenizer import Detokenizer
from pagebrain.engine.executor import Executor, InFlight, StepResult
from pagebrain.engine.output_processor import OutputProcessor
from pagebrain.engine.parts import SchedulerPart
from pagebrain.engine.plan import check_plan
from pagebrain.engine.requests import Prompt, make_request, max_num_tokens
from pagebrain.engine.scheduler import Scheduler
from pagebrain.engine.sequence import Request, Sequence, SequenceGroup, SequenceStatus
from pagebrain.engine.trace import EngineStats, Observer, StepTotals, StepTrace, trace_step
from pagebrain.errors import IntegrityError, InvalidRequestError, StepError, is_out_of_memory, place
from pagebrain.outputs import OutputDelta
from pagebrain.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_RUNNING, _FINISHED = SequenceStatus.RUNNING, SequenceStatus.FINISHED  # asked for once for every token


@dataclasses.dataclass
class _Launched:
    """A step in flight, with what its trace will say."""

    in_flight: InFlight
    trace: StepTrace | None


class Engine:
    """Drives requests from arrival to last token. It belongs to one thread: nothing in it may be called from another.

    Args:
        config: resolved.
        cache_manager: block tables.
        executor: computes steps; made for the same cache.
        scheduler: plans steps; made for the same cache.
        encode: text to token ids; ``None`` if only token ids are served.
        detokenizer: token ids to text; ``None`` leaves texts empty.
    """

    def __init__(
        self,
        config: PageBrainConfig,
        cache_manager: CacheManager,
        executor: Executor,
        scheduler: SchedulerPart,
        encode: Callable[[str], list[int]] | None = None,
        detokenizer: Detokenizer | None = None,
    ) -> None:
        self.config = config
        self.cache_manager = cache_manager
        self.executor = executor
        self.encode = encode
        self.detokenizer = detokenizer
        self.outputs = OutputProcessor(detokenizer, frozenset(config.eos_token_ids))
        self.scheduler = scheduler
        self.observers: list[Observer] = []
        self.depth = 1 if config.async_scheduling else 0
        self._in_flight: deque[_Launched] = deque()
        self._totals = StepTotals()
        # The engine's own scheduler is held to this by tests; asking it at every step costs as much as its planning.
        self._checks_plans = type(self.scheduler) is not Scheduler or config.check_integrity
        self._num_requests = 0
        self._next_seq_id = 0

    # Requests in ------------------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        wants_deltas: bool = True,
        keeps_logprobs: bool = True,
    ) -> Request:
        """Queue a request; the next steps serve it. Without ``wants_deltas`` only the delta that ends it comes out.

        Without ``keeps_logprobs`` log-probabilities are in the deltas alone: none are kept for the output at the end.

        Raises ``InvalidRequestError``, before anything changed, for a prompt or parameters that can never be served.
        """
        request_id = self._new_request_id() if request_id is None else request_id
        if request_id in self.outputs.requests:
            raise InvalidRequestError(f"request id {request_id!r} is under way already: choose another")
        has_text = self.detokenizer is not None
        request = make_request(prompt, params, request_id, self._num_requests, self.config, self.encode, has_text)
        limit = max_num_tokens(len(request.prompt_token_ids), request.params, self.config)
        ids = range(self._next_seq_id, self._next_seq_id + request.params.n)
        sequences = [Sequence(seq_id, request, index, limit) for index, seq_id in enumerate(ids)]
        self.outputs.add(request, sequences, wants_deltas, keeps_logprobs)
        self._num_requests += 1
        self._next_seq_id += len(sequences)
        for seq in sequences:
            self.scheduler.add(seq)
        return request

    def _new_request_id(self) -> str:
        """A name that no request under way has, not even one that a user chose."""
        names = (f"request-{number}" for number in itertools.count(self._num_requests))
        return next(name for name in names if name not in self.outputs.requests)

    def abort(self, request_id: str) -> bool:
        """End a request now; there is no delta for it. False if it is not under way.

        Its blocks come back when no step in flight uses them.
        """
        state = self.outputs.requests.pop(request_id, None)
        if state is None:
            return False
        for seq in state.sequences:
            if not seq.is_finished:
                seq.finish("abort")
                self._retire(seq)
        return True

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether :meth:`step` has something left to do."""
        return bool(self.outputs.requests or self._in_flight)

    @property
    def num_unfinished_requests(self) -> int:
        """Requests under way, waiting ones included."""
        return len(self.outputs.requests)

    def stats(self) -> EngineStats:
        """How the engine stands, in counts."""
        return EngineStats(
            **vars(self._totals),
            num_waiting=len(self.scheduler.waiting),
            num_running=len(self.scheduler.running),
            num_free_blocks=self.cache_manager.num_free_blocks,
            num_blocks=self.cache_manager.block_manager.num_blocks,
        )

    def snapshot(self) -> StepTrace:
        """A trace of how the engine stands now, between two steps: nothing is computed in it."""
        return trace_step(self._totals.num_steps, SequenceGroup(()), self.cache_manager, self.scheduler)

    # The loop ---------------------------------------------------------------------------------------------------------

    def step(self) -> list[OutputDelta]:
        """Plan and launch the next step, and read the oldest in flight if the pipeline is full or nothing was launched.

        Returns what the step that was read added, which is nothing for the very first at depth 1.
        Raises ``StepError`` if a step failed; the engine is then as it was before the steps in flight.
        """
        while len(self._in_flight) > self.depth:  # only after a read was interrupted, or one step too many would stay there
            self._read(self._in_flight.popleft())
        began = time.monotonic()
        try:
            group = self.scheduler.schedule()
        except Exception as error:
            self._roll_back()
            raise StepError(f"the scheduler failed: {_describe(error)}") from error
        self._totals.schedule_s += time.monotonic() - began
        if group is not None:
            self._launch(group, began)
        if self._in_flight and (group is None or len(self._in_flight) > self.depth):
            self._read(self._in_flight.popleft())
        elif self.outputs.requests and not self._in_flight:
            count = len(self.outputs.requests)
            raise StepError(f"the scheduler found nothing to compute although {count} requests are under way")
        return self.outputs.take_deltas()

    def drain(self) -> list[OutputDelta]:
        """Read the steps in flight without planning another, so that what ended or was aborted gives its blocks back."""
        while self._in_flight:
            self._read(self._in_flight.popleft())
        return self.outputs.take_deltas()

    def _launch(self, group: SequenceGroup, began: float) -> None:
        planned = time.monotonic()
        try:
            if self._checks_plans:
                check_plan(group, self.config, self.outputs.requests)
            group = self.cache_manager.complete(group)
            in_flight = self.executor.launch(group)
        except BaseException as error:  # interrupted, too: the executor may have come halfway
            self._roll_back()
            if not isinstance(error, Exception):
                raise
            raise StepError(f"step {self._totals.num_steps} could not be launched: {_describe(error)}") from error
        trace = trace_step(self._totals.num_steps, group, self.cache_manager, self.scheduler) if self.observers else None
        num_prefill_tokens = num_decode_tokens = 0
        for seq, start, num_tokens, samples in group.scheduled:
            if start < seq.num_to_catch_up:
                num_prefill_tokens += num_tokens
            else:
                num_decode_tokens += num_tokens
            seq.num_scheduled = start + num_tokens
            seq.num_unread_steps += 1
            seq.num_unread_tokens += samples
            if seq.status is not _RUNNING:
                seq.status = _RUNNING
                state = self.outputs.requests[seq.request.request_id]
                state.first_scheduled_s = state.first_scheduled_s or began
        launched = time.monotonic()
        if trace is not None:
            trace = dataclasses.replace(trace, launched_s=launched, schedule_s=planned - began, launch_s=launched - planned)
        self._in_flight.append(_Launched(in_flight, trace))
        totals = self._totals
        totals.num_steps += 1
        totals.num_prefill_tokens += num_prefill_tokens
        totals.num_decode_tokens += num_decode_tokens
        totals.num_graph_decode_tokens += in_flight.num_graph_decodes
        totals.num_preemptions += len(group.preempted)
        totals.launch_s += launched - planned

    def _read(self, launched: _Launched) -> None:
        """Wait for a step and apply what it brought."""
        began = time.monotonic()
        group = launched.in_flight.group
        try:
            result = launched.in_flight.wait()
        except Exception as error:
            self._mark_read(group)
            self._roll_back()
            raise StepError(f"a step of {len(group)} sequences failed: {_describe(error)}") from error
        except BaseException:  # interrupted while waiting: the step is still under way, and can be read later
            self._in_flight.appendleft(launched)
            raise
        waited = time.monotonic()
        self._mark_read(group)
        try:
            finished = self._apply(group, result, waited)
        except BaseException:  # a sequence that has not got its tokens yet computes them again
            self._roll_back()
            raise
        self.cache_manager.collect()
        if self.config.check_integrity:
            self.check_integrity()
        self._totals.wait_s += waited - began
        self._totals.output_s += time.monotonic() - waited
        self._tell(launched.trace, began, waited, finished)

    def _apply(self, group: SequenceGroup, result: StepResult, now: float) -> tuple[int, ...]:
        """Give each sequence what the step brought it. Returns the ids of those that ended with it."""
        finished: list[int] = []
        logprobs, of_prompts, append = result.logprobs, result.prompt_logprobs, self.outputs.append
        entries = zip(group.scheduled, result.token_ids, strict=True)
        for index, ((seq, start, num_tokens, _), token_ids) in enumerate(entries):
            if seq.status is _FINISHED:
                continue  # it ended while this step was in flight: what it sampled is past the end
            if of_prompts and index in of_prompts:
                self.outputs.keep_prompt_logprobs(seq, *of_prompts[index])
            if token_ids and append(seq, token_ids, logprobs.get(index, ()) if logprobs else (), now):
                finished.append(seq.seq_id)
                self._retire(seq)
            elif seq.status is _RUNNING:  # otherwise preempted: the tokens count, the cache is gone
                seq.num_computed = start + num_tokens
        return tuple(finished)

    def _retire(self, seq: Sequence) -> None:
        """Let the scheduler forget a sequence that ended; its blocks come back when no step in flight reads them."""
        self.scheduler.finish(seq)
        self.cache_manager.retire(seq)

    def _mark_read(self, group: SequenceGroup) -> None:
        for seq, _, _, samples in group.scheduled:
            seq.num_unread_steps -= 1
            seq.num_unread_tokens -= samples

    def _roll_back(self) -> None:
        """Forget all steps in flight. Every sequence stands where it was last read; nothing of it is lost."""
        while self._in_flight:
            launched = self._in_flight.popleft()
            try:
                launched.in_flight.wait()
            except Exception as error:  # it was launched on top of the one that failed
                logger.debug("a step behind the failed one failed too: %s", error)
            self._mark_read(launched.in_flight.group)
        for seq in self.scheduler.running:
            seq.num_scheduled = seq.num_computed
        self.cache_manager.collect()
        self.cache_manager.report_anew()  # the executor may keep tokens that were never read, or know half of the last plan

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` if the blocks' bookkeeping contradicts itself or a step in flight lost what it reads."""
        self.cache_manager.check_integrity()
        for launched in self._in_flight:
            for entry in launched.in_flight.group:
                held = len(self.cache_manager.block_table(entry.seq.seq_id)) * self.config.block_size
                if held < entry.context_len:
                    raise IntegrityError(
                        f"sequence {entry.seq.seq_id} holds {held} slots, but a step in flight reads {entry.context_len}"
                    )

    # Observers --------------------------------------------------------------------------------------------------------

    def _tell(self, trace: StepTrace | None, began: float, waited: float, finished: tuple[int, ...]) -> None:
        if trace is None:
            return
        now = time.monotonic()
        trace = dataclasses.replace(trace, finished=finished, read_s=waited, wait_s=waited - began, output_s=now - waited)
        for observer in list(self.observers):
            try:
                observer(trace)
            except Exception:  # the step is done: its tokens must reach their request whatever a watcher does
                logger.exception("an observer failed and is not called again")
                self.observers.remove(observer)


def _describe(error: Exception) -> str:
    """An error of a part in one line, with where it was raised: the part may be somebody's own."""
    what = "out of memory (lower max_num_batched_tokens or max_num_seqs): " if is_out_of_memory(error) else ""
    return f"{what}{type(error).__name__}: {' '.join(str(error).split())}{place(error)}"
