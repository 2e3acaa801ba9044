"""The error that a user can mend."""


class UsageError(Exception):
    """What was asked cannot be done: the message says what was wrong, expected, and what to type.

    The command line prints it as one line and exits with code 2; it is raised before any file of
    a run is touched.
    """
