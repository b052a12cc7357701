"""What others show of a run: a trace in Perfetto's own UI, its curves in TensorBoard."""

from __future__ import annotations

import base64
import contextlib
import http.server
import re
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import viztracer
from playwright.sync_api import expect

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from test_tensorboard import feed, make_run
from traces import Plan, make_traces

from dtkit.tensorboard.server import TensorBoard
from dtkit.trace.chrome import write
from dtkit.views import zoom
from dtkit.views.zoom import zoomable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

PERFETTO = Path(viztracer.__file__).parent / "web_dist"
TIMEOUT_MS = 30_000


class Perfetto(http.server.SimpleHTTPRequestHandler):
    """Serves Perfetto's UI, and to that the trace: viztracer's build of it asks for one."""

    def __init__(self, trace: bytes, *args: Any) -> None:
        self._answers = {"/vizviewer_info": b"{}", "/file_info": b"{}", "/localtrace": trace}
        super().__init__(*args, directory=str(PERFETTO))

    def do_GET(self) -> None:
        """Answer with the trace, or with a file."""
        answer = self._answers.get(self.path)
        if answer is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(trace: bytes) -> Iterator[str]:
    """Give the address of a Perfetto UI that opens the trace."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Perfetto, trace)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def stay_here(page: Page, address: str) -> None:
    """Let no request out to other hosts: statistics, updates."""
    page.route(
        lambda url: not url.startswith(address) and not url.startswith("blob:"),
        lambda route: route.abort(),
    )


def test_perfetto_takes_every_event(page: Page, tmp_path: Path) -> None:
    plans = [Plan(), Plan(data=9), Plan(backward=60), Plan(idle=4)]
    write(make_traces(plans, num_steps=20), tmp_path / "timeline.json")
    body = page.locator("body")
    with served((tmp_path / "timeline.json").read_bytes()) as address:
        stay_here(page, address)
        page.goto(address)
        for row in ("rank 0 (node1, cuda:0)", "rank 3 (node1, cuda:3)", "allreduce.0.weight"):
            expect(body).to_contain_text(row, timeout=TIMEOUT_MS)
        page.evaluate("() => { location.hash = '#!/info' }")
        expect(body).to_contain_text("slice_drop_overlapping", timeout=TIMEOUT_MS)
        counts = re.findall(r"(\w+)\s+(\d+)\s+(?:error|data_loss)", body.inner_text())
    assert len(counts) > 50
    assert [name for name, count in counts if count != "0"] == []


SHOW = """async ({code, values, spans}) => {
    const url = URL.createObjectURL(new Blob([code], {type: "text/javascript"}));
    const bytes = Uint8Array.from(atob(spans), (c) => c.charCodeAt(0));
    const model = {get: (name) => name === "spans" ? new DataView(bytes.buffer) : values[name]};
    (await import(url)).default.render({model, el: document.body});
}"""


def test_a_timeline_is_zoomed_and_moved(page: Page) -> None:
    plans = [Plan(), Plan(data=9), Plan(backward=60), Plan(idle=4)]
    traces = make_traces(plans, num_steps=20)
    widget = zoomable(traces)
    names = ("ranks", "kinds", "opening", "alt")
    values = {name: getattr(widget, name) for name in names}
    spans = base64.b64encode(widget.spans).decode()
    code = (Path(zoom.__file__).with_name("gantt.js")).read_text()
    page.evaluate(SHOW, {"code": code, "values": values, "spans": spans})
    widget.close()
    canvas, words = page.get_by_role("img"), page.get_by_role("status")
    expect(canvas).to_have_attribute("aria-label", re.compile("Phases of 4 ranks"))

    def window() -> tuple[float, float]:
        seen = canvas.evaluate("it => [Number(it.dataset.from), Number(it.dataset.to)]")
        return tuple(seen)

    opened = window()
    assert opened == tuple(values["opening"])
    canvas.dblclick()
    whole = window()
    assert whole[0] == 0.0 < opened[0]
    assert whole[1] == opened[1]
    canvas.hover(position={"x": 300, "y": 44})
    expect(words).to_contain_text(re.compile(r"rank 1, step \d+: \w+, [\d.]+ ms"))
    page.mouse.wheel(0, -400)
    page.wait_for_function("it => Number(it.dataset.from) > 0", arg=canvas.element_handle())
    zoomed = window()
    assert zoomed[1] - zoomed[0] < whole[1]
    canvas.press("ArrowRight")
    assert window()[0] > zoomed[0]
    canvas.press("0")
    assert window() == whole


def test_tensorboard_shows_a_run(page: Page, tmp_path: Path, owned_pids: set[int]) -> None:
    run = make_run(tmp_path)
    feed(run, 1, 50)
    run.end("finished")
    board = TensorBoard(tmp_path)
    owned_pids.add(board.pid)
    try:
        page.goto(f"http://127.0.0.1:{board.port}/?tagFilter=grad_norm#timeseries")
        body = page.locator("body")
        expect(body).to_contain_text("a/tensorboard", timeout=TIMEOUT_MS)
        expect(body).to_contain_text("train/grad_norm", timeout=TIMEOUT_MS)
    finally:
        board.close()
        owned_pids.discard(board.pid)
