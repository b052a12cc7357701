"""CellOutput: messages of a cell, from several ranks."""

from typing import Any

from dtkit.driver.runs.celloutput import CellOutput
from dtkit.events import Event, Note, encode


def message(kind: str, buffers: list[bytes] | None = None, **content: Any) -> dict[str, Any]:
    return {"header": {"msg_type": kind}, "content": content, "buffers": buffers or []}


def figure(png: str, **more: Any) -> dict[str, Any]:
    return message("display_data", data={"image/png": png}, metadata={}, **more)


def test_text_results_and_events_go_their_own_ways() -> None:
    events: list[Event] = []
    output = CellOutput([0, 1], events.append)
    for rank in (0, 1):
        output.on_message(rank, message("stream", name="stdout", text="hello\n"))
        output.on_message(rank, message("execute_result", data={"text/plain": str(rank)}))
    lines = b"\n".join([encode(Note(0, "a")), encode(Note(1, "b"))])
    output.on_message(0, message("dtkit_events", [lines]))
    assert [(block.ranks, block.text) for block in output.blocks()] == [((0, 1), "hello\n")]
    assert output.results == {0: "0", 1: "1"}
    assert events == [Note(0, "a"), Note(1, "b")]


def test_equal_displays_of_all_ranks_are_one() -> None:
    output = CellOutput([0, 1])
    output.on_message(0, figure("same"))
    assert output.take_displays() == []
    output.on_message(1, figure("same"))
    (display,) = output.take_displays()
    assert (display.ranks, display.data) == ((0, 1), {"image/png": "same"})


def test_different_displays_stay_apart_and_the_rest_comes_at_the_end() -> None:
    output = CellOutput([0, 1])
    output.on_message(0, figure("a"))
    output.on_message(1, figure("b"))
    output.on_message(0, figure("only on 0"))
    assert [d.ranks for d in output.take_displays()] == [(0,), (1,)]
    assert [d.ranks for d in output.take_displays(is_final=True)] == [(0,)]


def test_an_update_replaces_the_display_with_its_id() -> None:
    output = CellOutput([0])
    transient = {"display_id": "x"}
    output.on_message(0, figure("old", transient=transient))
    update = message("update_display_data", data={"image/png": "new"}, transient=transient)
    output.on_message(0, update)
    assert [d.data for d in output.take_displays()] == [{"image/png": "new"}]


def test_clear_output_clears_the_rank() -> None:
    output = CellOutput([0])
    output.on_message(0, message("stream", name="stdout", text="old\n"))
    output.on_message(0, message("clear_output", wait=False))
    output.on_message(0, message("stream", name="stdout", text="new\n"))
    assert output.text_of(0) == "new\n"
