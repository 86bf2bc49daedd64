"""Who counts what the server does: metrics, the request log, and whoever else is interested."""

import logging
from collections.abc import Callable
from typing import Protocol

from pagebrain.engine.trace import EngineStats
from pagebrain.server.link.streams import RequestStream

logger = logging.getLogger(__name__)


class ServerObserver(Protocol):
    """Who counts what happens. Everything is called on the event loop, and must be quick."""

    def on_step(self, stats: EngineStats) -> None:
        """The engine has stepped, or what waits in it has changed."""

    def on_first_token(self, request: RequestStream, seconds: float) -> None:
        """A request's first token came, so long after the request."""

    def on_tokens(self, num_tokens: int, gaps_s: list[float]) -> None:
        """Tokens came with a message of the engine's; each but a sample's first came so long after the one before it."""

    def on_finished(self, request: RequestStream, outcome: str) -> None:
        """A request is over: ``stop``, ``length``, ``abort`` or ``error``."""


class Observers(list[ServerObserver]):
    """Those who are told. One that fails is told nothing more: tokens must reach their request whatever a watcher does."""

    def tell(self, news: Callable[[ServerObserver], None]) -> None:
        """Tell each of them."""
        for observer in list(self):
            try:
                news(observer)
            except Exception:
                logger.exception("an observer failed and is not called again")
                self.remove(observer)
