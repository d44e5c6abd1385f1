"""Exceptions for mistakes of the user: the command prints their one sentence and exits with status 2."""


class UserError(Exception):
    """A mistake of the user. The text is one sentence that says what is wrong and what cures it."""


class DataError(UserError):
    """A data file is missing, damaged or not what its name promises."""
