"""Finds the config file that is meant, by its path or its name, and lets it import its helpers."""

import pathlib
import sys

from moe.errors import UsageError

_HERE = pathlib.Path(__file__).resolve().parent


def shipped() -> pathlib.Path:
    """Returns the folder of the shipped configs: inside a wheel, beside `moe` in a checkout."""
    inside = _HERE / "configs"
    return inside if inside.is_dir() else _HERE.parent / "configs"


def find(path: pathlib.Path) -> pathlib.Path:
    """Returns the file at `path`, else the config of that name: one's own, then a shipped one.

    Raises:
      UsageError: there is none.
    """
    if path.is_file() and path.suffix == ".py":
        return path
    if path.name == str(path) and path.name.isidentifier():
        for folder in (pathlib.Path("configs"), shipped()):
            file = folder / f"{path.name}.py"
            if file.is_file():
                return file
    raise UsageError(f"no config file {str(path)!r}; {_known()}")


def _known() -> str:
    own = sorted(map(str, pathlib.Path("configs").glob("[!_]*.py")))
    names = sorted(file.stem for file in shipped().glob("[!_]*.py"))
    here = f"here are {', '.join(own) or 'none'}"
    return f"{here}; shipped, by name: {', '.join(names)}"


def let_import(file: pathlib.Path) -> None:
    """Lets a config file import from its own folder, the one above it and the current one.

    So `import sizes` and `from configs import sizes` work in configs/mine.py, as they would in a
    script. The folders come last: a helper takes no installed package's name.
    """
    folder = file.resolve().parent
    if folder.is_relative_to(_HERE):
        return  # a shipped one: above it are the rooms of `moe`
    for place in (folder, folder.parent, pathlib.Path.cwd()):
        if str(place) not in sys.path:
            sys.path.append(str(place))
