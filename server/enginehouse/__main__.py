"""`python -m enginehouse` is the command `enginehouse`."""

from enginehouse.cli import main

main()
