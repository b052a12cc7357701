"""The flags that change how a run trains."""

from pathlib import Path
from typing import Any

import pytest

import dtkit
from dtkit.compression import METHODS, Compression
from dtkit.errors import InvalidInputError
from dtkit.recipe import Recipe
from dtkit.strategy import Strategy


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


@pytest.mark.parametrize(
    "text", ["none", "fp16", "bf16", "int8", "int4", "sign", "topk:0.01", "powersgd:4"]
)
def test_a_compression_is_written_as_it_is_read(text: str) -> None:
    assert str(Compression.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("zip", "choose one of none, fp16, bf16, int8, int4, sign, topk:RATIO, powersgd:RANK"),
        ("fp16:2", "fp16 takes no number; write --compress fp16"),
        ("topk", "RATIO must be a number greater than 0 and at most 1, as in topk:0.01"),
        ("topk:2", "RATIO must be"),
        ("topk:nan", "RATIO must be"),
        ("powersgd:1.5", "RANK must be a whole number greater than 0, as in powersgd:4"),
        ("powersgd:0", "RANK must be"),
    ],
)
def test_a_compression_that_there_is_not_is_refused(text: str, answer: str) -> None:
    with pytest.raises(InvalidInputError, match=answer):
        Recipe(compress=text)


@pytest.mark.parametrize(
    "text", ["ddp", "local-sgd:8", "diloco:32", "async:8", "async:inf", "gossip"]
)
def test_a_strategy_is_written_as_it_is_read(text: str) -> None:
    assert str(Strategy.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("fsdp", "--strategy fsdp: choose one of ddp"),
        ("ddp:2", "ddp takes no number; write --strategy ddp"),
        ("local-sgd", "H must be a whole number greater than 0, as in local-sgd:8"),
        ("diloco:0", "H must be"),
        ("diloco:1.5", "H must be"),
        ("local-sgd:inf", "H must be"),
        ("async", "STALENESS must be a whole number greater than 0 or inf, as in async:8"),
        ("async:0", "STALENESS must be"),
        ("gossip:2", "gossip takes no number"),
    ],
)
def test_a_strategy_that_there_is_not_is_refused(text: str, answer: str) -> None:
    with pytest.raises(InvalidInputError, match=answer):
        Recipe(strategy=text)


@pytest.mark.parametrize("strategy", ["async:8", "gossip"])
def test_free_ranks_do_not_know_which_batch_is_the_last(strategy: str) -> None:
    with pytest.raises(InvalidInputError, match="--accumulate 2 makes a step of the last batches"):
        Recipe(strategy=strategy, accumulate=2)


@pytest.mark.parametrize("flags", [{"batch": "global"}, {"compress": "fp16"}])
def test_what_does_not_go_with_a_strategy_is_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="not with --strategy local-sgd:8"):
        Recipe(strategy="local-sgd:8", **flags)


def test_every_method_is_a_module_of_its_name() -> None:
    folder = Path(dtkit.__file__).parent / "engine/reduce/compressors"
    modules = {path.stem for path in folder.glob("[a-z]*.py")} - {"base"}
    assert modules == set(METHODS) - {"none"}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"amp": "bf16"}, "--amp bf16 puts the cell's forward passes under autocast"),
        ({"accumulate": 4}, "--accumulate 4 holds the cell's optimizer steps back"),
        ({"compress": "int8"}, "--compress int8 changes how gradients are averaged"),
    ],
)
def test_what_changes_the_cell_is_refused_with_manual(
    flags: dict[str, object], reason: str
) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        Recipe(manual=True, **flags)  # type: ignore[arg-type]


def test_numbers_and_names_that_there_are_not_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="--accumulate 0: how many steps make one"):
        Recipe(accumulate=0)
    with pytest.raises(InvalidInputError, match="--amp half: choose one of bf16, fp16, off"):
        Recipe(amp="half")
    assert str(Recipe(amp="bf16", accumulate=4, compress="topk:0.01")) == (
        "--amp bf16 --accumulate 4 --compress topk:0.01"
    )
