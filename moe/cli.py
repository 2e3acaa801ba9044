"""Reads the command line, `--config.KEY=VALUE`, and ends on errors: a line each, exit code 2."""

import argparse
import ast
import difflib
import functools
import importlib.util
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from moe import config_files
from moe.checks import check
from moe.config import PATH_KEYS, check_ranges, flatten, from_json
from moe.errors import UsageError, check_all

CONFIG_HELP = "a config file, the name of a shipped one, or the directory of a run"


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Calls `main` with the arguments and exits: 2 with a line for each thing that was wrong."""
    absl = logging.getLogger("absl")
    absl.setLevel(logging.ERROR)  # Orbax warns of options that we mean
    absl.addFilter(lambda record: not record.exc_info)  # and logs what it raises as well
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        for wrong in getattr(error, "found", [error]):
            print("error:", " ".join(str(wrong).split()), file=sys.stderr)
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


def local_path(text: str, name: str = "--workdir") -> pathlib.Path:
    """Returns the path that a user typed for the flag or key `name`, with ~ as a shell reads it.

    Raises:
      UsageError: it is empty, no path of this machine, or may not be looked at.
    """
    typed = text.strip()
    if "://" in typed or typed.startswith("gs:"):
        raise UsageError(
            f"{name}={typed} is an address, not a path; mount it and give the path that it has "
            "then (gs://BUCKET: gcsfuse BUCKET /mnt/BUCKET on every host)"
        )
    try:
        typed.encode()
        path = pathlib.Path(typed).expanduser()
        path.stat()
    except FileNotFoundError:
        pass  # a place that will be made
    except (OSError, RuntimeError, ValueError) as error:  # too long, forbidden, no such user, ...
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{name}={format(repr(typed), '.200')} is no path that can be used: {reason}"
        ) from None
    if not typed:
        raise UsageError(f"{name} is empty; expected a path: {name}=PATH")
    return path


def read_config(path: str) -> ConfigDict:
    """Returns `get_config()` of a Python file, or of the shipped config of that name, unchecked.

    Of the directory of a run, it is the run's own.

    What the file itself raises is its author's and passes as it is; what it registers is known now.

    Raises:
      UsageError: there is no such file, or it makes no config.
    """
    place = local_path(path, "--config")
    if (place / "config.json").is_file():
        return _of_run(place / "config.json")
    file = config_files.find(place)
    config_files.let_import(file)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"{path} has no function get_config()")
    config = module.get_config()
    if not isinstance(config, ConfigDict):
        raise UsageError(f"get_config() of {path} returns no config; see moe.config.default()")
    return config


def _of_run(file: pathlib.Path) -> ConfigDict:
    """Returns the config that a run was made with."""
    try:
        return from_json(file.read_text()).copy_and_resolve_references()
    except (OSError, ValueError, UsageError) as error:
        raise UsageError(
            f"--config={file.parent} is no run whose config can be used: {error}"
        ) from error


def load_config(path: str, overrides: dict[str, str]) -> ConfigDict:
    """Returns the config of a file, see `read_config`, with the overrides applied.

    Raises:
      UsageError: there is none, or it cannot be run.
    """
    return apply(read_config(path), overrides)


def apply(config: ConfigDict, overrides: dict[str, str]) -> ConfigDict:
    """Sets the keys, each read as the type that it has; returns the checked and locked config.

    Raises:
      UsageError: unknown keys (with the nearest known ones), values of another type or outside
        their range; where there are none, values that do not fit each other: all in one go.
    """
    known = flatten(config)
    typed = [functools.partial(_set, config, known, key, text) for key, text in overrides.items()]
    check_all([*typed, lambda: _read_paths(config), lambda: check_ranges(config)])
    check(config)
    return config.lock()


def _set(config: ConfigDict, known: dict[str, object], key: str, text: str) -> None:
    """Sets a key to what the text says."""
    if key not in known:
        inside = [k for k in known if k.startswith(key + ".") and k.count(".") == 1]
        close = inside or difflib.get_close_matches(key, known, 3, 0.6) or list(config)
        raise UsageError(f"unknown key config.{key}; did you mean {', '.join(close)}?")
    if key == "task" and text != known[key]:
        raise UsageError(
            f"--config.task={text}: this config is of the task {known[key]!r}; take one of that "
            "task, which has other keys"
        )
    config.update_from_flattened_dict({key: _read(key, text, known[key])})


def _read_paths(config: ConfigDict) -> None:
    """Reads the keys that are paths as a shell does."""
    for key in PATH_KEYS:
        if typed := flatten(config).get(key):
            path = str(local_path(typed, f"--config.{key}"))
            config.update_from_flattened_dict({key: path})


def _read(key: str, text: str, old):
    """Returns `text` as a value of `old`'s type."""
    kind = type(old)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            value = ast.literal_eval(text)
            return tuple(value) if isinstance(value, tuple | list) else (value,)
        return kind(text)
    except (KeyError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        said = format(repr(text), ".60")
        raise UsageError(
            f"--config.{key}={said} is not of type {kind.__name__}; it is now {old!r}"
        ) from None


def _raise_usage(message: str):
    raise UsageError(message)
