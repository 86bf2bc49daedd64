"""``LLM(...).generate(prompts, params)``: offline generation with vLLM's interface."""

import contextlib
import os
from collections.abc import Generator
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from pagebrain.build import build_engine
from pagebrain.config import PageBrainConfig, with_own_names
from pagebrain.engine.engine import Engine
from pagebrain.engine.requests import Prompt
from pagebrain.errors import ConfigError, InvalidRequestError, StepError
from pagebrain.outputs import BeamSearchOutput, BeamSearchSequence, OutputDelta, RequestOutput
from pagebrain.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase


class LLM:
    """A model and its engine, for offline generation. Use it from one thread only.

    Args:
        model: hub name or folder of a GPT-2; ``None`` is the bundled model. Or a ``GPT2LMHeadModel``, whose weights are
            shared and not changed. On a GPU, do not change or move these weights while this LLM is in use: the head is
            copied, and CUDA graphs hold the addresses of the others.
        tokenizer: hub name or folder, or a tokenizer; ``None`` is the model's own.
        settings: any other field of :class:`~pagebrain.config.PageBrainConfig`, also by the names of
            :func:`~pagebrain.config.with_own_names`.

    Raises:
        ConfigError, ModelLoadError, PartError: where possible before anything large is allocated.
    """

    def __init__(
        self,
        model: "str | os.PathLike[str] | GPT2LMHeadModel | None" = None,
        tokenizer: "str | os.PathLike[str] | PreTrainedTokenizerBase | None" = None,
        **settings: Any,
    ) -> None:
        base: Any = model if isinstance(model, nn.Module) else None
        name = None if model is None or isinstance(model, nn.Module) else os.fspath(model)
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer_name, tokenizer_object = os.fspath(tokenizer), None
        else:
            tokenizer_name, tokenizer_object = None, tokenizer
        if base is not None and not hasattr(base, "config"):
            raise ConfigError(f"model is a {type(base).__name__}: give the name of a model, or a GPT2LMHeadModel")
        if base is not None:  # what suits a device is decided before the engine is built
            settings = {"device": str(next(base.parameters()).device)} | settings
        config = PageBrainConfig(model=name, tokenizer=tokenizer_name, **with_own_names(settings))
        built = build_engine(config, base, tokenizer_object)
        self.engine: Engine = built.engine
        self.config = built.config
        self.tokenizer = built.tokenizer
        self.notices = built.notices
        self.weights_packed = built.weights_packed
        self._mail: dict[str, list[OutputDelta]] = {}
        self._has_mail: set[str] = set()

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for one or many prompts and return the outputs in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one for each; ``None`` is ``SamplingParams()``.
            use_tqdm: show a progress bar on standard error.

        Raises:
            InvalidRequestError: for the first prompt that cannot be served; then no prompt was started.
        """
        return self._run(self._add(prompts, params, wants_deltas=False), use_tqdm)

    def _run(self, ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        """The outputs of these requests, in order."""
        outputs: dict[str, RequestOutput] = {}
        with _progress(use_tqdm) as progress:
            task = progress.add_task("Generating", total=len(ids))
            for delta in self._drive(ids):
                if delta.finished is not None:
                    outputs[delta.request_id] = delta.finished
                    progress.update(task, completed=len(outputs))
        return [outputs[request_id] for request_id in ids]

    def beam_search(
        self, prompts: Prompt | SequenceOf[Prompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """Find the most probable outputs of one or many prompts. Returns them in the order of the prompts.

        Beams share the blocks of the tokens that they share. All prompts are searched in one batch.

        Raises:
            InvalidRequestError: for the first prompt that cannot be served; then no search was started.
        """
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError(f"params must be BeamSearchParams, got {params!r}")
        outputs = self._run(self._add(prompts, params, wants_deltas=False), use_tqdm)
        return [
            BeamSearchOutput(
                tuple(
                    BeamSearchSequence(
                        tokens=output.prompt_token_ids + found.token_ids,
                        text=found.text,
                        cum_logprob=found.cumulative_logprob or 0.0,
                        score=found.score or 0.0,
                        finish_reason=found.finish_reason or "length",
                    )
                    for found in output.outputs
                )
            )
            for output in outputs
        ]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[OutputDelta, None, None]:
        """Generate for one prompt and yield what each step adds. Closing the generator early aborts the request.

        The first ``next`` raises ``InvalidRequestError`` if the prompt cannot be served.
        """
        yield from self._drive(self._add([prompt], params, wants_deltas=True))

    def _drive(self, ids: list[str]) -> Generator[OutputDelta, None, None]:
        """Step the engine until these requests are done. If that is interrupted, the others are aborted."""
        under_way = set(ids)
        self._mail.update((request_id, []) for request_id in ids)
        try:
            while under_way:
                ready = [request_id for request_id in ids if request_id in self._has_mail] if self._has_mail else []
                if not ready:
                    self._step()
                for request_id in ready:
                    deltas, self._mail[request_id] = self._mail[request_id], []
                    self._has_mail.discard(request_id)
                    for delta in deltas:
                        if delta.finished is not None:
                            under_way.discard(request_id)
                        yield delta
        finally:
            for request_id in ids:
                del self._mail[request_id]
                self._has_mail.discard(request_id)
                if request_id in under_way:
                    self.engine.abort(request_id)
            if not self.engine.num_unfinished_requests:
                with contextlib.suppress(StepError):  # the requests of a failing step have ended
                    self.engine.drain()

    def _step(self) -> None:
        """One engine step. Deltas are kept for each request, because several streams may be read in turn."""
        for delta in self.engine.step():
            if delta.request_id in self._mail:
                self._mail[delta.request_id].append(delta)
                self._has_mail.add(delta.request_id)

    def _add(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: SamplingParams | BeamSearchParams | SequenceOf[SamplingParams] | None,
        wants_deltas: bool,
    ) -> list[str]:
        batch = _as_batch(prompts)
        each: list[SamplingParams | BeamSearchParams]
        if params is None or isinstance(params, (SamplingParams, BeamSearchParams)):
            each = [params or SamplingParams()] * len(batch)
        else:
            each = list(params)
            if len(each) != len(batch):
                raise InvalidRequestError(
                    f"{len(batch)} prompts need as many SamplingParams, or one for all; got {len(each)}"
                )
        ids: list[str] = []
        try:
            for index, (prompt, wanted) in enumerate(zip(batch, each)):
                try:
                    ids.append(self.engine.add_request(prompt, wanted, wants_deltas=wants_deltas).request_id)
                except InvalidRequestError as error:
                    where = f"prompt {index}: " if len(batch) > 1 else ""
                    raise InvalidRequestError(f"{where}{error}") from None
        except BaseException:
            for request_id in ids:
                self.engine.abort(request_id)
            raise
        return ids


def _as_batch(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    """A list of prompts from a text, token ids, or a list of those."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, SequenceOf) or isinstance(prompts, (bytes, bytearray)):
        raise InvalidRequestError(f"prompts must be a string, token ids or a list of these, got {type(prompts).__name__}")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [list(prompts)]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]


def _progress(visible: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not visible, transient=True)
