"""The one error that a user is meant to read."""


class UserError(ValueError):
    """A user's mistake: one line with what was expected, what was got and what to do.

    Entry points print it to standard error and exit with its status; it never shows a traceback.
    """

    status = 2
