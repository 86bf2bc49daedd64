"""The engine's stages, one module each, in reading order: from recomputing everything to continuous batching.

``python -m chapters`` is the course tool: it writes the files that a learner fills in, and checks them.
"""


class TodoError(NotImplementedError):
    """A task that is not done yet. Its message says what to do, where to read about it and how to check it."""
