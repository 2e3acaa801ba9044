"""The command line: `--config.KEY=VALUE`, and errors as one line with exit code 2."""

import argparse
import ast
import difflib
import importlib.util
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from moe.config import flatten
from moe.errors import UsageError


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Calls `main` with the arguments and exits: 2 with one line on a `UsageError`."""
    for name in ("absl", "asyncio"):  # Orbax narrates what it does; its errors are raised, too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]):
    """Returns the parsed flags, and the overrides {"router.name": "topk", ...} as text."""
    parser.error = _raise_usage  # argparse prints its whole usage before the one line that matters
    flags, rest = parser.parse_known_args(argv)
    overrides, rest = {}, list(rest)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--config."):
            raise UsageError(f"unknown argument {word!r}; settings are --config.KEY=VALUE")
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            if not rest:
                raise UsageError(f"--config.{key} needs a value: --config.{key}=VALUE")
            value = rest.pop(0)
        overrides[key] = value
    return flags, overrides


def local_path(text: str) -> pathlib.Path:
    """The path of --workdir.

    Raises:
      UsageError: it is an address of a bucket, which `pathlib` would take for a folder "gs:".
    """
    if "://" in text:
        raise UsageError(
            f"--workdir={text} is an address, not a path; mount it and give the path that it has "
            "then (gs://BUCKET: gcsfuse BUCKET /mnt/BUCKET on every host)"
        )
    return pathlib.Path(text)


def load_config(path: str, overrides: dict[str, str]) -> ConfigDict:
    """Returns `get_config()` of a Python file, with the overrides applied."""
    file = pathlib.Path(path)
    if not file.is_file():
        known = ", ".join(sorted(map(str, pathlib.Path("configs").glob("[!_]*.py"))))
        raise UsageError(f"no config file {path!r}; here are {known or 'none'}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"{path} has no function get_config()")
    return apply(module.get_config(), overrides)


def apply(config: ConfigDict, overrides: dict[str, str]) -> ConfigDict:
    """Sets the keys, each read as the type that it has; returns the locked config.

    Raises:
      UsageError: an unknown key (with the nearest known ones), or a value of another type.
    """
    known = flatten(config)
    for key, text in overrides.items():
        if key not in known:
            inside = [k for k in known if k.startswith(key + ".") and k.count(".") == 1]
            close = inside or difflib.get_close_matches(key, known, 3, 0.6) or list(config)
            raise UsageError(f"unknown key config.{key}; did you mean {', '.join(close)}?")
        config.update_from_flattened_dict({key: _read(key, text, known[key])})
    return config.lock()


def _read(key: str, text: str, old):
    """`text` as a value of `old`'s type."""
    kind = type(old)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            value = ast.literal_eval(text)
            return tuple(value) if isinstance(value, tuple | list) else (value,)
        return kind(text)
    except (KeyError, ValueError, SyntaxError):
        raise UsageError(
            f"--config.{key}={text!r} is not of type {kind.__name__}; it is now {old!r}"
        ) from None


def _raise_usage(message: str):
    raise UsageError(message)
