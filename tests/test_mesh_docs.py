"""The program in ``docs/meshes.md`` runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parents[1] / "docs" / "meshes.md"


def test_the_program_of_the_page_moves_blocks_of_its_data_shard() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["canonical"].records[0].num_data_shards == 2
    assert not names["canonical"].per_shard_layers
    assert names["ticket"].wait().num_bytes == 3 * 2 * 16 * 8 * 64 * 2
    assert np.all(np.array(names["kv_caches"]["layers.0"]) == 1)
