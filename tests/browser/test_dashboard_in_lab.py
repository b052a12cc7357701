"""The dashboard as a person uses it: run, watch, reload, stop, reopen."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import nbformat
import pytest
from lab import SCREENSHOTS, TOKEN, Lab
from playwright.sync_api import Locator, Page, expect

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)

TRAINING = """\
%%dist_train --name watched
import time
import dtkit
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
X, y = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(y))
loader = DataLoader(data, batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
num_steps = 0
for epoch in range(2000):
    for xb, yb in loader:
        time.sleep(dtkit.control("sleep", 0.02, low=0.0, high=0.1))  # as slow as a larger model
        dtkit.control("mode", "plain", choices=["plain", "noisy"])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
        num_steps += 1
"""
CELLS = [
    "%load_ext dtkit\n%dist_init -n 2",
    TRAINING,
    "%dist num_steps > 10",
    "%env DTKIT_UI=widgets\n",
    TRAINING.replace("watched", "saved"),
    "%dist_shutdown",
]


def open_notebook(page: Page, lab: Lab, name: str) -> None:
    """Open a notebook in single-document mode and wait until its cells are there."""
    page.goto(f"{lab.url}/doc/tree/{name}?token={TOKEN}&reset")
    expect(page.locator(".jp-Notebook .jp-CodeCell").first).to_be_visible(timeout=60_000)


def wait_for_kernel(page: Page) -> None:
    """Return when the kernel is ready to run a cell."""
    expect(page.locator(".jp-Notebook-ExecutionIndicator")).to_have_attribute(
        "data-status", "idle", timeout=60_000
    )


def cell(page: Page, index: int) -> Locator:
    """Return the index-th code cell."""
    return page.locator(".jp-Notebook .jp-CodeCell").nth(index)


def run(page: Page, index: int) -> Locator:
    """Run a cell; returns it once it is running or has run.

    JupyterLab loses the key now and then when it comes right after the kernel
    became idle: pressed again until the prompt changes.
    """
    target = cell(page, index)
    prompt = target.locator(".jp-InputPrompt")
    for _ in range(10):
        target.locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        try:
            expect(prompt).not_to_have_text(re.compile(r"\[ \]:"), timeout=3_000)
        except AssertionError:
            continue
        return target
    pytest.fail(f"cell {index} did not start")


def steps(target: Locator) -> int:
    """Return the number of steps that the dashboard shows."""
    text = target.locator(".jp-OutputArea").inner_text()
    match = re.search(r"([\d,]+)(?:/[\d,]+)? *(?:steps|·)", text)
    return int(match[1].replace(",", "")) if match else 0


def expect_progress(page: Page, target: Locator) -> None:
    """Wait until the dashboard has gone ten steps further."""
    expect(target.get_by_text("running").first).to_be_visible(timeout=60_000)
    before = steps(target)
    for _ in range(120):
        if steps(target) > before + 10:
            return
        page.wait_for_timeout(500)
    pytest.fail(f"the dashboard stays at step {before}")


def save(page: Page, path: Path, *, needs: str) -> None:
    """Save the notebook; returns when the file holds `needs`."""
    for _ in range(20):
        page.keyboard.press("Control+s")
        page.wait_for_timeout(500)
        if needs in path.read_text():
            return
    pytest.fail(f"the saved notebook never held {needs!r}")


def expect_charts_to_obey(page: Page, target: Locator) -> None:
    """Choose, scale and zoom the charts in the browser, by hand and by key, while they grow."""
    left, right = (target.locator(".dtkit-charts .plot").nth(i) for i in range(2))
    expect(left.locator("canvas")).to_be_visible(timeout=30_000)
    grown = left.get_attribute("data-to") or ""
    expect(left).not_to_have_attribute("data-to", grown, timeout=30_000)
    target.get_by_label("what is drawn").nth(1).select_option("ms of a step by rank")
    expect(right).to_have_attribute("data-chart", "ms of a step by rank")
    expect(right).to_contain_text("rank 1")
    target.get_by_label("log", exact=True).first.check()
    expect(left).to_have_attribute("data-scale", "log")
    target.get_by_label("smoothing").first.fill("0.9")
    expect(left).to_contain_text("smoothed 0.9")
    left.press("+")
    zoomed = left.get_attribute("data-to") or ""
    left.press("ArrowLeft")
    expect(left).not_to_have_attribute("data-to", zoomed)
    zoomed = left.get_attribute("data-to") or ""
    expect_progress(page, target)
    expect(left).to_have_attribute("data-to", zoomed)  # new points do not undo it


def expect_controls_to_obey(target: Locator) -> None:
    """Move the learning rate's slider, by hand and by key, and a list; the charts mark both."""
    target.locator(".jp-InputPrompt").click()  # command mode, in which arrows move between cells
    target.get_by_role("tab", name="Controls").click()
    group = target.get_by_role("group", name="live controls")
    slider = group.get_by_role("slider", name="lr_factor, slider")
    slider.fill("170")  # of 400, from 0.01 to 100 times
    expect(group).to_contain_text("lr 0.025", timeout=60_000)
    slider.press("ArrowRight")
    expect(group.get_by_label("lr_factor", exact=True)).to_have_value("0.513", timeout=60_000)
    group.get_by_label("mode").select_option("noisy")
    box = group.get_by_label("sleep", exact=True)
    box.fill("2")
    box.press("Enter")
    expect(group).to_contain_text("✖ a number from 0 to 0.1")
    plots = target.locator(".dtkit-charts .plot")
    expect(plots.first).to_have_attribute("data-marks", "3", timeout=60_000)
    expect(target.get_by_role("tab", name=re.compile(r"Notes \(\d"))).to_be_visible()


@pytest.fixture(scope="module")
def notebook(lab: Lab) -> Path:
    """A notebook that trains for ten minutes if nobody stops it."""
    path = lab.folder / "watched.ipynb"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(book, path)
    return path


def stop(target: Locator) -> None:
    """Press Stop while the cell runs, and wait for the summary."""
    assert is_stop_heard(target), "a click on Stop did not come to the kernel"
    expect_summary(target)


def expect_summary(target: Locator) -> None:
    """Wait until the summary of a stopped run has taken the dashboard's place."""
    expect(target.get_by_text("stopped").first).to_be_visible(timeout=60_000)
    # What a run says of its settings at its end is measured in between.
    expect(target.get_by_role("button", name="Stop")).to_have_count(0, timeout=60_000)


def is_stop_heard(target: Locator) -> bool:
    """Press Stop, again if need be; return whether the button says that it was heard."""
    for _ in range(3):
        target.get_by_role("button", name="Stop").click()
        try:
            expect(target.get_by_text(re.compile("Stopping…|stopped")).first).to_be_visible(
                timeout=5_000
            )
        except AssertionError:
            continue
        return True
    return False


def test_a_run_is_watched_reloaded_and_stopped(page: Page, lab: Lab, notebook: Path) -> None:
    open_notebook(page, lab, notebook.name)
    wait_for_kernel(page)
    expect(run(page, 0)).to_contain_text("2 ranks on CPU over gloo", timeout=60_000)

    training = run(page, 1)
    expect_progress(page, training)
    expect_charts_to_obey(page, training)
    expect_controls_to_obey(training)
    page.screenshot(path=SCREENSHOTS / "running-light.png")

    save(page, notebook, needs="widget-view+json")
    page.reload()
    training = cell(page, 1)
    expect_progress(page, training)

    training.get_by_role("button", name="Pause").click()
    expect(training.get_by_role("button", name="Resume")).to_be_visible()
    paused_at = steps(training)
    training.get_by_role("button", name="Resume").click()
    expect_progress(page, training)
    assert steps(training) > paused_at
    stop(training)
    expect(run(page, 2)).to_contain_text("all ranks: True")

    run(page, 3)
    again = run(page, 4)
    expect_progress(page, again)
    picture = again.locator("img")
    first = picture.get_attribute("src")
    expect(picture).not_to_have_attribute("src", first or "", timeout=30_000)
    again.get_by_role("tab", name="Controls").click()
    again.get_by_role("button", name="−").first.click()
    expect(again.get_by_text("lr_factor 0.5 (lr 0.025)")).to_be_visible(timeout=60_000)
    page.screenshot(path=SCREENSHOTS / "running-buttons.png")
    stop(again)
    expect(run(page, 5)).to_contain_text("ended: 2 ranks")
    save(page, notebook, needs="ended: 2 ranks")


def test_the_saved_notebook_shows_the_run_without_a_kernel(
    page: Page, lab: Lab, notebook: Path
) -> None:
    lab.end_kernels()
    lab.set_theme("JupyterLab Dark")
    open_notebook(page, lab, notebook.name)
    outputs = cell(page, 4).locator(".jp-OutputArea")
    outputs.scroll_into_view_if_needed()
    expect(outputs.get_by_text("stopped").first).to_be_visible()
    picture = outputs.locator("img").first
    expect(picture).to_be_visible()
    assert "Loss over" in (picture.get_attribute("alt") or "")
    expect(outputs.get_by_text("Error displaying widget")).to_have_count(0)
    page.screenshot(path=SCREENSHOTS / "reopened-dark.png")
    for output in nbformat.read(notebook, as_version=4).cells[4].outputs:
        assert "application/vnd.jupyter.widget-view+json" not in output.data
        assert {"text/html", "text/plain"} <= set(output.data)
