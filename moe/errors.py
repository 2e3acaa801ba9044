"""Defines the error that a user can mend."""


class UsageError(Exception):
    """Says what was wrong with what was asked, what was expected, and what to type instead.

    The command line prints it as one line and exits with code 2; it is raised before any file of
    a run is touched.
    """


class DataError(UsageError):
    """An example cannot be read or used; of a large set that is found out when its turn comes."""
