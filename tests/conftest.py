"""Every test runs on eight fake CPU devices, so that sharding is always exercised.

Warnings are errors, but for those named in pyproject.toml.
"""

import os

flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
