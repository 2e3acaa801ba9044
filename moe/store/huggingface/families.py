"""Finds the family of a published model, and of a run."""

from collections.abc import Mapping
from typing import Any

from moe.errors import UsageError
from moe.store.huggingface.decoders import DECODERS
from moe.store.huggingface.vit import VITS

FAMILIES = (*DECODERS, *VITS)
PLAIN = "plain"
FORMATS = (*dict.fromkeys(family.kind for family in FAMILIES), PLAIN)


def of_model(published: Mapping[str, Any]):
    """Returns the family that a config.json is of.

    Raises:
      UsageError: it is none of those that are known.
    """
    said = published.get("architectures") or [None]
    for family in FAMILIES:
        if said == [family.architecture]:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UsageError(
        f"config.json says architectures={format(str(said), '.80')}, which is unknown here: "
        f"expected one of {known}"
    )


def of_run(settings: Mapping[str, Any], asked: str | None):
    """Returns the family that can hold a run, given its flat config, and its config.json.

    Args:
      asked: one of `FORMATS` but "plain"; None: the first that fits.

    Raises:
      UsageError: none does, or not the one that was asked for.
    """
    reasons = {}
    for family in FAMILIES:
        wanted = asked in (None, family.kind) and not family.fresh
        if family.task != settings["task"] or not wanted:
            continue
        if why := _obstacle(family, settings):
            reasons.setdefault(family.kind, why)
        else:
            return family, family.published(settings)
    found = "; ".join(f"{kind} needs {why}" for kind, why in reasons.items())
    raise UsageError(
        f"the run is of no shape that {asked or 'transformers'} has ({found or 'another task'}): "
        "--format=plain writes its parameters under their own names"
    )


def _obstacle(family, settings: Mapping[str, Any]) -> str:
    """Returns the first setting that a family's config.json cannot say; "" where it says all."""
    back = {**settings, **family.settings(family.published(settings))}
    ours, theirs = family.arithmetic(settings), family.arithmetic(back)
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            return f"{key}={theirs.get(key)!r}, not {ours.get(key)!r}"
    return ""
