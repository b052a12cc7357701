"""What the magics' lines may say, and what they answer to what they may not."""

import ast

import pytest
from IPython.core.error import UsageError

from dtkit.cluster import place_local
from dtkit.errors import InvalidInputError
from dtkit.magics import PARSERS, carrying, lines, opening
from dtkit.magics.arguments import HelpShown, Parser
from dtkit.magics.awaiting import rewrite
from dtkit.magics.cells import with_header


@pytest.mark.parametrize("parser", PARSERS.values(), ids=lambda parser: parser.prog)
def test_help_is_printed_and_nothing_else_happens(
    parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HelpShown):
        parser.parse("-h")
    assert parser.prog in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parser", "line", "text"),
    [
        (opening.INIT, "--bakend gloo", "did you mean --backend?"),
        (opening.INIT, "-n two", "invalid int value: 'two'"),
        (opening.INIT, "-n", "expected one argument"),
        (opening.INIT, "--backend mpi", "invalid choice: 'mpi'"),
        (opening.INIT, "--devices '0", "check the quotes"),
        (lines.TRAIN, "--batch both", "invalid choice: 'both'"),
        (lines.TRAIN, "--manul", "did you mean --manual?"),
        (lines.TRAIN, "--checkpoint-every often", "invalid int value: 'often'"),
        (lines.TRAIN, "--resume", "expected one argument"),
        (carrying.PULL, "", "required"),
        (opening.STATUS, "now", "unrecognized arguments: now"),
    ],
)
def test_a_line_that_cannot_be_read_says_what_would_be_right(
    parser: Parser, line: str, text: str
) -> None:
    with pytest.raises(UsageError, match="lists the options") as caught:
        parser.parse(line)
    assert text in str(caught.value)


@pytest.mark.parametrize("lease", ["-1", "nan", "inf"])
def test_a_lease_is_a_number_of_minutes(lease: str) -> None:
    with pytest.raises(InvalidInputError, match="for example --lease 15"):
        opening.parse_init(f"--lease={lease}")


def test_a_session_that_is_taken_over_stays_as_it_is() -> None:
    assert opening.parse_init("--attach").attach == ""
    assert opening.parse_init("--attach abc").attach == "abc"
    assert opening.parse_init("").attach is None
    with pytest.raises(UsageError, match="leave out -n, --lease"):
        opening.parse_init("-n 2 --attach --lease 3")


@pytest.mark.parametrize("num_ranks", ["0", "-1", "1000000000"])
def test_a_number_of_ranks_that_no_host_takes(num_ranks: str) -> None:
    with pytest.raises(InvalidInputError, match="one host takes 1 to 1024 ranks"):
        place_local(opening.parse_init(f"-n={num_ranks}").n, "cpu")


def test_a_script_keeps_its_own_arguments() -> None:
    args = lines.parse_train("--batch global --name a train.py --lr 3 -h", is_cell=False)
    assert (args.batch, args.name) == ("global", "a")
    assert args.words == ["train.py", "--lr", "3", "-h"]
    args = lines.parse_train("--name 'a b' 'my train.py' 'x y'", is_cell=False)
    assert (args.name, args.words) == ("a b", ["my train.py", "x y"])
    with pytest.raises(UsageError, match="%%dist_train"):
        lines.parse_train("--manual", is_cell=False)


@pytest.mark.parametrize(
    ("line", "is_cell", "expected"),
    [
        ("x + 1", False, ("all", "x + 1")),
        ("-r 0,1 x - 1", False, ("0,1", "x - 1")),
        ("--ranks 1: x", False, ("1:", "x")),
        ("-x", False, ("all", "-x")),
        ("", True, ("all", "")),
        ("-r 1", True, ("1", "")),
    ],
)
def test_an_expression_is_taken_as_it_is(
    line: str, *, is_cell: bool, expected: tuple[str, str]
) -> None:
    assert lines.split_dist(line, is_cell=is_cell) == expected


@pytest.mark.parametrize(("line", "is_cell"), [("", False), ("-r", False), ("oops", True)])
def test_a_dist_line_without_sense_is_refused(line: str, *, is_cell: bool) -> None:
    with pytest.raises(UsageError):
        lines.split_dist(line, is_cell=is_cell)


def test_only_our_cells_are_rewritten() -> None:
    for cell in ("x = 1\n", "%%time\n1\n", "%%dist_trainer\n1\n", "%%dist_train?\n", "%dist x\n"):
        assert rewrite([cell]) == [cell]
    (line,) = rewrite(["%%dist_train --batch global\n", "print('a')\n", "x = '%'\n"])
    compile(line, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert "'--batch global'" in line


def test_lines_keep_their_numbers() -> None:
    assert with_header("%%dist_train", "x = 1\n1/0\n").splitlines()[2] == "1/0"
    assert with_header("%%dist_train", "%%time\nx = 1\n") == "%%time\nx = 1\n"
    assert with_header("%%dist_train", "  x = 1\n") == "  x = 1\n"


def test_options_with_an_optional_value_leave_the_script_alone() -> None:
    args = lines.parse_train("--tensorboard --timeline --profile train.py --lr 1", is_cell=False)
    assert args.words == ["train.py", "--lr", "1"]
    assert (args.tensorboard, args.timeline, args.profile) == ("", "", 5)
    args = lines.parse_train(
        "--tensorboard=logs --timeline=t.json --profile=3 train.py", is_cell=False
    )
    assert args.words == ["train.py"]
    options = lines.options_of(args)
    assert (options.tensorboard, options.timeline, options.profile) == ("logs", "t.json", 3)
    args = lines.parse_train("--timeline t.json --tensorboard", is_cell=True)
    assert (args.timeline, args.tensorboard) == ("t.json", "")
    nothing = lines.options_of(lines.parse_train("", is_cell=True))
    assert (nothing.tensorboard, nothing.timeline, nothing.profile) == (None, None, 0)
