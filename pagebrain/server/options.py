"""What shapes the server, as :class:`~pagebrain.config.PageBrainConfig` shapes the engine.

Frozen, and checked when it is made, so that the server trusts it.
"""

import ipaddress
from dataclasses import dataclass, field

from pagebrain.errors import ConfigError

MIN_BODY_BYTES = 1024
MIN_HELD_BYTES = 2**20
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True)
class ServerOptions:
    """How the server behaves.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        served_model_name: what clients call the model.
        api_key: what clients must send as ``Authorization: Bearer ...``; ``None`` lets everybody in.
        cors_origins: web pages from these origins may use the server; ``*`` is all.
        chat_template: a Jinja template for chats; ``None`` is the tokenizer's own.
        max_body_bytes: longest body of a request.
        max_answer_bytes: longest answer in one piece, as JSON; one that would be longer is refused.
        max_held_bytes: most of answers in one piece that is held, from their requests to their last bytes; and most that
            may wait for readers of streams.
        max_queued_requests: most prompts that wait for their first token at a time; a request may hold many.
        max_queued_tokens: most prompt tokens that wait so, each sample counted.
        keep_alive_s: seconds that a connection stays open without a request.
        fair_queue: clients take turns in the queue, instead of being served in order of arrival.
        forwarded_allow_ips: addresses or networks of proxies whose ``X-Forwarded-For`` is believed; ``*`` is all.
        drain_s: seconds that requests under way have to finish when the server is told to end.
        log_level: ``critical``, ``error``, ``warning``, ``info`` or ``debug``; the last may show what is in prompts.
        log_requests: write a line for each request that ends.
        live_control: whoever may use the server may also pause and step the engine.

    Raises:
        ConfigError: naming the option, what was got and what was expected.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str = "storyteller"
    api_key: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    max_body_bytes: int = 4 * 2**20
    max_answer_bytes: int = 64 * 2**20
    max_held_bytes: int = 128 * 2**20
    max_queued_requests: int = 1024
    max_queued_tokens: int = 262_144
    keep_alive_s: float = 180.0
    fair_queue: bool = False
    forwarded_allow_ips: tuple[str, ...] = ()
    drain_s: float = 30.0
    log_level: str = "info"
    log_requests: bool = False
    live_control: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, got {self.port}")
        if not self.served_model_name.strip():
            raise ConfigError("--served-model-name must not be empty")
        if self.api_key is not None and (not self.api_key or self.api_key.split() != [self.api_key]):
            raise ConfigError("--api-key must not be empty or hold white space: clients could not send it")
        for origin in self.cors_origins:
            if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.count("/") != 2):
                raise ConfigError(f"--cors-origin must look like https://example.org, or be *; got {origin!r}")
        for proxy in self.forwarded_allow_ips:
            if proxy != "*" and not _is_network(proxy):
                raise ConfigError(f"--forwarded-allow-ips must be addresses or networks, or *; got {proxy!r}")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"--log-level must be one of {', '.join(LOG_LEVELS)}; got {self.log_level!r}")
        if self.max_body_bytes < MIN_BODY_BYTES:
            raise ConfigError(f"--max-body-bytes must be at least {MIN_BODY_BYTES}, got {self.max_body_bytes}")
        if self.max_answer_bytes < MIN_BODY_BYTES:
            raise ConfigError(f"--max-answer-bytes must be at least {MIN_BODY_BYTES}, got {self.max_answer_bytes}")
        if self.max_held_bytes < MIN_HELD_BYTES:
            raise ConfigError(f"--max-held-bytes must be at least {MIN_HELD_BYTES}, got {self.max_held_bytes}")
        for name in ("max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.keep_alive_s < float("inf"):
            raise ConfigError(f"--keep-alive-seconds must be more than 0 and finite, got {self.keep_alive_s}")
        if not 0 <= self.drain_s < float("inf"):
            raise ConfigError(f"--drain-seconds must be at least 0 and finite, got {self.drain_s}")


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True
