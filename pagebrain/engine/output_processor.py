"""From sampled tokens to outputs: stop rules, text, log-probabilities, deltas, and the output at the end.

The :class:`OutputProcessor` holds the requests under way. It adds tokens to a sequence and notes how the sequence ended. It
does not touch queues and blocks.
"""

from dataclasses import dataclass, field

from pagebrain.engine.beam_search import BeamSearch, EndedBeam
from pagebrain.engine.detokenizer import Detokenizer, TextStream
from pagebrain.engine.sequence import Request, Sequence, SequenceStatus
from pagebrain.outputs import CompletionOutput, OutputDelta, RequestMetrics, RequestOutput, TokenLogprobs
from pagebrain.sampling_params import SamplingParams

_FINISHED = SequenceStatus.FINISHED  # looked up once, not for every token


@dataclass
class RequestState:
    """A request under way: its sequences, their text, and its times. ``stop_ids`` are the tokens that end a sequence.

    With ``search`` it is a request for beam search, and ``sequences`` are its present beams.
    """

    request: Request
    sequences: list[Sequence]
    streams: list[TextStream | None]
    stop_ids: frozenset[int] = frozenset()
    wants_deltas: bool = True
    keeps_logprobs: bool = True
    search: BeamSearch | None = None
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    stream_of: dict[int, TextStream | None] = field(init=False)
    only_scores: bool = field(init=False)

    def __post_init__(self) -> None:
        self.only_scores = self.request.params.max_tokens == 0
        self.stream_of = {seq.seq_id: stream for seq, stream in zip(self.sequences, self.streams)}

    @property
    def is_finished(self) -> bool:
        """Whether all samples have ended."""
        return all(seq.is_finished for seq in self.sequences)

    def output(self) -> RequestOutput:
        """The request with the tokens that it has now."""
        wants_prompt_logprobs = self.keeps_logprobs and self.request.params.prompt_logprobs is not None
        completions = tuple(self._completion(seq, stream) for seq, stream in zip(self.sequences, self.streams))
        return self.output_of(
            completions,
            self.is_finished,
            sum(seq.num_preemptions for seq in self.sequences),
            self.sequences[0].num_cached_tokens,
            tuple(self.sequences[0].prompt_logprobs) if wants_prompt_logprobs else None,
        )

    def output_of(
        self,
        completions: tuple[CompletionOutput, ...],
        finished: bool,
        num_preemptions: int,
        num_cached_tokens: int | None,
        prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None,
    ) -> RequestOutput:
        """An output of this request with these completions."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=completions,
            finished=finished,
            metrics=RequestMetrics(
                arrival_s=self.request.arrival_s,
                first_scheduled_s=self.first_scheduled_s,
                first_token_s=self.first_token_s,
                finished_s=self.finished_s,
                num_preemptions=num_preemptions,
                num_cached_tokens=num_cached_tokens,
            ),
            prompt_logprobs=prompt_logprobs,
        )

    def _completion(self, seq: Sequence, stream: TextStream | None) -> CompletionOutput:
        wants_logprobs = self.keeps_logprobs and seq.params.logprobs is not None
        return CompletionOutput(
            index=seq.sample_index,
            text="" if stream is None else stream.text,
            token_ids=tuple(seq.output_token_ids),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            cumulative_logprob=sum(entry.logprob for entry in seq.logprobs) if wants_logprobs else None,
            logprobs=tuple(seq.logprobs) if wants_logprobs else None,
        )


class OutputProcessor:
    """Adds tokens to sequences and makes deltas of them.

    Args:
        detokenizer: token ids to text; ``None`` leaves texts empty.
        eos_token_ids: tokens that end a sequence unless its request ignores them.

    Attributes:
        requests: the requests under way, by id.
    """

    def __init__(self, detokenizer: Detokenizer | None, eos_token_ids: frozenset[int]) -> None:
        self.detokenizer = detokenizer
        self.eos_token_ids = eos_token_ids
        self.requests: dict[str, RequestState] = {}
        self._deltas: list[OutputDelta] = []

    def add(
        self,
        request: Request,
        sequences: list[Sequence],
        wants_deltas: bool = True,
        keeps_logprobs: bool = True,
        search: BeamSearch | None = None,
    ) -> None:
        """Take a new request. See :meth:`pagebrain.engine.engine.Engine.add_request` for the two switches."""
        params = request.params
        streams = [None if self.detokenizer is None else self.detokenizer.stream(params) for _ in sequences]
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        if params.prompt_logprobs is not None:  # only sample 0 has them; the first token has none
            sequences[0].prompt_logprobs.append(None)
        self.requests[request.request_id] = RequestState(
            request, sequences, streams, stop_ids, wants_deltas, keeps_logprobs, search
        )

    def append(self, seq: Sequence, token_ids: tuple[int, ...], scores: tuple[TokenLogprobs, ...], now: float) -> bool:
        """Add sampled tokens up to the one that ends the sequence, and keep the delta. Returns whether the sequence ended.

        ``scores`` is empty or has an entry for each token. ``now`` is when the tokens arrived.
        """
        request_id = seq.request.request_id
        state = self.requests[request_id]
        stream = state.stream_of[seq.seq_id]
        all_ids = seq.token_ids
        num_before = len(all_ids)
        text = ""
        if state.only_scores:  # the token sampled at the end of the prompt is dropped
            token_ids, scores = (), ()
            seq.finish("length")
        for token_id in token_ids:
            is_stop_token = token_id in state.stop_ids and _may_stop(seq)
            if stream is not None and (not is_stop_token or seq.params.include_stop_str_in_output):
                text += stream.append(token_id)
            all_ids.append(token_id)
            if is_stop_token:
                seq.finish("stop", token_id if token_id in seq.params.stop_token_ids else None)
                break
            if stream is not None and stream.stopped_by is not None:
                seq.finish("stop", stream.stopped_by)
                break
            if len(all_ids) >= seq.max_num_tokens:
                seq.finish("length")
                break
        has_ended = seq.status is _FINISHED
        if has_ended:
            num_kept = len(all_ids) - num_before
            token_ids, scores = token_ids[:num_kept], scores[:num_kept]
            text += "" if stream is None else stream.finish()
        if scores and state.keeps_logprobs:
            seq.logprobs.extend(scores)
        if state.first_token_s is None:
            state.first_token_s = now
        request_ended = has_ended and state.is_finished
        if request_ended:
            state.finished_s = now
            del self.requests[request_id]
        if state.wants_deltas or request_ended:
            output = state.output() if request_ended else None
            of_prompt = seq.prompt_logprobs
            delta = OutputDelta(
                request_id,
                seq.sample_index,
                text,
                token_ids,
                scores,
                seq.finish_reason,
                seq.stop_reason,
                tuple(of_prompt) if of_prompt and num_before == seq.num_prompt_tokens else None,
                None if output is None else output.metrics,
                output,
            )
            self._deltas.append(delta)
        if seq.prompt_logprobs and not state.keeps_logprobs:
            seq.prompt_logprobs.clear()  # the first delta holds them
        return has_ended

    def note_candidates(self, beam: Sequence, scores: TokenLogprobs) -> None:
        """Give a beam's most probable next tokens to its search."""
        search = self.requests[beam.request.request_id].search
        assert search is not None
        search.note(beam, scores)

    def end_search(self, state: RequestState, now: float) -> None:
        """End a beam search, and keep one delta for each output, best first. The last one ends the request."""
        search, params, request_id = state.search, state.request.params, state.request.request_id
        assert search is not None
        completions = tuple(
            CompletionOutput(
                index,
                self._text_of(ended, params),
                ended.token_ids,
                ended.finish_reason,
                cumulative_logprob=ended.logprob,
                score=ended.score,
            )
            for index, ended in enumerate(search.ended)
        )
        state.finished_s = now
        del self.requests[request_id]
        output = state.output_of(completions, True, search.num_preemptions, search.num_cached_tokens)
        for sample in completions:
            is_last = sample.index == len(completions) - 1
            self._deltas.append(
                OutputDelta(
                    request_id,
                    sample.index,
                    sample.text,
                    sample.token_ids,
                    finish_reason=sample.finish_reason,
                    metrics=output.metrics if is_last else None,
                    finished=output if is_last else None,
                )
            )

    def _text_of(self, ended: EndedBeam, params: SamplingParams) -> str:
        """The text of an output of beam search. As for samples, that of the token which ended it is left out."""
        if self.detokenizer is None:
            return ""
        stream = self.detokenizer.stream(params)
        has_stop_token = ended.finish_reason == "stop" and not params.include_stop_str_in_output
        for token_id in ended.token_ids[:-1] if has_stop_token else ended.token_ids:
            stream.append(token_id)
        stream.finish()
        return stream.text

    def keep_prompt_logprobs(self, seq: Sequence, first_position: int, scores: tuple[TokenLogprobs, ...]) -> None:
        """Keep the scores that are new: after a preemption the prompt is computed and scored again."""
        known = len(seq.prompt_logprobs)
        seq.prompt_logprobs.extend(scores[max(0, known - first_position) :])

    def take_deltas(self) -> list[OutputDelta]:
        """The deltas since the last call."""
        deltas, self._deltas = self._deltas, []
        return deltas


def _may_stop(seq: Sequence) -> bool:
    """Whether the next token of ``seq`` may end it."""
    return len(seq.token_ids) + 1 - seq.num_prompt_tokens >= seq.params.min_tokens
