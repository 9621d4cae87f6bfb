"""`fastalign` and `python -m fastalign`: the command line."""

import os
import sys


def main() -> None:
    _open_standard_streams()
    try:
        from fastalign.cli.main import main as run

        run()
    except KeyboardInterrupt:  # while modules are imported: a command that runs says more
        print("fastalign: interrupted", file=sys.stderr)
        sys.exit(130)


def _open_standard_streams() -> None:
    """Those that the caller has closed, on the null device: nothing of ours may get their numbers."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the least number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


if __name__ == "__main__":
    main()
