"""Prepares an image set from files of one's own; TensorFlow is not needed.

    python -m moe.data.prepare images --folder=DIR --name=NAME     DIR/SPLIT/CLASS/*.png or .jpg
    python -m moe.data.prepare images --idx=DIR --name=NAME        train-images-idx3-ubyte[.gz], ...
    python -m moe.data.prepare images --parquet='DIR/*.parquet' --name=NAME

PNG and JPEG files are kept as they are. Train with --config.data.name=NAME, and with
--config.data.data_dir=DATA_DIR where --data_dir was given.
"""

import argparse
import contextlib
import io
import os
import pathlib
import re
import shlex
import shutil
import sys

import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe.data.images import digits, folder, idx, parquet
from moe.data.images.damage import COMMAND_FILE
from moe.data.images.found import Advance, Found
from moe.data.images.prepared import resolve_data_dir
from moe.data.staging import staging
from moe.errors import UsageError

VERSION = "1.0.0"


def main(argv: list[str]) -> str:
    """Prepares the set that the arguments after `prepare images` describe; returns its folder.

    Raises:
        UsageError: an argument, a file or the folder is not as it must be.
    """
    options = _parser().parse_args(argv)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", options.name) or options.name == digits.NAME:
        raise UsageError(
            f"--name={options.name}: expected small letters, digits and _, such as my_images, and "
            "not that of an embedded set"
        )
    data_dir = pathlib.Path(os.path.abspath(resolve_data_dir(options.data_dir)))
    made = data_dir / options.name
    with staging(made) as place, _progress() as bar:
        found = _find(options, _task(bar, "reading images"))
        advance = _task(bar, "writing", sum(split.count for split in found.splits.values()))
        _write(found, options.name, place, advance)
        command = ["python", "-m", "moe.data.prepare", "images", *argv]
        (place / VERSION / COMMAND_FILE).write_text(shlex.join(command) + "\n")
    print(_summary(found), file=sys.stderr)
    return str(made / VERSION)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe.data.prepare images", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = _raise_usage  # argparse prints its whole usage before the one line that matters
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", help="of a folder for each split, with one for each class")
    source.add_argument("--idx", help="a folder of IDX files, as MNIST has them")
    source.add_argument("--parquet", help="a pattern in quotes, of files with image and label")
    add("--name", required=True, help="of the set: --config.data.name=NAME")
    add("--data_dir", "--out", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    add("--classes", default="", help="of --idx and --parquet: NAME,NAME,... in order of label")
    add("--image_column", help="of --parquet, where it cannot be told")
    add("--label_column", help="of --parquet, where it cannot be told")
    return parser


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


def _task(bar: Progress, what: str, total: int | None = None) -> Advance:
    task = bar.add_task(what, total=total)
    return lambda count: bar.advance(task, count)


def _find(options: argparse.Namespace, advance: Advance) -> Found:
    names = tuple(options.classes.split(",")) if options.classes else ()
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UsageError(f"--classes={options.classes}: expected different names")
    if options.folder is not None:
        if names:
            raise UsageError("--classes: the folders of --folder name the classes; leave it out")
        return folder.find(pathlib.Path(options.folder).expanduser(), advance)
    if options.idx is not None:
        return idx.find(pathlib.Path(options.idx).expanduser(), names)
    return parquet.find(
        options.parquet, advance, names, (options.image_column, options.label_column)
    )


def _write(found: Found, name: str, place: pathlib.Path, advance: Advance) -> None:
    """Writes the set in TFDS's array_record form into `place`/1.0.0."""
    if found.encoded:
        image = tfds.features.Image(shape=found.shape)
    else:
        image = tfds.features.Tensor(shape=found.shape, dtype=np.uint8)
    label = tfds.features.ClassLabel(names=list(found.class_names))
    builder = _builder(found, name, {"image": image, "label": label}, advance)
    build = place / "build"
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        builder(data_dir=build, file_format="array_record").download_and_prepare()
    os.rename(build / name / VERSION, place / VERSION)
    shutil.rmtree(build)


def _builder(found: Found, set_name: str, features: dict, advance: Advance):
    """Returns the class of a TFDS builder that generates what was found."""

    class Own(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Images of one's own."""

        name = set_name
        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Prepared by permoe from files of one's own.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # nothing is downloaded
            return {name: self._generate_examples(name) for name in found.splits}

        def _generate_examples(self, split):
            for i, (image, label) in enumerate(found.splits[split].examples()):
                yield i, {"image": image, "label": label}
                advance(1)

    return Own


def _summary(found: Found) -> str:
    height, width, channels = found.shape
    size = f"{height} x {width}" if height else "of different sizes (--config.data.image_size=SIDE)"
    counts = ", ".join(f"{name} {split.count:,}" for name, split in found.splits.items())
    return f"{counts} images {size}, {channels} channel(s), {len(found.class_names)} classes"


def _raise_usage(message: str):
    raise UsageError(f"{message}; python -m moe.data.prepare images --help shows all")
