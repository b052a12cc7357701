"""The flags that change how a run trains."""

import pytest

from dtkit.errors import InvalidInputError
from dtkit.recipe import Recipe


def test_it_shows_only_what_differs_from_the_defaults() -> None:
    assert str(Recipe()) == ""
    assert str(Recipe(batch="global")) == "--batch global"
    assert str(Recipe(manual=True)) == "--manual"


def test_it_survives_json() -> None:
    recipe = Recipe(batch="global")
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("flags", [{"batch": "all"}, {"manual": True, "batch": "global"}])
def test_nonsense_is_refused_with_the_choices(flags: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match="global"):
        Recipe(**flags)  # type: ignore[arg-type]
