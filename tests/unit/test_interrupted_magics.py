"""■ in a magic that waits."""

from __future__ import annotations

import pytest

from dtkit.driver.waiting import Interrupted
from dtkit.magics.arguments import usage_errors


def test_an_interrupt_shows_what_was_interrupted_and_none_of_our_frames() -> None:
    @usage_errors
    def dist_pull(_line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="%dist_pull was not done to its end") as caught:
        dist_pull("model")
    assert caught.value.__suppress_context__
    assert caught.value._render_traceback_() == ["Interrupted: %dist_pull was not done to its end"]
