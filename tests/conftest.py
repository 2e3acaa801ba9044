"""Every test runs on eight fake CPU devices, so that sharding is always exercised.

Warnings are errors, but for those named in pyproject.toml.
"""

import os

import pytest

flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Lets each worker load what it has compiled before: the compiler takes most of the time.

    A directory for each, since JAX writes its files in place, where another would read half of one.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compilation_cache.reset_cache()  # it may have been looked for, in vain
