"""The exceptions that PageBrain raises on purpose.

Every message says what was got, what was expected and what to do about it. All derive from :class:`PageBrainError`, so a
caller (the command line, the server) can tell a mistake in the input, which deserves one line, from a bug, which deserves a
traceback.
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
    """A tokenizer is there, and PageBrain can make no text with it. The model can be served with token ids."""


class PartError(PageBrainError):
    """A part that was named does not exist or does not have the signature that the engine calls."""


class KernelError(PageBrainError, ValueError):
    """A Triton kernel was given tensors that it does not work on; nothing was computed."""


class OutOfBlocksError(PageBrainError):
    """More physical blocks were asked for than are free; nothing was allocated."""


class BlockError(PageBrainError):
    """A physical block was freed or shared although nobody holds it."""


class BlockTableError(PageBrainError):
    """A block table does not cover the tokens that were asked for."""


class IntegrityError(PageBrainError):
    """The bookkeeping of blocks contradicts itself: a bug in the engine or in a part of the user's own."""


class StepError(PageBrainError):
    """A forward step failed. The engine rolled back to the state before it: requests and blocks are intact."""


def place(error: BaseException) -> str:
    """Where an exception was raised, to be written after its name: `` (file.py:12, in function)``, or nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""


_NO_MEMORY = (
    "can't allocate memory",  # torch's allocator for CPUs
    "not enough memory",  # the same on Windows
    "out of memory",  # CUDA's
    "cannot allocate memory",  # the system's, in the text of another error
    "bad_alloc",  # C++
    "could not create a primitive",  # oneDNN's, which does not say more; that it works here was tried at start
    "failed to map segment from shared object",  # the loader's, when a library is imported
    "can't start new thread",  # whose stack found no room
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, says that there was too little memory. Libraries say so in several ways."""
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
