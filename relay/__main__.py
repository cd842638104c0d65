"""`python -m relay`: the command line."""

from __future__ import annotations

import sys

from relay.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
