"""Exchanges weights with Hugging Face's directories.

    python -m moe.store.huggingface import --from=DIR --out=RUN
    python -m moe.store.huggingface export --from=RUN --out=DIR

An import reads config.json, safetensors and tokenizer.json of Mixtral, Qwen3-MoE, OLMoE and ViT,
and makes the directory of a run, which eval.py, generate.py and train.py --config.init.workdir=RUN
take. An export makes a directory that `transformers` loads, or with --format=plain safetensors of
any run's parameters by their own names. docs/weights.md says more.
"""

import argparse
import importlib.util
from collections.abc import Sequence

from moe.errors import UsageError
from moe.extras import need


def main(argv: Sequence[str]) -> None:
    """Runs the command line.

    Raises:
      UsageError: what was asked for cannot be done.
    """
    flags = _parse(argv)
    program = "python -m moe.store.huggingface"
    need(program)
    if importlib.util.find_spec("safetensors") is None:
        raise UsageError(
            f"{program} needs 'safetensors', which is not installed: "
            "type pip install 'permoe[huggingface]'"
        )
    from moe import cli
    from moe.store.huggingface import exporting, families, importing, tensors

    source, out = cli.local_path(flags.source, "--from"), cli.local_path(flags.out, "--out")
    if flags.action == "import":
        wishes = importing.Wishes(flags.seq_len, flags.image_size, flags.begin, flags.end)
        return importing.import_run(source, out, wishes)
    for name, known in (("format", families.FORMATS), ("dtype", tensors.SAVED)):
        value = getattr(flags, name)
        if value is not None and value not in known:
            raise UsageError(f"--{name}={value}: expected one of {', '.join(known)}")
    options = {"step": flags.step, "form": flags.format, "dtype": flags.dtype}
    options["harden"] = flags.harden
    return exporting.export_run(source, out, **options)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True, parser_class=_Parser)
    into = actions.add_parser("import", help="make a run of a model's directory")
    away = actions.add_parser("export", help="make a directory of a run")
    for action, source, out in ((into, "a model's directory", "the run"), (away, "a run", "it")):
        action.add_argument("--from", required=True, dest="source", help=source)
        action.add_argument("--out", required=True, help=f"a new directory for {out}")
    into.add_argument("--seq_len", type=_count, default=0, help="tokens of a row; default: all")
    into.add_argument(
        "--image_size", type=_count, default=0, help="of a ViT; interpolates the positions"
    )
    into.add_argument("--begin", default="", help="the token before a document")
    into.add_argument("--end", default="", help="the token after a document")
    away.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    away.add_argument("--format", help="a family, or plain; default: the family that fits")
    away.add_argument("--dtype", default="float32", help="of the tensors; default float32")
    away.add_argument("--harden", action="store_true", help="of a pruned run: what it keeps alone")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its whole usage before the one line that matters."""

    def error(self, message: str):
        raise UsageError(message)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


if __name__ == "__main__":
    from moe import cli

    cli.run(main)
