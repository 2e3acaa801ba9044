"""Reads what the rows of a comparison are: "topk", "sparse_topk:p=1.5:k=1", "dense"."""

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping

from moe.errors import UsageError
from routers import ROUTERS

DENSE = "dense"  # an MLP of the experts' FLOPs in place of each layer of experts
DENSE_PARAMS = "dense_params"  # an MLP as wide as all experts together
BASELINES = (DENSE, DENSE_PARAMS)
ALL = "all"
# What rows must share to be comparable, or what makes a row and has a way of its own to be said.
SHARED = ("task", "seed", "router.name", "moe.dense")
SHARED += ("data.name", "data.data_dir", "data.train_split", "data.eval_split")
# Sections whose settings have names that a row's router, or another section, has: of these the
# section is said too.
IN_FULL = ("router.", "depth.", "prune.", "topk.", "optimizer.compress.")
_LONGEST = 120  # letters of a folder's name


@dataclasses.dataclass(frozen=True)
class Row:
    """Says which router a row has, or which dense model, and its own settings of config keys."""

    base: str
    settings: Mapping[str, str]

    @property
    def name(self) -> str:
        """Returns the row as a user may type it; two ways to say one row give one name."""
        own = f"router.{self.base}."
        pairs = sorted((key.removeprefix(own), value) for key, value in self.settings.items())
        return ":".join([self.base, *(f"{key}={value}" for key, value in pairs)])

    @property
    def folder(self) -> str:
        """Returns the name of the folder of the row's runs; a plain row's is its own name."""
        folder = re.sub(r"[^\w.,=+-]", "_", self.name.replace(":", ","))
        if len(folder) <= _LONGEST:
            return folder
        return f"{folder[:_LONGEST]},{hashlib.sha256(folder.encode()).hexdigest()[:10]}"

    def overrides(self, keys: Mapping[str, object]) -> dict[str, str]:
        """Returns the config keys that make the row, as text.

        An MLP of equal FLOPs is as wide as the K experts of a token, by
        `moe.tasks.flops.dense_width`; one of equal parameters is that of K = E.

        Args:
          keys: of the config without the row.
        """
        if self.base not in BASELINES:
            return {"router.name": self.base, **self.settings}
        made = {"moe.dense": "true"}
        if self.base == DENSE_PARAMS:
            experts = self.settings.get("moe.num_experts", keys["moe.num_experts"])
            made[f"router.{keys['router.name']}.k"] = str(experts)
            made["moe.capacity_factor"] = "1"
        return {**made, **self.settings}

    def with_settings(self, settings: Mapping[str, str]) -> "Row":
        """Returns the row with further settings."""
        return Row(self.base, {**self.settings, **settings})


def split(text: str) -> list[str]:
    """Returns the rows of a list with commas; with semicolons where a value has commas itself."""
    return text.split(";" if ";" in text else ",")


def parse(words: Iterable[str], keys: Mapping[str, object], everything: Iterable[str]) -> list[Row]:
    """Returns the rows that the words name, before their values are checked.

    Args:
      words: such as "topk" and "sparse_topk:p=1.5"; "all" stands for `everything`.
      keys: of the config, with its values.
      everything: names of the routers that fit the task, and "dense".

    Raises:
      UsageError: a router or a setting is unknown, or cannot differ between rows.
    """
    words = [each for word in words for each in (everything if word == ALL else [word])]
    return [_row(word, keys) for word in words]


def _row(word: str, keys: Mapping[str, object]) -> Row:
    base, *settings = (part.strip() for part in word.split(":"))
    if base not in ROUTERS and base not in BASELINES:
        raise UsageError(
            f"--rows: {base!r} is unknown; expected {', '.join([*ROUTERS, *BASELINES])}, or all"
        )
    found: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--rows: {setting!r} of {word!r}: expected KEY=VALUE")
        key = _key(name, base, keys)
        if key in found:
            raise UsageError(f"--rows: {word!r} sets {key} twice; set it once")
        found[key] = value
    return Row(base, found)


def _key(name: str, base: str, keys: Mapping[str, object]) -> str:
    """Returns the config key that a row's setting is of: the router's own ones come first."""
    own = f"router.{base}."
    if own + name in keys:
        return own + name
    try:
        key = full_key(name, keys)
    except UsageError as error:
        settings = [key.removeprefix(own) for key in keys if key.startswith(own)]
        has = f"; {base} has {', '.join(settings)}" if settings else ""
        raise UsageError(f"--rows: {base}: {error}{has}") from None
    router = keys["router.name"] if base in BASELINES else base
    if key.startswith("router.") and not key.startswith(f"router.{router}."):
        raise UsageError(f"--rows: {base}: {key} is a setting of another router")
    return key


def full_key(name: str, keys: Mapping[str, object]) -> str:
    """Returns the config key of that name, "optimizer.learning_rate" or "learning_rate" alone.

    Raises:
      UsageError: there is none, or several, or it is one that all rows share.
    """
    ends = [key for key in keys if key.endswith("." + name) and not key.startswith(IN_FULL)]
    if name in keys:
        ends = [name]
    if not ends:
        close = difflib.get_close_matches(name, [*keys, *(key.split(".")[-1] for key in keys)], 3)
        hint = f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""
        raise UsageError(f"{name!r} is no setting{hint}")
    if len(ends) > 1:
        raise UsageError(f"{name!r} may be {' or '.join(ends)}; say which")
    if ends[0] in SHARED:
        raise UsageError(f"{ends[0]} cannot differ between rows")
    return ends[0]
