"""Prepares a token set from text files: `python -m moe.data.prepare text --help`."""

import argparse


def main(argv: list[str]) -> str:
    """Prepares the set that the arguments after `prepare text` describe; returns its folder.

    Raises:
        UsageError: an argument, a file or the folder is not as it must be.
    """
    parser = argparse.ArgumentParser(prog="python -m moe.data.prepare text", description=__doc__)
    parser.add_argument("--files", required=True, help="a pattern: 'DIR/**/*.txt'")
    parser.parse_args(argv)
    raise NotImplementedError
