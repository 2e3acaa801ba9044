"""Finds for each parameter of a run the tensors that it is made of, and for each tensor its use."""

import re
from collections.abc import Mapping

from moe.errors import UsageError, raise_all
from moe.store.huggingface.tensors import Tensor
from moe.store.origins import Part, Rule, find, parts


def match(
    rules: tuple[Rule, ...],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    skipped: tuple[str, ...],
) -> dict[str, list[Part]]:
    """Returns the parts that each tensor is read for, by the tensors' order.

    Args:
      rules: of the family.
      shapes: of the run's parameters.
      tensors: of the directory.
      skipped: patterns of names that have no place here, and need none.

    Raises:
      UsageError: a tensor is missing, not used, or has another shape than config.json says.
    """
    needed = [
        part for name, shape in shapes.items() for part in _parts(rules, name, shape, tensors)
    ]
    wrong = [
        f"{part.theirs} of {tensors[part.theirs].file} has the shape "
        f"{list(tensors[part.theirs].shape)}; by config.json it is {list(part.whole)}"
        for part in needed
        if part.theirs in tensors and tensors[part.theirs].shape != part.whole
    ]
    missing = dict.fromkeys(part.theirs for part in needed if part.theirs not in tensors)
    used: dict[str, list[Part]] = {name: [] for name in tensors}
    for part in needed:
        used.get(part.theirs, []).append(part)
    extra = [n for n, of in used.items() if not of and not any(re.fullmatch(s, n) for s in skipped)]
    if missing:
        wrong.insert(0, f"the model of config.json needs {_first(missing)}: no safetensors have it")
    if extra:
        wrong.insert(0, f"the model of config.json has no place for {_first(extra)}")
    raise_all(wrong[:3])
    return {name: of for name, of in used.items() if of}


def _parts(rules, name: str, shape, tensors) -> list[Part]:
    """Returns a parameter's parts by the first rule of which there is any tensor."""
    found = [parts(rule, number, name, shape) for rule, number in find(rules, name)]
    if not found:
        raise UsageError(f"{name} of the run has no name in this family")
    there = (of for of in found if any(part.theirs in tensors for part in of))
    return next(there, found[0])


def _first(names) -> str:
    """Returns the first few names."""
    return ", ".join(list(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
