"""Finds the images of DIR/SPLIT/CLASS/*.png: a folder for each class in one for each split."""

import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from moe.data.images.found import Advance, Found, Split, common, shape_of
from moe.errors import UsageError

ENDINGS = (".png", ".jpg", ".jpeg")
EXPECTED = "expected DIR/SPLIT/CLASS/*.png (or .jpg), such as DIR/train/cat/1.png"
_THREADS = 16


def find(root: pathlib.Path, advance: Advance) -> Found:
    """Reads every image below `root` once, to know its shape.

    Raises:
        UsageError: a folder is missing, empty or not of that form, or an image cannot be read.
    """
    splits = {path.name: _classes(path) for path in _folders(root, "split")}
    names = sorted(set().union(*splits.values()), key=_by_number)
    for split, classes in splits.items():
        if missing := [name for name in names if name not in classes]:
            raise UsageError(
                f"split {split!r} of {root} lacks the class {missing[0]!r}, which another split "
                f"has: each split needs images of each class, in {root / split / missing[0]}"
            )
    files = {
        split: [(file, label) for label, name in enumerate(names) for file in classes[name]]
        for split, classes in splits.items()
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            shapes = set()
            for shape in pool.map(_shape, (file for pairs in files.values() for file, _ in pairs)):
                shapes.add(shape)
                advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = {split: Split(len(pairs), lambda p=pairs: _read(p)) for split, pairs in files.items()}
    return Found(tuple(names), common(shapes), True, found)


def _folders(place: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """Returns the folders in one, of which there must be some."""
    try:
        inside = sorted(p for p in place.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise UsageError(f"cannot read {place} ({error.strerror}): {EXPECTED}") from error
    if folders := [path for path in inside if path.is_dir()]:
        return folders
    what = "holds images itself" if any(map(_is_image, inside)) else "is empty"
    raise UsageError(f"{place} {what}, no folder for each {kind}: {EXPECTED}")


def _classes(split: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Returns the image files of each class of a split."""
    files = {}
    for folder in _folders(split, "class"):
        files[folder.name] = sorted(path for path in folder.iterdir() if _is_image(path))
        if not files[folder.name]:
            raise UsageError(f"{folder} holds no {', '.join(ENDINGS)}: {EXPECTED}")
    return files


def _is_image(path: pathlib.Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def _by_number(name: str) -> tuple[int, str]:
    """Sorts 2 before 10, and names after numbers."""
    return (int(name) if name.isdecimal() else 1 << 62, name)


def _bytes(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file} ({error.strerror})") from error


def _shape(file: pathlib.Path) -> tuple[int, int, int]:
    return shape_of(_bytes(file), str(file))


def _read(files: list[tuple[pathlib.Path, int]]) -> Iterator[tuple[bytes, int]]:
    for file, label in files:
        yield _bytes(file), label
