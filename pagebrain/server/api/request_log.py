"""One line of JSON for each finished request: user, counts of tokens, times and outcome. It holds no text of the request.

:class:`RequestLog` is an observer of :class:`~pagebrain.server.link.client.EngineClient`. The destination of its lines is
configured in :mod:`pagebrain.server.logs`.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from pagebrain.engine.trace import EngineStats
from pagebrain.sampling_params import SamplingParams
from pagebrain.server.logs import REQUEST_LOGGER

if TYPE_CHECKING:
    from pagebrain.server.link.streams import RequestStream

MAX_USER_CHARACTERS = 256
"""A longer ``user`` is cut."""

LOGGED_PARAMS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("max_tokens", "min_tokens", "ignore_eos", "seed", "logprobs", "prompt_logprobs"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)
"""Sampling parameters that are logged if they differ from the default. Stop strings, stop tokens and biases are left out:
they may repeat text of a prompt."""

_DEFAULTS = {field.name: field.default for field in fields(SamplingParams) if field.name in LOGGED_PARAMS}


class RequestLog:
    """An observer of the engine client that logs every request that ends.

    Args:
        logger: gets the lines, at level INFO.
        clock: the clock of the engine client's times.
    """

    def __init__(self, logger: logging.Logger | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logging.getLogger(REQUEST_LOGGER) if logger is None else logger
        self._clock = clock

    def on_step(self, stats: EngineStats) -> None:
        """Steps are not logged."""

    def on_first_token(self, request: "RequestStream", seconds: float) -> None:
        """Not logged here; the line at the end has the time."""

    def on_tokens(self, num_tokens: int, gaps_s: list[float]) -> None:
        """Tokens are not logged."""

    def on_finished(self, request: "RequestStream", outcome: str) -> None:
        """Write the line."""
        self._logger.info("%s", json.dumps(self.entry(request, outcome), allow_nan=False))

    def entry(self, request: "RequestStream", outcome: str) -> dict[str, Any]:
        """The line's values. Times are seconds since the request's arrival; ``None`` if the event never happened.

        ``queue_s``: until the request's first step. ``ttft_s``: until its first token. ``e2e_s``: until now.
        """
        times = request.metrics
        scheduled_s = None if times is None else times.first_scheduled_s
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": request.request_id,
            "user": None if request.user is None else request.user[:MAX_USER_CHARACTERS],
            "outcome": outcome,
            "prompt_tokens": request.num_prompt_tokens,
            "cached_tokens": None if times is None else times.num_cached_tokens,
            "generated_tokens": request.num_generated,
            "queue_s": _since(request.arrival_s, scheduled_s),
            "ttft_s": _since(request.arrival_s, request.first_token_s),
            "e2e_s": _since(request.arrival_s, self._clock()),
            "preemptions": None if times is None else times.num_preemptions,
            "params": {
                name: getattr(request.params, name)
                for name, default in _DEFAULTS.items()
                if getattr(request.params, name) != default
            },
        }


def _since(start_s: float, end_s: float | None) -> float | None:
    return None if end_s is None else round(max(0.0, end_s - start_s), 6)
