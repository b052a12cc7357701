"""RankError: the cause once, the echoes folded, and it pickles."""

import pickle

from dtkit.errors import RankError, RankFailure


def failure(rank: int, *, line: int | None = 3, is_echo: bool = False) -> RankFailure:
    name = "RuntimeError" if is_echo else "ValueError"
    return RankFailure(rank, name, "boom", f"traceback of {rank}", line, is_echo)


def test_the_same_error_on_several_ranks_is_shown_once() -> None:
    error = RankError((failure(0), failure(2)), "group rebuilt")
    assert str(error) == "ranks 0, 2: ValueError: boom (cell line 3)\ngroup rebuilt"
    assert "".join(error._render_traceback_()).count("traceback of") == 1


def test_errors_that_differ_in_a_number_only_have_one_traceback() -> None:
    texts = ("the loss is nan on rank 0 in step 6", "the loss is nan on rank 1 in step 6")
    other = RankFailure(2, "ValueError", "no loss", "traceback of 2", 3)
    failures = [
        RankFailure(i, "ValueError", t, f"traceback of {i}", 3) for i, t in enumerate(texts)
    ]
    assert RankError((*failures, other))._render_traceback_() == [
        "── ranks 0, 1, cell line 3 ──",
        "traceback of 0",
        "(rank 1: the loss is nan on rank 1 in step 6)",
        "── rank 2, cell line 3 ──",
        "traceback of 2",
    ]


def test_what_a_worker_raised_is_told_in_short_and_shown_whole() -> None:
    caught = (
        "Caught KeyError in DataLoader worker process 0.\n"
        "Original Traceback (most recent call last):"
        '\n  File "a.py", line 1, in f\n    raise KeyError("image 37")\nKeyError: \'image 37\'\n'
    )
    error = RankError((RankFailure(0, "KeyError", caught, f"KeyError: {caught}", 9),))
    assert str(error) == (
        "rank 0: KeyError: 'image 37', in DataLoader worker process 0 (cell line 9)"
    )
    assert "Original Traceback" in "".join(error._render_traceback_())


def test_echoes_are_folded_into_a_line() -> None:
    error = RankError((failure(1), failure(0, is_echo=True)))
    rendered = "\n".join(error._render_traceback_())
    assert error.causes == (failure(1),)
    assert "traceback of 1" in rendered
    assert "traceback of 0" not in rendered
    assert "rank 0 failed as a consequence" in rendered


def test_with_nothing_but_echoes_they_are_the_cause() -> None:
    error = RankError((failure(0, is_echo=True),))
    assert error.causes == error.failures


def test_it_pickles() -> None:
    error = RankError((failure(1),), "epilogue")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    assert (copy.failures, copy.epilogue, str(copy)) == (error.failures, "epilogue", str(error))
