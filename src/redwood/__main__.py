"""`python -m redwood` is the `redwood` command."""

from redwood.cli import main

main()
