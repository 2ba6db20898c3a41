"""The console entry of `redwood`. The commands themselves are in `redwood.commands`."""

from __future__ import annotations

import sys

from redwood._standard_streams import fault_of_folder, open_streams


def main() -> None:
    """Runs the command line and exits: 0, 1 after an error, 2 after wrong usage, 130 on Ctrl-C."""
    open_streams()
    if (fault := fault_of_folder()) is not None:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(1)
    try:
        from redwood.commands.app import app
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    app()
