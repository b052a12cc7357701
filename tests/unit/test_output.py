"""What ranks print, as a terminal would show it."""

import pytest

from dtkit.output import MAX_CHARS, OutputBlock, RankOutput, merge_output


def shown(*pieces: str) -> str:
    output = RankOutput()
    for piece in pieces:
        output.write(piece)
    return output.text


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (("a\n", "b"), "a\nb"),
        (("10 %", "\r", "20 %"), "20 %"),
        (("10 %\r20 %\r30 %\n",), "30 %\n"),
        (("long line\rshort",), "shortline"),
        (("abc\b\bX",), "aXc"),
        (("\x1b[31mred\x1b[0m",), "red"),
        (("one\r\ntwo\r\n",), "one\ntwo\n"),
        (("\n\n",), "\n\n"),
        (("outer 0 %", "\n", "\rinner 0 %", "\x1b[A", "\router 9 %"), "outer 9 %\ninner 0 %"),
        (("a\nb\x1b[A\rc\n\rd\ne",), "c\nd\ne"),
        (("\x1b[Aa",), "a"),
    ],
)
def test_control_characters_act_as_on_a_terminal(pieces: tuple[str, ...], text: str) -> None:
    assert shown(*pieces) == text


def test_only_the_newest_text_is_kept_and_the_cut_is_said() -> None:
    output = RankOutput()
    for i in range(30_000):
        output.write(f"line {i:06d}\n")
    assert len(output.text) < MAX_CHARS + 100
    assert output.text.endswith("line 029999\n")
    first, *rest = output.text.splitlines()
    assert first == f"… {30_000 - len(rest):,} earlier lines are not shown"


@pytest.mark.parametrize("num_pieces", [1, 50])
def test_of_one_long_line_the_newest_is_kept(num_pieces: int) -> None:
    output = RankOutput()
    for i in range(num_pieces):
        output.write("x" * (1_000_000 // num_pieces - 1) + str(i % 10))
    first, rest = output.text.split("\n")
    assert first == "… 800,000 earlier characters are not shown"
    assert len(rest) == MAX_CHARS
    assert rest.endswith(str((num_pieces - 1) % 10))
    output.write("\rshort\n")
    assert output.text.split("\n")[1].startswith("short")


def test_clearing_forgets_everything() -> None:
    output = RankOutput()
    output.write("a\nb")
    output.clear()
    output.write("c")
    assert output.text == "c"


def test_equal_texts_are_merged_and_silent_ranks_left_out() -> None:
    outputs = {rank: RankOutput() for rank in range(4)}
    for rank, text in enumerate(["same\n", "other\n", "same\n", ""]):
        outputs[rank].write(text)
    assert merge_output(outputs) == (OutputBlock((0, 2), "same\n"), OutputBlock((1,), "other\n"))
