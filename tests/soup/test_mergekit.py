"""fastalign's merges held to the values that mergekit 0.1.5 made of the same recipes (python
tools/compare_mergekit.py --store)."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import compare_mergekit

STORED = json.loads(Path(__file__).with_name("mergekit_values.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        name: str(compare_mergekit.make_model(root / name, i, more=2 * (name == "E")))
        for i, name in enumerate(compare_mergekit.NAMES)
    }


@pytest.mark.parametrize("name", compare_mergekit.RECIPES)
def test_a_recipe_gives_what_mergekit_made_of_it(models, tmp_path, name):
    recipe = compare_mergekit.named(compare_mergekit.RECIPES[name], models, "float32")
    assert compare_mergekit.ours(recipe, tmp_path / "out") is None
    result, wanted = compare_mergekit.digest(tmp_path / "out"), STORED[name]
    assert result.keys() == wanted.keys()
    for group, sums in wanted.items():
        assert result[group] == pytest.approx(sums, abs=5e-4), group
