"""Holds every key of a run's configuration, with its default and its range, and how it is saved.

A config file in `configs/` starts from `default()` and changes what its experiment needs; the
command line changes the rest. A task brings its own keys (`moe.tasks`), and settings of a router
have their defaults and ranges in the router's signature; both appear here by reading them.
docs/config.md says how a range is written and which keys may change while a run lasts.
"""

import dataclasses
import functools
import json

from ml_collections import ConfigDict

from moe.errors import UsageError, check_all
from moe.nn.blocks import REMATS
from moe.nn.dispatch import DISPATCHES
from moe.nn.pruning import Pruning
from moe.nn.skip import SKIPS
from moe.plugins import GROUP, load_routers
from moe.ranges import COUNT, RATE, SIZE, Key, annotated, fit, keyword_settings
from moe.tasks import TASKS
from moe.train.optimizer import DIRECTIONS, SCHEDULES, warmup_steps
from routers import ROUTERS
from routers.compression import METHODS

# A run may go on with other values of these keys, and of all keys inside these sections: they
# change none of its numbers. (Any mesh computes the same up to rounding, to the bit only the same
# one does; another way with steps that are not finite matters from the next such step on.)
FREE_KEYS = ("checkpoint", "data.data_dir", "eval", "log", "mesh", "nonfinite")

# What config.json says of the program that wrote it: counted up when a key goes, gets another name
# or another meaning. Programs before the first number wrote none.
VERSION = 1
PATH_KEYS = ("data.data_dir", "init.workdir")
# Of older programs: a directory of compiled programs; the type in which gradients cross devices,
# which is their layer's in any case.
REMOVED_KEYS = ("compile_cache", "optimizer.grad_dtype")


class UnknownPart(UsageError):
    """A run's task or router is not registered here."""


def keys(task: str = "images") -> dict[str, Key]:
    """Returns every key of a task's configs, {"data.name": Key(default, range), ...}."""
    load_routers()
    sections = {
        "task": Key(task, (task,)),
        "seed": Key(0, "[0, 2^63)"),
        "num_steps": Key(1000, COUNT),
        "batch_size": Key(128, "[1, 1e6]"),  # over all processes
        # At a step whose update is not finite; "skip": go on without it.
        "nonfinite": Key("stop", ("stop", "skip")),
        "data": {
            "data_dir": Key(""),  # "": TFDS's own default
            "train_split": Key("train"),
            "eval_split": Key("test"),
        },
        "model": {
            "dtype": Key("float32", ("float32", "bfloat16")),  # of the computation
            "scan": Key(False),  # True: equal blocks compile once, as a loop
            # What the backward pass computes again, see `moe.nn.blocks.REMATS`.
            "remat": Key("none", tuple(REMATS)),
        },
        "moe": {
            "layers": Key("last-2"),  # last-N, every-N, a list of blocks such as "1,3", or none
            "num_experts": Key(8, "[1, 1e5]"),
            "expert_dim": Key(0, SIZE),  # hidden width F of an expert; 0: mlp_dim
            "dropout": Key(0.0, RATE),  # inside the experts
            "group_size": Key(1, "[1, 1e6]"),  # whole examples that are routed together
            "capacity_factor": Key(1.05, "(0, 1e4]"),
            "eval_capacity_factor": Key(2.0, "(0, 1e4]"),
            "dispatch": Key("capacity", tuple(DISPATCHES)),  # dense is the reference
            # Of dropless. Rows of a group, in K per token, where a router does not bound them:
            "dropless_bound": Key(2.0, "(0, 1e4]"),
            # rows that one device sends to another, in fair shares, where experts are spread:
            "dropless_receive": Key(2.0, "(0, 1e4]"),
            # True: an MLP of the experts' FLOPs in place of each MoE layer.
            "dense": Key(False),
        },
        # Mixture of depths: blocks that only chosen tokens of a row pass, see `moe.nn.skip`.
        "depth": {
            "layers": Key("none"),  # as moe.layers
            "router": Key("sparse", tuple(SKIPS)),  # of a text: threshold
            "capacity": Key(0.125, "(0, 1]"),  # share of a row's tokens that top-k ones choose
            # Of sparse, the operator's norm and strength.
            "p": Key(2.0, "(1, 100]"),
            "strength": Key(0.5, "[1e-6, 1e6]"),
            "final_strength": Key(0.0, "0 or [1e-6, 1e6]"),  # 0: the strength stays
            "gated": Key(False),  # True: top-k ones weigh by a gate too
            "threshold": Key(0.5, "[0.001, 0.999]"),  # of a gate
            "start": Key(0.0, "[-100, 100]"),  # of its logits, above the threshold's
            "alpha": Key(0.01, "[0, 1e3]"),  # weight of the loss that closes gates
            "gain": Key(1.0, "[1e-3, 1e3]"),  # of gates; 1 / threshold: all tokens begin at 1
            # Slots for taken tokens, shares of a row; what finds none is counted as dropped.
            "bound": Key(0.0, "[0, 1]"),  # in training; 0: capacity, and all for threshold
            "eval_bound": Key(1.0, "(0, 1]"),
        },
        "router": {
            "name": Key("topk", tuple(ROUTERS)),
            **{name: keyword_settings(router.__init__) for name, router in ROUTERS.items()},
        },
        "optimizer": {
            "name": Key("adamw", tuple(DIRECTIONS)),
            "learning_rate": Key(1e-3, "[0, 100]"),  # peak
            "schedule": Key("cosine", SCHEDULES),  # after the warm-up
            "warmup_steps": Key(-1, "-1 or [0, 2e9]"),  # -1: the next key's share of num_steps
            "warmup": Key(0.1, RATE),
            "weight_decay": Key(
                0.05, "[0, 1e3]"
            ),  # of matrices, 1 - learning_rate * weight_decay a step
            # Momentum of adamw, sgd, and of what muon leaves to adam; adafactor has none.
            "b1": Key(0.9, "[0, 0.999999]"),
            "b2": Key(0.999, "[0, 0.999999]"),  # of adam's second moment
            "momentum": Key(0.95, "[0, 0.999999]"),  # of muon's matrices
            "grad_clip": Key(1.0, "0 or [1e-6, 1e6]"),  # global norm; 0: off
            "accumulate": Key(
                1, "[1, 1e6]"
            ),  # micro-batches per step, see `moe.train.step.make_gradient`
            # Of gradients between shards of `data`, see `moe.train.compressed`: the share of the
            # entries that are sent (1: off), whether what is left is made up for, and how.
            "compress": {
                "keep": Key(1.0, "(0, 1]"),
                "feedback": Key(True),
                "method": Key("ef", tuple(METHODS)),
            },
            # 0: off; otherwise evaluation uses the averaged parameters.
            "ema_decay": Key(0.0, "[0, 0.999999]"),
        },
        "prune": {f.name: annotated(f.default, f.type) for f in dataclasses.fields(Pruning)},
        # Another run whose parameters to start from, a dense one's as experts; "": none.
        "init": {"workdir": Key(""), "step": Key(-1, "-1 or [0, 2e9]")},  # -1: the newest
        # Devices along each axis of `moe.hosts.mesh`; -1: all that the others leave.
        "mesh": {
            "data": Key(-1, "-1 or [1, 1e6]"),
            **{axis: Key(1, "-1 or [1, 1e6]") for axis in ("fsdp", "expert", "tensor")},
        },
        # Beside the newest `keep`, the best stays.
        "checkpoint": {"every": Key(500, COUNT), "keep": Key(3, COUNT)},
        "eval": {"every": Key(500, COUNT), "batch_size": Key(256, "[1, 1e6]")},
        "log": {"every": Key(50, COUNT)},
    }
    return flatten(sections) | flatten(TASKS[task].keys())


def default(task: str = "images") -> ConfigDict:
    """Returns every key of a task with its default, locked: a misspelt key is an error."""
    return _nested({name: key.default for name, key in keys(task).items()})


def check_ranges(config: ConfigDict) -> None:
    """Raises UsageError where values have another type than their key, or are outside its range."""
    values = flatten(config)
    task = values.get("task", "images")
    if task not in TASKS:
        raise UsageError(f"config.task={task!r} is unknown; expected {', '.join(TASKS)}")

    def look(name: str, key: Key) -> None:
        if name not in values:
            raise UsageError(f"the config has no {name}: start it from moe.config.default()")
        fit(name, values[name], key)

    check_all(functools.partial(look, name, key) for name, key in keys(task).items())


def flatten(config) -> dict[str, object]:
    """Returns {"data.name": value, ...} of nested sections."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= {f"{key}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns "key=old, now new" for each key whose change makes another run.

    A warm-up is the same whether its length was said in steps or as a share.
    """
    a, b = (
        used(config) | {"optimizer.warmup_steps": warmup_steps(config.optimizer, config.num_steps)}
        for config in (old, new)
    )
    return [
        f"{key}={a.get(key, 'absent')!r}, now {b.get(key, 'absent')!r}"
        for key in sorted(a.keys() | b.keys())
        if not is_free(key) and key != "optimizer.warmup" and a.get(key) != b.get(key)
    ]


def is_free(key: str) -> bool:
    """Tells whether a run may go on with another value of this key."""
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


def used(config: ConfigDict) -> dict[str, object]:
    """Returns the flat config without the settings of the routers that were not chosen."""
    return {
        key: value for key, value in flatten(config).items() if _is_used(key, config.router.name)
    }


def _is_used(key: str, router: str) -> bool:
    section, _, rest = key.partition(".")
    return section != "router" or "." not in rest or rest.startswith(router + ".")


def to_json(config: ConfigDict) -> str:
    """Returns what a run uses, and the version of what is written, as text."""
    saved = _nested(used(config)).to_dict()
    return json.dumps({"version": VERSION, **saved}, indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns a config from `to_json`, locked; keys that came later have their defaults.

    Raises:
      UsageError: it is no such text, or says what this program does not know.
    """
    try:
        saved = json.loads(text)
    except ValueError as error:
        raise UsageError(f"it is no JSON: {error}") from None
    if not isinstance(saved, dict):
        raise UsageError("it is no table of settings")
    version = saved.pop("version", 0)
    if not isinstance(version, int) or version > VERSION:
        raise UsageError(
            f"it was written by a newer program: it has version {version!r}, this one reads up to "
            f"{VERSION}"
        )
    values = flatten(saved)
    task, router = values.get("task", "images"), values.get("router.name", "topk")
    if task not in TASKS:
        raise UnknownPart(
            f"its task {task!r} is none of {', '.join(TASKS)}: if the run's config file registers "
            "it, say --config=FILE"
        )
    known = keys(task)
    if router not in ROUTERS:
        raise UnknownPart(
            f"its router {router!r} is none of {', '.join(ROUTERS)}: if the run's config file "
            "registers it, say --config=FILE; if a package does (its entry point in the group "
            f"{GROUP}), install that package here"
        )
    config = {name: key.default for name, key in known.items()}
    for name, value in values.items():
        if name in REMOVED_KEYS or not _is_used(name, router):
            continue
        if name not in known:
            raise UsageError(f"it has config.{name}, which this program (version {VERSION}) lacks")
        config[name] = fit(name, value, known[name])
    return _nested(config)


def _nested(flat: dict[str, object]) -> ConfigDict:
    """Returns the locked config of {"data.name": value, ...}."""
    config: dict = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        inner = config
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return ConfigDict(config).lock()
