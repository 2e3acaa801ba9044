"""The configuration of a run: its defaults, and the model and optimizer sections' meaning.

A config file in `configs/` starts from `default()` and changes what its experiment needs; the
command line changes the rest. Settings of a router have their defaults in the router's signature,
those of the augmentation in `moe.data.Augment`, and appear here by reading them.
"""

import dataclasses
import inspect
import json

from ml_collections import ConfigDict

from moe.data import Augment
from routers import ROUTERS

# Keys that change neither the numbers of a run nor its records: a run may go on with others.
# (Any mesh computes the same up to rounding; to the bit only the same mesh does.)
FREE_KEYS = ("checkpoint.every", "checkpoint.keep", "data.data_dir", "compile_cache")
FREE_KEYS += ("mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor")
FREE_KEYS += ("nonfinite",)  # of a run with such a step: "skip" goes on where "stop" stopped


def default() -> ConfigDict:
    """Returns every key with its default, locked: a misspelt key is an error."""
    config = ConfigDict(
        {
            "seed": 0,
            "num_steps": 1000,
            "batch_size": 128,  # over all processes
            "loss": "softmax",  # or "sigmoid"
            "nonfinite": "stop",  # at a step whose update is not finite; "skip": go on without it
            "compile_cache": "",  # a directory that keeps compiled programs for the next start
            "data": {
                "name": "digits",  # any TFDS image classification set in array_record form
                "data_dir": "",  # "": TFDS's own default
                "train_split": "train",
                "eval_split": "test",
                "image_size": 0,  # 0: that of the data set
                "channels": 0,  # 0: that of the data set; filled in when a run starts
                "num_classes": 0,  # the same
                "augment": {f.name: f.default for f in dataclasses.fields(Augment)},
            },
            "model": {
                "name": "vit",
                "size": "S",  # S, B, L or H; the explicit sizes below win where they are not 0
                "width": 0,
                "depth": 0,
                "mlp_dim": 0,
                "num_heads": 0,
                "patch_size": 16,
                "pool": "cls",  # or "mean"
                "position": "learned",  # or "sincos"
                "dropout": 0.0,
                "dtype": "float32",  # of the computation; "bfloat16" on accelerators
                "scan": False,  # True: equal blocks compile once, as a loop
                "remat": "none",  # what the backward pass computes again, see `moe.blocks.REMATS`
            },
            "moe": {
                "layers": "last-2",  # last-N, every-N, a list of blocks such as "1,3", or none
                "num_experts": 8,
                "expert_dim": 0,  # hidden width F of an expert; 0: mlp_dim
                "dropout": 0.0,  # inside the experts
                "group_size": 1,  # whole examples that are routed together
                "capacity_factor": 1.05,
                "eval_capacity_factor": 2.0,
                "dispatch": "capacity",  # dropless or dense, the reference
                # Of dropless. Rows of a group, in K per token, where a router does not bound them:
                "dropless_bound": 2.0,
                # rows that one device sends to another, in fair shares, where experts are spread:
                "dropless_receive": 2.0,
                "dense": False,  # True: an MLP of the experts' FLOPs in place of each MoE layer
            },
            "router": {
                "name": "topk",
                **{name: router_settings(name) for name in ROUTERS},
            },
            "optimizer": {
                "name": "adamw",  # adamw, sgd or adafactor
                "learning_rate": 1e-3,  # peak
                "schedule": "cosine",  # cosine, linear, rsqrt or constant, after the warmup
                "warmup_steps": 100,
                "weight_decay": 0.05,  # on matrices only
                "b1": 0.9,  # momentum of sgd
                "b2": 0.999,
                "grad_clip": 1.0,  # global norm; 0: off
                "label_smoothing": 0.0,
                "accumulate": 1,  # micro-batches per step
                # "bfloat16": every gradient crosses devices so; "float32": as its layer computes.
                "grad_dtype": "float32",
                "ema_decay": 0.0,  # 0: off; otherwise evaluation uses the averaged parameters
            },
            # Another run whose parameters to start from, a dense one's as experts; "": none.
            "init": {"workdir": "", "step": -1},  # -1: the newest
            # Devices along each axis of `moe.mesh`; -1: all that the others leave.
            "mesh": {"data": -1, "fsdp": 1, "expert": 1, "tensor": 1},
            "checkpoint": {"every": 500, "keep": 3},  # beside the newest `keep`, the best stays
            "eval": {"every": 500, "batch_size": 256},
            "log": {"every": 50},
        }
    )
    return config.lock()


def router_settings(name: str) -> dict:
    """Returns a router's settings and their defaults, read from its signature."""
    parameters = inspect.signature(ROUTERS[name].__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "rngs"}


def flatten(config: ConfigDict) -> dict[str, object]:
    """Returns {"data.name": value, ...}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns "key=old, now new" for each key whose change makes another run."""
    a, b = flatten(old), flatten(new)
    return [
        f"{key}={a.get(key, 'absent')!r}, now {b.get(key, 'absent')!r}"
        for key in sorted(a.keys() | b.keys())
        if key not in FREE_KEYS and a.get(key) != b.get(key)
    ]


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns a config from `to_json`, locked; keys that came later have their defaults.

    Lists become the tuples that they were.
    """

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(value) if isinstance(value, list) else value

    config = default()
    config.update(tuples(json.loads(text)))
    return config.lock()
