"""Conductor: begins a cell on the ranks, sees it to its end, and repairs what it broke."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtkit.driver.failures import freed_text, missing_module_hint, survived_text
from dtkit.driver.memory import memory_line, ran_out_of_memory
from dtkit.driver.runs.asked import Asked
from dtkit.driver.stall import StallWatch
from dtkit.driver.supervisor import Supervisor
from dtkit.errors import ClusterDiedError, DtkitError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dtkit.cluster import Engines, Execution
    from dtkit.driver.procgroup import ProcessGroup
    from dtkit.driver.repair import Repair
    from dtkit.driver.requests import Requests
    from dtkit.driver.runs.celloutput import CellOutput
    from dtkit.driver.runs.followed import FollowedExecution
    from dtkit.driver.runs.run import Run
    from dtkit.errors import RankError

__all__ = ["Conductor"]


class Conductor:
    """Runs one cell at a time on the ranks of a session.

    Attributes:
        active: where requests to the cell that is running go; None while idle.
    """

    def __init__(self, engines: Engines, group: ProcessGroup, repair: Repair) -> None:
        self._engines = engines
        self._group = group
        self._repair = repair
        self.active: Requests | None = None

    def check_idle(self) -> None:
        """Refuse if a cell is running.

        Raises:
            DtkitError: one is.
        """
        if self.active is not None:
            msg = "the ranks are busy with another cell; wait for it, or %dist_stop"
            raise DtkitError(msg)

    def train(self, run: Run) -> Iterator[None]:
        """Begin a run, send its cell and see it to its end.

        Raises:
            RankError: the cell failed on a rank.
        """
        self.check_idle()
        with self._group.debugging(run.options.debug):
            yield from self._train(run)

    def _train(self, run: Run) -> Iterator[None]:
        spec = {
            "dir": str(run.dir),
            "start_unix_s": run.start_unix_s,
            "recipe": run.recipe.to_dict(),
            "ranks": list(run.ranks),
            "parts": [*run.recipe.parts(), *run.options.parts()],
        }
        try:
            self._engines.call("dtkit.engine.run:begin", (spec,), ranks=run.ranks)
        except BaseException as error:
            run.end("failed", error)
            self._engines.call("dtkit.engine.run:cancel", ranks=run.ranks)
            raise
        yield from self._see_through(run)

    def follow(self, run: Run, execution: FollowedExecution) -> Iterator[None]:
        """See a run to its end that another driver began.

        Raises:
            RankError: the cell failed on a rank.
        """
        yield from self._see_through(run, execution)

    def _see_through(self, run: Run, execution: FollowedExecution | None = None) -> Iterator[None]:
        try:
            yield from self.run(
                run.cell, run.ranks, run.output, run.requests, run, execution=execution
            )
        except BaseException as error:
            if run.state == "running" and not run.requests.is_left:
                run.end("failed", error)
            raise

    def run(
        self,
        cell: str,
        ranks: tuple[int, ...],
        output: CellOutput,
        requests: Requests,
        run: Run | None = None,
        *,
        execution: Execution | FollowedExecution | None = None,
    ) -> Iterator[None]:
        """Send a cell and see it to its end; yields while there is nothing to do.

        Args:
            cell: the cell.
            ranks: where.
            output: takes what it shows.
            requests: what the user asks for meanwhile.
            run: the run that it belongs to.
            execution: the cell as it was sent already, by another driver.

        Raises:
            RankError: the cell failed on a rank.
        """
        self.check_idle()
        self.active = requests
        try:
            if execution is None:
                wake = requests.alarm.ring
                execution = self._engines.execute(cell, ranks, output.on_message, wake)
            supervisor = Supervisor(
                self._engines, execution, requests,
                has_steps=run is not None, is_free=run is not None and run.recipe.is_free,
                generation=self._group.generation,
                **({} if run is None else {"note": run.note}),
            )  # fmt: skip
            look = self._looking(run, supervisor) if run is not None else None
            try:
                for _ in supervisor.wait():
                    if look is not None:
                        look()
                    yield
            except BaseException:
                # Whoever drove us has given up; a closed session has no engines left.
                if not self._engines.is_closed:
                    supervisor.abandon()
                    self._recover(supervisor)
                raise
            auto_restart = run is not None and run.options.auto_restart
            epilogue = self._recover(supervisor, auto_restart=auto_restart)
            error = self._error(supervisor, epilogue)
            requests.outcome = epilogue
            if run is not None:
                if supervisor.has_survived:
                    run.note(survived_text(supervisor.lost, epilogue))
                run.end(supervisor.state(), error)
            if error is not None:
                raise error
        finally:
            self.active = None

    def _looking(self, run: Run, supervisor: Supervisor) -> Callable[[], None]:
        """Return what is looked at again and again while a run goes on."""
        stall, asked = StallWatch(self._engines, run), Asked(run.dir)

        def look() -> None:
            run.set_state(supervisor.phase)
            if supervisor.phase == "running":
                stall.look()
            _pass_on(asked, run)

        return look

    def _error(self, supervisor: Supervisor, epilogue: str) -> RankError | None:
        """Return what the cell failed with, with the host's memory if that was too small."""
        error = supervisor.error(epilogue)
        if error is not None and ran_out_of_memory(error):
            parts = (epilogue, memory_line(self._engines))
            error = supervisor.error("\n".join(filter(None, parts)))
        elif error is not None and (hint := missing_module_hint(error, self._engines.host_of)):
            error = supervisor.error("\n".join(filter(None, (epilogue, hint))))
        return error

    def _recover(self, supervisor: Supervisor, *, auto_restart: bool = False) -> str:
        """Repair what the cell's failure broke; return what to tell the user.

        Raises:
            ClusterDiedError: nothing can be repaired.
        """
        if self._engines.broken:
            raise ClusterDiedError(self._engines.broken)
        lost = self._engines.lost
        if not lost and not supervisor.is_group_broken:
            return ""
        freed = freed_text(supervisor.places, len(self._engines.ranks))
        if lost and not (auto_restart or supervisor.replaced):
            new = self._engines.remedy(lost)
            if len(lost) == len(self._engines.ranks):
                return new
            kept = f"{'their state' if freed else 'the state of the others'} is kept. {new}"
            refill = ", --refill with the state of another" * self._engines.can_return(lost)
            return "; ".join(filter(None, [freed, kept + refill]))
        if not lost:
            self._repair.rebuild()
            return "; ".join(filter(None, [freed, "group rebuilt; state kept"]))
        done = self._repair.restart(lost, refill=auto_restart)
        return "; ".join(filter(None, [freed, done, "group rebuilt; the others kept their state"]))


def _pass_on(asked: Asked, run: Run) -> None:
    """Let a run have what another kernel asks of it."""
    for values in asked.new():
        try:
            run.set_controls(**values)
        except (InvalidInputError, TypeError) as error:
            run.note(f"another kernel asked in vain: {error}")
