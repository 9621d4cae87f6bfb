"""Exceptions that end a command early: a user's mistake (one line with the argument, the rule and the value received),
and SIGTERM."""


class UserError(ValueError):
    """A mistake in what the user passed; the command line prints its message and no traceback."""

    # Not at its making: torch.compile can trace no `__init__` here, and would show its own complaint, not the message.
    def __str__(self) -> str:
        return printable(super().__str__())


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: handled like Ctrl-C, except for the exit code."""


def printable(text: str) -> str:
    """Escapes control characters and the like, such as \\x1b: names come from files that anyone may have
    written."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
