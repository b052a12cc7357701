"""Run All and Interrupt, and a browser that is closed while a run goes on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import nbformat
import pytest
from lab import TOKEN, Lab
from playwright.sync_api import Browser, Locator, Page, expect
from test_dashboard_in_lab import (
    TRAINING,
    cell,
    expect_progress,
    expect_summary,
    is_stop_heard,
    open_notebook,
    run,
    save,
    steps,
    wait_for_kernel,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)

START = "%load_ext dtkit\n%dist_init -n 2"
WHOLE = (
    "import dtkit\nsteps = dtkit.last_run.history['step'].tolist()\n"
    "f'whole: {steps == list(range(1, len(steps) + 1))}, long: {len(steps) > 20}'"
)
ALL = [START, TRAINING, "after = 1\n'the next cell'", "%dist num_steps > 10", "%dist_shutdown"]
CLOSED = [
    START,
    TRAINING,
    WHOLE,
    TRAINING.replace("--name watched", "--name unseen --background"),
    "%dist_init --attach",
    WHOLE,
    "%dist_shutdown",
]


def make(lab: Lab, name: str, cells: list[str]) -> Path:
    """Write a notebook into the lab's folder."""
    path = lab.folder / name
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(book, path)
    return path


def choose(page: Page, menu: str, item: str) -> None:
    """Choose an item of the main menu."""
    page.get_by_role("menubar").get_by_text(menu, exact=True).click()
    page.locator(".lm-Menu-item").filter(has_text=re.compile(rf"^{item}")).first.click()


def test_interrupt_ends_run_all_and_the_next_cell_works(page: Page, lab: Lab) -> None:
    path = make(lab, "all.ipynb", ALL)
    open_notebook(page, lab, path.name)
    wait_for_kernel(page)
    expect(run(page, 0)).to_contain_text("2 ranks on CPU over gloo", timeout=60_000)
    choose(page, "Run", "Run All Cells")
    training, following = cell(page, 1), cell(page, 2)
    expect_progress(page, training)
    expect(following.locator(".jp-InputPrompt")).to_have_text("[*]:")
    choose(page, "Kernel", "Interrupt Kernel")
    expect(training.get_by_text("Interrupted: ").first).to_be_visible(timeout=15_000)
    expect(training.get_by_text("stopped").first).to_be_visible()
    expect(following.locator(".jp-InputPrompt")).to_have_text("[ ]:")
    expect(cell(page, 4).locator(".jp-InputPrompt")).to_have_text("[ ]:")
    expect(run(page, 2)).to_contain_text("the next cell")
    expect(run(page, 3)).to_contain_text("all ranks: True")
    expect(run(page, 4)).to_contain_text("ended: 2 ranks")


def test_a_closed_browser_leaves_the_run_and_finds_all_of_it(browser: Browser, lab: Lab) -> None:
    path = make(lab, "closed.ipynb", CLOSED)
    lab.end_kernels()
    page = browser.new_page()
    page.set_default_timeout(30_000)
    open_notebook(page, lab, path.name)
    # What is run before asks for a kernel.
    while not lab.num_kernels():
        page.wait_for_timeout(100)
    wait_for_kernel(page)
    expect(run(page, 0)).to_contain_text("2 ranks on CPU over gloo", timeout=60_000)
    expect_progress(page, run(page, 1))
    save(page, path, needs="widget-view+json")
    seen = steps(cell(page, 1))
    page.close()

    page = stop_in_another_page(browser, lab, path, lambda page: cell(page, 1), num_seen=seen)
    expect(run(page, 2)).to_contain_text("whole: True, long: True")

    # Nothing of this one is in the notebook that was saved.
    save(page, path, needs="whole: True")
    expect_progress(page, run(page, 3))
    page.close()
    page = stop_in_another_page(browser, lab, path, lambda page: run(page, 4))
    expect(run(page, 5)).to_contain_text("whole: True, long: True")
    expect(run(page, 6)).to_contain_text("ended: 2 ranks")
    page.close()


def stop_in_another_page(
    browser: Browser, lab: Lab, path: Path, show: Callable[[Page], Locator], *, num_seen: int = 0
) -> Page:
    """Open the notebook again, see the run in the cell that `show` returns, and stop it there.

    JupyterLab 4.6 deletes a subshell of the kernel and makes another when it has restored a page's
    widgets, and ipykernel 7.4 now and then lets that one hear nothing: another page is opened then.
    """
    for _ in range(5):
        page = open_again(browser, lab, path)
        target = show(page)
        expect_progress(page, target)
        assert steps(target) > num_seen
        if is_stop_heard(target):
            expect_summary(target)
            return page
        page.close()
    pytest.fail("no page's click on Stop came to the kernel")


def open_again(browser: Browser, lab: Lab, path: Path) -> Page:
    """Open a notebook whose kernel is running in a new page."""
    page = browser.new_page(viewport={"width": 1000, "height": 1100})
    page.set_default_timeout(30_000)
    page.goto(f"{lab.url}/doc/tree/{path.name}?token={TOKEN}&reset")
    expect(page.locator(".jp-Notebook .jp-CodeCell").first).to_be_visible(timeout=60_000)
    return page
