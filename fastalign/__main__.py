"""`fastalign` and `python -m fastalign`: the command line."""

import os
import sys


def main() -> None:
    _open_standard_streams()
    try:
        from fastalign.cli.main import main as run

        run()
    except KeyboardInterrupt:  # during imports: a running command says more
        print("fastalign: interrupted", file=sys.stderr)
        sys.exit(130)


def _open_standard_streams() -> None:
    """Open closed standard streams on the null device, so that no other file gets their descriptors."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


if __name__ == "__main__":
    main()
