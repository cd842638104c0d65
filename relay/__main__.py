"""`python -m relay`: the command line."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Before the imports, which take half a second: the default action of these two would end a
    # relay that is starting. `relay.process.reloading` lets them through.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1))

    import sys

    from relay.cli.commands import main

    sys.exit(main())
