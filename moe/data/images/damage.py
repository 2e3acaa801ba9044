"""Says what is wrong with the files of a prepared data set, and what to type."""

import os
import shlex
from collections.abc import Iterator

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from moe.data.images import digits
from moe.errors import UsageError

# The files that describe a set, and what reads each: the second one reads both.
DESCRIPTION = {
    "features.json": tfds.features.FeatureConnector.from_config,
    "dataset_info.json": read_only_builder.builder_from_directory,
}

# Beside them, where the set was made of one's own files: the command that made it.
COMMAND_FILE = "prepared_by.txt"


def prepare_command(name: str, data_dir: str) -> str:
    """Returns what to type to prepare a data set."""
    # `tfds build` would need Apache Beam as well: tfds 4.9.10 imports it for every command.
    arguments = f"{shlex.quote(name)} --data_dir={shlex.quote(data_dir)}"
    return f"pip install 'permoe[prepare]' && python -m moe.data.prepare {arguments}"


def version_folders(name: str, data_dir: str) -> Iterator[str]:
    """Yields the folders of the set's versions and configs, which have no folders themselves.

    Raises:
        OSError: a folder is there, but not to be read.
    """

    def stop(error: OSError):
        if not isinstance(error, FileNotFoundError):
            raise error

    stem = name.partition(":")[0].partition("/")[0]
    for folder, inner, _ in os.walk(os.path.join(data_dir, stem), onerror=stop):
        inner[:] = [sub for sub in inner if sub not in DESCRIPTION]
        if not inner:
            yield folder


def check_description(name: str, data_dir: str, folder: str) -> None:
    """Raises where one of the two files that describe a set is missing or damaged.

    Raises:
        OSError: it is not to be read.
        UsageError: it does not hold what TFDS wrote.
    """
    for file, read in DESCRIPTION.items():
        path = os.path.join(folder, file)
        try:
            if os.path.isfile(path):
                with open(path, "rb"):  # TFDS has its own words for what the system says
                    pass
            read(folder)
        except PermissionError:
            raise
        except Exception as error:
            reason = reason_of(error) if os.path.isfile(path) else "there is no such file"
            remedy = prepare_again(name, data_dir, path)
            raise UsageError(
                f"{path} of data set '{name}' is damaged ({reason}): {remedy}"
            ) from error


def prepare_again(name: str, data_dir: str, damaged: str) -> str:
    """Returns what to do about a damaged file of a set."""
    folder = os.path.dirname(damaged)
    if name in digits.NAMES:
        return f"delete {folder}, and the next start prepares it again"
    try:
        with open(os.path.join(folder, COMMAND_FILE)) as file:
            command = file.read().strip()
    except (OSError, ValueError):
        command = prepare_command(name, data_dir)
    return f"delete {folder} and prepare it again with `{command}`"


def reason_of(error: Exception) -> str:
    """Returns the text of another library's error on one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__
