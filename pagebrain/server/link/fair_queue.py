"""The waiting queue of ``--fair-queue``: clients take turns, so that a client with many requests does not delay the others.

The queue is in the engine's process, in front of the engine. The engine gets only the requests that its next step can start;
the order of the others can still change. The engine serves its requests in order of arrival, so a preempted sequence resumes
first.
"""

import dataclasses

from pagebrain.engine.engine import Engine
from pagebrain.engine.requests import request_seed
from pagebrain.server.link.messages import Submit


class FairQueue:
    """Requests by client. Each turn takes the oldest request of the client whose last turn is longest ago.

    Attributes:
        num_sequences: samples of all requests in the queue.
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

        A request without a seed gets its seed now, as the engine would choose it: the answer must not depend on the turns.
        """
        seed = request_seed(request.params, self._engine_seed, self._num_arrived)
        self._num_arrived += 1
        request = dataclasses.replace(request, params=dataclasses.replace(request.params, seed=seed))
        self._by_source.setdefault(source, {})[request.request_id] = request
        self.num_sequences += request.params.n

    def remove(self, request_id: str) -> None:
        """Remove a request, if it is in the queue."""
        for source, requests in self._by_source.items():
            if (request := requests.pop(request_id, None)) is not None:
                self.num_sequences -= request.params.n
                if not requests:
                    del self._by_source[source]
                return

    def take(self, engine: Engine) -> Submit | None:
        """Take the next request, if the engine can start it with its next step or has no other request."""
        if not self._by_source:
            return None
        source, requests = next(iter(self._by_source.items()))
        request = next(iter(requests.values()))
        if engine.has_unfinished_requests and not _can_start(engine, request):
            return None
        del self._by_source[source], requests[request.request_id]
        if requests:
            self._by_source[source] = requests  # at the end: its next turn is the last
        self.num_sequences -= request.params.n
        return request


def _can_start(engine: Engine, request: Submit) -> bool:
    """Whether the engine has a seat, blocks and tokens of the step's budget for a request, beside its waiting sequences."""
    config, waiting = engine.config, engine.scheduler.waiting
    num_seats = config.max_num_seqs - len(engine.scheduler.running) - len(waiting)
    num_tokens = config.max_num_batched_tokens - sum(seq.num_unscheduled for seq in waiting)
    num_blocks = engine.cache_manager.num_free_blocks - sum(config.blocks_for(seq.num_tokens) for seq in waiting)
    needed = config.blocks_for(len(request.prompt_token_ids)) * request.params.n
    return num_seats > 0 and num_tokens > 0 and num_blocks >= needed
