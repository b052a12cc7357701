"""The agent of a host: `python -m dtkit.cluster.remote.agent`, started by a launcher.

An engine of ipyparallel without a rank, which starts the host's other engines
and tells how they ended. What it is asked comes over ipyparallel's control
channel: no port of its own. It ends, and its engines with it, when it is told
to, when the controller is gone, or when no heartbeat of the controller's has come
for 30 s: that has given the host up by then, as its own hearts did not answer.

`DTKIT_AGENT` tells it, as JSON: number, session, notebook_dir, interface. Or `--told FILE` does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtkit.cluster.remote.children import Children
from dtkit.cluster.remote.collecting import files_of, read_piece
from dtkit.cluster.remote.facts import HostFacts
from dtkit.cluster.remote.farewell import note_agent
from dtkit.cluster.remote.network import address_of, address_towards, interface_with
from dtkit.cluster.remote.peers import pairs_without_access
from dtkit.cluster.remote.probing import listen, measure
from dtkit.cluster.remote.told import read_told
from dtkit.guard.processes import Identity, end, family
from dtkit.guard.record import FOLDER_PREFIX, RankRun

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FIRST_ENGINE", "main"]

FIRST_ENGINE = 1_000_000
"""Engine id of the agent number 0: beyond every rank's."""

_NUMBERS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
"""Where mpirun and srun say which of their processes this is."""
_LOOK_S = 2.0
_NUM_REFUSED = 2
"""How often in a row a connection is refused before the controller counts as gone."""
_LEAVE_S = 0.2
"""How long the answer to the last request may take to be sent."""

# Any, below: JSON, and ipyparallel's classes, which are untyped.
Request = dict[str, Any]


class Agent:
    """Answers what the driver asks about this host, on ipyparallel's control thread.

    Args:
        options: what `DTKIT_AGENT` says.
        info: how the controller is reached: an engine's connection file.
        folder: one of this session's own, if its launcher has made one; removed at the end.
    """

    def __init__(self, options: Request, info: Request, folder: str) -> None:
        self._options = options
        self._controller = (str(info["interface"]).rpartition("/")[2], int(info["registration"]))
        prefix = f"{FOLDER_PREFIX}{options['session']}-host-"
        self.folder: Path = Path(folder or tempfile.mkdtemp(prefix=prefix))
        process = Identity.of(os.getpid())
        assert process is not None  # noqa: S101  it is us
        note_agent(self.folder, process)
        security = self.folder / "security"
        security.mkdir(mode=0o700, exist_ok=True)
        connection = security / "ipcontroller-engine.json"
        with os.fdopen(
            os.open(connection, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w"
        ) as file:
            json.dump(info, file)
        self._has_notebook_dir = _enter(str(options["notebook_dir"]))
        self._children = Children(self.folder, info)
        self._facts: HostFacts | None = None
        self._cleaning = threading.RLock()

    def answer(self, request: Request) -> Request:
        """Answer one request; what it raises is the answer too."""
        answers: dict[str, Callable[[Request], Request]] = {
            "facts": self._tell_facts,
            "start": self._start,
            "end": self._end,
            "ending": self._tell_ending,
            "ended": lambda _request: {"engines": self._children.ended},
            "log": lambda asked: {"text": self._children.log(int(asked["engine"]))},
            "runs": self._tell_runs,
            "files": lambda asked: {"files": files_of(asked["folder"])},
            "read": lambda asked: read_piece(asked["path"], asked["offset"]),
            "listen": lambda asked: listen(asked["address"]),
            "measure": lambda asked: measure(
                asked["address"], asked["port"], asked["token"], asked["for_s"]
            ),
            "peers": lambda _request: {"pairs": pairs_without_access()},
            "close": self._close,
        }
        return answers[request["operation"]](request)

    def watch(self) -> None:
        """Look after the controller, and end when it has; runs on a thread of its own."""
        num_refused = 0
        while num_refused < _NUM_REFUSED:
            time.sleep(_LOOK_S)
            try:
                socket.create_connection(self._controller, timeout=_LOOK_S).close()
                num_refused = 0
            except ConnectionRefusedError:
                num_refused += 1
            except OSError:  # the network is gone; ipyparallel counts the heartbeats
                pass
        self.leave(is_alone=True)

    def leave(self, *, is_alone: bool = False) -> None:
        """End the engines and this process, and remove what they have written.

        Args:
            is_alone: the controller is gone, or cannot be reached. ipyparallel's nanny would wait
                for ever to send it what it has of it.
        """
        self._clean_up()
        if is_alone:
            here = Identity.of(os.getpid())
            end(
                [process for process in family([here] if here else []) if process != here],
                grace_s=0.0,
            )
        os._exit(0)

    def _clean_up(self) -> None:
        with self._cleaning:  # two at once would each find what the other has half removed
            self._children.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _tell_facts(self, _request: Request) -> Request:
        if self._facts is None:
            wanted = self._options["interface"]
            address = address_of(wanted) if wanted else address_towards(self._controller[0])
            self._facts = HostFacts.of_this_host(
                interface_with(address), address,
                folder=str(self.folder), has_folder=self._has_notebook_dir,
            )  # fmt: skip
        return {**self._facts.to_dict(), "unix_s": time.time()}

    def _start(self, request: Request) -> Request:
        for engine, environment in request["engines"].items():
            self._children.start(int(engine), environment)
        return {}

    def _end(self, request: Request) -> Request:
        self._children.end(request["engines"])
        return {}

    def _tell_ending(self, request: Request) -> Request:
        return {"text": self._children.ending(int(request["engine"]))}

    def _tell_runs(self, _request: Request) -> Request:
        runs = RankRun.read_all(self.folder).values()
        return {
            "runs": [{**asdict(run), "process": {"is_alive": run.process.is_alive}} for run in runs]
        }

    def _close(self, _request: Request) -> Request:
        self._clean_up()  # before it is answered: what has launched this may end it then
        threading.Timer(_LEAVE_S, self.leave).start()
        return {}


def _enter(folder: str) -> bool:
    """Make the notebook's folder this process's own; return whether it is there."""
    try:
        os.chdir(folder)
    except OSError:
        return False
    return True


def main() -> None:
    """Run the agent until its session has ended."""
    options, info = _told()
    agent = Agent(options, info, os.environ.pop("DTKIT_AGENT_FOLDER", ""))
    os.environ["IPP_PROFILE_DIR"] = str(agent.folder)
    os.environ["IPP_CLUSTER_ID"] = ""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: agent.leave())
    threading.Thread(target=agent.watch, name="dtkit-agent-watch", daemon=True).start()
    sys.argv[1:] = [f"--IPEngine.id={FIRST_ENGINE + _number(options)}", "--IPEngine.timeout=60"]
    _serve(agent)


def _told() -> tuple[Request, Request]:
    """Return the options, and how the controller is reached: of its launcher's, or of a file."""
    # Not for the engines to inherit: it holds the key, and they read the file.
    told, info = (os.environ.pop(name, "") for name in ("DTKIT_AGENT", "IPP_CONNECTION_INFO"))
    if "--told" in sys.argv:
        return read_told(Path(sys.argv[sys.argv.index("--told") + 1]))
    return json.loads(told), json.loads(info)


def _number(options: Request) -> int:
    """Return which agent of its session this is: told, or by what has launched it."""
    told = [options["number"], *(os.environ.get(name) for name in _NUMBERS)]
    return int(next((number for number in told if number is not None), 0))


def _serve(agent: Agent) -> None:
    from ipyparallel.engine import app

    class AgentKernel(app.Kernel):  # type: ignore[misc]  # ipyparallel is untyped
        control_msg_types = (*app.Kernel.control_msg_types, "dtkit_request")

        def dtkit_request(self, stream: Any, ident: Any, parent: Any) -> None:
            try:
                reply = agent.answer(json.loads(parent["content"]["json"]))
            except Exception as error:  # noqa: BLE001  the driver gets it as the answer
                reply = {"error": f"{type(error).__name__}: {error}"}
            self.session.send(
                stream, "dtkit_reply", {"json": json.dumps(reply)}, parent=parent, ident=ident
            )

    app.Kernel = AgentKernel
    app.IPEngine.launch_instance()
    agent.leave(is_alone=True)


if __name__ == "__main__":
    main()
