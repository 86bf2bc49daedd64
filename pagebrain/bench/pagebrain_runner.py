"""PageBrain as the benchmarks run it: loaded once, then any number of runs against the clock, and a closer look."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pagebrain import LLM
from pagebrain.bench.closer import look_back, look_closer
from pagebrain.bench.engine_loop import LoopRun, run_loop
from pagebrain.bench.sampled import Sampling
from pagebrain.bench.serve.load import Load
from pagebrain.bench.spec import RunResult, synchronize
from pagebrain.bench.totals import Totals
from pagebrain.bench.workload import BenchRequest

_CONFIGURATION = ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "lookahead", "cuda_graphs")


class PageBrainRunner:
    """One engine. It is ready for requests when it has been made: weights read, blocks allocated, graphs captured."""

    def __init__(self, model: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.model = dict(model)
        self.llm = LLM(**model, **settings)
        synchronize(self.llm.config.device)
        self._arrived: LoopRun | None = None

    def generate(self, requests: Sequence[BenchRequest], sampling: Sampling) -> list[Any]:
        """Serve all requests through the front door, ``LLM.generate``."""
        prompts = [list(request.prompt_token_ids) for request in requests]
        return self.llm.generate(prompts, sampling.params(requests), use_tqdm=False)

    def timed(self, requests: Sequence[BenchRequest], sampling: Sampling, request_rate: float | None = None) -> RunResult:
        """Serve all requests against the clock; with a rate, each when its time has come."""
        if request_rate is not None:
            return self._timed_loop(requests, sampling, request_rate)
        self._arrived = None
        engine = self.llm.engine
        before = Totals.of(engine.stats())
        began = time.monotonic()  # the engine's own clock
        outputs = self.generate(requests, sampling)
        elapsed = time.monotonic() - began
        return RunResult(
            elapsed_s=elapsed,
            first_token_s=[output.metrics.first_token_s - began for output in outputs],
            token_ids=[list(output.outputs[0].token_ids) for output in outputs],
            configuration=self.configuration,
            detokenization=self.detokenization,
            totals=vars(Totals.of(engine.stats()).since(before)),
        )

    def _timed_loop(self, requests: Sequence[BenchRequest], sampling: Sampling, request_rate: float) -> RunResult:
        arrivals = Load(rate=request_rate).arrivals_s(len(requests), int(self.model.get("seed", 0)))
        assert arrivals is not None
        run = run_loop(self.llm.engine, requests, sampling.params(requests), list(arrivals.values()))
        self._arrived = run
        return RunResult(
            elapsed_s=run.elapsed_s,
            first_token_s=run.first_token_s,
            token_ids=run.token_ids,
            configuration=self.configuration,
            detokenization=self.detokenization,
            totals=vars(run.totals),
        )

    def look_closer(self, requests: Sequence[BenchRequest], sampling: Sampling) -> dict[str, Any]:
        """Where the time of a decode step goes; what fails there is told, not raised.

        The requests run again for it, unless they came one by one: then the loop that added them kept a record of its steps.
        """
        engine = self.llm.engine
        try:
            if self._arrived is not None:
                return look_back(engine, self._arrived, self.model)
            return look_closer(engine, requests, sampling.params(requests), self.model)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}

    @property
    def configuration(self) -> dict[str, Any]:
        """What the engine runs with."""
        return {name: getattr(self.llm.config, name) for name in _CONFIGURATION} | {
            "weights_packed": self.llm.weights_packed
        }

    @property
    def detokenization(self) -> str:
        """Whether text is made of the tokens."""
        return "none: the model has no tokenizer" if self.llm.tokenizer is None else "each token as it comes, in the clock"
