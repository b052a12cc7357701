"""Fleet: what starts the agents of a session's hosts; one for each way of reaching hosts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from dtkit.launch import Launch

__all__ = ["AGENT", "Fleet", "agent_command", "agent_environment"]

AGENT = ("-m", "dtkit.cluster.remote.agent")

# Any, below: JSON, and ipyparallel is untyped.


class Fleet(Protocol):
    """The agents of a session, one on each host.

    Attributes:
        names: what the user calls the hosts; empty: known only when the agents say where they are.
        num_agents: how many there are to be.
    """

    names: tuple[str, ...]
    num_agents: int

    @property
    def pids(self) -> Sequence[int]:
        """Processes on this host that hold the agents, if there are any."""

    def own_address(self) -> str:
        """Return the address of this host at which the others are to reach it.

        Asked only if the user names no interface.

        Raises:
            StartError: there is none, or several; the text names the fix.
        """

    def start(
        self, options: dict[str, Any], info: str, on_exit: Callable[..., None], log: Any
    ) -> None:
        """Start all agents; does not wait until they have registered.

        Args:
            options: what `DTKIT_AGENT` is to say.
            info: how the controller is reached: an engine's connection file.
            on_exit: called on a thread with the number of an agent that may have ended, and
                `is_certain`.
            log: takes what ipyparallel reports.

        Raises:
            InvalidInputError: what the user has set up starts no agents.
            StartError: they could not be started; the text names the fix.
        """

    def waits_for(self) -> str:
        """Return what the agents wait for, such as a place in a queue; empty: for nothing.

        Raises:
            StartError: they will not come any more.
        """

    def log(self, number: int) -> str:
        """Return what an agent has printed, or all of them where that is one text."""

    def stop(self, closed: Collection[int]) -> None:
        """End what was started.

        Args:
            closed: agents that were asked to end, and end by themselves.
        """


def agent_command(launch: Launch) -> list[str]:
    """Return what is run on a host."""
    return [launch.python or sys.executable, *AGENT]


def agent_environment(
    options: dict[str, Any], info: str, number: int | None = None
) -> dict[str, str]:
    """Return what an agent is told by its environment.

    Args:
        options: the session's.
        info: how the controller is reached.
        number: which agent it is; None: what starts it says so.
    """
    told = json.dumps({**options, "number": number})
    return {"DTKIT_AGENT": told, "IPP_CONNECTION_INFO": info}
