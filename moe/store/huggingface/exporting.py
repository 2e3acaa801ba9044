"""Makes a directory of safetensors of a run, for `transformers` or as they are."""

import functools
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from moe.config import flatten
from moe.data.staging import staging
from moe.data.text.tokenizer import BYTES
from moe.errors import UsageError
from moe.nn.pruning import Pruning
from moe.screen import say
from moe.store import pieces, tokens
from moe.store.huggingface import families, published, tensors
from moe.store.huggingface.shapes import places_of, shapes_of
from moe.store.origins import SAME, Part, Place, find, parts
from moe.store.workdir import saved_config, saved_steps


def export_run(
    workdir: pathlib.Path,
    out: pathlib.Path,
    *,
    step: int | None = None,
    form: str | None = None,
    dtype: str = "float32",
    harden: bool = False,
) -> None:
    """Writes a checkpoint's parameters, their average where the run keeps one, as safetensors.

    Those of a pruned run are its dense state, unless `harden` leaves what it is to compute with.

    Args:
      step: None for the newest checkpoint.
      form: of `families.FORMATS`; None for the family that the run's shape is of.
      dtype: of `tensors.SAVED`.

    Raises:
      UsageError: there is no such run or checkpoint, it is damaged, of no such family, or the disk
        has no room.
    """
    saved = saved_config(workdir)
    if saved is None:
        raise UsageError(f"--from={workdir} holds no run (no config.json)")
    steps = saved_steps(workdir)
    if not steps or step not in (None, *steps):
        raise UsageError(f"--from={workdir} has no checkpoint of step {step}: it has {steps}")
    step = steps[-1] if step is None else step
    settings, where, shapes = flatten(saved), places_of(saved), shapes_of(saved)
    pruning = Pruning(**saved.prune)
    if harden and not pruning.prunes:
        raise UsageError(f"--harden: --from={workdir} holds a run that prunes nothing")
    if pruning.prunes and not harden:
        say("the run is pruned, and this is the dense state that it trains: see --harden")
    family, config_json = None, None
    if form != families.PLAIN:
        family, config_json = families.of_run(settings, form)
    single = {name: shapes[p.leaf][p.turn is not None :] for name, p in where.items()}
    written = _parts(family, single)
    _check_space(out, written, dtype)
    item = "ema" if settings["optimizer.ema_decay"] else "params"
    reader = pieces.Reader(workdir / "checkpoints" / str(step), item, shapes)
    with staging(out) as folder:
        sizes = {name: part.layout.theirs(part.shape) for name, part in written.items()}
        prune = pruning.hardened_piece if harden else lambda name, piece: piece
        value = functools.partial(_value, reader, where, prune)
        tensors.write(folder, sizes, lambda name: value(written[name]), dtype)
        reader.check()
        if config_json is None:
            shutil.copy(workdir / "config.json", folder / "permoe.json")
        else:
            _describe(folder, workdir, config_json, dtype)
    kind = "their own names" if family is None else f"{family.architecture}'s"
    say(f"exported step {step} of {workdir} to {out}: {len(sizes)} tensors in {dtype}, by {kind}")


def _parts(family, shapes: dict[str, tuple[int, ...]]) -> dict[str, Part]:
    """Returns what each tensor of the directory is made of."""
    if family is None:
        return {name: Part(name, None, s, name, (), s, SAME) for name, s in shapes.items()}
    found: dict[str, Part] = {}
    for name, shape in shapes.items():
        rule, number = next(find(family.rules, name))
        found |= {part.theirs: part for part in parts(rule, number, name, shape)}
    return found


def _value(
    reader: pieces.Reader, where: dict[str, Place], prune: Callable, part: Part
) -> np.ndarray:
    """Reads a tensor from the run's checkpoint, and prunes it by its parameter's name."""
    leaf, turn = where[part.ours]
    place = tuple(n for n in (turn, part.expert) if n is not None)
    return part.layout.write(prune(part.ours, reader.read(leaf, place)))


def _describe(folder: pathlib.Path, workdir: pathlib.Path, config_json, dtype: str) -> None:
    """Writes config.json and, of a text, the tokenizer."""
    found = tokens.read(workdir)
    if found is not None:
        config_json |= {"bos_token_id": found.begin, "eos_token_id": found.end}
        if json.loads(found.content).get("permoe") == BYTES:
            say("the run's tokens are bytes, which transformers has no tokenizer.json for")
        else:
            (folder / tokens.FILE).write_bytes(found.content)
    text = json.dumps(config_json | {"torch_dtype": dtype}, indent=2) + "\n"
    (folder / published.FILE).write_text(text)


def _check_space(out: pathlib.Path, written: dict[str, Part], dtype: str) -> None:
    width = np.dtype(tensors.SAVED[dtype]).itemsize
    needed = pieces.size({name: part.shape for name, part in written.items()}) // 4 * width
    pieces.check_space(out, needed)
