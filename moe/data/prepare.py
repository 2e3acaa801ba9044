"""Prepares a data set: files of one's own, or a stock TFDS set.

    python -m moe.data.prepare text --files='DIR/**/*.txt' --out=DIR
    python -m moe.data.prepare images --folder=DIR --name=NAME
    python -m moe.data.prepare cifar100 --data_dir=DIR

Each says more by --help after its name.
"""

import importlib
import sys
from collections.abc import Sequence

from moe.errors import UsageError
from moe.extras import need

# What makes a set of one's own files; any other name is of a stock set.
OWN = {"images": "moe.data.images.prepare", "text": "moe.data.text.prepare"}
STOCK = "moe.data.images.stock"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; prints the folder of the set, or one line of what is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if "".join(argv[:1]) in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        if not argv:
            raise UsageError("say what to prepare: text, images, or a TFDS name; --help shows how")
        need("python -m moe.data.prepare")
        own = argv[0] in OWN
        preparation = importlib.import_module(OWN[argv[0]] if own else STOCK)
        print(preparation.main(argv[1:] if own else argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
