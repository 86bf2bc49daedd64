"""A process that starts another one, as the server starts the engine's, and what that one does: it can only be ended.

``python -m tests.support.spawned_child HOW`` writes the child's pid once the child watches its parent.
"""

import ctypes
import multiprocessing
import sys
import time
from multiprocessing.synchronize import Event

from pagebrain.server.link.spawned import end_with_parent


def child(how: str, watches: Event) -> None:
    """Watch the parent, then be busy: ``elsewhere``, as on a system whose kernel cannot help; ``loading``, so that no
    thread of Python's runs, as while a large library is loaded."""
    if how == "elsewhere":
        sys.platform = "elsewhere"
    end_with_parent()
    watches.set()
    if how == "loading":
        ctypes.PyDLL(None).sleep(600)  # with the lock of the interpreter held
    time.sleep(600)


def main() -> None:
    """Start the child and stay."""
    context = multiprocessing.get_context("spawn")
    watches = context.Event()
    process = context.Process(target=child, args=(sys.argv[1], watches))
    process.start()
    watches.wait()
    print(process.pid, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
