"""`python -m fastalign`: the command line."""

from fastalign.cli import main

main()
