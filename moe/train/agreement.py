"""Compares what the processes of a run were told, before any of them computes.

One that has another learning rate would train along silently, every record wrong; one with another
number of steps, other code or another library would leave the rest waiting for a collective.
"""

import hashlib
import importlib.metadata
import inspect
import json
import os
import pathlib

import jax
from ml_collections import ConfigDict

import isotonic
import moe
import routers
from moe.config import flatten
from moe.hosts.distributed import AgreedError, gather, together
from moe.tasks.task import Source

OWN_KEYS = ("data.data_dir", "compile_cache")  # places, which every host may have elsewhere
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")
JAX_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl")
JAX_SETTINGS += ("jax_threefry_partitionable", "jax_platforms")
SHOWN = 4  # differences


def agree(config: ConfigDict, *sources: Source, **told: object) -> None:
    """Compares the config, the program, the libraries and the data of all processes.

    Args:
      config: of the run, with what the data filled in.
      *sources: the splits that will be read.
      **told: what else they must have been told alike, by its name.

    Raises:
      AgreedError: on all of them; names what a process has otherwise than process 0.
    """
    if jax.process_count() == 1:
        return
    own = together(lambda: told | _told(config, sources))
    first, *others = map(json.loads, gather(json.dumps(own, default=repr)))
    for number, other in enumerate(others, 1):
        changed = [
            f"{key} is {other.get(key, 'absent')!r} and not {first.get(key, 'absent')!r}"
            for key in sorted(first.keys() | other.keys())
            if other.get(key, "absent") != first.get(key, "absent")
        ]
        if changed:
            raise AgreedError(
                f"process {number} was told something else than process 0: "
                f"{'; '.join(changed[:SHOWN])}{' ...' if len(changed) > SHOWN else ''}; give every "
                "process the same command, program and data"
            )


def _told(config: ConfigDict, sources) -> dict[str, object]:
    told = {f"config.{k}": v for k, v in flatten(config).items() if k not in OWN_KEYS}
    told["the program's source"] = _program()
    told |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    told |= {name: getattr(jax.config, name) for name in JAX_SETTINGS}
    flags = os.environ.get("XLA_FLAGS", "").split()
    told["XLA_FLAGS"] = " ".join(sorted(f for f in flags if not f.startswith("--xla_dump")))
    return told | {f"the data of split {s.split!r}": s.fingerprint for s in sources}


def _program() -> str:
    """Returns a digest of the source of this project, and of routers that others registered."""
    files = {}
    for package in (isotonic, moe, routers):
        root = pathlib.Path(package.__file__).parent
        files |= {f"{root.name}/{p.relative_to(root)}": p for p in root.rglob("*.py")}
    for name, router in routers.ROUTERS.items():
        functions = filter(inspect.isfunction, vars(router).values())
        files |= {f"{name}: {f.__name__}": pathlib.Path(f.__code__.co_filename) for f in functions}
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(name.encode() + b"\0")
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:12]
