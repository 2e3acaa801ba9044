"""Loads the routers that installed packages bring: the entry points of the group permoe.routers.

    [project.entry-points."permoe.routers"]
    mine = "my_package.routing:Mine"

makes `--config.router.name=mine` a router of every program, as a line in `ROUTERS` would.
"""

import functools
import importlib.metadata

from moe.errors import UsageError
from routers import ROUTERS, Router

GROUP = "permoe.routers"


@functools.cache
def load_routers() -> None:
    """Registers every router of the group, once.

    Raises:
      UsageError: one cannot be loaded, is no router, or has the name of another.
    """
    for entry in importlib.metadata.entry_points(group=GROUP):
        package = entry.dist.name if entry.dist else entry.module
        said = f"the router {entry.name!r} of the package {package} (entry point {entry.value})"
        mend = f"mend it, or pip uninstall {package}"
        try:
            router = entry.load()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            raise UsageError(f"{said} cannot be loaded ({reason}): {mend}") from error
        if not (isinstance(router, type) and issubclass(router, Router)):
            raise UsageError(f"{said} is {router!r:.100}; expected a subclass of routers.Router")
        if ROUTERS.setdefault(entry.name, router) is not router:
            raise UsageError(f"{said} has the name of another router: {mend}")
