"""Errors that a user can mend."""


class UserError(ValueError):
    """One line that names the argument, what was expected and what came.

    The command line prints it without a traceback and exits with code 2.
    """
