"""A dashboard that fails costs the picture, not the run."""

from __future__ import annotations

import pytest
from run_views import make_view

from dtkit.views.guarded import GuardedDashboard


class Broken:
    """Fails in the method that it is told to fail in."""

    def __init__(self, where: str) -> None:
        self._where = where

    def _do(self, what: str) -> None:
        if what == self._where:
            msg = "no front end"
            raise OSError(msg)

    def start(self, _view: object) -> None:
        self._do("start")

    def is_due(self) -> bool:
        return True

    def update(self, _view: object, _blocks: object) -> None:
        self._do("update")

    def finish(self, _view: object, _blocks: object) -> None:
        self._do("finish")


@pytest.mark.parametrize("where", ["start", "update", "finish"])
def test_text_takes_over_and_the_reason_is_said_once(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    dashboard = GuardedDashboard(Broken(where), said.append)
    dashboard.start(make_view())
    for _ in range(3):
        dashboard.update(make_view(), ())
    dashboard.finish(make_view(state="finished"), ())
    assert said == ["the dashboard failed (OSError: no front end); text instead"]
    assert "finished" in capsys.readouterr().out
