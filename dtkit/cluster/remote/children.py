"""Children: the engines that an agent has started, and how they ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtkit.cluster.deaths import end_session, exit_text, last_words, num_oom_kills
from dtkit.guard.processes import Identity, end, family

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Children"]

_LOG_BYTES = 64 << 10
_END_TIMEOUT_S = 2.0
_LINGER_MS = 3000


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    log: Path
    has_ended: threading.Event = field(default_factory=threading.Event)
    text: str = ""


class Children:
    """The engines of one host, by their id. Safe to use from any thread.

    Args:
        folder: where their logs go, and where they find the connection file.
        info: how the controller is reached; it is told when an engine has ended, also
            where ipyparallel's own nanny ended with it.
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:  # Any: JSON
        self._logs = folder / "log"
        self._logs.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._info = info
        self._children: dict[int, _Child] = {}
        self._is_closing = False
        self._num_oom_kills = num_oom_kills()

    @property
    def ended(self) -> list[int]:
        """Engines that have ended."""
        return [engine for engine, child in self._children.items() if child.has_ended.is_set()]

    def start(self, engine: int, environment: dict[str, str]) -> None:
        """Start an engine under an id; the log of one that had it before is continued."""
        log = self._logs / f"engine-{engine}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "dtkit.cluster._engine_main", f"--IPEngine.id={engine}",
                 "--IPEngine.timeout=60", "--IPEngine.max_heartbeat_misses=0"],
                env={**os.environ, **environment, "DTKIT_SESSION_DIR": str(self._folder),
                     "DTKIT_PARENT": str(os.getpid())},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        child = self._children[engine] = _Child(process, log)
        name = f"dtkit-engine-{engine}"
        threading.Thread(target=self._wait, args=(engine, child), name=name, daemon=True).start()

    def end(self, engines: Iterable[int], grace_s: float = 0.0) -> None:
        """End engines, and all that they started."""
        roots = [
            identity
            for engine in engines
            if (child := self._children.get(engine)) and not child.has_ended.is_set()
            if (identity := Identity.of(child.process.pid)) is not None
        ]
        end(family(roots), grace_s=grace_s)

    def close(self) -> None:
        """End all of them."""
        self._is_closing = True
        self.end(list(self._children))

    def ending(self, engine: int) -> str:
        """Return how an engine ended, with its last words; empty while it lives."""
        child = self._children[engine]
        # Its nanny may have told of it before this process has heard.
        return child.text if child.has_ended.wait(_END_TIMEOUT_S) else ""

    def log(self, engine: int) -> str:
        """Return the end of an engine's log."""
        child = self._children.get(engine)
        return _tail(child.log) if child else ""

    def _wait(self, engine: int, child: _Child) -> None:
        code = child.process.wait()
        before, self._num_oom_kills = self._num_oom_kills, num_oom_kills()
        words = last_words(_tail(child.log))
        child.text = exit_text(code, (before, self._num_oom_kills))
        child.text += f". Last lines of its log:\n{words}" if words else ""
        child.has_ended.set()
        if not self._is_closing and self._children[engine] is child:
            _unregister(engine, self._info)
            end_session(child.process.pid)


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_BYTES))
        return file.read().decode(errors="replace")


def _unregister(engine: int, info: dict[str, Any]) -> None:
    """Tell the controller that an engine has left, in the engine's name."""
    # What the engine's nanny itself sends it with.
    from ipyparallel.engine.nanny import Session, zmq
    from ipyparallel.util import connect

    session = Session(
        key=info["key"].encode(), signature_scheme=info["signature_scheme"],
        packer=info["pack"], unpacker=info["unpack"],
    )  # fmt: skip
    hub: Any  # a socket: zmq's type of it is generic over what it returns
    with zmq.Context.instance().socket(zmq.DEALER) as hub:
        hub.linger = _LINGER_MS
        server_key = info.get("curve_serverkey")
        connect(
            hub, f"{info['interface']}:{info['registration']}",
            curve_serverkey=server_key.encode() if server_key else None,
        )  # fmt: skip
        session.send(hub, "unregistration_request", content={"id": engine})
