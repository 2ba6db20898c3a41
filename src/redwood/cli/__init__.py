"""The command line: a file each command; `app` joins them.

Modules here import torch and Transformers inside the functions that need them, so that help, usage
errors and small commands need no slow imports. May import: everything.
"""

from __future__ import annotations

import sys

from redwood.cli._standard_streams import fault_of_folder, open_streams


def main() -> None:
    """Runs the command line and exits: 0, 1 after an error, 2 after wrong usage, 130 on Ctrl-C."""
    open_streams()
    if (fault := fault_of_folder()) is not None:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(1)
    try:
        from redwood.cli.app import app
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    app()
