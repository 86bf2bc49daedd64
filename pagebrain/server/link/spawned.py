"""The entry of the engine's process. It watches the parent process before it imports large libraries.

The import of torch and transformers takes seconds, and unpickling the config imports both. So this module imports neither,
and gets the config as pickled bytes.
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
    """Run the engine's process. ``config`` is a pickled ``PageBrainConfig``."""
    end_with_parent()
    from pagebrain.server.link import engine_main

    engine_main.main(connection, pickle.loads(config), log_level)


def end_with_parent() -> None:
    """End this process as soon as its parent process has ended, for any reason.

    A thread waits for the parent. While a library is loaded, no Python thread may run. So on Linux the kernel watches the
    parent too. There the thread that started this process must live as long as this process is needed.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    threading.Thread(target=_end_after, args=(parent,), name="pagebrain-parent-watch", daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # the parent ended before the call of prctl
            os._exit(1)


def _end_after(parent: "multiprocessing.process.BaseProcess") -> None:
    parent.join()
    os._exit(1)
