"""What a table was measured on: the machine, the versions, the commit."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess

import jax

PACKAGES = ["jax", "jaxlib", "numpy", "scipy", "scikit-learn", "jaxopt", "numba", "softjax"]
PACKAGES += ["ott-jax", "torch", "entmax", "transformers"]


def describe() -> dict[str, str]:
    """Returns the name and value of each fact, for the head of a report."""
    devices = jax.devices()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return {
        "cpu": f"{_cpu_model()}, {_cores()} cores",
        "jax device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "libraries": versions,
        "commit": commit(),
    }


def version(package: str) -> str:
    """Returns the version of an installed package, else "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Returns the hash of the checked-out commit, and "dirty" if files differ from it."""
    root = pathlib.Path(__file__).parent.parent

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!docs")
        return git("rev-parse", "--short=12", "HEAD") + (" dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cores() -> int:
    """Those this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
