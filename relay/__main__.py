"""`relay` and `python -m relay`: the command line."""

from __future__ import annotations

import gc
import sys

from relay.process.standard_files import open_standard_files
from relay.process.start_signals import hold_signals


def main() -> int:
    """Run the command line and return the exit code."""
    open_standard_files()
    hold_signals()
    # Imports create many objects that are never freed. Visiting them in garbage collections takes
    # a quarter of the start, and visiting them once more a quarter of a second at exit.
    gc.disable()
    from relay.cli import commands

    try:
        return commands.main()
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
