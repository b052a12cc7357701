"""Engines that compute nothing: `python -m benchmarks.simulator CONNECTION_FILE NUM_RANKS`.

They register with a real controller, beat, and answer as dtkit's engines do, all in one process.
A cell says in a line `simulate = {...}` what it stands for: `steps_per_s` for `seconds`, sent
as a rank's recorder sends them, or `num_lines` of text of each rank's own or of all alike.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import platform
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from ipyparallel.serialize import serialize_object, unpack_apply_message
from ipyparallel.util import connect
from jupyter_client.session import Session

from dtkit.events import (
    STEP_COLUMNS,
    RankEnded,
    RankStarted,
    StepBatch,
    encode,
    flush_interval_s,
    until_flush_s,
)

__all__ = ["main"]

_LINES_PER_MESSAGE = 100
_REGISTER_AT_ONCE = 16
_MAX_LATE_S = 0.01
"""How far ranks are from sending at the same moment: clocks differ, and ranks are busy."""

# Any, below: ipyparallel's and Jupyter's messages carry no types.
Message = dict[str, Any]


class Engine:
    """One simulated engine.

    Args:
        info: the connection file's content.
        rank: of the engine; its id as well.
        num_ranks: of the session.
    """

    def __init__(self, info: dict[str, Any], rank: int, num_ranks: int) -> None:
        self._info, self._rank, self._num_ranks = info, rank, num_ranks
        self._uuid = f"simulated-{rank}"
        self._session = Session(
            key=info["key"].encode(), signature_scheme=info["signature_scheme"],
            packer=info["pack"], unpacker=info["unpack"],
        )  # fmt: skip
        context = zmq.asyncio.Context.instance()
        self._sockets = {
            name: context.socket(kind)
            for name, kind in {
                "registration": zmq.DEALER, "mux": zmq.ROUTER, "control": zmq.ROUTER,
                "iopub": zmq.PUB, "hb_pong": zmq.DEALER,
            }.items()
        }  # fmt: skip
        for name, socket in self._sockets.items():
            socket.setsockopt(zmq.IDENTITY, self._uuid.encode())
            socket.sndhwm = 0
            if name != "registration":
                self._connect(name)

    def _connect(self, name: str) -> None:
        connect(self._sockets[name], f"{self._info['interface']}:{self._info[name]}")

    async def register(self) -> None:
        """Make the engine known to the controller."""
        self._connect("registration")
        socket = self._sockets["registration"]
        await self._send(socket, "registration_request", {"uuid": self._uuid, "id": self._rank})
        await socket.recv_multipart()

    async def beat(self, ping: list[bytes]) -> None:
        """Answer a heartbeat of the controller's."""
        await self._sockets["hb_pong"].send_multipart(ping)

    async def serve(self) -> None:
        """Answer requests, for ever."""
        await asyncio.gather(self._serve("mux"), self._serve("control"))

    async def _serve(self, name: str) -> None:
        socket = self._sockets[name]
        while True:
            idents, frames = self._session.feed_identities(await socket.recv_multipart(), copy=True)
            message = self._session.deserialize(frames, content=True, copy=True)
            kind, content = message["header"]["msg_type"], Message()
            if kind == "dtkit_request":
                content = {"json": json.dumps(self._answer(json.loads(message["content"]["json"])))}
                await self._send(socket, "dtkit_reply", content, message, ident=idents)
            elif kind == "apply_request":
                _, (called, *_args), _ = unpack_apply_message(message["buffers"])
                buffers = serialize_object(self._call(str(called)))
                await self._send(
                    socket, "apply_reply", {"status": "ok"}, message, ident=idents, buffers=buffers
                )
            elif kind == "execute_request":
                await self._execute(message)
                content = {"status": "ok", "execution_count": 1, "payload": []}
                await self._send(socket, "execute_reply", content, message, ident=idents)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["operation"] == "where":
            return {"state": "python", "line": 1}
        return {"running": True, "state": "busy", "used_bytes": 1, "total_bytes": 2}

    def _call(self, function: str) -> Any:
        """Return what a function of dtkit's engine side would, as far as anybody looks at it."""
        if function.endswith(":join"):
            return {
                "host": platform.node(), "pid": os.getpid(), "device": "cpu", "device_name": "CPU",
                "torch": "none", "python": platform.python_version(),
            }  # fmt: skip
        return ("127.0.0.1", 1) if function.endswith(":open_store") else None

    async def _execute(self, request: Message) -> None:
        found = re.search(r"^simulate = (.+)$", request["content"]["code"], re.MULTILINE)
        await self._publish("status", {"execution_state": "busy"}, request)
        if found:
            what = ast.literal_eval(found[1])
            if "num_lines" in what:
                await self._print(request, what["num_lines"], is_alike=what["is_alike"])
            else:
                await self._train(request, what["steps_per_s"], what["seconds"])
        await self._publish("status", {"execution_state": "idle"}, request)

    async def _print(self, request: Message, num_lines: int, *, is_alike: bool) -> None:
        mark = "" if is_alike else f" on rank {self._rank}"
        for first in range(0, num_lines, _LINES_PER_MESSAGE):
            lines = [f"step {first + i}: loss 0.12345{mark}\n" for i in range(_LINES_PER_MESSAGE)]
            await self._publish("stream", {"name": "stdout", "text": "".join(lines)}, request)
            await asyncio.sleep(0)

    async def _train(self, request: Message, steps_per_s: float, seconds: float) -> None:
        begun_s = time.monotonic()
        started = RankStarted(self._rank, os.getpid(), platform.node(), "cpu", time.time())
        await self._tell(request, encode(started))
        interval_s = flush_interval_s(self._num_ranks)
        step = 0
        while (at_s := time.monotonic() - begun_s) < seconds:
            steps = list(range(step + 1, int(at_s * steps_per_s) + 1))
            if steps:
                step = steps[-1]
                batch = StepBatch(self._rank, _columns(steps, steps_per_s))
                await self._tell(request, encode(batch, is_compact=True))
            late_s = random.uniform(0.0, _MAX_LATE_S)
            await asyncio.sleep(late_s + until_flush_s(interval_s, time.time()))
        await self._tell(request, encode(RankEnded(self._rank, "finished", step, seconds)))

    async def _tell(self, request: Message, *lines: bytes) -> None:
        await self._publish("dtkit_events", {}, request, [b"\n".join(lines)])

    async def _publish(
        self, kind: str, content: Message, request: Message, buffers: list[bytes] | None = None
    ) -> None:
        topic = f"engine.{self._rank}.{kind}".encode()
        await self._send(
            self._sockets["iopub"], kind, content, request, ident=topic, buffers=buffers
        )

    async def _send(
        self, socket: Any, kind: str, content: Message, parent: Message | None = None,
        *, ident: Any = None, buffers: Any = None,
    ) -> None:  # fmt: skip
        message = self._session.msg(
            kind, content, parent=parent, metadata={"engine": self._uuid, "status": "ok"}
        )
        frames = self._session.serialize(message, ident)
        await socket.send_multipart([*frames, *(buffers or ())])


def _columns(steps: list[int], steps_per_s: float) -> dict[str, list[float]]:
    """Return steps as a plain cell's are: what varies in a run varies here."""
    step_ms = [1000.0 / steps_per_s * random.uniform(0.9, 1.1) for _ in steps]
    values: dict[str, list[float]] = {
        "step": list(map(float, steps)), "time_s": [step / steps_per_s for step in steps],
        "loss": [random.uniform(0.9, 1.1) / (1.0 + 0.01 * step) for step in steps],
        "step_ms": step_ms, "data_ms": [0.1 * ms for ms in step_ms],
        "comm_ms": [0.2 * ms for ms in step_ms],
    }  # fmt: skip
    rest = {"samples": 32.0, "lr": 0.01}
    return {name: values.get(name, [rest.get(name, 4096.0)] * len(steps)) for name in STEP_COLUMNS}


async def _beat(info: dict[str, Any], engines: list[Engine]) -> None:
    socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    connect(socket, f"{info['interface']}:{info['hb_ping']}")
    while True:
        ping = await socket.recv_multipart()
        for engine in engines:
            await engine.beat(ping)


async def _run(info: dict[str, Any], num_ranks: int) -> None:
    engines = [Engine(info, rank, num_ranks) for rank in range(num_ranks)]
    beating = asyncio.create_task(_beat(info, engines))
    serving = [asyncio.create_task(engine.serve()) for engine in engines]
    for first in range(0, num_ranks, _REGISTER_AT_ONCE):
        await asyncio.gather(*(e.register() for e in engines[first : first + _REGISTER_AT_ONCE]))
    await asyncio.gather(beating, *serving)


def main() -> None:
    """Be engines until killed."""
    asyncio.run(_run(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])))


if __name__ == "__main__":
    main()
