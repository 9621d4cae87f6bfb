"""What ends a command before its time: a user's mistake, one line that names the argument, the rule and what came;
and SIGTERM."""


class UserError(ValueError):
    """A mistake in what the user passed; the command line prints its message and no traceback."""

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))


class Terminated(KeyboardInterrupt):
    """SIGTERM came: all goes as at Ctrl-C, but for the exit code."""


def printable(text: str) -> str:
    """With control characters written out, such as \\x1b: names come from files that anyone may have written."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
