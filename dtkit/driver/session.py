"""Session: one cluster, one process group, one event stream. Every magic is a thin face of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dtkit.driver.cells import CellVerbs
from dtkit.driver.check import Check, check
from dtkit.driver.clusters import check_hosts
from dtkit.driver.orphans import end_orphan, list_orphans
from dtkit.driver.registry import Registry
from dtkit.driver.stall import places
from dtkit.driver.transfer.verbs import Transfer, pull, push
from dtkit.driver.waiting import in_background
from dtkit.errors import DtkitError, InvalidInputError
from dtkit.tensorboard.server import Boards
from dtkit.values import Orphan, RankPlace, RankStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dtkit.driver.runs.run import Run
    from dtkit.launch import Launch
    from dtkit.livecontrol import Value
    from dtkit.tensorboard.server import TensorBoard
    from dtkit.values import HostCheck

__all__ = ["Session"]

_NAMES_TIMEOUT_S = 0.5
"""A completion that comes later is of no use."""


class Session(CellVerbs):
    """Engines with a process group across them. Make one with `Session.start`."""

    @classmethod
    def attaching(cls, session_id: str | None = None) -> tuple[Self, Run | None, Iterator[None]]:
        """Take over a session whose kernel is gone.

        Args:
            session_id: which, as `Session.orphans` lists them; None: the only one.

        Returns:
            The session, its newest run if it had one, and an iterator to be
            exhausted, which follows that run to its end as `training` does.

        Raises:
            InvalidInputError: there is no such session.
            StartError: its controller does not answer.
        """
        session = cls._take_over(session_id)
        run, steps = session._follow()  # noqa: SLF001  one of us
        return session, run, steps

    @classmethod
    def attach(cls, session_id: str | None = None) -> Self:
        """Take over a session whose kernel is gone; its run goes on as `dtkit.last_run`.

        Args:
            session_id: which, as `Session.orphans` lists them; None: the only one.

        Raises:
            InvalidInputError: there is no such session.
            StartError: its controller does not answer.
        """
        session, run, steps = cls.attaching(session_id)
        if run is not None and run.state == "running":
            in_background(steps, run.requests)
        return session

    @staticmethod
    def check_hosts(
        launch: Launch, *, on_stage: Callable[[str], None] = lambda _stage: None
    ) -> HostCheck:
        """Look whether hosts can train together, and how fast they reach each other.

        Nothing is left on them.

        Args:
            launch: which hosts, and how they are reached.
            on_stage: called with a short text as each stage begins.

        Raises:
            StartError: a host cannot be reached or used at all; the text names the fix.
        """
        return check_hosts(launch, on_stage)

    @staticmethod
    def orphans() -> tuple[Orphan, ...]:
        """Return the sessions on this host whose kernel is gone."""
        return list_orphans()

    @staticmethod
    def end_orphan(session_id: str) -> Orphan:
        """End a session whose kernel is gone, and return what it was.

        Raises:
            InvalidInputError: there is no such session.
        """
        return end_orphan(session_id)

    def stop(self, *, now: bool = False) -> None:
        """Ask the cell that is running to stop at the next step boundary.

        Args:
            now: stop it wherever it is, in a collective too; the ranks keep their state.
        """
        requests = self._conductor.active
        if requests is None:
            msg = "nothing is running on the ranks"
            raise DtkitError(msg)
        if now:
            requests.stop_now()
        else:
            requests.stop()

    def set_controls(self, **values: Value) -> None:
        """Ask for new values of the running run's live controls; see `Run.set_controls`.

        Raises:
            InvalidInputError: nothing trains, there is no such control, or it takes no such value.
        """
        run = Registry.run
        if run is None or self._conductor.active is not run.requests:
            msg = "nothing trains on the ranks; controls are there while %%dist_train runs"
            raise InvalidInputError(msg)
        run.set_controls(**values)

    def pull(self, name: str, *, rank: int = 0) -> Transfer:
        """Bring an object from a rank; tensors and modules arrive on the CPU.

        Raises:
            InvalidInputError: there is no such name on the rank, it cannot be carried,
                or there is no memory for it.
        """
        self._check_open()
        self._conductor.check_idle()
        return pull(self._engines, name, rank, hosts=self._hosts())

    def push(
        self, objects: dict[str, Any], *, ranks: Sequence[int] | None = None
    ) -> list[Transfer]:
        """Put objects into the namespace of ranks, under their names; tensors stay on the CPU.

        Raises:
            InvalidInputError: an object cannot be pickled.
        """
        self._check_open()
        self._conductor.check_idle()
        chosen = self.ranks if ranks is None else ranks
        return [
            push(self._engines, name, value, chosen, hosts=self._hosts())
            for name, value in objects.items()
        ]

    def _hosts(self) -> dict[int, str]:
        return {rank: self.facts[rank]["host"] for rank in self.ranks}

    def status(self) -> tuple[RankStatus, ...]:
        """Return where every rank is; answers while they are busy."""
        self._check_open()
        answers = self._engines.control("status")
        found = []
        for slot in self.slots:
            fact, answer = self.facts.get(slot.rank, {}), answers.get(slot.rank, {})
            is_lost = slot.rank in self._engines.lost
            found.append(
                RankStatus(
                    rank=slot.rank,
                    host=fact.get("host", ""),
                    pid=fact.get("pid", 0),
                    device=fact.get("device", slot.device),
                    device_name=fact.get("device_name", ""),
                    state="lost" if is_lost else answer.get("state", "no answer"),
                    used_bytes=answer.get("used_bytes"),
                    total_bytes=answer.get("total_bytes"),
                )
            )
        return tuple(found)

    def tensorboard(self, folder: str | Path | None = None) -> TensorBoard:
        """Start TensorBoard on a folder, once; it ends with the session.

        Args:
            folder: of logs; None: that of the session's runs.
        """
        self._check_open()
        if self._boards is None:
            self._boards = Boards()
        return self._boards.open(Path(folder or self.runs_dir))

    def check(self, names: Sequence[str] = ()) -> Check:
        """Compare models, optimizers, random numbers and shares of the data over the ranks.

        Args:
            names: what to compare; none: all models, optimizers and divided loaders there are.

        Raises:
            InvalidInputError: no rank has such a name.
            RankError: a name is nothing that can be compared.
        """
        self._check_open()
        self._conductor.check_idle()
        return check(self._engines, names)

    def where(self) -> tuple[RankPlace, ...]:
        """Return where every rank is now, in the cell and in collectives; answers while busy."""
        self._check_open()
        return places(self._engines)

    def names(self, path: str = "") -> dict[str, str]:
        """Return what names there are on the ranks, with their types; answers while busy.

        Args:
            path: an object, such as `model.fc`: its attributes; empty: the namespace.

        Returns:
            Those of the first rank that lives; none if it does not answer at once.
        """
        self._check_open()
        living = [rank for rank in self.ranks if rank not in self._engines.lost][:1]
        answers = self._engines.control(
            "names", {"path": path}, ranks=living, timeout_s=_NAMES_TIMEOUT_S
        )
        found: dict[str, str] = answers[living[0]].get("names", {}) if answers else {}
        return found

    def reset_group(self) -> None:
        """Build the process group anew; the ranks keep their namespaces."""
        self._check_open()
        self._conductor.check_idle()
        self._repair.rebuild()

    def restart(self, ranks: Sequence[int] | None = None, *, refill: bool = False) -> str:
        """Put new engines in the place of ranks, keeping their numbers; build the group anew.

        Args:
            ranks: whose engines are to be replaced; by default those that have ended.
            refill: give the new ones the names and the random state of a healthy
                rank, and make models and optimizers equal on all ranks.

        Returns:
            What was done, in a sentence.

        Raises:
            InvalidInputError: all engines live and no rank was named, or none has a state to give.
            StartError: a new engine did not come up.
        """
        self._check_open()
        self._conductor.check_idle()
        chosen = self._engines.lost if ranks is None else tuple(ranks)
        if not chosen:
            msg = "every engine lives; name the rank to replace, as in %dist_restart 1"
            raise InvalidInputError(msg)
        return self._repair.restart(chosen, refill=refill)
