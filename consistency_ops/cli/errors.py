"""Mistakes a user can make, as one sentence each; the command line prints it and exits with status 2."""


class UserError(Exception):
    """What is wrong and what cures it, in one sentence, without a traceback."""


class DataError(UserError):
    """A data file that is missing, damaged or not what its name promises."""
