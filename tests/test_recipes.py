"""Each recipe runs by itself, anywhere, and checks that what came back is what left."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxkv

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.py"))
NEEDS = {"flax_nnx": "flax"}
LAST_LINE = {
    "flax_nnx": "8 tokens are back in other pages, same logits",
    "gemma_dense": "40 tokens are back in another row",
    "gpu_paged_attention": "192 bytes a page, same answer",
    "maxtext_dense": "8 tokens are back in another row",
    "ragged_paged_attention": "same bytes",
    "sglang_pools": "[-1, 3] came back as [-1, 1], same bytes",
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_from_any_folder_and_finds_its_own_bytes_back(recipe, tmp_path):
    package = NEEDS.get(recipe.stem)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; make test-families runs this recipe")
    search = [str(Path(jaxkv.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(recipe)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(LAST_LINE[recipe.stem])
    assert list(tmp_path.iterdir()) == []


def test_the_docs_include_code_of_every_recipe():
    page = (ROOT / "docs" / "recipes.md").read_text()
    included = {
        (name, part) for name, part in re.findall(r'^--8<-- "examples/recipes/(.*?):(.*)"$', page, re.M)
    }
    assert {name for name, _ in included} == {path.name for path in RECIPES}
    for name, part in included:
        source = (ROOT / "examples" / "recipes" / name).read_text()
        assert source.count(f"[start:{part}]") == source.count(f"[end:{part}]") == 1
