"""A JupyterLab that is running, as tests address it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

__all__ = ["SCREENSHOTS", "TOKEN", "Lab"]

TOKEN = "of-this-test"  # noqa: S105  the server listens on loopback and lives for a minute
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, its folder of notebooks, its settings."""

    url: str
    folder: Path
    settings: Path

    def set_theme(self, theme: str) -> None:
        """Choose the theme that pages opened from now on have."""
        path = self.settings / "@jupyterlab/apputils-extension/themes.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"theme": theme}))

    def num_kernels(self) -> int:
        """Return how many kernels are running."""
        return len(self._call("GET", "api/kernels"))

    def end_kernels(self) -> None:
        """Shut all kernels down, as the user's «Shut Down All» does."""
        for session in self._call("GET", "api/sessions"):
            self._call("DELETE", f"api/sessions/{session['id']}")

    def _call(self, method: str, path: str) -> list[dict[str, str]]:
        headers = {"Authorization": f"token {TOKEN}"}
        with urlopen(Request(f"{self.url}/{path}", headers=headers, method=method)) as answer:  # noqa: S310
            text = answer.read()
        return json.loads(text) if text else []  # type: ignore[no-any-return]
