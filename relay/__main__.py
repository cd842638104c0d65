"""`relay` and `python -m relay`: the command line."""

from __future__ import annotations

import sys

from relay.process.start_signals import hold_signals


def main() -> int:
    """Run the command line and return the exit code."""
    hold_signals()
    from relay.cli import commands

    return commands.main()


if __name__ == "__main__":
    sys.exit(main())
