"""The numbers of a program as compiled code makes them, and what it refuses to make them from."""

import numpy as np
import pytest

from jaxkv.host_pool import load_native

MOST = np.iinfo(np.int64).max


@pytest.mark.parametrize(
    ("layout", "num_chunks", "num_entries"),
    [
        ((1, 0, 8), 2, 8),
        ((2, 2, 8), 2, 8),
        ((MOST, MOST, 8), 1, 8),  # the sum of both and three blocks is 2**64
        ((0, 0, 8), 9, 8),
        ((1, -1, 8), 9, 8),
        ((1, 0, 8), 9, 2),
    ],
)
def test_blocks_without_a_chunk_or_an_entry_are_refused(layout, num_chunks, num_entries):
    ids, chunks = np.arange(3), np.zeros(num_chunks, np.int64)
    with pytest.raises(ValueError, match=r"each entry needs a chunk|more blocks than entries"):
        load_native().make_entries(ids, chunks, layout, (0, 0), num_entries)


@pytest.mark.parametrize("num_entries", [3, 8, 4096])
def test_entries_beyond_the_blocks_are_skipped_and_at_address_zero(num_entries):
    ids, chunks = np.array([5, -1, 2]), np.array([70, 7])
    for _ in range(20):  # So that memory comes up that was in use.
        numbers, num_blocks = load_native().make_entries(ids, chunks, (2, 1, 8), (11, 12), num_entries)
        padding = num_entries - 3
        assert numbers.tolist() == [11, 12, 5, -1, 2, *[-1] * padding, 78, 7, 15, *[0] * padding]
        assert num_blocks == 2
        numbers[:] = 9


@pytest.mark.parametrize("num_entries", [8, 128, 4096, 1 << 18])
def test_numbers_begin_where_xla_takes_them_without_a_copy(num_entries):
    made = [
        load_native().make_entries(np.arange(3), np.arange(3), (1, 0, 8), (0, 0), num_entries)[0]
        for _ in range(5)
    ]
    assert [numbers.ctypes.data % 64 for numbers in made] == [0] * 5
