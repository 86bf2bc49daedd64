"""The exceptions that PageBrain raises on purpose.

Every message says what was got, what was expected and what to do. All derive from :class:`PageBrainError`: the command line
and the server report these in one line, and any other exception, which is a bug, with a traceback.
"""

import errno
import traceback
from collections.abc import Iterator
from pathlib import Path


class PageBrainError(Exception):
    """Base of all errors that PageBrain raises on purpose."""


class ConfigError(PageBrainError, ValueError):
    """A configuration value is out of range, unknown, or contradicts another one."""


class InvalidRequestError(PageBrainError, ValueError):
    """A prompt or a sampling parameter cannot be served; nothing was changed."""


class ModelLoadError(PageBrainError):
    """A model or a tokenizer could not be found, read, or is of an unsupported kind."""


class UnsupportedTokenizerError(ModelLoadError):
    """A tokenizer exists, but PageBrain cannot decode text with it. The model can be served with token ids."""


class PartError(PageBrainError):
    """A part that was named does not exist or does not have the signature that the engine calls."""


class KernelError(PageBrainError, ValueError):
    """A Triton kernel was given tensors that it does not support; nothing was computed."""


class OutOfBlocksError(PageBrainError):
    """A correct request for more physical blocks than are free; nothing was allocated."""


class BlockError(PageBrainError):
    """A mistake of a caller: a block that is free or does not exist was freed or shared, or a count is below 0."""


class BlockTableError(PageBrainError):
    """A block table does not cover the requested tokens."""


class IntegrityError(PageBrainError):
    """The bookkeeping of blocks contradicts itself: a bug in the engine or in a part that the user wrote."""


class StepError(PageBrainError):
    """A forward step failed. The engine rolled back to the state before it: requests and blocks are intact."""


def place(error: BaseException) -> str:
    """Where an exception was raised: `` (file.py:12, in function)``, or an empty string if it has no traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""


_NO_MEMORY = (
    "can't allocate memory",  # torch's allocator for CPUs
    "not enough memory",  # the same on Windows
    "out of memory",  # CUDA's
    "cannot allocate memory",  # the system's, in the text of another error
    "bad_alloc",  # C++
    "could not create a primitive",  # oneDNN's only message; that it works on this machine was tried at start
    "failed to map segment from shared object",  # the loader's, when a library is imported
    "can't start new thread",  # no memory for the thread's stack
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` or one of its causes reports a lack of memory. Libraries use different types and messages."""
    return any(_says_no_memory(cause) for cause in _causes(error))


def _says_no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower() if isinstance(error, (RuntimeError, ImportError)) else ""
    return any(sign in text for sign in _NO_MEMORY)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
