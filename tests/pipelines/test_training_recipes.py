"""Every training recipe is a function that tells its command, its number and its sources."""

from pathlib import Path

from pipelines import recipes
from pipelines.published import NONE_PUBLISHED, PUBLISHED
from pipelines.training_recipes import TRAINING_RECIPES

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
NUMBERS = {
    "yfcc15m-v2-clip-vit-b-32": 32.8,
    "yfcc15m-v2-slip-vit-b-32": 34.3,
    "yfcc15m-v2-filip-vit-b-32": 39.5,
    "yfcc15m-v2-declip-vit-b-32": 43.2,
    "yfcc15m-v2-defilip-vit-b-32": 45.0,
    "yfcc15m-v2-clip-rn50": 37.2,
    "yfcc15m-v2-slip-rn50": 28.5,
    "yfcc15m-v2-filip-rn50": 21.3,
    "yfcc15m-v2-declip-rn50": 44.4,
    "yfcc15m-v2-defilip-rn50": None,
    "yfcc15m-v1-clip-vit-b-16": 37.6,
    "yfcc15m-v1-slip-vit-b-16": 42.8,
    "cc3m-clip-rn50": 20.6,
    "cc3m-declip-rn50": 27.2,
    "cc3m-clip-vit-b-16": 17.1,
    "cc3m-slip-vit-b-16": 23.0,
    "cc12m-clip-vit-b-16": 36.5,
    "cc12m-slip-vit-b-16": 40.7,
    "yfcc100m-filip-vit-b-32": None,
    "declip-88m-declip-rn50": 62.5,
    "declip-88m-declip-vit-b-32": 66.2,
}
"""ImageNet zero-shot top-1, percent."""


def test_every_recipe_is_a_function_of_its_own_with_number_and_source() -> None:
    assert set(TRAINING_RECIPES) == set(PUBLISHED)
    for name, recipe in TRAINING_RECIPES.items():
        published = PUBLISHED[name]
        assert published.acc1 == NUMBERS.get(name)
        assert recipe("x").recipe == name
        text = " ".join(recipes.describe(name).split())
        assert f"Command: declip run {name} --sources.lists FILE" in text
        assert " Settings: " in text
        if published.acc1 is None:
            assert published.result == NONE_PUBLISHED
            assert f"Published: {NONE_PUBLISHED}" in text
            assert published.source == ""
        else:
            assert f"Published: {published.acc1:.1f} (ImageNet zero-shot top-1); " in text
            assert published.source in text


def test_the_documents_table_is_the_recipes() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCS.read_text().splitlines()
        if line.startswith("| `") and line.count("|") == 5
    ]
    assert [row[0].strip("`") for row in rows] == list(PUBLISHED)
    for name, number, source, ours in rows:
        published = PUBLISHED[name.strip("`")]
        assert number == ("-" if published.acc1 is None else published.result)
        assert source == (published.source or "-")
        assert ours == "not run"
