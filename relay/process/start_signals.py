"""Hold back SIGHUP and SIGUSR1 during the start, because their default action ends the process.

Imports nothing else of relay: `relay.__main__` calls it before the slow imports.
"""

from __future__ import annotations

import signal

_SIGNALS = (signal.SIGHUP, signal.SIGUSR1)


def hold_signals() -> None:
    """Keep both signals pending until `release_signals`, which must follow their handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def release_signals() -> None:
    """Deliver both signals from now on, and those that were sent since `hold_signals`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
