"""Logging of the server's processes to stderr. No line holds text of a prompt, unless the level is ``debug``.

Exceptions may quote a prompt: in their message, in pydantic's ``repr`` of an invalid value, in asyncio's note of a failed
task. So a traceback shows the place and the type of an exception, but not its message. The line for each finished request is
made in ``request_log.py``.
"""

import copy
import logging
import logging.config
import traceback
import types
from typing import Any

from pagebrain.errors import ConfigError
from pagebrain.server.options import LOG_LEVELS

REQUEST_LOGGER = "pagebrain.requests"
"""Name of the logger for finished requests."""

WITHHELD = "(message withheld, it may quote a prompt; log level debug shows it)"


def configure_logging(log_level: str = "info", log_requests: bool = False) -> None:
    """Configure the logging of this process, Python's warnings included. Raises ``ConfigError`` for an unknown level."""
    logging.config.dictConfig(logging_config(log_level, log_requests))
    logging.captureWarnings(True)


def logging_config(log_level: str = "info", log_requests: bool = False) -> dict[str, Any]:
    """The configuration for ``logging.config.dictConfig`` or uvicorn's ``log_config``.

    Raises ``ConfigError`` for an unknown level.
    """
    if log_level not in LOG_LEVELS:
        raise ConfigError(f"the log level must be one of {', '.join(LOG_LEVELS)}, got {log_level!r}")
    level, is_debug = log_level.upper(), log_level == "debug"
    others = level if log_level not in ("info", "debug") else "DEBUG" if is_debug else "WARNING"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "line": {"()": LineFormatter, "show_messages": is_debug},
            "bare": {"format": "%(message)s"},
        },
        "handlers": {
            "line": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"},
            "bare": {"class": "logging.StreamHandler", "formatter": "bare", "stream": "ext://sys.stderr"},
        },
        "root": {"handlers": ["line"], "level": others},
        "loggers": {
            "pagebrain": {"level": level},
            REQUEST_LOGGER: {
                "handlers": ["bare"],
                "level": "INFO" if log_requests else "CRITICAL",
                "propagate": False,
            },
            # uvicorn's lines about start and end repeat the server's own.
            "uvicorn": {"handlers": [], "level": others, "propagate": True},
            "uvicorn.error": {"level": others},
            # Without a handler uvicorn does not format access lines.
            "uvicorn.access": {"handlers": [], "level": others, "propagate": False},
            # Captured warnings: pydantic's quote values.
            "py.warnings": {"level": level if is_debug else "CRITICAL"},
        },
    }


class LineFormatter(logging.Formatter):
    """Lines like ``pagebrain: warning: text``; with ``show_messages`` also time, logger and messages of exceptions."""

    def __init__(self, show_messages: bool = False) -> None:
        line = "pagebrain: %(prefix)s%(message)s"
        super().__init__(f"%(asctime)s {line} [%(name)s]" if show_messages else line)
        self.show_messages = show_messages

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback below it."""
        record = copy.copy(record)
        record.prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        record.exc_text = None  # another formatter may have cached the traceback with its message here
        if record.name == "asyncio" and not self.show_messages:
            # Below the first line asyncio lists the objects involved, with the repr of the exception.
            record.msg, record.args = record.getMessage().partition("\n")[0], ()
        return super().format(record)

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, types.TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """The traceback; without ``show_messages`` without the exceptions' messages."""
        if self.show_messages or ei[1] is None:
            return super().formatException(ei)
        return "\n".join(_withheld(ei[1], set()))


def _withheld(error: BaseException, seen: set[int]) -> list[str]:
    """Traceback and type of an exception, without its message, after those of its cause."""
    seen.add(id(error))
    lines = []
    origin = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if origin is not None and id(origin) not in seen:
        lines = [*_withheld(origin, seen), "which led to:"]
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip("\n")
    kind = type(error)
    lines += ["Traceback (most recent call last):", frames, f"{kind.__module__}.{kind.__qualname__} {WITHHELD}"]
    for part in getattr(error, "exceptions", ()):  # of an exception group
        if isinstance(part, BaseException) and id(part) not in seen:
            lines += ["of which one is:", *_withheld(part, seen)]
    return lines
