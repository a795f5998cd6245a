"""What compiled code refuses to make a program's numbers from, whoever calls it."""

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
