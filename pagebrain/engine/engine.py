"""The engine loop: requests in, tokens out, one step at a time.

The scheduler plans a step, the cache manager adds new blocks to the plan, the executor computes it, and the output
processor turns its tokens into text and deltas. :class:`Engine` launches steps, reads them and retires sequences that ended.
Without ``async_scheduling`` each step is read before the next is planned (depth 0). With it the next step is launched first
(depth 1).
"""

import dataclasses
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

from pagebrain.cache import CacheManager
from pagebrain.config import PageBrainConfig
from pagebrain.engine.beam_search import BeamSearch, continue_beams
from pagebrain.engine.detokenizer import Detokenizer
from pagebrain.engine.executor import Executor, InFlight, StepResult
from pagebrain.engine.output_processor import OutputProcessor, RequestState
from pagebrain.engine.parts import SchedulerPart, describe_failure
from pagebrain.engine.plan import check_held, check_plan
from pagebrain.engine.requests import Prompt, make_request, max_num_tokens
from pagebrain.engine.scheduler import Scheduler
from pagebrain.engine.sequence import Request, Sequence, SequenceGroup, SequenceStatus
from pagebrain.engine.trace import EngineStats, Observer, StepTotals, StepTrace, tell_observers, trace_step
from pagebrain.errors import InvalidRequestError, StepError
from pagebrain.outputs import OutputDelta
from pagebrain.sampling_params import BeamSearchParams, SamplingParams

logger = logging.getLogger(__name__)

MIN_MEASURED_TOKENS = 16
"""A step with fewer prompt tokens says little about the time that a token takes."""

_RUNNING, _FINISHED = SequenceStatus.RUNNING, SequenceStatus.FINISHED  # looked up once, not for every token


@dataclasses.dataclass
class _Launched:
    """A step in flight and its trace; there is no trace without observers."""

    in_flight: InFlight
    trace: StepTrace | None
    launched_s: float
    num_prefill_tokens: int
    num_decode_tokens: int


class Engine:
    """Drives requests from arrival to last token. All methods must be called from one thread.

    Args:
        config: resolved.
        cache_manager: block tables.
        executor: computes steps; made for the same cache.
        scheduler: plans steps; made for the same cache.
        encode: text to token ids; ``None`` if only token ids are served.
        detokenizer: token ids to text; ``None`` leaves texts empty.
        without_beam_search: names of parts that do not support beam search.
    """

    def __init__(
        self,
        config: PageBrainConfig,
        cache_manager: CacheManager,
        executor: Executor,
        scheduler: SchedulerPart,
        encode: Callable[[str], list[int]] | None = None,
        detokenizer: Detokenizer | None = None,
        without_beam_search: SequenceOf[str] = (),
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
        self._without_beam_search = without_beam_search
        self._learns_costs = config.num_swap_blocks > 0 and config.preemption_mode == "auto"
        self._last_read_s = 0.0
        self._in_flight: deque[_Launched] = deque()
        self._totals = StepTotals()
        # Tests check the plans of the engine's own scheduler. A check at every step would cost as much as its planning.
        self._checks_plans = type(self.scheduler) is not Scheduler or config.check_integrity
        self._num_requests = 0
        self._next_seq_id = 0

    # Requests in ------------------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        request_id: str | None = None,
        *,
        wants_deltas: bool = True,
        keeps_logprobs: bool = True,
        cache_salt: str | None = None,
    ) -> Request:
        """Queue a request. Raises ``InvalidRequestError``, before anything changed, if it can never be served.

        Without ``wants_deltas`` :meth:`step` returns only the delta that ends the request. Without ``keeps_logprobs`` its
        log-probabilities are in the deltas and not in the output at the end. It shares cached prefixes only with requests of
        the same ``cache_salt``, so that a user's prompt does not make another user's answer start sooner.
        """
        request_id = self._new_request_id() if request_id is None else request_id
        if request_id in self.outputs.requests:
            raise InvalidRequestError(f"request id {request_id!r} is under way already: choose another")
        has_text = self.detokenizer is not None
        if isinstance(params, BeamSearchParams) and self._without_beam_search:
            parts = " and the ".join(self._without_beam_search)
            verb = "do" if len(self._without_beam_search) > 1 else "does"
            raise InvalidRequestError(f"the {parts} in use {verb} not support beam search: use PageBrain's own")
        request = make_request(
            prompt, params, request_id, self._num_requests, self.config, self.encode, has_text, cache_salt
        )
        limit = max_num_tokens(len(request.prompt_token_ids), request.params, self.config)
        if request.beam_params is not None:
            num_tokens = len(request.prompt_token_ids)
            sequences = [Sequence(self._new_seq_id(), request, 0, num_tokens + 1, is_beam=True)]
            search = BeamSearch(request.beam_params, sequences[0], limit, self.outputs.eos_token_ids)
            self.outputs.add(request, sequences, search=search)
        else:
            first = Sequence(self._new_seq_id(), request, 0, limit)
            others = range(1, request.params.n)
            sequences = [first, *(Sequence(self._new_seq_id(), request, index, limit, parent=first) for index in others)]
            self.outputs.add(request, sequences, wants_deltas, keeps_logprobs)
        self._num_requests += 1
        for seq in sequences:
            self.scheduler.add(seq)
        return request

    def _new_request_id(self) -> str:
        """A name that no request under way has; users choose names too."""
        names = (f"request-{number}" for number in itertools.count(self._num_requests))
        return next(name for name in names if name not in self.outputs.requests)

    def _new_seq_id(self) -> int:
        self._next_seq_id += 1
        return self._next_seq_id - 1

    def abort(self, request_id: str) -> bool:
        """End a request now, without a delta. False if it is not under way."""
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
        """Whether a request is under way or a step in flight."""
        return bool(self.outputs.requests or self._in_flight)

    @property
    def num_unfinished_requests(self) -> int:
        """Requests under way, waiting ones included."""
        return len(self.outputs.requests)

    def stats(self) -> EngineStats:
        """Totals since the start, and the present queues and pool."""
        return EngineStats(
            **vars(self._totals),
            num_waiting=len(self.scheduler.waiting),
            num_running=len(self.scheduler.running),
            num_free_blocks=self.cache_manager.num_free_blocks,
            num_blocks=self.cache_manager.block_manager.num_blocks,
            num_cached_blocks=self.cache_manager.num_cached_blocks,
            num_evicted_blocks=self.cache_manager.num_evicted_blocks,
            num_swapped=self.cache_manager.swap_space.num_sequences,
            swap_block_bytes=self.config.block_bytes if self.config.num_swap_blocks else 0,
        )

    def snapshot(self) -> StepTrace:
        """A trace of the present state, without a step."""
        return trace_step(self._totals.num_steps, SequenceGroup(()), self.cache_manager, self.scheduler)

    # The loop ---------------------------------------------------------------------------------------------------------

    def step(self) -> list[OutputDelta]:
        """Plan and launch the next step. Then read the oldest step if the pipeline is full or nothing was launched.

        Returns the deltas of the step that was read. The first call at depth 1 reads none.
        Raises ``StepError`` if a step failed; the engine is then as it was before the steps in flight.
        """
        while len(self._in_flight) > self.depth:  # a read was interrupted, and its step is still in flight
            self._read(self._in_flight.popleft())
        began = time.monotonic()
        try:
            group = self.scheduler.schedule()
        except Exception as error:
            self._roll_back()
            raise StepError(f"the scheduler failed: {describe_failure(error)}") from error
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
        """Read the steps in flight without planning another, so that the blocks of ended sequences are free."""
        while self._in_flight:
            self._read(self._in_flight.popleft())
        return self.outputs.take_deltas()

    def _launch(self, group: SequenceGroup, began: float) -> None:
        planned = time.monotonic()
        try:
            if self._checks_plans:
                check_plan(group, self.config, self.outputs.requests)
            group = group.with_changes(self.cache_manager.take_changes())
            in_flight = self.executor.launch(group)
        except BaseException as error:  # after an interrupt too, the executor may have applied half of the plan
            self._roll_back()
            if not isinstance(error, Exception):
                raise
            raise StepError(f"step {self._totals.num_steps} could not be launched: {describe_failure(error)}") from error
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
                if seq.num_preemptions == 0 and self.cache_manager.prefix_caching and seq.num_cached_tokens is not None:
                    self._totals.prefix_cache_queries += seq.num_prompt_tokens
                    self._totals.prefix_cache_hits += seq.num_cached_tokens
                seq.status = _RUNNING
                state = self.outputs.requests[seq.request.request_id]
                state.first_scheduled_s = state.first_scheduled_s or began
        launched = time.monotonic()
        if trace is not None:
            trace = dataclasses.replace(trace, launched_s=launched, schedule_s=planned - began, launch_s=launched - planned)
        self._in_flight.append(_Launched(in_flight, trace, launched, num_prefill_tokens, num_decode_tokens))
        totals = self._totals
        totals.num_steps += 1
        totals.num_prefill_tokens += num_prefill_tokens
        totals.num_decode_tokens += num_decode_tokens
        totals.num_graph_decode_tokens += in_flight.num_graph_decodes
        totals.num_preemptions += len(group.preempted)
        totals.num_copied_blocks += len(group.copied_blocks)
        totals.num_swapped_out_blocks += len(group.swapped_out)
        totals.num_swapped_in_blocks += len(group.swapped_in)
        totals.launch_s += launched - planned

    def _read(self, launched: _Launched) -> None:
        """Wait for a step and apply its result."""
        began = time.monotonic()
        group = launched.in_flight.group
        try:
            result = launched.in_flight.wait()
        except Exception as error:
            self._mark_read(group)
            self._roll_back()
            raise StepError(f"a step of {len(group)} sequences failed: {describe_failure(error)}") from error
        except BaseException:  # interrupted while waiting: the step can be read later
            self._in_flight.appendleft(launched)
            raise
        waited = time.monotonic()
        if self._learns_costs:
            self._learn_costs(launched, waited)
        self._mark_read(group)
        try:
            finished = self._apply(group, result, waited)
        except BaseException:  # sequences without their tokens compute them again
            self._roll_back()
            raise
        self.cache_manager.collect()
        if self.config.check_integrity:
            self.check_integrity()
        wait_s, output_s = waited - began, time.monotonic() - waited
        self._totals.wait_s += wait_s
        self._totals.output_s += output_s
        if launched.trace is not None:
            trace = dataclasses.replace(launched.trace, finished=finished, read_s=waited, wait_s=wait_s, output_s=output_s)
            tell_observers(self.observers, trace)

    def _learn_costs(self, launched: _Launched, read_s: float) -> None:
        """Take the time of a step that computed mostly prompts as a measure of what it costs to compute tokens again."""
        if launched.num_prefill_tokens >= max(MIN_MEASURED_TOKENS, launched.num_decode_tokens):
            num_tokens = launched.num_prefill_tokens + launched.num_decode_tokens
            seconds = read_s - max(launched.launched_s, self._last_read_s)
            self.cache_manager.swap_space.costs.learn(num_tokens, seconds)
        self._last_read_s = read_s

    def _apply(self, group: SequenceGroup, result: StepResult, now: float) -> tuple[int, ...]:
        """Add the step's tokens to its sequences. Returns the ids of the sequences that ended."""
        finished: list[int] = []
        searching: dict[str, None] = {}  # ids of requests for beam search, in order
        logprobs, of_prompts, append = result.logprobs, result.prompt_logprobs, self.outputs.append
        block_size, caches = self.config.block_size, self.cache_manager.prefix_caching
        if caches and group.swapped_in:
            self._register_swapped_in(group)
        entries = zip(group.scheduled, result.token_ids, strict=True)
        for index, ((seq, start, num_tokens, _), token_ids) in enumerate(entries):
            if seq.status is _FINISHED:
                continue  # it ended while this step was in flight: the sampled token is past the end
            if of_prompts and index in of_prompts:
                self.outputs.keep_prompt_logprobs(seq, *of_prompts[index])
            if caches and (start + num_tokens) % block_size < num_tokens and seq.status is _RUNNING:  # it filled a block
                self.cache_manager.register(seq, start, start + num_tokens)
            if token_ids and logprobs and seq.is_beam:
                self.outputs.note_candidates(seq, logprobs[index][-1])
                searching[seq.request.request_id] = None
            elif token_ids and append(seq, token_ids, logprobs.get(index, ()) if logprobs else (), now):
                finished.append(seq.seq_id)
                self._retire(seq)
            elif seq.status is _RUNNING:  # a preempted sequence keeps the tokens, but its blocks are gone
                seq.num_computed = start + num_tokens
        for request_id in searching:
            finished += self._search(self.outputs.requests[request_id], now)
        return tuple(finished)

    def _register_swapped_in(self, group: SequenceGroup) -> None:
        """Make the blocks findable that came back from the swap space with this step."""
        for seq, start, _, _ in group.scheduled:
            if seq.num_computed < start and seq.status is _RUNNING:
                self.cache_manager.register(seq, seq.num_computed, start)

    def _search(self, state: RequestState, now: float) -> list[int]:
        """Go on with a beam search after a step of some of its beams. Returns the ids of the beams that have ended."""
        search = state.search
        assert search is not None
        state.first_token_s = state.first_token_s or now
        ended = search.noted
        if search.is_complete:
            if going_on := search.choose():
                scheduler: Any = self.scheduler
                search.beams = continue_beams(going_on, ended, self.cache_manager, scheduler, self._new_seq_id)
                state.sequences[:] = search.beams
            else:
                self.outputs.end_search(state, now)
        # Where beams are missing, seats or blocks were: the others give theirs back. What goes on computes them again.
        for seq in ended:
            if not seq.is_finished:
                seq.status = _FINISHED
                self._retire(seq)
        return [seq.seq_id for seq in ended]

    def _retire(self, seq: Sequence) -> None:
        """Remove a sequence that ended. Its blocks are freed when no step in flight reads them."""
        self.scheduler.finish(seq)
        self.cache_manager.retire(seq)
        if seq.num_swapped_tokens:
            self.cache_manager.swap_space.drop(seq.seq_id)

    def _mark_read(self, group: SequenceGroup) -> None:
        for seq, _, _, samples in group.scheduled:
            seq.num_unread_steps -= 1
            seq.num_unread_tokens -= samples

    def _roll_back(self) -> None:
        """Forget all steps in flight. Each sequence returns to the state after its last read step."""
        while self._in_flight:
            launched = self._in_flight.popleft()
            try:
                launched.in_flight.wait()
            except Exception as error:  # its input comes from the step that failed
                logger.debug("a step behind the failed one failed too: %s", error)
            self._mark_read(launched.in_flight.group)
        for seq in self.scheduler.running:
            seq.num_scheduled = seq.num_computed
        for seq in self.scheduler.waiting:
            seq.num_swapped_tokens = 0
        self.cache_manager.collect()
        self.cache_manager.report_anew()  # the executor may hold unread tokens, or half of the last plan

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` if the blocks' bookkeeping contradicts itself or a step in flight lacks blocks."""
        self.cache_manager.check_integrity()
        for launched in self._in_flight:
            check_held(launched.in_flight.group, self.cache_manager)
