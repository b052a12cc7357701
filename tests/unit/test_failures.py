"""Failures in words: whose frames are shown, where ranks were, how an engine ended."""

from __future__ import annotations

import signal

from dtkit.cluster.deaths import exit_text, last_words
from dtkit.driver.failures import freed_text, own_frames

TRACEBACK = """\
-----------
RuntimeError                              Traceback (most recent call last)
Cell In[2], line 2
      1 if rank == 1:
----> 2     forward(x)

Cell In[1], line 2, in forward(x)
      1 def forward(x):
----> 2     return layer(x)

File ~/env/lib/python3.11/site-packages/torch/nn/modules/module.py:1775, in Module.call(self)
   1774 else:
-> 1775     return self._call_impl(*args)

File ~/env/lib/python3.11/site-packages/torch/nn/modules/linear.py:125, in Linear.forward(self)
--> 125     return F.linear(input)

RuntimeError: mat1 and mat2 shapes cannot be multiplied"""


def place(state: str, line: int | None = None, operation: str = "") -> dict[str, object]:
    return {"state": state, "line": line, "operation": operation}


def test_the_users_frames_are_shown_and_the_others_counted() -> None:
    text = own_frames(TRACEBACK)
    assert "site-packages" not in text
    assert "[… 2 frames in torch]\n\nRuntimeError: mat1" in text
    assert text.count("Cell In[") == 2


def test_a_traceback_without_a_frame_of_the_user_is_left_whole() -> None:
    blocks = TRACEBACK.split("\n\n")
    whole = "\n\n".join(blocks[2:])
    assert own_frames(whole) == whole


def test_a_script_of_the_users_is_his_own() -> None:
    text = "File ~/train.py:3, in main()\n      3 1 / 0\n\nZeroDivisionError: x"
    assert own_frames(text) == text


def test_ranks_that_were_at_the_same_place_share_a_clause() -> None:
    reduce = place("collective", 14, "all_reduce")
    text = freed_text({0: reduce, 2: reduce, 3: place("data", 9), 4: {}}, 5)
    assert text == (
        "ranks 0, 2 were in all_reduce (cell line 14) and were released; "
        "rank 3 was waiting for data (cell line 9) and was stopped; "
        "rank 4 was not answering and was stopped"
    )


def test_an_exit_code_in_words() -> None:
    assert exit_text(3) == "ended with exit code 3"
    assert exit_text(-signal.SIGSEGV) == "was killed by SIGSEGV"
    assert exit_text(-signal.SIGKILL, (1, 1)) == "was killed by SIGKILL"
    assert "out of memory" in exit_text(-signal.SIGKILL, (1, 2))
    assert exit_text(None) == "ended"


def test_the_last_words_are_not_those_of_ipyparallel() -> None:
    own = "2026-11-24 16:01:04.359 [Engine.1.1] Aborting queue\n"
    assert last_words("useful\n" + own) == "useful"
    crash = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1:\n  File a\n"
    assert last_words(own + crash + own).splitlines() == [
        "Fatal Python error: Segmentation fault", "Current thread 0x1:", "  File a",
    ]  # fmt: skip


def test_the_last_words_are_not_those_of_an_earlier_cell() -> None:
    cell = "2026-11-24 16:01:04.359 [Engine.1.1] Handling execute_request: 1_2\n"
    earlier = (
        cell + "2026-11-24 16:01:04.4 [Engine.1.1] Exception in execute request:\nValueError\n"
    )
    assert last_words(earlier) == "ValueError"
    assert last_words(earlier + cell) == ""
    assert last_words(earlier + cell + "terminate called\n") == "terminate called"
