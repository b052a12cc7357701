"""How engines start, and what a failed start says."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

import dtkit
from dtkit.cluster import _engine_main, starter
from dtkit.errors import StartError

if TYPE_CHECKING:
    from pathlib import Path

    from dtkit.cluster import Slot

DRIVER = """
import sys, dtkit
with dtkit.Session.start(2, runs_dir=sys.argv[1]) as session:
    run = session.train("import torch; x = torch.ones(1); dist.all_reduce(x); dtkit_x = x.item()")
    session.execute("1 / 1")
    session.status()
    session.reset_group()
print(sorted({"torch", "ipywidgets", "matplotlib"} & set(sys.modules)))
"""

CONNECTION = {
    "location": "here", "interface": "tcp://127.0.0.1", "registration": 1, "key": "k",
    "signature_scheme": "hmac-sha256", "pack": "json", "unpack": "json",
}  # fmt: skip


def test_the_driver_never_loads_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_an_engine_that_cannot_start_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = starter.slot_env

    def broken(slot: Slot, preload: tuple[str, ...]) -> dict[str, str]:
        return {**usual(slot, preload), **({"PYTHONHOME": "/nowhere"} if slot.engine == 1 else {})}

    monkeypatch.setattr(starter, "slot_env", broken)
    with pytest.raises(StartError, match="engine 1 ended"):
        dtkit.Session.start(2)
    assert dtkit.current_session() is None


def test_an_engine_waits_until_its_connection_file_is_whole(tmp_path: Path) -> None:
    text = json.dumps(CONNECTION)
    path = tmp_path / "ipcontroller-engine.json"
    path.write_text(text[:20])
    engine = _engine_main._engine_class()()
    engine.url_file = str(path)
    writer = threading.Timer(0.2, path.write_text, [text])
    writer.start()
    engine.load_connection_file()
    assert engine.registration_url == "tcp://127.0.0.1:1"
    writer.join()
