"""The first number that stood before, found by compiled code, against Python's sets."""

from __future__ import annotations

import numpy as np
import pytest

from jaxkv.host_pool import load_native

MOST = np.iinfo(np.int64).max


def expected(values: list[int]) -> int | None:
    seen: set[int] = set()
    for at, value in enumerate(values):
        if value >= 0 and value in seen:
            return at
        seen.add(value)
    return None


@pytest.mark.parametrize(
    "values",
    [
        [],
        [7],
        [0, 1, 2],
        [-1, 0, 1],
        [-1, -1, 0, -1],
        [0, 0],
        [2, 1, 0],
        [3, 1, 3, 1],
        [1, 3, 3, 1, 1],
        [MOST, 0],
        [MOST, 0, MOST],
        [0, MOST, MOST],
        [-1, -1],
        [5, -1, -1, 5],
        [1023, 0, 1023, 0],
        [1024, 0, 512, 1024],
        [4096, 512, 4608, 512],
        [0, -1, -1, 0],
        [1 << 40, 0, 3 << 40, 1 << 40],
        [1 << 62, 0, 1 << 62],
        [MOST, 1 << 62, MOST - 1, 1 << 62],
    ],
)
def test_the_first_repeated_number_is_found(values):
    assert load_native().first_repeated(np.array(values, np.int64)) == expected(values)


@pytest.mark.parametrize("end", [2, 30, 300, 10**6, 10**12])
@pytest.mark.parametrize("step", [1, 512, 3 * 4096])
@pytest.mark.parametrize("seed", range(20))
def test_random_numbers_dense_and_sparse(seed, step, end):
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, end, size=int(rng.integers(2, 60))) * step
    values[rng.integers(len(values))] = values[0]
    assert load_native().first_repeated(values) == expected(values.tolist())
