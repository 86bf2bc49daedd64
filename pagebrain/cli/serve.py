"""``pagebrain serve``: an OpenAI-compatible HTTP server."""

import argparse
import os
from pathlib import Path
from typing import Any

from pagebrain.cli import arguments
from pagebrain.errors import ConfigError

API_KEY_VARIABLE = "PAGEBRAIN_API_KEY"

_SERVER_FIELDS = (
    *("host", "port", "cors_origins", "forwarded_allow_ips", "keep_alive_s", "drain_s", "log_level", "log_requests"),
    *("max_body_bytes", "max_answer_bytes", "max_held_bytes", "max_queued_requests", "max_queued_tokens"),
    *("fair_queue", "live_control"),
)
"""Fields of ``ServerOptions`` that are options under the same name; the others need more than their value."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.usage = "pagebrain serve [options]"
    group = parser.add_argument_group("server", argument_default=argparse.SUPPRESS)
    group.add_argument("--host", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1, this machine only)")
    group.add_argument("--port", type=int, metavar="N", help="0 takes a free one (default: 8000)")
    group.add_argument("--served-model-name", metavar="NAME", help="name of the model in the API (default: its own name)")
    group.add_argument("--api-key", metavar="KEY", help=f"key that requests need (default: ${API_KEY_VARIABLE}, if set)")
    more: dict[str, Any] = {"action": "append", "dest": "cors_origins", "metavar": "URL"}
    group.add_argument("--cors-origin", **more, help="origin of web pages that may use the server; repeatable")
    group.add_argument("--chat-template", metavar="FILE", help="a Jinja template for chats (default: the tokenizer's own)")
    more = {"type": float, "metavar": "S"}
    group.add_argument("--drain-seconds", **more, dest="drain_s", help="time to finish requests at the end (default: 30)")
    idle = "time that a connection may be idle (default: 180)"
    group.add_argument("--keep-alive-seconds", **more, dest="keep_alive_s", help=idle)
    group.add_argument("--log-level", metavar="LEVEL", help="debug may show parts of prompts (default: info)")
    group.add_argument("--log-requests", action="store_true", help="write a line for each request that ends, without texts")
    group.add_argument("--live-control", action="store_true", help="let /live pause and step the engine")

    group = parser.add_argument_group("limits", argument_default=argparse.SUPPRESS)
    group.add_argument("--max-body-bytes", type=int, metavar="N", help="longest body of a request (default: 4 MiB)")
    group.add_argument("--max-answer-bytes", type=int, metavar="N", help="longest answer in one piece (default: 64 MiB)")
    group.add_argument("--max-held-bytes", type=int, metavar="N", help="most bytes of all such answers (default: 128 MiB)")
    group.add_argument(
        "--max-queued-requests", type=int, metavar="N", help="most prompts that wait for their first token (default: 1024)"
    )
    group.add_argument(
        "--max-queued-tokens", type=int, metavar="N", help="most tokens of these prompts together (default: 262144)"
    )
    group.add_argument("--fair-queue", action="store_true", help="clients take turns in the queue (default: as they arrive)")
    group.add_argument(
        "--forwarded-allow-ips",
        action="append",
        metavar="ADDRESS",
        help="a proxy whose X-Forwarded-For header is used (default: no proxy); repeatable",
    )
    arguments.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal. All checks that need no model come first."""
    parent = os.getppid()  # before the imports: they take seconds, and the parent may end meanwhile
    from pagebrain.config import PageBrainConfig
    from pagebrain.server.options import ServerOptions

    config = PageBrainConfig(**arguments.engine_settings(args))
    server = ServerOptions(**server_settings(args, config.model))

    from pagebrain.server.run import serve

    return serve(config, server, parent)


def server_settings(args: argparse.Namespace, model: str | None) -> dict[str, Any]:
    """Keyword arguments for ``ServerOptions``. Raises ``ConfigError`` for a chat template that cannot be read."""
    given = {name: value for name, value in vars(args).items() if name in _SERVER_FIELDS}
    given |= {name: tuple(given[name]) for name in ("cors_origins", "forwarded_allow_ips") if name in given}
    name = getattr(args, "served_model_name", model)
    if name is not None:
        given["served_model_name"] = name
    api_key = getattr(args, "api_key", os.environ.get(API_KEY_VARIABLE))
    if api_key or "api_key" in args:
        given["api_key"] = api_key
    if "chat_template" in args:
        given["chat_template"] = _read_template(Path(args.chat_template))
    return given


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"--chat-template {path} cannot be read: {reason}") from error
    if not text.strip():
        raise ConfigError(f"--chat-template {path} is empty: name a file that holds a Jinja template")
    from pagebrain.server.api.templates import template_mistake

    mistake = template_mistake(text)  # checked now, because otherwise every chat would fail
    if mistake is not None:
        raise ConfigError(f"--chat-template {path} is no Jinja template: {mistake}")
    return text
