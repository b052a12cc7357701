"""Sets of ranks as people write them."""

import pytest

from dtkit._ranks import format_ranks, parse_ranks
from dtkit.errors import InvalidInputError


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("all", (0, 1, 2, 3)),
        ("0", (0,)),
        ("0,2", (0, 2)),
        ("1:3", (1, 2)),
        ("0,2:4", (0, 2, 3)),
        ("::2", (0, 2)),
        ("-1", (3,)),
        ("2,0,2", (0, 2)),
        (" 1 , 2 ", (1, 2)),
    ],
)
def test_named_ranks_are_sorted_and_counted_once(text: str, ranks: tuple[int, ...]) -> None:
    assert parse_ranks(text, 4) == ranks


@pytest.mark.parametrize(
    "text", ["", "4", "x", "0,", "1:1", "0-2", "1:2:0", "__import__('os')", "0.5"]
)
def test_what_names_no_rank_is_refused_with_the_range(text: str) -> None:
    with pytest.raises(InvalidInputError, match="0 to 3"):
        parse_ranks(text, 4)


@pytest.mark.parametrize(
    ("ranks", "world_size", "text"),
    [
        ([0, 1], 2, "all ranks"),
        ([0], 1, "rank 0"),
        ([2], 4, "rank 2"),
        ([3, 0], 4, "ranks 0, 3"),
        ([0, 1], 4, "ranks 0, 1"),
        ([0, 1, 2, 5], 8, "ranks 0–2, 5"),
        ([1, 0], None, "ranks 0, 1"),
    ],
)
def test_ranks_are_shown_short(ranks: list[int], world_size: int | None, text: str) -> None:
    assert format_ranks(ranks, world_size) == text
