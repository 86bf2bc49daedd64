"""One line of JSON for each finished request: who, how much, how long, how it ended; nothing of what was asked or answered.

:class:`RequestLog` is told by the :class:`~pagebrain.server.link.client.EngineClient` when a request ends. Where its lines
go is the logging configuration's matter, see :mod:`pagebrain.server.logs`.
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
"""Longer names of users are cut."""

LOGGED_PARAMS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("max_tokens", "min_tokens", "ignore_eos", "seed", "logprobs", "prompt_logprobs"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)
"""Sampling parameters that are logged if they are not the default. Stop strings, stop tokens and biases are not: they are
made of text, and may be parts of a prompt."""

_DEFAULTS = {field.name: field.default for field in fields(SamplingParams) if field.name in LOGGED_PARAMS}


class RequestLog:
    """An observer of the engine client's that logs every request that ends.

    Args:
        logger: gets the lines, at level INFO.
        clock: ``time.monotonic``, by which the engine client notes when things happen.
    """

    def __init__(self, logger: logging.Logger | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logging.getLogger(REQUEST_LOGGER) if logger is None else logger
        self._clock = clock

    def on_step(self, stats: EngineStats) -> None:
        """Steps are not logged."""

    def on_first_token(self, request: "RequestStream", seconds: float) -> None:
        """Nothing: the line at the end says it."""

    def on_tokens(self, num_tokens: int, gaps_s: list[float]) -> None:
        """Tokens are not logged."""

    def on_finished(self, request: "RequestStream", outcome: str) -> None:
        """Write the line."""
        self._logger.info("%s", json.dumps(self.entry(request, outcome), allow_nan=False))

    def entry(self, request: "RequestStream", outcome: str) -> dict[str, Any]:
        """What the line says. Times are seconds; ``null`` stands for what never happened.

        ``queue_s`` lasts from its arrival until the first step that the request took part in, ``ttft_s`` until its first
        token, ``e2e_s`` until now.
        """
        times = request.metrics
        scheduled_s = None if times is None else times.first_scheduled_s
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": request.request_id,
            "user": None if request.user is None else request.user[:MAX_USER_CHARACTERS],
            "outcome": outcome,
            "prompt_tokens": request.num_prompt_tokens,
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
