"""The waiting queue of ``--fair-queue``: clients take turns, so that one with many requests does not hold up the others.

It lies in the engine's process, in front of the engine. The engine is given only what its next step can start; what waits
here can still be overtaken. In the engine everything is in order of arrival, so a preempted sequence still resumes first.
"""

import dataclasses

from pagebrain.engine.engine import Engine
from pagebrain.engine.requests import request_seed
from pagebrain.server.link.messages import Submit


class FairQueue:
    """Requests by client. Each turn takes the oldest request of the client whose last turn is longest ago.

    Attributes:
        num_sequences: samples of all requests that wait here.
    """

    def __init__(self, engine_seed: int) -> None:
        self.num_sequences = 0
        self._engine_seed = engine_seed
        self._num_arrived = 0
        self._by_source: dict[str, dict[str, Submit]] = {}  # source -> request id -> request; the first source is next

    def __bool__(self) -> bool:
        return bool(self._by_source)

    def put(self, request: Submit, source: str) -> None:
        """Queue a request.

        One without a seed gets the one that the engine would give it if it came now: its answer must not depend on how
        long others hold it up.
        """
        seed = request_seed(request.params, self._engine_seed, self._num_arrived)
        self._num_arrived += 1
        request = dataclasses.replace(request, params=dataclasses.replace(request.params, seed=seed))
        self._by_source.setdefault(source, {})[request.request_id] = request
        self.num_sequences += request.params.n

    def remove(self, request_id: str) -> None:
        """Forget a request, if it waits here."""
        for source, requests in self._by_source.items():
            if (request := requests.pop(request_id, None)) is not None:
                self.num_sequences -= request.params.n
                if not requests:
                    del self._by_source[source]
                return

    def take(self, engine: Engine) -> Submit | None:
        """The next request, if the engine can start it with its next step, or has nothing else to do."""
        if not self._by_source:
            return None
        source, requests = next(iter(self._by_source.items()))
        request = next(iter(requests.values()))
        if engine.has_unfinished_requests and not _can_start(engine, request):
            return None
        del self._by_source[source], requests[request.request_id]
        if requests:
            self._by_source[source] = requests  # as the last one
        self.num_sequences -= request.params.n
        return request


def _can_start(engine: Engine, request: Submit) -> bool:
    """Whether seats, blocks and the step's budget of tokens are left for a request, beside what waits in the engine."""
    config, waiting = engine.config, engine.scheduler.waiting
    num_seats = config.max_num_seqs - len(engine.scheduler.running) - len(waiting)
    num_tokens = config.max_num_batched_tokens - sum(seq.num_unscheduled for seq in waiting)
    num_blocks = engine.cache_manager.num_free_blocks - sum(config.blocks_for(seq.num_tokens) for seq in waiting)
    needed = config.blocks_for(len(request.prompt_token_ids)) * request.params.n
    return num_seats > 0 and num_tokens > 0 and num_blocks >= needed
