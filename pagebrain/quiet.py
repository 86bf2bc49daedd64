"""Suppresses the output of libraries in commands: progress bars, advice, messages about retries."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_LOGGERS = ("huggingface_hub", "transformers", "pagebrain.build")  # the commands print the notices of the last one


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Hugging Face's libraries and Python's warnings within the block. The user's environment takes precedence."""
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _ENVIRONMENT[name] for name in missing})  # read when the libraries are imported
    loggers = [logging.getLogger(name) for name in _LOGGERS]  # for libraries that are imported already
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = _progress_bars()
    had_bars = bars is not None and bars.is_progress_bar_enabled()
    if bars is not None and had_bars:
        bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if bars is not None and had_bars:
            bars.enable_progress_bar()


def _progress_bars() -> ModuleType | None:
    """The module that switches progress bars, if it is imported already. Otherwise the environment variable is enough."""
    return sys.modules.get("transformers.utils.logging")
