"""Child processes that do not outlive the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """From now on this process dies when the one that started it does, however that ended.

    For children of `multiprocessing` (start method spawn); elsewhere it does nothing. A killed
    parent cannot end its children, and those that wait for work or for one another wait for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
