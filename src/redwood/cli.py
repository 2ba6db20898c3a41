"""The console entry of `redwood`. The commands themselves are in `redwood.commands`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits: 0, 1 after an error, 2 after wrong usage, 130 on Ctrl-C."""
    try:
        from redwood.commands.app import app
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    app()
