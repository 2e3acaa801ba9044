"""Top-k along an axis that is spread over devices."""

import os
import subprocess
import sys


def test_same_numbers_and_only_scalars_per_row_between_devices():
    """In a process of its own, which starts with eight devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-m", "tests.routers.sharded_rows"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("collectives") == 5
