"""`dtkit.control`, and the present values of a run's live controls on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from dtkit.engine.process.agent import current_run
from dtkit.errors import InvalidInputError
from dtkit.events import ControlDeclared, ControlsChanged, Note
from dtkit.livecontrol import LR_FACTOR, LiveControl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.optim import Optimizer

    from dtkit.engine.lrfactor import LrFactor
    from dtkit.engine.recorder import Recorder
    from dtkit.livecontrol import Value

__all__ = ["LiveControls", "control"]

T = TypeVar("T", bool, int, float, str)


def control(
    name: str,
    default: T,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[T] | None = None,
) -> T:
    """Return the present value of a live control: `clip = dtkit.control("clip", 1.0)`.

    The user changes it while the run goes on, in the panel under the cell or with
    `%dist_control clip 0.5`; the new value is there from the same step on, on all ranks. A run
    begins with the default. Outside a run it is the default, so that the same code runs
    as a plain script.

    Args:
        name: an identifier; the same name is the same control, wherever it is asked for.
        default: a number, True or False, or one of `choices`.
        low: the least number it takes.
        high: the greatest.
        choices: what it may be, numbers or texts.

    Raises:
        InvalidInputError: the default is not what the control takes, or the name is taken.
    """
    run = current_run()
    live: LiveControls | None = getattr(run, "controls", None)
    rules = (default, low, high, tuple(choices or ()))
    known = None if live is None else live.declared.get(name)
    if known is None or (known.default, known.low, known.high, known.choices) != rules:
        wanted = LiveControl(name, *rules)
        if name == LR_FACTOR.name:
            msg = f"control {name!r} is there in every run without being declared: take another"
            raise InvalidInputError(msg)
        if live is not None:
            live.declare(wanted)
    return default if live is None else live.values.get(name, default)  # type: ignore[return-value]


class LiveControls:
    """The live controls of a run on one rank; used by the training thread alone.

    Args:
        recorder: sends what was declared and changed.
        lr: takes the learning rate's factor.
        lead: returns the optimizer whose learning rate `lr` means, None before the first step.

    Attributes:
        declared: the controls that the cell has asked for, by name.
        values: those that were changed.
    """

    def __init__(
        self, recorder: Recorder, lr: LrFactor, lead: Callable[[], Optimizer | None]
    ) -> None:
        self.declared: dict[str, LiveControl] = {}
        self.values: dict[str, Value] = {}
        self._recorder, self._lr, self._lead = recorder, lr, lead

    def declare(self, wanted: LiveControl) -> None:
        """Let the user know of a control, at its first use.

        Raises:
            InvalidInputError: the name is of another kind of control.
        """
        known = self.declared.setdefault(wanted.name, wanted)
        if known.kind != wanted.kind:
            msg = (
                f"control {wanted.name!r} takes {known.takes}, as it was declared first: "
                f"take another name for one that takes {wanted.takes}"
            )
            raise InvalidInputError(msg)
        if known is wanted:
            facts = (wanted.default, wanted.low, wanted.high, list(wanted.choices))
            self._recorder.emit(ControlDeclared(self._recorder.rank, wanted.name, *facts))

    def change(self, number: int, values: dict[str, Value]) -> None:
        """Take new values; the next step is the first that is made with them.

        Args:
            number: which change it is, the same on all ranks.
            values: by name; `lr`, if the cell has no such control, sets the factor.
        """
        if "lr" in values and "lr" not in self.declared:
            values = self._aim(values)
        if LR_FACTOR.name in values:
            self._lr.value = float(values[LR_FACTOR.name])
        self.values.update(values)
        if values:
            at = (self._recorder.num_steps, self._recorder.elapsed_s)
            self._recorder.emit(ControlsChanged(self._recorder.rank, number, *at, values))

    def _aim(self, values: dict[str, Value]) -> dict[str, Value]:
        lead, others = self._lead(), {k: v for k, v in values.items() if k != "lr"}
        if lead is None or not self._lr.aim(lead, float(values["lr"])):
            text = (
                f"lr {values['lr']}: no factor makes it that, since the cell's own learning rate "
                f"is 0 now; {LR_FACTOR.name} can be changed"
            )
            self._recorder.emit(Note(self._recorder.rank, text))
            return others
        return {**others, LR_FACTOR.name: self._lr.value}
