"""Open missing standard files, because some service managers start programs without them.

Otherwise the next file or socket would get such a descriptor: log lines would be written to it, and
libuv would abort the process when it is closed. Imports nothing else of relay.
"""

from __future__ import annotations

import os


def open_standard_files() -> None:
    """Connect standard input, output and error to /dev/null if they are closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The kernel assigns the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
