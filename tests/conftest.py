"""Settings every test shares."""

import os
from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings

# Property tests run beside builds on small machines, where a deadline only measures the neighbours.
settings.register_profile("jaxkv", deadline=None, database=None)
settings.load_profile("jaxkv")

# Meshes for tests that want one. The others run on the first device, and processes of their own have one.
jax.config.update("jax_num_cpu_devices", 8)

# Processes of one run share a GPU, of which JAX would otherwise give three quarters to the first.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU that JAX uses")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.cuda)])
def platform(request: pytest.FixtureRequest) -> Iterator[str]:
    """The platform whose first device a test uses."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param
