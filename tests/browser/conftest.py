"""A real JupyterLab in a real Chromium, both of this test alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

import psutil
import pytest
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

TOKEN = "of-this-test"  # noqa: S105  the server listens on loopback and lives for a minute
START_TIMEOUT_S = 60.0
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
QUIET = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
}
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


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


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, owned_pids: set[int]) -> Iterator[Lab]:
    """JupyterLab with folders of its own; everything it started is ended afterwards."""
    home = tmp_path_factory.mktemp("lab")
    settings = home / "config/lab/user-settings"
    for name, value in QUIET.items():
        path = settings / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(value))
    folder = home / "notebooks"
    folder.mkdir()
    process = _start(home, folder)
    owned_pids.add(process.pid)
    try:
        yield Lab(_address(process, home / "runtime"), folder, settings)
    finally:
        family = [
            psutil.Process(process.pid),
            *psutil.Process(process.pid).children(recursive=True),
        ]
        process.terminate()
        process.wait(20)
        _, alive = psutil.wait_procs(family, timeout=10)
        for left in alive:
            left.kill()
        owned_pids.discard(process.pid)


@pytest.fixture(scope="module")
def browser(owned_pids: set[int]) -> Iterator[Browser]:
    """The system's own Chromium; what it starts later on is a child of what it starts here."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium on the PATH")
    before = {process.pid for process in psutil.Process().children()}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_FLAGS)
        started = {process.pid for process in psutil.Process().children()} - before
        owned_pids.update(started)
        yield browser
        browser.close()
    owned_pids.difference_update(started)


@pytest.fixture(autouse=True)
def no_leaked_thread() -> None:
    """Stand in for the guard: Playwright's event loop keeps its pool until the browser closes."""


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new page; a failure leaves a screenshot of it."""
    page = browser.new_page(viewport={"width": 1000, "height": 1100})
    page.set_default_timeout(30_000)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    yield page
    page.screenshot(path=SCREENSHOTS / "last.png")
    page.close()


def _start(home: Path, folder: Path) -> subprocess.Popen[bytes]:
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "PYTEST"))},
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "config/lab/user-settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "config/lab/workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0",
        "--ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}",
        "--LabApp.news_url=", "--ServerApp.log_level=ERROR",
    ]  # fmt: skip
    with (home / "lab.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)


def _address(process: subprocess.Popen[bytes], runtime: Path) -> str:
    """Return the server's address once it answers."""
    for _ in range(int(START_TIMEOUT_S / 0.1)):
        assert process.poll() is None, "JupyterLab ended while starting"
        for path in runtime.glob(f"jpserver-{process.pid}.json"):
            facts = json.loads(path.read_text() or "{}")
            if facts:
                return str(facts["url"]).rstrip("/")
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    pytest.fail("JupyterLab did not start in time")
