"""Where the engine's process begins: with a watch over the process that started it, before anything large is imported.

Importing torch and transformers takes seconds, and they are needed to read the config. So this module imports neither, and
what it is given is pickled once more.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1  # prctl's, in Linux


def main(connection: Connection, config: bytes, log_level: str) -> None:
    """The whole life of the engine's process; ``config`` is a pickled ``PageBrainConfig``."""
    end_with_parent()
    from pagebrain.server.link import engine_main

    engine_main.main(connection, pickle.loads(config), log_level)


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, however that was.

    A thread waits for it. While a library is being loaded, no thread of Python's may run; on Linux the kernel does the same.
    There the thread that started this process must live as long as this process is needed.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    threading.Thread(target=_end_after, args=(parent,), name="pagebrain-parent-watch", daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it ended before the kernel was asked
            os._exit(1)


def _end_after(parent: "multiprocessing.process.BaseProcess") -> None:
    parent.join()
    os._exit(1)
