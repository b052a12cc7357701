"""What is offered at the cursor, asked as a notebook asks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell

import dtkit
from dtkit.magics import MAGICS, PARSERS

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InteractiveShell]:
    folder = tmp_path_factory.mktemp("notebook")
    for name in ("first_run", "second_run"):
        (folder / "dtkit_runs" / name).mkdir(parents=True)
        (folder / "dtkit_runs" / name / "run.json").write_text("{}")
    shell = InteractiveShell()
    dtkit.load_ipython_extension(shell)
    shell.user_ns["mine"] = 1
    with contextlib.chdir(folder):
        yield shell
    dtkit.unload_ipython_extension(shell)
    InteractiveShell.clear_instance()


def offered(shell: InteractiveShell, text: str) -> list[str]:
    """Return what is offered where the `|` is."""
    at = text.index("|")
    code = text.replace("|", "")
    with provisionalcompleter():
        found = list(shell.Completer.completions(code, at))
    return [one.text for one in found]


def test_every_magic_has_a_parser_under_its_name() -> None:
    names = {name for made in MAGICS for kinds in made.magics.values() for name in kinds}
    assert names == set(PARSERS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%dist_init --ba|", ["--backend"]),
        ("%dist_init --backend |", ["auto", "nccl", "gloo"]),
        ("%dist_init --backend=g|", ["gloo"]),
        ("%dist_init --backend gloo --ba|", []),
        ("%%dist_train --am|\nx = 1", ["--amp"]),
        ("%%dist_train --amp b|\nx = 1", ["bf16"]),
        ("%%dist_train --compress top|\nx = 1", ["topk:0.01"]),
        ("%%dist_train --strategy di|\nx = 1", ["diloco:32"]),
        ("%%dist_train --resume f|\nx = 1", ["first_run"]),
        ("%%dist_sweep --amp off,b|\nx = 1", ["bf16"]),
        ("%%dist_sweep --compress none,int|\nx = 1", ["int8", "int4"]),
        ("%%dist_tune l|\nx = 1", ["lr"]),
        ("x = 1\n%dist_runs sec|", ["second_run"]),
        ("found = %dist_runs sec|", ["second_run"]),
        ("%dist_runs first_run --d|", ["--delete", "--dir"]),
        ("%dist_push mi|", ["mine"]),
    ],
)
def test_options_and_values_are_offered(
    shell: InteractiveShell, text: str, expected: list[str]
) -> None:
    assert offered(shell, text) == expected


@pytest.mark.parametrize(
    "text",
    ["%dist_status|", "%nothing --ba|", "%%time --ba|\nx", "mine = 3 % dist_init --ba|", "|"],
)
def test_what_is_not_ours_is_left_to_ipython(shell: InteractiveShell, text: str) -> None:
    assert "--backend" not in offered(shell, text)


def test_without_a_session_names_on_the_ranks_are_unknown(shell: InteractiveShell) -> None:
    assert "mode" not in offered(shell, "%dist_pull mod|")


def test_the_question_mark_shows_the_options(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.run_cell("%dist_init?")
    assert "--oversubscribe" in capsys.readouterr().out
