import pytest
from hypothesis import given
from hypothesis import strategies as st

from molcli.config.layer_choice import Every, cheapest, chosen_layers, is_every, parse_choice
from molcli.config.recipe import load_recipe
from molcli.errors import MolError

ELIGIBLE = st.lists(st.integers(0, 40), unique=True).map(sorted)


@pytest.mark.parametrize(
    "text, choice",
    [
        ("all", "all"),
        ("none", "none"),
        ("auto", "auto"),
        ("every:4", "every:4"),
        ("7", [7]),
        ("0,3,7", [0, 3, 7]),
    ],
)
def test_the_command_line_and_the_recipe_agree(text: str, choice: object) -> None:
    assert parse_choice(text) == choice
    value = text if isinstance(choice, str) else f"[{text}]"
    recipe = load_recipe(None, [f"convert.gated_deltanet={value}"])
    assert recipe.convert.gated_deltanet == choice


@pytest.mark.parametrize(
    "text",
    [
        *("", "every", "every:0", "every:-1", "every:2x", "0,", "-1", "al"),
        *(f"every:{'9' * 5000}", "9" * 5000, "0" * 5000),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(MolError) as error:
        parse_choice(text)
    assert "every:N" in error.value.allowed
    with pytest.raises(MolError):
        load_recipe(None, [f"convert.gated_deltanet='{text}'"])


@given(ELIGIBLE, st.integers(1, 45))
def test_every_nth_is_the_last_of_n_neighbours(eligible: list[int], n: int) -> None:
    assert is_every(f"every:{n}")
    found = sorted(chosen_layers(Every(f"every:{n}"), eligible))
    assert found == [layer for place, layer in enumerate(eligible, 1) if place % n == 0]


@given(ELIGIBLE)
def test_words(eligible: list[int]) -> None:
    assert chosen_layers("all", eligible) == chosen_layers(Every("every:1"), eligible)
    assert chosen_layers("none", eligible) == chosen_layers("auto", eligible) == set()


@given(st.dictionaries(st.integers(0, 40), st.floats(-1, 1)), st.floats(0, 1))
def test_the_cheapest_cost_no_more_than_the_others(costs: dict[int, float], share: float) -> None:
    taken = cheapest(costs, share)
    assert len(taken) == round(share * len(costs))
    others = costs.keys() - taken
    assert all(costs[a] <= costs[b] for a in taken for b in others)
