"""The server's options. The engine's are :class:`~pagebrain.config.PageBrainConfig`."""

import ipaddress
from dataclasses import dataclass, field

from pagebrain.errors import ConfigError

MIN_BODY_BYTES = 1024
MIN_HELD_BYTES = 2**20
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True)
class ServerOptions:
    """The server's options, checked when they are made.

    Attributes:
        host, port: address to listen on; port 0 takes a free port.
        served_model_name: the model's name for clients.
        api_key: the key that clients must send as ``Authorization: Bearer ...``; ``None``: no key is needed.
        cors_origins: origins whose web pages may use the server; ``*`` means all.
        chat_template: a Jinja template for chats; ``None`` is the tokenizer's own.
        max_body_bytes: longest body of a request.
        max_answer_bytes: longest answer in one piece, as JSON; a request whose answer could be longer is refused.
        max_held_bytes: most memory for answers in one piece, from the request to the last byte sent; and most memory for
            data of streams that clients have not received yet.
        max_queued_requests: most prompts that wait for their first token; a request may hold many prompts.
        max_queued_tokens: most tokens of these prompts, counted once for each sample.
        keep_alive_s: seconds that a connection stays open without a request.
        fair_queue: clients take turns in the queue, instead of order of arrival.
        forwarded_allow_ips: addresses or networks of proxies whose ``X-Forwarded-For`` is trusted; ``*`` means all.
        drain_s: seconds for requests under way to finish when the server is told to end.
        log_level: ``critical``, ``error``, ``warning``, ``info`` or ``debug``; ``debug`` may show text of prompts.
        log_requests: write a line for each request that ends.
        live_control: every client that may use the server may also pause and step the engine.

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
        minimums = {"max_body_bytes": MIN_BODY_BYTES, "max_answer_bytes": MIN_BODY_BYTES, "max_held_bytes": MIN_HELD_BYTES}
        for name, minimum in (minimums | {"max_queued_requests": 1, "max_queued_tokens": 1}).items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {minimum}, got {getattr(self, name)}")
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
