"""Live controls: values that the user changes while a run goes on, and what each may be.

The rank that declares one and the driver that changes it read the same rules here, so a bad
value is refused before it travels. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtkit.errors import InvalidInputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LR_FACTOR", "LiveControl", "Value", "settings", "shown"]

Value = bool | int | float | str
_TYPES = {bool, int, float, str}
_WORDS = {
    "true": True, "on": True, "yes": True, "1": True,
    "false": False, "off": False, "no": False, "0": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LiveControl:
    """A control's name, and which values it takes.

    Attributes:
        name: an identifier.
        default: its value until it is changed; its type is the control's.
        low: the least number it takes; None: any.
        high: the greatest.
        choices: the values it may have; none: any of its type.
    """

    name: str
    default: Value  # of any type, until it has been looked at
    low: float | None = None
    high: float | None = None
    choices: tuple[Value, ...] = ()

    def __post_init__(self) -> None:
        if not str(self.name).isidentifier():
            self._refuse("a name is letters, digits and '_', as of a variable")
        if type(self.default) not in _TYPES:
            kind = type(self.default).__name__
            self._refuse(f"{kind} is no default: give a number, True or False, or choices=[…]")
        if isinstance(self.default, str) and not self.choices:
            self._refuse("a text needs choices=[…], which says what it may be")
        if self.kind not in ("int", "float") and (self.low, self.high) != (None, None):
            self._refuse("low and high are for numbers")
        if not {type(choice) for choice in self.choices} <= _TYPES:
            self._refuse("choices are numbers, texts, True and False")
        if self.low is not None and self.high is not None and self.low > self.high:
            self._refuse(f"low {self.low:g} is more than high {self.high:g}")
        self.checked(self.default)

    @property
    def kind(self) -> str:
        """choice, bool, int or float."""
        if self.choices:
            return "choice"
        return type(self.default).__name__

    @property
    def takes(self) -> str:
        """What it takes, in words."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.kind == "bool":
            return "on or off"
        noun = "a whole number" if self.kind == "int" else "a number"
        ends = [f"{word} {end:g}" for word, end in (("from", self.low), ("to", self.high))
                if end is not None]  # fmt: skip
        return " ".join([noun, *ends])

    def checked(self, value: Any) -> Value:  # Any: the user's own
        """Return a value, or what a text says, as this control's type.

        Raises:
            InvalidInputError: it does not take that.
        """
        found = self._read(value)
        if found is not None and not self._is_outside(found):
            return found
        msg = f"control {self.name!r}: {value!r} is not what it takes: {self.takes}"
        raise InvalidInputError(msg)

    def _read(self, value: Any) -> Value | None:
        if self.choices:
            fitting = (c for c in self.choices if type(c) is type(value) and c == value)
            named = (c for c in self.choices if str(c) == str(value))
            return next(fitting, next(named, None))
        if self.kind == "bool":
            return value if isinstance(value, bool) else _WORDS.get(str(value).lower())
        if isinstance(value, bool):
            return None
        try:
            number = float(value)
            if self.kind == "float":
                return number if math.isfinite(number) else None
            return int(value) if isinstance(value, str) or number.is_integer() else None
        except (TypeError, ValueError, OverflowError):
            return None

    def _is_outside(self, value: Value) -> bool:
        if self.choices or isinstance(value, str | bool):
            return False
        is_below = self.low is not None and value < self.low
        return is_below or (self.high is not None and value > self.high)

    def _refuse(self, why: str) -> None:
        msg = f"control {self.name!r}: {why}"
        raise InvalidInputError(msg)


LR_FACTOR = LiveControl("lr_factor", 1.0, low=0.0)
"""What every learning rate of a run is multiplied with; there without being declared."""
_LR = LiveControl("lr", 1.0, low=0.0)
"""A way to say `lr_factor`: the first learning rate of the next step, schedules going on from it
in proportion."""


def shown(value: Value) -> str:
    """Return a value as people read it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def settings(controls: Mapping[str, LiveControl], values: Mapping[str, Any]) -> dict[str, Value]:
    """Return new values of controls as these take them.

    Args:
        controls: those of the run, by name.
        values: what each is to be, or a text that says it. `lr` sets `lr_factor`.

    Raises:
        InvalidInputError: there is no such control, or it does not take the value.
    """
    known = {"lr": _LR, **controls}
    for name in values:
        if name not in known:
            hint = f"{did_you_mean(name, known)} it has {', '.join(known)}".lstrip()
            msg = f"the run has no control {name!r}; {hint}"
            raise InvalidInputError(msg)
    if "lr" in values and LR_FACTOR.name in values and "lr" not in controls:
        msg = f"lr and {LR_FACTOR.name} set the same: give one of them"
        raise InvalidInputError(msg)
    return {name: known[name].checked(value) for name, value in values.items()}
