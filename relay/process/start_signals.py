"""Hold back signals during the start, until their handlers are installed.

The default action of SIGHUP, SIGUSR1 and SIGUSR2 ends the process. As process 1 of a container,
relay would not receive SIGTERM at all, because the kernel drops it there if it is neither handled
nor blocked.

Imports nothing else of relay: `relay.__main__` calls it before the slow imports.
"""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_OTHERS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def hold_signals() -> None:
    """Keep the signals pending until `release_signals`, which must follow their handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, *_OTHERS))


def release_signals(*, only_stop: bool = False) -> None:
    """Deliver the signals from now on, and those that were sent since `hold_signals`.

    Child processes inherit held signals, so this must happen before they are started.
    """
    released = STOP_SIGNALS if only_stop else (*STOP_SIGNALS, *_OTHERS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, released)
