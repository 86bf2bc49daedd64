"""Observers of the server: metrics and the request log."""

import logging
from collections.abc import Callable
from typing import Protocol

from pagebrain.engine.trace import EngineStats
from pagebrain.server.link.streams import RequestStream

logger = logging.getLogger(__name__)


class ServerObserver(Protocol):
    """What the server calls on an observer. All calls are on the event loop and must be quick."""

    def on_step(self, stats: EngineStats) -> None:
        """The engine has stepped, or its queue has changed."""

    def on_first_token(self, request: RequestStream, seconds: float) -> None:
        """A request's first token came ``seconds`` after the request."""

    def on_tokens(self, num_tokens: int, gaps_s: list[float]) -> None:
        """Tokens came with a message. ``gaps_s`` are the times since the token before, without a sample's first token."""

    def on_finished(self, request: RequestStream, outcome: str) -> None:
        """A request ended; ``outcome`` is ``stop``, ``length``, ``abort`` or ``error``."""


class Observers(list[ServerObserver]):
    """The observers. One that fails is removed: tokens must reach their requests."""

    def tell(self, news: Callable[[ServerObserver], None]) -> None:
        """Call ``news`` with each observer."""
        for observer in list(self):
            try:
                news(observer)
            except Exception:
                logger.exception("an observer failed and is not called again")
                self.remove(observer)
