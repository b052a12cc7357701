"""A real JupyterLab in a real Chromium, both of this test alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest
from lab import SCREENSHOTS, TOKEN, Lab
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

START_TIMEOUT_S = 60.0
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
        # Now and then JupyterLab itself waits for one of its threads for ever when all is closed.
        _, alive = psutil.wait_procs(family, timeout=30)
        for left in alive:
            left.kill()
        process.wait()
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
