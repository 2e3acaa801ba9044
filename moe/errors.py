"""Defines the error that a user can mend, and gathers several into one."""

from collections.abc import Callable, Iterable


class UsageError(Exception):
    """Says what was wrong with what was asked, what was expected, and what to type instead.

    The command line prints it as one line and exits with code 2; it is raised before any file of
    a run is touched.
    """


class DataError(UsageError):
    """An example cannot be read or used; of a large set that is found out when its turn comes."""


class Misfits(UsageError):
    """Says several things that were wrong; the command line gives each a line."""

    def __init__(self, found: list[UsageError]):
        super().__init__("; also: ".join(map(str, found)))
        self.found = found


def check_all(checks: Iterable[Callable[[], object]]) -> None:
    """Calls every check, and raises all that they found wrong: in one go, not one by one.

    Raises:
      UsageError: the one that was raised, or `Misfits` of several.
    """
    found: list[UsageError] = []
    for check in checks:
        try:
            check()
        except Misfits as several:
            found += several.found
        except UsageError as error:
            found.append(error)
    _raise(found)


def raise_all(wrong: Iterable[str]) -> None:
    """Raises all that is said to be wrong, in one go; nothing where nothing is.

    Raises:
      UsageError: of one text, or `Misfits` of several.
    """
    _raise([UsageError(text) for text in wrong])


def _raise(found: list[UsageError]) -> None:
    if found:
        raise found[0] if len(found) == 1 else Misfits(found)
