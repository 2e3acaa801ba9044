"""Tells what training needs beside the operators, `permoe[train]`, and whether it is there."""

import importlib.util

from moe.errors import UsageError

# What `permoe[train]` installs, by the names that are imported.
NEEDED = (
    "absl",
    "array_record",
    "grain",
    "importlib_resources",
    "matplotlib",
    "ml_collections",
    "optax",
    "orbax.checkpoint",
    "PIL",
    "rich",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
    "tensorstore",
)


def need(program: str) -> None:
    """Raises UsageError, with what to type, where `program` misses a package that it needs."""
    if missing := [module for module in NEEDED if not _is_there(module)]:
        raise UsageError(
            f"{program} needs {missing[0]!r}, which is not installed: "
            "type pip install 'permoe[train]'"
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False
