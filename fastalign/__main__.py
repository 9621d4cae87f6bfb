"""`python -m fastalign`: the command line."""

from fastalign.cli.main import main

main()
