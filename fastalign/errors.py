"""The error a user's mistake raises: one line that names the argument, the rule and what came."""


class UserError(ValueError):
    """A mistake in what the user passed; the command line prints its message and no traceback."""
