"""Makes a run of a model's directory: its config, a checkpoint of step 0, its tokenizer."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe.checks import check
from moe.config import default, to_json
from moe.data.staging import staging
from moe.data.text import tokenizer as tokenizers
from moe.errors import UsageError
from moe.screen import say
from moe.store import pieces, tokens
from moe.store.huggingface import families, published, tensors
from moe.store.huggingface.matching import match
from moe.store.huggingface.shapes import shapes_of
from moe.store.huggingface.vit import interpolated, side
from moe.store.origins import Part


class Wishes(NamedTuple):
    """Holds what may be asked for beside what a directory says; 0 or "" for what it says.

    Attributes:
      seq_len: tokens of a row, at most as many as the model was made for.
      image_size: pixels along a side, of a vision transformer.
      begin, end: the tokens before and after a document.
    """

    seq_len: int = 0
    image_size: int = 0
    begin: str = ""
    end: str = ""


def import_run(source: pathlib.Path, out: pathlib.Path, wishes: Wishes) -> None:
    """Makes a run in `out` of the model in `source`; what is there after an error was there before.

    One tensor, or one expert's part of a tensor, is in memory at a time.

    Raises:
      UsageError: the directory holds no model that is known here, or the disk has no room.
    """
    model = published.read(source)
    family = families.of_model(model)
    settings = _settings(family, model)
    marks = _tokenizer(source, model, settings, wishes) if family.task == "text" else None
    if marks is not None:
        settings["data.tokenizer"] = tokenizers.fingerprint(marks.content)
    asked = _asked(family.task, settings, wishes)
    made = _config(family.task, settings | asked)
    shapes = shapes_of(made)
    found = tensors.find(source)
    used = _match(family, settings, shapes, found, asked)
    pieces.check_space(out, pieces.size(shapes))
    with staging(out) as folder:
        _write(folder / "checkpoints" / "0", shapes, used, found)
        if marks is not None:
            tokens.write(folder, marks.content, marks.begin, marks.end)
        (folder / "config.json").write_text(to_json(made))
    _report(source, out, family, shapes, settings, asked, marks)


def _settings(family, model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a run's config that a directory says."""
    try:
        return family.settings(model)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"config.json has a value of an unknown kind ({error})") from error


def _asked(task: str, settings: Mapping[str, Any], wishes: Wishes) -> dict[str, Any]:
    """Returns the keys that are other than the directory says, by a flag."""
    own = {"text": "seq_len", "images": "image_size"}[task]
    for flag in ("seq_len", "image_size"):
        if getattr(wishes, flag) and flag != own:
            raise UsageError(f"--{flag} has no meaning for a model of the task {task!r}")
    value = getattr(wishes, own)
    if task == "text" and value > settings["data.seq_len"]:
        raise UsageError(
            f"--seq_len={value} is above the {settings['data.seq_len']} tokens of config.json"
        )
    if task == "images" and value % settings["model.patch_size"]:
        raise UsageError(
            f"--image_size={value} is no multiple of the patches of {settings['model.patch_size']}"
        )
    return {f"data.{own}": value} if value and value != settings[f"data.{own}"] else {}


def _config(task: str, settings: Mapping[str, Any]):
    """Returns the config of the run, checked."""
    made = default(task)
    made.update_from_flattened_dict(dict(settings))
    made.batch_size = made.eval.batch_size = 8  # rows may be long
    try:
        check(made)
    except UsageError as error:
        raise UsageError(f"what config.json says fits no model here: {error}") from error
    return made.lock()


def _match(family, settings, shapes, found, asked) -> dict[str, list[Part]]:
    """Returns what each tensor is read for; a head that the directory lacks is left out."""
    rules = family.rules
    if family.task == "images":
        patches = settings["data.image_size"] // settings["model.patch_size"]
        layout = interpolated(patches, side(shapes["position"]))
        if "data.image_size" in asked:
            rules = tuple(r._replace(layout=layout) if r.ours == "position" else r for r in rules)
    wanted = {name: shape for name, shape in shapes.items() if not name.startswith(family.fresh)}
    return match(rules, wanted, found, family.skipped)


def _write(folder: pathlib.Path, shapes, used: dict[str, list[Part]], found) -> None:
    """Writes the checkpoint, tensor by tensor; what no tensor is read for is zeros."""
    split = {part.ours for of in used.values() for part in of if part.expert is not None}
    writer = pieces.Writer(folder, shapes, split)
    for name, part_of in tensors.read({name: found[name] for name in used}):
        for part in used[name]:
            value = part.layout.read(part_of(part.index), part.shape)
            writer.write(part.ours, value, part.expert)
            del value  # before the next one is read
    for name in shapes.keys() - {part.ours for of in used.values() for part in of}:
        writer.write_zeros(name)
    writer.finish()


def _tokenizer(source: pathlib.Path, model: Mapping[str, Any], settings, wishes: Wishes):
    """Returns the directory's tokenizer, None where it has none."""
    file = source / tokenizers.FILE
    if not file.exists():
        return None

    def mark(key: str) -> int | None:
        value = model.get(key)
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) else None

    begin, end = wishes.begin or mark("bos_token_id"), wishes.end or mark("eos_token_id")
    found = tokenizers.read(file, begin, end)
    if found.vocabulary > settings["data.vocabulary"]:
        raise UsageError(
            f"{file} has {found.vocabulary} tokens and the model of config.json "
            f"{settings['data.vocabulary']}: they do not belong together"
        )
    return found


def _report(source, out, family, shapes, settings, asked, marks) -> None:
    """Says what was made, and what was not taken as it was."""
    count = pieces.size(shapes) // 4
    say(f"imported {family.architecture} of {source} to {out}: {count:,} parameters")
    if "data.image_size" in asked:
        old, new = settings["data.image_size"], asked["data.image_size"]
        say(f"position embeddings were interpolated from images of {old} to {new} pixels")
    if family.fresh:
        say("the directory has no classifier: the head is zeros, of one class")
    if family.task == "text" and marks is None:
        say(f"there is no {tokenizers.FILE}: generate.py cannot read a prompt for this run")
