"""An interrupt that comes at a bad moment waits for the end of it."""

import signal
import threading

import pytest

from dtkit.cluster import interrupt_held


def work(num_interrupts: int, done: list[str], error: Exception | None = None) -> None:
    with interrupt_held():
        for _ in range(num_interrupts):
            signal.raise_signal(signal.SIGINT)
        done.append("all")
        if error:
            raise error


@pytest.mark.parametrize(("num_interrupts", "expected"), [(1, ["all"]), (2, [])])
def test_one_waits_for_the_end_and_a_second_does_not(
    num_interrupts: int, expected: list[str]
) -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        work(num_interrupts, done)
    assert done == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_is_not_hidden_by_it() -> None:
    with pytest.raises(ValueError, match="first"):
        work(1, [], ValueError("first"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_get_none() -> None:
    done: list[str] = []
    thread = threading.Thread(target=work, args=(0, done))
    thread.start()
    thread.join()
    assert done == ["all"]
