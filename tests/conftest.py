"""Settings every test shares."""

import jax
import pytest
from hypothesis import settings

# Property tests run beside builds on small machines, where a deadline only measures the neighbours.
settings.register_profile("jaxkv", deadline=None, database=None)
settings.load_profile("jaxkv")

# Meshes for tests that want one. The others run on the first device, and processes of their own have one.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU that JAX uses")
