"""Every test runs on eight fake CPU devices, so that sharding is always exercised.

Arrays of different rank never meet silently: a broadcast that was not meant is an error. Warnings
are errors too, but for those named in pyproject.toml.
"""

import os

flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
